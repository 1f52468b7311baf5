"""Two crystals in one pattern: found, weighed, kept in the map; and single crystals left single."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from sample_maps import MICROSCOPE

from stemtune._files import shipped_or
from stemtune.config import Config, SimulateConfig, Span
from stemtune.crystal.phase import linio2
from stemtune.crystal.sampling import random_orientations
from stemtune.crystal.symmetry import disorientation_beam180_deg, disorientation_deg
from stemtune.crystal_map.io import read_map_h5
from stemtune.dataset.store import StoreWriter
from stemtune.diffraction import overlap
from stemtune.diffraction.bloch import simulator_for
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator
from stemtune.indexing.overlap import OverlapFinder
from stemtune.indexing.predictor import Indexer
from stemtune.learning.checkpoint import load_model, save_model
from stemtune.learning.models import build
from stemtune.map_folder.predict import predict

SHAPE, SINGLE = (8, 12), 48
"""A scan whose first half are single crystals, the second half mixtures of 50:50 to 70:30."""


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, overlap.Overlap]:
    place = tmp_path_factory.mktemp("overlaps")
    settings = dataclasses.replace(
        MICROSCOPE, size=128, scale=0.025, overlap=1.0, overlap_weight=Span(0.43, 1.0), background=Span(0, 0.1)
    )
    geometry, n = Geometry(128, 0.025, 200), SHAPE[0] * SHAPE[1]
    generator = torch.Generator().manual_seed(2)
    truth, further = random_orientations(n, generator), overlap.draw_overlap(settings, n, generator)
    further.orientation[:SINGLE] = torch.nan
    further.weight[:SINGLE] = torch.tensor([1.0, 0.0, 0.0])
    simulator = KinematicSimulator(linio2(), geometry, settings)
    patterns = overlap.patterns(simulator, truth, further, generator).numpy().astype(np.uint16)
    position = np.stack(np.divmod(np.arange(n), SHAPE[1]), axis=1)
    with StoreWriter(place / "scan.h5", n, geometry, [linio2()], attrs={"scan_shape": SHAPE, "step_nm": 5.0}) as writer:
        writer.write(0, patterns, orientation=truth.numpy(), phase=np.zeros(n), position=position)
    config = Config.from_flat({"model.name": "matched", "model.grid_step": 3})
    save_model(build(config, linio2(), geometry), place / "model", {}, "")
    return place, truth.numpy(), further


def test_both_crystals_and_their_shares(scan: tuple[Path, np.ndarray, overlap.Overlap]) -> None:
    place, truth, further = scan
    summary = predict(place / "scan.h5", place / "model", place / "map", overlap=True)
    made = read_map_h5(place / "map")
    second, weight = made.layers["orientation2"], made.layers["weight2"]
    two = np.isfinite(weight)
    np.testing.assert_array_equal(two, np.isfinite(second).all(axis=1))
    assert (weight[two] <= 0.5).all() and (weight[two] > 0.05).all()
    assert summary["overlaps"]["pixels"] == two.sum()
    assert two[:SINGLE].mean() < 0.15
    assert two[SINGLE:].mean() > 0.5
    rows = np.flatnonzero(two)[np.flatnonzero(two) >= SINGLE]
    first, other = torch.from_numpy(made.answers[rows, 0]), torch.from_numpy(second[rows])
    one, two_truth = torch.from_numpy(truth[rows]), further.orientation[torch.from_numpy(rows), 0]

    def near(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
        return disorientation_beam180_deg(a, b, linio2().symmetry).numpy() < 5

    both = (near(first, one) & near(other, two_truth)) | (near(first, two_truth) & near(other, one))
    assert both.mean() > 0.7
    share = np.where(near(first, one), weight[rows], 1 - weight[rows])[both]
    assert np.abs(share - further.weight[torch.from_numpy(rows), 1].numpy()[both]).mean() < 0.2
    assert imread(place / "map" / "overlap.png").shape[0] > 300


def test_dynamical_mixtures_are_read_and_single_crystals_left_single() -> None:
    several, single = 150, 100
    settings = dataclasses.replace(
        SimulateConfig(),
        physics="bloch",
        thickness=Span(20, 80),
        precession=Span(0, 0.5),
        convergence=Span(0.3, 1),
        dose=Span(3000, 30_000),
        background=Span(0, 0.2),
        overlap=1.0,
        overlap_weight=Span(0.43, 1.0),
    )
    geometry, n, generator = Geometry(128, 0.025, 200), several + single, torch.Generator().manual_seed(11)
    truth, further = random_orientations(n, generator), overlap.draw_overlap(settings, n, generator)
    further.orientation[several:] = torch.nan
    further.weight[several:] = torch.tensor([1.0, 0.0, 0.0])
    patterns = overlap.patterns(simulator_for(linio2(), geometry, settings), truth, further, generator)
    model = load_model(shipped_or("linio2"))
    found = OverlapFinder(model, Indexer(model, geometry).forward_only).find(patterns)

    def near(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return disorientation_deg(a.double(), b, linio2().symmetry) < 5

    first, second = found.orientation.unbind(1)
    other = further.orientation[:, 0]
    both = (near(first, truth) & near(second, other)) | (near(first, other) & near(second, truth))
    assert both[:several].double().mean() > 0.74  # 0.82 in the mean of 600; a second crystal by the first's spots: 0.65
    assert found.two[:several].double().mean() > 0.7
    assert found.two[several:].double().mean() <= 0.05
    assert (found.weight[:, 0] >= found.weight[:, 1]).all()


def test_without_being_asked_nothing_is_looked_for(scan: tuple[Path, np.ndarray, overlap.Overlap]) -> None:
    place, _, _ = scan
    summary = predict(place / "scan.h5", place / "model", place / "plain")
    assert "overlaps" not in summary
    assert "orientation2" not in read_map_h5(place / "plain").layers
    assert not (place / "plain" / "overlap.png").exists()
