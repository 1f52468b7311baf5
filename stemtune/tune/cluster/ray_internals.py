"""What stemtune needs of Ray and Ray's public interface does not give: every private name of Ray in use, and why.

No other module imports or patches one (`tests/test_architecture.py`), so that a new release of Ray is looked at here.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Iterator
from typing import Any

import ray
from ray._private import ray_constants


def loopback_only() -> dict[str, str]:
    """Have a Ray that is started from now on listen on the loopback address alone; return what its processes must know.

    `ray.init` takes no such address: it replaces 127.0.0.1 by the machine's own. Ray's rule for machines that form no
    clusters is the constant, which its other processes read from the variable.
    """
    ray_constants.ENABLE_RAY_CLUSTER = False
    return {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}


def clusters_again() -> None:
    """Take `loopback_only` back once the Ray that it was for is gone."""
    ray_constants.ENABLE_RAY_CLUSTER = True


def running_here() -> str | None:
    """Return the address of the Ray that `ray start` started last on this machine, or None.

    `ray.init("auto")` finds it as well, but then joins it at once, for minutes if it does not answer.
    """
    from ray._private.services import canonicalize_bootstrap_address

    where = canonicalize_bootstrap_address(None)
    return str(where) if where else None


def accepts_token(where: str) -> bool:
    """Whether the Ray at `where` takes the token that we show, if any: `ray.init` would try for minutes, and log."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError

    try:
        GcsClient(address=where)
    except AuthenticationError:
        return False
    return True


def show_token() -> bool:
    """Show the token of the token file from now on, unless `RAY_AUTH_MODE` says otherwise; return whether it is shown.

    Ray does so by itself only for a cluster that it found by itself.
    """
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    return bool(maybe_enable_token_auth_if_token_available(warn_if_disabled=False))


def trainer_class() -> Any:
    """Return `TorchTrainer` with its controller in the calling process, which can be ended, and nothing that we lack.

    Ray puts the controller into a process of its own, which goes on after Tune has stopped the trial and keeps its
    workers. Here its reports reach Tune in the same process (`stemtune.tune.run.workers.ToTune`), where stopping ends
    both. Without datasets of Ray's there is no manager of them; and the detached actor that frees the resources of a
    run whose controller died asks the dashboard, which a plain installation does not have: then it frees nothing and
    says so every second. The sweep itself frees them (`stemtune.tune.run.callback`).
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.controller import TrainController

    class QuietTrainer(TorchTrainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            unused = ("PlacementGroupCleanerCallback", "DatasetsCallback")
            return [made for made in super()._create_default_callbacks() if type(made).__name__ not in unused]

        def _initialize_and_run_controller(self, **settings: Any) -> Any:
            controller = TrainController(**settings)
            with _named_groups(str(self.run_config.name)):
                asyncio.run(controller.run())
            return controller.get_result()

    return QuietTrainer


@contextlib.contextmanager
def _named_groups(run: str) -> Iterator[None]:
    """Have a run's placement groups carry its name: who is left when its process dies finds them by that.

    Ray frees them at the end of the job only.
    """
    from ray.train.v2._internal.execution.worker_group import worker_group

    made = worker_group.placement_group
    worker_group.placement_group = lambda **settings: made(**settings, name=f"{run}-{uuid.uuid4().hex[:8]}")
    try:
        yield
    finally:
        worker_group.placement_group = made


def free_groups(run: str) -> None:
    """Give back what the workers of `run` hold, whose controller is dead; see `_named_groups`."""
    from ray.util import placement_group_table, remove_placement_group
    from ray.util.placement_group import PlacementGroup

    for group in placement_group_table().values():
        if str(group["name"]).startswith(f"{run}-") and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group["placement_group_id"])))
