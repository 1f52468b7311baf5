"""How long a sweep may take and what each trial gets: the blocks `budget` and `resources` of a search space."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stemtune.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Budget:
    """How much is tried."""

    trials: int = 10  # number of trials
    epochs: int | None = None  # epochs of a trial that is not stopped; None leaves it to `train.epochs`
    grace_epochs: int = 1  # epochs that every trial gets before ASHA may stop it
    reduction: float = 3.0  # ASHA lets one in `reduction` go on at each rung
    hours: float | None = None  # wall time of the whole sweep; None is without limit
    concurrent: int | None = None  # most trials at a time; None is as many as the machine holds


@dataclass(frozen=True)
class Resources:
    """What one trial gets: `workers` data-parallel processes of `cpus_per_worker` cores and `gpus_per_worker` GPUs.

    Fractions share: four trials with `gpus_per_worker: 0.25` run on one GPU.

    With `workers_least` a trial goes on from its last checkpoint with fewer workers, but as many at least, when a node
    is lost, and takes more again when there are more; without it a trial waits until it gets all of its workers back.
    The batch of a step stays `train.batch_size` whatever the number of workers: each takes a larger share of it, so
    neither the learning rate nor the number of steps changes, but the memory that a worker needs does.
    """

    workers: int = 1
    workers_least: int | None = None
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    workers_given: bool = False


@dataclass(frozen=True)
class _Limit:
    low: float
    whole: bool = False
    open_low: bool = False


_AT_LEAST_ONE, _ABOVE_ZERO = _Limit(1, whole=True), _Limit(0, open_low=True)
_BUDGET = {
    **dict.fromkeys(("trials", "epochs", "grace_epochs", "concurrent"), _AT_LEAST_ONE),
    "reduction": _Limit(1, open_low=True),
    "hours": _ABOVE_ZERO,
}
_RESOURCES = {
    "workers": _AT_LEAST_ONE,
    "workers_least": _AT_LEAST_ONE,
    "cpus_per_worker": _ABOVE_ZERO,
    "gpus_per_worker": _Limit(0),
}


def read_budget(written: Mapping[Any, Any]) -> Budget:
    return Budget(**_checked(written, "budget", _BUDGET))


def read_resources(written: Mapping[Any, Any]) -> Resources:
    given = _checked(written, "resources", _RESOURCES)
    resources = Resources(**given, workers_given="workers" in given)
    for name in ("cpus_per_worker", "gpus_per_worker"):
        value = getattr(resources, name)
        if value > 1 and value != int(value):
            raise UserError(f"`resources.{name}` is {value:g}, but above 1 it must be whole")
        if resources.workers_least and value and value != int(value):
            raise UserError(
                f"`resources.{name}` is {value:g}, but must be whole with resources.workers_least: Ray cannot count how"
                " many workers that share are left"
            )
    return resources


def _checked(written: Mapping[Any, Any], block: str, limits: Mapping[str, _Limit]) -> dict[str, Any]:
    """Return the numbers of a block that are given, each within its limits."""
    for key in written:
        if key not in limits:
            hint = did_you_mean(str(key), limits) or f"; it has {', '.join(limits)}"
            raise UserError(f"the block {block} has no setting called '{key}'{hint}")
    return {key: _number(value, f"{block}.{key}", limits[key]) for key, value in written.items() if value is not None}


def _number(value: object, place: str, limit: _Limit) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"`{place}` is {value!r}, but must be a {'whole ' if limit.whole else ''}number")
    if limit.whole and value != int(value):
        raise UserError(f"`{place}` is {value!r}, but must be a whole number")
    if value < limit.low or (limit.open_low and value == limit.low):
        bound = "more than" if limit.open_low else "at least"
        raise UserError(f"`{place}` is {value!r}, but must be {bound} {limit.low:g}")
    return int(value) if limit.whole else float(value)
