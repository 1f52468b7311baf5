"""`stemtune bench`: names are checked before anything is measured, and a measurement prints its figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import benchmarks
from benchmarks import peers, predicting
from stemtune.config import SimulateConfig
from stemtune.dataset.simulate import simulate_store
from stemtune.errors import UserError


def test_an_unknown_measurement_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="did you mean 'simulate'.*loading"):
        benchmarks.run(["simulat"])


def test_figures_are_printed_under_their_measurement(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(
        benchmarks._MEASUREMENTS, "simulate", ("how fast", lambda folder: {"rate": 1234.5, "device": "cpu"})
    )
    benchmarks.run(["simulate"])
    assert capsys.readouterr().out == (
        "simulate: how fast\n  rate                             1,234\n  device                           cpu\n"
    )


def test_prediction_is_told_in_times_of_pyxem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_store("linio2", tmp_path / "few.h5", 8, SimulateConfig(), seed=0)
    monkeypatch.setattr(predicting, "predict_rate", lambda store, model, **_: {"patterns_per_second": 60.0, "ratio": 1})
    monkeypatch.setattr(peers, "find", lambda peer, pythons: ("python", "0.21") if pythons else None)
    answers = [peers.Answered(0, "pyxem", torch.zeros(8, 4), rate) for rate in (2.0, 3.0)]
    monkeypatch.setattr(peers, "run_pyxem", lambda *given: iter(answers))
    monkeypatch.setattr(predicting, "shipped_models", list)
    found = predicting.run(tmp_path / "few.h5", {}, ["python"])
    assert found["matched times_pyxem"] == 20.0  # beside the fastest of pyxem's settings
    assert found["pyxem patterns_per_second"] == 3.0
    for pythons in ((), None):
        found = predicting.run(tmp_path / "few.h5", {}, pythons)
        assert "matched times_pyxem" not in found
        assert found["matched patterns_per_second"] == 60.0
