"""`python -m benchmarks sweep`: what is counted is what happened; the figures themselves are for the bench."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import sweep_rates
from benchmarks.__main__ import main


def test_epochs_until_a_figure_is_reached() -> None:
    assert sweep_rates.reached([5.0, 3.0, 4.0], 3.0, "min") == 2
    assert sweep_rates.reached([5.0, 3.0, 4.0], 2.9, "min") is None
    assert sweep_rates.reached([0.1, 0.3], 0.2, "max") == 2


def test_methods_are_timed_and_left_as_they_were() -> None:
    class Thing:
        def work(self, value: int) -> int:
            return value + 1

    before = Thing.work
    with sweep_rates.clocked((Thing, "work")) as spent:
        assert [Thing().work(number) for number in range(3)] == [1, 2, 3]
    assert Thing.work is before
    assert spent["Thing.work"][1] == 3


def test_two_measurements_at_once_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--scale", "3", "--search", "smoke.yaml"]) == 2
    assert "--scale and --search are two measurements" in capsys.readouterr().err
    assert main(["sweep", "--search", "nowhere.yaml"]) == 2
    assert "there is no search space 'nowhere.yaml'" in capsys.readouterr().err


def test_a_sweep_without_training_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    command = [sys.executable, "-m", "stemtune.cli", "bench", "sweep", "--scale", "12", "--json", "figures.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["trials"] == 12
    assert figures["events lost"] == 0
    assert 6 <= figures["MLflow calls per trial"] <= 13
    assert figures["  calls of StudySearch.suggest"] >= 12
    assert not list(tmp_path.glob("sweeps"))
