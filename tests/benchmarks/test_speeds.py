"""`python -m benchmarks`: names are checked before anything is measured, and a measurement prints its figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import maps, peers, prediction
from benchmarks.__main__ import main
from stemtune.config import SimulateConfig
from stemtune.dataset.simulate import simulate_store


def test_an_unknown_measurement_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "simulat"]) == 2
    printed = capsys.readouterr()
    assert "did you mean 'simulate'" in printed.err and "loading" in printed.err and not printed.out


def test_figures_are_printed_under_their_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(maps, "grains", lambda folder: {"rate": 1234.5, "device": "cpu"})
    assert main(["map", "--json", str(tmp_path / "figures.json")]) == 0
    assert capsys.readouterr().out == (
        f"map: {command._SPEEDS['map'][0]}\n  {'rate':40s} 1,234\n  {'device':40s} cpu\n"
    )
    assert json.loads((tmp_path / "figures.json").read_text()) == {"rate": 1234.5, "device": "cpu"}


def test_every_measurement_has_its_function() -> None:
    import importlib

    for _, place in command._SPEEDS.values():
        module, function = place.split(".")
        assert callable(getattr(importlib.import_module(f"benchmarks.{module}"), function))


def test_prediction_is_told_in_times_of_pyxem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_store("linio2", tmp_path / "linio2.h5", 8, SimulateConfig(), seed=0)
    figures = {"patterns_per_second": 60.0, "ratio": 1}
    monkeypatch.setattr(prediction, "prediction_throughput", lambda store, model, **_: dict(figures))
    monkeypatch.setattr(peers, "find", lambda peer, pythons: ("python", "0.21") if pythons else None)
    answers = [peers.Answers(0, "pyxem", torch.zeros(8, 4), rate) for rate in (2.0, 3.0)]
    monkeypatch.setattr(peers, "run_pyxem", lambda *given: iter(answers))
    monkeypatch.setattr(prediction, "shipped_models", list)
    found = prediction.run(tmp_path, {}, ["python"])
    assert found["matched times_pyxem"] == 20.0  # beside the fastest of pyxem's settings
    assert found["pyxem patterns_per_second"] == 3.0
    for pythons in ((), None):
        found = prediction.run(tmp_path, {}, pythons)
        assert "matched times_pyxem" not in found
        assert found["matched patterns_per_second"] == 60.0
