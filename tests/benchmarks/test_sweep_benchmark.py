"""`python -m benchmarks sweep`: what is counted is what happened; the figures themselves are for the bench."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import sweep
from benchmarks.__main__ import main


def trial(began: float, ended: float, status: str, **seconds: float) -> Any:
    """A run of MLflow, as far as it is looked at."""
    metrics = {f"time/{name}_s": value for name, value in seconds.items()}
    info = SimpleNamespace(start_time=int(1000 * began), end_time=int(1000 * ended))
    return SimpleNamespace(info=info, data=SimpleNamespace(metrics=metrics, tags={"stemtune.status": status}))


def test_the_makespan_of_known_trials() -> None:
    trials = [
        trial(10, 40, "finished", train=20.0, start=4.0, first_report=9.0),
        trial(45, 70, "stopped", train=20.0, start=2.0, first_report=6.0),
        trial(12, 44, "finished", train=30.0, start=3.0, first_report=8.0),
        trial(72, 80, "failed", train=10.0),
    ]
    found = sweep.makespan(sweep.Sweep(80.0, 12.0, 300.0, trials), epochs=3, slots=2)
    assert found["makespan / training on the slots"] == 2.0
    assert found["  from the first trial's training on"] == pytest.approx((80 - 14) / 40)
    assert found["start to training, s: first trials"] == 3.5
    assert found["start to training, s: later trials"] == 2.0
    assert (found["stopped by ASHA"], found["failed"], found["trials"]) == (1, 1, 4)
    assert found["driver's processor s per trial"] == 3.0
    assert math.isnan(sweep.metric(trials[3], "time/start_s"))


@pytest.mark.slow
def test_a_small_sweep_is_measured_from_outside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", "--trials", "2", "--seconds", "1", "--slots", "2"]
    assert main([*command, "--keep", str(tmp_path), "--json", str(tmp_path / "figures.json")]) == 0
    assert "makespan, s" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["trials"] == 2 and figures["failed"] == 0
    assert 0 < figures["training alone, median s"] < figures["makespan, s"]
    assert figures["driver's memory at its peak, MiB"] > 50
