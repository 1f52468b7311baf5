"""Several models, one for each phase: the phase of each pattern, and the files that tell it."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from orix import io as orix_io
from sample_maps import MICROSCOPE, NICKEL

from stemtune.config import Config
from stemtune.crystal.phase import Phase, linio2
from stemtune.crystal.sampling import random_orientations
from stemtune.crystal_map.io import read_map_h5
from stemtune.dataset.store import StoreWriter
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator
from stemtune.errors import UserError
from stemtune.learning.checkpoint import save_model
from stemtune.learning.models import build
from stemtune.map_folder.predict import predict

SHAPE = (8, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scan of nickel on the left, LiNiO2 on the right and nothing between, and a `matched` model of each phase."""
    place = tmp_path_factory.mktemp("phases")
    geometry, phases = Geometry(64, 0.05, 200), [linio2(), Phase.from_cif_text(NICKEL)]
    n = SHAPE[0] * SHAPE[1]
    column = np.arange(n) % SHAPE[1]
    number = np.select([column < 9, column > 11], [1, 0], -1)
    truth, generator = random_orientations(n, 3), torch.Generator().manual_seed(5)
    patterns = np.zeros((n, 64, 64), dtype=np.uint16)
    for index, phase in enumerate(phases):
        own = number == index
        simulator = KinematicSimulator(phase, geometry, MICROSCOPE)
        patterns[own] = simulator.patterns(truth[torch.from_numpy(own)].float(), generator).numpy().astype(np.uint16)
    patterns[number < 0, 31:33, 31:33] = 1000
    columns = {"orientation": np.where((number >= 0)[:, None], truth.numpy(), np.nan), "phase": number}
    position = np.stack(np.divmod(np.arange(n), SHAPE[1]), axis=1)
    with StoreWriter(place / "scan.h5", n, geometry, phases, attrs={"scan_shape": SHAPE, "step_nm": 3.0}) as writer:
        writer.write(0, patterns, position=position, **columns)
    for name, phase in zip(("oxide", "nickel"), phases, strict=True):
        config = Config.from_flat({"model.name": "matched", "model.grid_step": 4})
        save_model(build(config, phase, geometry), place / name, {}, "")
    return place


def test_each_pattern_is_of_its_phase(folder: Path) -> None:
    summary = predict(folder / "scan.h5", [folder / "oxide", folder / "nickel"], folder / "map")
    made = read_map_h5(folder / "map")
    column = np.arange(160) % SHAPE[1]
    number = np.select([column < 9, column > 11], [1, 0], -1)
    assert not made.indexed[number < 0].any()
    seen = made.indexed
    assert seen[number >= 0].mean() > 0.9
    assert (made.phase[seen] == number[seen]).mean() > 0.95
    assert summary["disorientation"]["beam180"]["within_5deg"] > 0.75  # banks of 4 degrees on 64 px
    assert summary["other_phase"] < 0.05
    assert made.layers["phase_explained_intensity"].shape == (160, 2)
    np.testing.assert_array_equal(made.layers["phase_explained_intensity"].argmax(1)[seen], made.phase[seen])
    table = {row["name"]: row for row in summary["phases"]}
    assert table["LiNiO2"]["pixels"] == int((made.phase == 0).sum())
    assert sum(row["share"] for row in summary["phases"]) == pytest.approx(1.0)
    with (folder / "map" / "phases.csv").open(newline="") as file:
        assert [int(row["pixels"]) for row in csv.DictReader(file)] == [row["pixels"] for row in summary["phases"]]
    picture = imread(folder / "map" / "phase.png")[..., :3]
    for colour in ((0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)):
        assert (np.abs(picture - np.array(colour) / 255).max(axis=2) < 0.01).mean() > 0.1
    read = orix_io.load(folder / "map" / "map.h5")
    assert {read.phases[index].point_group.name for index in (0, 1)} == {"-3m", "m-3m"}
    assert "phase boundary" in summary["grains"]["boundaries"]["classes"]
    assert summary["model"] == [str(folder / "oxide"), str(folder / "nickel")]


def test_the_same_phase_twice_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="same phase"):
        predict(folder / "scan.h5", [folder / "oxide", folder / "oxide"], folder / "twice")
    assert not (folder / "twice").exists()
