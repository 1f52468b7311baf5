"""ASHA stops the weak among the learners, and is not misled by a model that learns nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import TrialScheduler

from stemtune.tune.schedule import LearnersASHA


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
