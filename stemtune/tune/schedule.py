"""Who lives: ASHA among the trials that learn."""

from __future__ import annotations

from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

UNTRAINED = ("matched",)
"""Models that learn nothing: their one report says how good they are, not how good they will become."""


class LearnersASHA(ASHAScheduler):  # type: ignore[misc]
    """ASHA (Li et al., MLSys 2020) that leaves models without training out of its rungs.

    Such a model shows its final figure where a network shows its first epoch. In the lowest rung it would have every
    network stopped that is not at once as good.
    """

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Give a learner its place in the rungs."""
        if _learns(trial):
            super().on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide whether a trial goes on."""
        if not _learns(trial):
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Keep what a learner reached."""
        if _learns(trial):
            super().on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Forget a learner."""
        if _learns(trial):
            super().on_trial_remove(tune_controller, trial)


def _learns(trial: Any) -> bool:
    return trial.config.get("knobs", {}).get("model.name") not in UNTRAINED
