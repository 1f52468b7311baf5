"""The curves of networks from random weights: recorded epoch by epoch, resumed, drawn."""

from __future__ import annotations

import pytest

from benchmarks import curves
from stemtune.config import Config
from stemtune.dataset.beam_store import simulate_beams
from stemtune.errors import UserError

SMALL = {"train.batch_size": 16, "model.width": 8, "model.depth": 1, "model.grid_step": 12, "model.angles": 24}


@pytest.fixture
def few(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "EPOCH", 32)
    small = {**curves.COMMON, **SMALL, "data.validation_patterns": 16, "model.radii": 12, "simulate.centre_error": 0}
    monkeypatch.setattr(curves, "COMMON", small)
    microscope = {"simulate.size": 64, "simulate.scale": 0.05, "simulate.physics": "bloch", "simulate.tilts": 1}
    simulate = Config.from_flat({**microscope, "simulate.beam_error": 0.002, "simulate.precession": 0}).simulate
    monkeypatch.setattr(curves, "run_workers", lambda task, workers, given: task(0, 1, *given))
    return simulate_beams("linio2", tmp_path / "beams.h5", 30, simulate, 1, 1)


def test_curves_are_recorded_and_go_on(few, tmp_path):
    given = {"beams": str(few), "networks": ("circular",), "seen": 64, "out": str(tmp_path / "out")}
    first = curves.run(curves.Options(minutes=1e-6, **given))["circular"]
    assert [point["patterns"] for point in first] == [32]  # the time was over
    both = curves.run(curves.Options(**given))["circular"]
    assert both[:1] == first and both[1]["patterns"] == 64 and both[1]["minutes"] > both[0]["minutes"] > 0
    assert set(first[0]) >= {"median_deg", "median_deg_beam180", "within_5deg", "within_5deg_beam180"}
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    assert curves.run(curves.Options(**given))["circular"] == both  # nothing is left to do


def test_an_unknown_network(few, tmp_path):
    with pytest.raises(UserError, match="no network is called 'vgg' here; there are circular, cnn"):
        curves.run(curves.Options(beams=str(few), networks=("vgg",), out=str(tmp_path / "out")))
