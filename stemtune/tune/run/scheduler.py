"""Which trials are stopped early: asynchronous successive halving by a figure that moves from the first epoch on."""

from __future__ import annotations

from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from stemtune.config import Scalar
from stemtune.tune.run.searcher import UNTRAINED
from stemtune.tune.run.trial import EARLIER
from stemtune.tune.run.trial_state import driver_state, history, unpacked
from stemtune.tune.space.budget import Budget, metric_mode, setting_of

CONTINUE, STOP = str(TrialScheduler.CONTINUE), str(TrialScheduler.STOP)

Group = tuple[Scalar, ...]
"""The values of the settings in `Budget.within`: trials are compared with those that share them."""


class SuccessiveHalving(FIFOScheduler):  # type: ignore[misc]
    """Asynchronous successive halving (ASHA; Li et al., MLSys 2020) in its form that stops trials instead of pausing.

    At a rung of `budget` a trial goes on when it is, by `budget.stop_by`, among the best one in `budget.reduction` of
    those of its group that have come as far; it counts itself. Its own last epoch decides nothing, as there is nothing
    left to save, and models without training take no part: they show their final figure at once.

    The searcher learns from `driver_state(sweep_id)` which trials were stopped here.
    """

    def __init__(self, budget: Budget, sweep_id: str = "") -> None:
        super().__init__()
        self._budget, self._sweep = budget, sweep_id
        self._sign = 1.0 if metric_mode(budget.stop_by) == "min" else -1.0
        self.rungs: dict[tuple[Group, int], dict[str, float]] = {}  # figures by trial; less is better

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Put what the trial reached before a restart into the rungs, which Tune does not keep."""
        # The sweep's folder may have been moved since the trial began.
        if folder := driver_state(self._sweep).folder or trial.config.get("sweep", {}).get("folder"):
            for report in history(folder, trial.trial_id):
                self._enter(trial, report)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Say whether the trial goes on."""
        for report in result.get(EARLIER, ()):
            self._enter(trial, report)
        rung = self._enter(trial, unpacked(result))
        if rung is None:
            return CONTINUE
        places = max(1, int(len(rung) / self._budget.reduction))
        if rung[trial.trial_id] <= sorted(rung.values())[places - 1]:
            return CONTINUE
        driver_state(self._sweep).pruned.add(trial.trial_id)
        return STOP

    def _enter(self, trial: Any, report: dict[str, Any]) -> dict[str, float] | None:
        """Enter a report into the highest rung that it reaches; return that rung unless nothing is to be decided."""
        knobs = trial.config.get("knobs", {})
        figure, milestone = report.get(self._budget.stop_by), self._budget.rung_reached(knobs, report)
        if figure is None or milestone is None or setting_of(knobs, "model.name") in UNTRAINED:
            return None
        if report["epoch"] >= int(setting_of(knobs, "train.epochs")):
            return None
        group = tuple(setting_of(knobs, key) for key in self._budget.within)
        rung = self.rungs.setdefault((group, milestone), {})
        if trial.trial_id in rung:  # decided before, or trained again after a restart
            return None
        rung[trial.trial_id] = self._sign * float(figure)
        return rung
