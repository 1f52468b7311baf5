"""Ray Train's `TorchTrainer` with one helper process less per trial.

Ray starts a detached actor per run that frees the run's resources when its controller dies. It asks the dashboard,
which a plain installation does not have: then it frees nothing and says so every second. The sweep itself knows
when it stops a trial, and frees the resources then (`stemtune.tune.watch`).
"""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer


class QuietTrainer(TorchTrainer):  # type: ignore[misc]
    """A `TorchTrainer` without the placement-group cleaner."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if type(callback).__name__ != "PlacementGroupCleanerCallback"]
