"""How long a sweep may take and what each trial gets: the blocks `budget` and `resources` of a search space."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
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


def read_budget(written: Mapping[Any, Any]) -> Budget:
    """Check the block `budget`."""
    _known(written, "budget", [item.name for item in fields(Budget)])
    limits = {
        "trials": _number(written, "budget.trials", 1, whole=True),
        "epochs": _number(written, "budget.epochs", 1, whole=True),
        "grace_epochs": _number(written, "budget.grace_epochs", 1, whole=True),
        "reduction": _number(written, "budget.reduction", 1, open_low=True),
        "hours": _number(written, "budget.hours", 0, open_low=True),
        "concurrent": _number(written, "budget.concurrent", 1, whole=True),
    }
    return Budget(**{key: value for key, value in limits.items() if value is not None})  # type: ignore[arg-type]


def read_resources(written: Mapping[Any, Any]) -> Resources:
    """Check the block `resources`."""
    names = ["workers", "workers_least", "cpus_per_worker", "gpus_per_worker"]
    _known(written, "resources", names)
    limits = {
        "workers": _number(written, "resources.workers", 1, whole=True),
        "workers_least": _number(written, "resources.workers_least", 1, whole=True),
        "cpus_per_worker": _number(written, "resources.cpus_per_worker", 0, open_low=True),
        "gpus_per_worker": _number(written, "resources.gpus_per_worker", 0),
    }
    given = {key: value for key, value in limits.items() if value is not None}
    resources = Resources(**given, workers_given="workers" in given)  # type: ignore[arg-type]
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


def _known(written: Mapping[Any, Any], block: str, names: list[str]) -> None:
    for key in written:
        if key not in names:
            hint = did_you_mean(str(key), names) or f"; it has {', '.join(names)}"
            raise UserError(f"the block {block} has no setting called '{key}'{hint}")


def _number(
    written: Mapping[Any, Any], place: str, low: float, *, whole: bool = False, open_low: bool = False
) -> float | int | None:
    value = written.get(place.split(".")[1])
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"`{place}` is {value!r}, but must be a {'whole ' if whole else ''}number")
    if whole and value != int(value):
        raise UserError(f"`{place}` is {value!r}, but must be a whole number")
    if value < low or (open_low and value == low):
        raise UserError(f"`{place}` is {value!r}, but must be {'more than' if open_low else 'at least'} {low:g}")
    return int(value) if whole else float(value)
