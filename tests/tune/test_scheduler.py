"""ASHA stops the weak among those that can be compared, and nobody at its own last epoch."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from stemtune.tune.run import tuner
from stemtune.tune.run.checkpoints import annotate, train_folder
from stemtune.tune.run.scheduler import SuccessiveHalving
from stemtune.tune.run.trial_state import FIGURES, driver_state, drop_driver_state
from stemtune.tune.run.tuner import TimeBudget
from stemtune.tune.space.budget import Budget
from stemtune.tune.space.space import space_from_text

CONTINUE, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP


def made(**budget: Any) -> SuccessiveHalving:
    return SuccessiveHalving(Budget(**{"grace_epochs": 1, "reduction": 2, **budget}))


def trial(asha: SuccessiveHalving, name: str, model: str = "cnn", epochs: int = 9, more: Any = ()) -> Any:
    knobs = {"model.name": model, "train.epochs": epochs, **dict(more)}
    new = SimpleNamespace(trial_id=name, config={"knobs": knobs})
    asha.on_trial_add(None, new)
    return new


def decide(asha: SuccessiveHalving, one: Any, epoch: int, loss: float, **more: float) -> str:
    """Report as a trial does: figures that Tune does not go by are packed into one text."""
    figures = {"val/loss": loss, **more}
    return asha.on_trial_result(None, one, {"epoch": epoch, FIGURES: json.dumps(figures)})


def test_the_weak_are_stopped() -> None:
    asha = made()
    decisions = [decide(asha, trial(asha, f"t{number}"), 1, loss) for number, loss in enumerate((1.0, 5.0, 0.5))]
    assert decisions == [CONTINUE, STOP, CONTINUE]
    assert driver_state("").pruned == {"t1"}
    drop_driver_state("")


def test_one_in_reduction_goes_on() -> None:
    """Of losses that arrive from the worst to the best all go on, the other way round one in three, ties included."""
    rising, falling = made(reduction=3), made(reduction=3)
    ups = [decide(rising, trial(rising, f"t{number}"), 1, float(number)) for number in range(30)]
    downs = [decide(falling, trial(falling, f"t{number}"), 1, -float(number)) for number in range(30)]
    assert downs == [CONTINUE] * 30
    assert ups == [CONTINUE] + [STOP] * 29
    same = made(reduction=3)
    assert {decide(same, trial(same, f"t{number}"), 1, 1.0) for number in range(9)} == {CONTINUE}
    middle = made(reduction=3)
    for number in range(9):
        decide(middle, trial(middle, f"t{number}"), 1, float(number))
    assert decide(middle, trial(middle, "third"), 1, 1.5) == CONTINUE  # of ten the best three go on
    assert decide(middle, trial(middle, "fourth"), 1, 1.9) == STOP
    drop_driver_state("")


def test_no_trial_is_stopped_at_its_own_last_epoch() -> None:
    """A rung falls on the last epoch (1 x 3 x 3 = 9); trials of other lengths are judged by what they have left."""
    asha = made(reduction=3)
    network = [trial(asha, f"t{number}") for number in range(4)]
    for epoch in range(1, 10):
        for number, one in enumerate(network):
            if one is not None and decide(asha, one, epoch, 10.0 - number - epoch) != CONTINUE:
                raise AssertionError(f"each is better than those before, but trial {number} was stopped at {epoch}")
    worst = trial(asha, "worst", epochs=9)
    asha.on_trial_result(None, worst, {"epoch": 9, "val/loss": 99.0})
    assert decide(asha, worst, 9, 99.0) == CONTINUE
    short = trial(asha, "short", epochs=3)
    assert decide(asha, short, 3, 99.0) == CONTINUE
    assert decide(asha, trial(asha, "longer", epochs=4), 3, 99.0) == STOP
    drop_driver_state("")


def test_a_slow_starter_is_not_measured_against_what_shows_its_final_figure_at_once() -> None:
    asha = made()
    assert decide(asha, trial(asha, "r", "rerank"), 1, 0.01) == CONTINUE
    assert decide(asha, trial(asha, "g", "cnn"), 1, 9.0) == CONTINUE
    assert decide(asha, trial(asha, "s", "cnn", more={"head.name": "sixd"}), 1, 20.0) == CONTINUE  # other units
    assert decide(asha, trial(asha, "h", "cnn", more={"head.name": "grid"}), 1, 9.5) == STOP  # the default head
    one_for_all = made(within=())
    assert decide(one_for_all, trial(one_for_all, "r", "rerank"), 1, 0.01) == CONTINUE
    assert decide(one_for_all, trial(one_for_all, "m", "matched"), 1, 90.0) == CONTINUE  # learns nothing
    assert decide(one_for_all, trial(one_for_all, "g", "cnn"), 1, 9.0) == STOP
    drop_driver_state("")


def test_the_metric_of_stops_has_a_direction() -> None:
    asha = made(stop_by="val/within_5deg")
    decisions = [
        decide(asha, trial(asha, f"t{number}"), 1, 1.0, **{"val/within_5deg": share})
        for number, share in enumerate((0.5, 0.1, 0.7))
    ]
    assert decisions == [CONTINUE, STOP, CONTINUE]
    drop_driver_state("")


def test_rungs_in_patterns_and_in_seconds_of_devices() -> None:
    seen = made(grace_patterns=1000)
    small, large = ({"data.patterns_per_epoch": count} for count in (250, 1000))
    assert decide(seen, trial(seen, "a", more=large), 1, 1.0) == CONTINUE
    late = trial(seen, "b", epochs=20, more=small)
    assert [decide(seen, late, epoch, 2.0) for epoch in range(1, 5)] == [CONTINUE] * 3 + [STOP]
    spent = made(grace_device_s=60.0)
    assert decide(spent, trial(spent, "a"), 1, 1.0, **{"time/device_s": 61.0}) == CONTINUE
    slow = trial(spent, "b")
    spending = [decide(spent, slow, epoch, 2.0, **{"time/device_s": 25.0 * epoch}) for epoch in range(1, 4)]
    assert spending == [CONTINUE, CONTINUE, STOP]
    drop_driver_state("")


def test_the_rungs_are_remembered_after_a_restart(tmp_path: Path) -> None:
    """Tune restores the scheduler as it was at the start; what trials reached lies in their folders."""
    asha = pickle.loads(pickle.dumps(made()))
    for name, value in (("a", 1.0), ("b", 2.0)):
        checkpoint = train_folder(tmp_path, name) / "checkpoint_1"
        checkpoint.mkdir(parents=True)
        (checkpoint / "SHA256SUMS").touch()
        annotate(checkpoint, [{"epoch": 1, "val/loss": value}])
        known = SimpleNamespace(trial_id=name, config={"knobs": {"model.name": "cnn"}, "sweep": {"folder": tmp_path}})
        asha.on_trial_add(None, known)
    assert decide(asha, trial(asha, "c"), 1, 3.0) == STOP
    assert decide(asha, trial(asha, "d"), 1, 1.5) == CONTINUE
    # A trial that Tune starts anew tells what it had reported; that is entered, and decides nothing a second time.
    again = trial(asha, "e")
    report = {"epoch": 2, "earlier": [{"epoch": 1, "val/loss": 0.5}], FIGURES: json.dumps({"val/loss": 0.4})}
    assert asha.on_trial_result(None, again, report) == CONTINUE
    assert decide(asha, trial(asha, "f"), 1, 0.9) == CONTINUE
    assert decide(asha, trial(asha, "g"), 2, 0.6) == STOP
    drop_driver_state("")


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
