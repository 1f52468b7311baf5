"""Who lives: ASHA among the trials that learn, and all of them only as long as the sweep may last."""

from __future__ import annotations

import time
from typing import Any

from ray.tune import Stopper
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from stemtune.tune.run.trial_state import driver_state, history

UNTRAINED = ("matched",)
"""Models that learn nothing: their one report says how good they are, not how good they will become."""


class LearnersASHA(ASHAScheduler):  # type: ignore[misc]
    """ASHA (Li et al., MLSys 2020) that leaves models without training out of its rungs.

    Such a model shows its final figure where a network shows its first epoch. In the lowest rung it would have every
    network stopped that is not at once as good.
    """

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        if _learns(trial):
            super().on_trial_add(tune_controller, trial)
            self._recall(trial)

    def _recall(self, trial: Any) -> None:
        """Put what a trial reached before a restart into the rungs, which Tune does not keep."""
        folder = trial.config.get("sweep", {}).get("folder")
        if not folder:
            return
        for report in history(folder, trial.trial_id):
            self._trial_info[trial.trial_id].on_result(trial, report["epoch"], self._metric_op * report[self._metric])

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if not _learns(trial):
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if _learns(trial):
            super().on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        if _learns(trial):
            super().on_trial_remove(tune_controller, trial)


def _learns(trial: Any) -> bool:
    return trial.config.get("knobs", {}).get("model.name") not in UNTRAINED


class TimeBudget(Stopper):  # type: ignore[misc]
    """Ends a sweep after so many hours of running, however often it is interrupted and whatever the clock is set to.

    Trials end with the epoch that they are in, and the searcher proposes no others.
    """

    def __init__(self, hours: float, sweep_id: str = "") -> None:
        self._left_s, self._sweep = hours * 3600.0, sweep_id
        self._last: float | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether a trial that has just reported is to end."""
        return driver_state(self._sweep).time_over

    def stop_all(self) -> bool:
        """Look at the time; Tune asks before each step. To end all at once would leave records open."""
        now = time.monotonic()
        self._left_s -= now - self._last if self._last is not None else 0.0
        self._last = now
        driver_state(self._sweep).time_over = self._left_s <= 0
        return False

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _last=None)
