"""ASHA stops the weak among the learners, and is not misled by a model that learns nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from stemtune.tune.run import tuner
from stemtune.tune.run.checkpoints import annotate, train_folder
from stemtune.tune.run.trial_state import driver_state, drop_driver_state
from stemtune.tune.run.tuner import LearnersASHA, TimeBudget
from stemtune.tune.space.space import space_from_text


def made() -> LearnersASHA:
    asha = LearnersASHA(time_attr="epoch", max_t=5, grace_period=1, reduction_factor=2)
    asha.set_search_properties("val/loss", "min")
    return asha


def trial(asha: LearnersASHA, name: str, model: str) -> Any:
    new = SimpleNamespace(trial_id=name, config={"knobs": {"model.name": model}}, stopping_criterion={})
    asha.on_trial_add(None, new)
    return new


def test_the_weak_are_stopped() -> None:
    asha = made()
    decisions = [
        asha.on_trial_result(None, trial(asha, f"t{number}", "cnn"), {"epoch": 1, "val/loss": value})
        for number, value in enumerate((1.0, 5.0, 0.5))
    ]
    assert decisions == [TrialScheduler.CONTINUE, TrialScheduler.STOP, TrialScheduler.CONTINUE]


def test_a_matched_filter_stops_no_network() -> None:
    asha = made()
    matched = trial(asha, "m", "matched")
    assert asha.on_trial_result(None, matched, {"epoch": 1, "val/loss": 0.01}) == TrialScheduler.CONTINUE
    asha.on_trial_complete(None, matched, {"epoch": 1, "val/loss": 0.01})
    network = trial(asha, "n", "polar")
    assert asha.on_trial_result(None, network, {"epoch": 1, "val/loss": 3.0}) == TrialScheduler.CONTINUE
    asha.on_trial_remove(None, matched)


def test_the_last_epoch_is_not_a_stop() -> None:
    asha = made()
    network = trial(asha, "n", "cnn")
    decisions = [asha.on_trial_result(None, network, {"epoch": epoch, "val/loss": 1.0}) for epoch in range(1, 5)]
    assert decisions == [TrialScheduler.CONTINUE] * 4


def test_the_rungs_are_remembered_after_a_restart(tmp_path: Path) -> None:
    """Tune restores the scheduler as it was at the start; what trials reached lies in their folders."""
    asha = made()
    for name, value in (("a", 1.0), ("b", 2.0)):
        checkpoint = train_folder(tmp_path, name) / "checkpoint_1"
        checkpoint.mkdir(parents=True)
        (checkpoint / "SHA256SUMS").touch()
        annotate(checkpoint, [{"epoch": 1, "val/loss": value}])
        known = SimpleNamespace(trial_id=name, config={"knobs": {"model.name": "cnn"}, "sweep": {"folder": tmp_path}})
        known.stopping_criterion = {}
        asha.on_trial_add(None, known)
    weak = trial(asha, "c", "cnn")
    assert asha.on_trial_result(None, weak, {"epoch": 1, "val/loss": 3.0}) == TrialScheduler.STOP


def test_the_time_of_a_sweep_is_not_that_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(tuner.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(tuner.time, "time", lambda: now[0] * 1e6)
    space = space_from_text("budget: {hours: 1}\nsearch: {optim.lr: [0.1, 0.2]}", "test")
    driver_state("").space = space
    budget = TimeBudget()
    result = {"epoch": 1}
    budget.stop_all()
    now[0] += 3000.0
    budget.stop_all()
    assert not budget("trial", result)
    budget.__setstate__(budget.__dict__.copy())  # interrupted for as long as you like
    now[0] += 1e6
    budget.stop_all()
    assert not budget("trial", result)
    now[0] += 700.0
    assert not budget.stop_all()  # which would end trials without telling anyone
    assert budget("trial", result) and driver_state("").time_over
    driver_state("").space = space.with_budget(hours=1.5)  # a resume grants more
    budget.stop_all()
    assert not budget("trial", result)
    drop_driver_state("")
