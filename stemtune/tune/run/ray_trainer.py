"""Ray Train's `TorchTrainer` with fewer processes per trial.

Ray starts six for a trial of one worker: Tune's driver, a queue for the reports, the controller, a manager of datasets,
an actor that synchronises the workers, and the worker, and each imports Ray for two to five seconds of a core. A sweep
pays that for every trial. Here the controller runs in the driver's own process and hands its reports to Tune there; a
worker that is alone waits for nobody, so that actor is kept for the next trial of the same driver; and there is no
manager of datasets, for stemtune's are read by the workers themselves. What is left to start is a trial's workers.

Nor is there the detached actor that frees the resources of a run whose controller died. It asks the dashboard, which
a plain installation does not have: then it frees nothing and says so every second. The sweep itself knows when it
stops a trial, and frees the resources then (`stemtune.tune.run.callback`).
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import ray
from ray import tune
from ray.train import UserCallback
from ray.train.torch import TorchTrainer

from stemtune.tune.run.trial_state import packed

_UNUSED = ("PlacementGroupCleanerCallback", "DatasetsCallback")


class ToTune(UserCallback):  # type: ignore[misc]
    """Passes every report of a run to Tune, from the process in which both live; `metrics` are what Tune goes by."""

    def __init__(self, metrics: Sequence[str]) -> None:
        self._metrics = metrics

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Report what rank 0 reported; return when Tune has taken it, or end the thread if Tune stops the trial."""
        path = {} if checkpoint is None else {"checkpoint_path": checkpoint.path}
        tune.report(packed({**metrics[0], **path}, self._metrics))


class QuietTrainer(TorchTrainer):  # type: ignore[misc]
    """A `TorchTrainer` whose controller runs in the calling process, with the callbacks that stemtune needs."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if type(callback).__name__ not in _UNUSED]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        from ray.train.v2._internal.execution.controller import TrainController

        controller = TrainController(**settings)
        with contextlib.ExitStack() as changed:
            changed.enter_context(_named_groups(str(self.run_config.name)))
            if self.scaling_config.num_workers == 1:
                changed.enter_context(_reused_sync_actor())
            asyncio.run(controller.run())
        return controller.get_result()


@contextlib.contextmanager
def _named_groups(run: str) -> Iterator[None]:
    """Have a run's placement groups carry its name: who is left when its driver dies finds them by that."""
    from ray.train.v2._internal.execution.worker_group import worker_group

    made = worker_group.placement_group
    worker_group.placement_group = lambda **settings: made(**settings, name=f"{run}-{uuid.uuid4().hex[:8]}")
    try:
        yield
    finally:
        worker_group.placement_group = made


def free_groups(run: str) -> None:
    """Give back what the workers of `run` hold, whose driver is dead: Ray itself would at the end of the job."""
    from ray import PlacementGroupID
    from ray.util import placement_group_table, remove_placement_group
    from ray.util.placement_group import PlacementGroup

    for group in placement_group_table().values():
        if str(group["name"]).startswith(f"{run}-") and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group["placement_group_id"])))


class _SyncActor:
    """Stands for Ray's `SynchronizationActor` and gives out the one that this process has, if it still answers."""

    current: ClassVar[Any] = None
    original: ClassVar[Any] = None

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options

    @classmethod
    def options(cls, **options: Any) -> _SyncActor:
        return cls(options)

    def remote(self, **settings: Any) -> Any:
        try:
            ray.get(_SyncActor.current.get_counter.remote(), timeout=10)
        except Exception:  # none yet, or it died
            _SyncActor.current = _SyncActor.original.options(**self._options).remote(**settings)
        return _SyncActor.current


@contextlib.contextmanager
def _reused_sync_actor() -> Iterator[None]:
    """Have a run's worker group take the actor that this process has, and leave it alive."""
    from ray.train.v2._internal.execution.worker_group import state, worker_group

    made, ended = worker_group.SynchronizationActor, state._shutdown_sync_actor
    _SyncActor.original = made
    worker_group.SynchronizationActor = _SyncActor
    state._shutdown_sync_actor = lambda actor: None
    try:
        yield
    finally:
        worker_group.SynchronizationActor, state._shutdown_sync_actor = made, ended
