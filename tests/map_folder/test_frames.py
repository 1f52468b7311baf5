"""A scan turned and mirrored against its detector gives the same crystal back, through ingest and predict."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import sample_maps
import torch
from rsciio import hspy

from stemtune.analysis.evaluation.evaluate import evaluate
from stemtune.config import Config, Span
from stemtune.crystal.phase import linio2
from stemtune.crystal.sampling import random_orientations
from stemtune.crystal.symmetry import disorientation_deg
from stemtune.crystal_map.frame_rotations import to_pattern_frame, to_scan_frame
from stemtune.crystal_map.io import read_map_h5
from stemtune.dataset.augment import turn_orientation, turn_patterns
from stemtune.dataset.simulate import simulate_polycrystal
from stemtune.dataset.store import Store
from stemtune.learning.models import build
from stemtune.learning.models.matched import Matched
from stemtune.map_folder import predict as predict_module
from stemtune.map_folder.predict import predict
from stemtune.plot.patterns import overlay_positions
from stemtune.scan.corrections import flipped

MICROSCOPE = dataclasses.replace(
    sample_maps.MICROSCOPE,
    dose=Span(100_000, 100_000),
    background=Span(0, 0.05),
    dead_pixels=0.0,
    centre_error=0.2,
    ellipticity=0.0,
    scale_error=0.0,
)


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scan") / "scan.h5"
    simulate_polycrystal("", path, (9, 8), 3, MICROSCOPE, seed=1)
    return path


@pytest.fixture(scope="module")
def model(scan: Path) -> Matched:
    settings = {"model.name": "matched", "model.grid_step": 4, "model.angles": 90, "model.radii": 24}
    with Store.open(scan) as store:
        made = build(Config.from_flat(settings), linio2(), store.geometry)
    assert isinstance(made, Matched)
    return made


def written(path: Path, data: np.ndarray) -> Path:
    """Write the scan's patterns as a hyperspy file that knows its scale and voltage."""
    axes = [
        {"_type": "UniformDataAxis", "name": name, "units": units, "navigate": number < 2, "size": data.shape[number],
         "is_binned": False, "scale": scale, "offset": 0.0}
        for number, (name, units, scale) in enumerate(
            (("y", "nm", 10.0), ("x", "nm", 10.0), ("v", "1/Å", 0.05), ("u", "1/Å", 0.05))
        )
    ]  # fmt: skip
    metadata = {
        "General": {"title": "scan"},
        "Signal": {"signal_type": ""},
        "Acquisition_instrument": {"TEM": {"beam_energy": 200.0}},
    }
    signal = {
        "data": data, "axes": axes, "metadata": metadata, "original_metadata": {}, "learning_results": {}, "models": {},
        "package_info": {"package": "hyperspy", "package_version": "2.0"},
        "attributes": {"_lazy": False, "ragged": False}, "tmp_parameters": {},
    }  # fmt: skip
    hspy.file_writer(str(path), signal)
    return path


def test_frames_are_the_exact_rule_and_undo_each_other() -> None:
    """A pattern turned by +a against the scan is g * Rz(-a), the rule of `dataset.augment`, tested by itself."""
    g = random_orientations(20, 0)
    turned = turn_orientation(g, torch.full((20,), 33.0), torch.zeros(20, dtype=torch.bool))
    np.testing.assert_allclose(to_pattern_frame(g.numpy(), 33.0), turned.numpy(), atol=1e-7)
    np.testing.assert_allclose(to_scan_frame(turned.numpy(), 33.0), g.numpy(), atol=1e-7)
    assert to_scan_frame(g.numpy(), 0.0).tobytes() == g.numpy().tobytes()
    assert np.isnan(to_scan_frame(np.full((2, 4), np.nan), 10.0)).all()


@pytest.mark.parametrize(("flip", "angle"), [("x", 25.0), ("transpose", -70.0)])
def test_turned_and_mirrored_scan_gives_the_same_crystal(
    flip: str, angle: float, scan: Path, model: Matched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_module, "load_model", lambda folder: model)
    with Store.open(scan) as store:
        patterns, truth, crystal = np.array(store.patterns), store.orientation, store.phase >= 0
    count = len(patterns)
    turned = turn_patterns(
        torch.from_numpy(patterns.astype(np.float32)), torch.full((count,), angle), torch.zeros(count)
    )
    measured = flipped(turned.numpy(), flip).reshape(9, 8, 64, 64)
    file = written(tmp_path / "measured.hspy", measured)
    predict(file, "matched", tmp_path / "map", flip=flip, scan_rotation=angle)
    # On so coarse patterns the best answer is often a pseudo-symmetric variant; the crystal is among the five best.
    assert right_among_answers(tmp_path / "map", scan) > 0.9
    found = read_map_h5(tmp_path / "map")
    off = disorientation_deg(
        torch.from_numpy(to_pattern_frame(found.answers[crystal], angle)),
        torch.from_numpy(truth[crystal])[:, None],
        linio2().symmetry,
    )
    nearest = off.nan_to_num(nan=180.0).min(dim=1).values
    assert float(nearest.median()) > 5, "left in the pattern's frame, the map would be wrong"
    assert overlay_positions(tmp_path / "map", [(4, 4)]).is_file()
    if flip == "x":
        predict(file, "matched", tmp_path / "other", scan_rotation=angle)
        assert right_among_answers(tmp_path / "other", scan) < 0.5


def right_among_answers(folder: Path, scan: Path) -> float:
    return float(evaluate(folder, scan)["within_5deg_of_best"]["5"])


def test_patterns_do_not_tell_the_hand(scan: Path, model: Matched) -> None:
    """Mirrored patterns match as well as the true ones: the note of --calibrate is no excuse."""
    with Store.open(scan) as store:
        patterns = torch.from_numpy(store.take(np.flatnonzero(store.phase >= 0)).astype(np.float32))
    plain, mirrored = (model.proposals(each, 1).score for each in (patterns, patterns.flip(-1)))
    assert float(plain.mean()) > 0.3
    assert abs(float(plain.mean() - mirrored.mean())) < 0.01
