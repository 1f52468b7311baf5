"""What travels from a trial to Tune: little that Tune counts, and every figure for the records."""

from __future__ import annotations

import json
import re

import pytest

from stemtune.config import METRICS
from stemtune.tune.run import trial_state
from stemtune.tune.run.trial_state import SweepProgress, TrialState, packed, unpacked


def test_tune_gets_few_numbers_and_the_records_all() -> None:
    report = {**{metric: number + 0.5 for number, metric in enumerate(METRICS)}, "time/device_s": 3.0, "epoch": 2}
    report |= {"placement_group": "ab12", "earlier": [{"epoch": 1}]}
    sent = packed(report, ["val/ece"])
    numbers = {key for key, value in sent.items() if isinstance(value, int | float)}
    assert numbers == {"val/ece", "epoch"}
    assert (sent["placement_group"], sent["earlier"]) == ("ab12", [{"epoch": 1}])
    again = unpacked({**sent, "training_iteration": 2, "done": False})
    assert {key: again[key] for key in report} == report
    assert again["done"] is False
    assert json.loads(json.dumps(sent)) == sent
    assert unpacked({"val/loss": 1.0}) == {"val/loss": 1.0}  # a report that was not packed


def test_a_log_gets_a_line_per_epoch_with_figure_best_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(trial_state.time, "monotonic", lambda: now[0])
    progress = SweepProgress(3, "val/disorientation_median_deg", "min", ())
    states = [TrialState(name, number, {"model.name": "cnn", "train.epochs": 4}) for number, name in enumerate("ab")]
    for state in states:
        progress.started(state)
    for number, figure in ((0, 20.0), (1, 30.0), (0, 25.0)):
        now[0] += 10.0
        report = {"epoch": states[number].epoch + 1, "val/disorientation_median_deg": figure, "val/loss": figure / 10}
        states[number].take(report, "val/disorientation_median_deg", "min")
        progress.reported(states[number])
    lines = [line for line in capsys.readouterr().err.splitlines() if "epoch" in line]
    figures = "trial 0 cnn epoch 2: 25.00°  best so far 20.00° (trial 0)  6 epochs/min  1 min 30 s left at most"
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d  " + re.escape(figures), lines[2]
    )  # 2 and 3 epochs of those that run, 4 of the one to come: 9 epochs of 10 s
    assert states[0].best_values == {"val/disorientation_median_deg": 20.0, "val/loss": 2.0}
    states[1].status = "stopped"
    progress.ended(states[1])
    now[0] += 10.0
    states[0].take({"epoch": 3, "val/disorientation_median_deg": 10.0}, "val/disorientation_median_deg", "min")
    progress.reported(states[0])
    last = capsys.readouterr().err.splitlines()[-1]
    assert "best so far 10.00° (trial 0)" in last and last.endswith("20 s left at most")  # 1 more, and 1 as the stopped
    progress.close()
