"""What the blocks `budget`, `resources` and `replicates` of a search space may hold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stemtune.config import METRICS, Scalar, knob
from stemtune.errors import UserError, did_you_mean

STOP_BY = tuple(metric for metric in METRICS if metric.startswith("val/") or metric == "train/loss")
"""Metrics that ASHA may go by."""


def metric_mode(metric: str) -> str:
    """Return whether less ("min") or more ("max") of a metric is better."""
    return "max" if "within" in metric or "samples" in metric else "min"


def setting_of(settings: Mapping[str, Scalar], key: str) -> Scalar:
    """Return a trial's value of a setting, its default where the trial has none of its own."""
    default: Scalar = settings.get(key, knob(key).default)
    return default


@dataclass(frozen=True)
class Budget:
    """How much is tried, and when ASHA stops a trial.

    ASHA decides at rungs: the first after the grace that every trial gets, each next one `reduction` times later. The
    grace is so many epochs or, where one of the others is given, patterns seen or seconds of training times devices.
    """

    trials: int = 10  # number of trials
    epochs: int | None = None  # epochs of a trial that is not stopped; None leaves it to `train.epochs`
    patterns: int | None = None  # instead of epochs: patterns that a trial sees, fresh ones
    stop_by: str = "val/loss"  # metric that ASHA goes by: one that moves from the first epoch on
    within: tuple[str, ...] = ("model.name", "head.name")  # ASHA compares trials with equal values of these
    grace_epochs: int = 1
    grace_patterns: int | None = None
    grace_device_s: float | None = None
    reduction: float = 3.0  # ASHA lets one in `reduction` go on at each rung
    hours: float | None = None  # wall time of the whole sweep; None is without limit
    concurrent: int | None = None  # most trials at a time; None is as many as the machine holds

    @property
    def startup(self) -> int:
        """Trials that have ended before the sampler goes by what they taught: a quarter, three to ten."""
        return max(3, min(10, self.trials // 4))

    def rung_reached(self, settings: Mapping[str, Scalar], report: Mapping[str, Any]) -> int | None:
        """Return the number of the highest rung, from 0, that a trial of these settings has reached with a report."""
        if self.grace_device_s:
            share = report.get("time/device_s", 0.0) / self.grace_device_s
        elif self.grace_patterns:
            share = report["epoch"] * int(setting_of(settings, "data.patterns_per_epoch")) / self.grace_patterns
        else:
            share = report["epoch"] / self.grace_epochs
        return math.floor(math.log(share, self.reduction) + 1e-9) if share >= 1 else None

    def rungs(self, epochs: int) -> list[int]:
        """Return the epochs after which ASHA decides on a trial of so many, where these do not depend on the trial."""
        if self.grace_device_s or self.grace_patterns:
            return []
        found, at = [], float(self.grace_epochs)
        while math.ceil(at - 1e-9) < epochs:
            found.append(math.ceil(at - 1e-9))
            at *= self.reduction
        return found


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
class Replicates:
    """How many seeds the best settings are trained with once more, after the search."""

    seeds: int = 3
    of_best: int = 3  # settings


@dataclass(frozen=True)
class _Limit:
    low: float
    whole: bool = False
    open_low: bool = False


_AT_LEAST_ONE, _ABOVE_ZERO = _Limit(1, whole=True), _Limit(0, open_low=True)
_BUDGET = {
    **dict.fromkeys(("trials", "epochs", "patterns", "grace_epochs", "grace_patterns", "concurrent"), _AT_LEAST_ONE),
    "reduction": _Limit(1, open_low=True),
    **dict.fromkeys(("grace_device_s", "hours"), _ABOVE_ZERO),
}
_EXCLUSIVE = (
    ("epochs", "patterns"),
    *itertools.combinations(("grace_epochs", "grace_patterns", "grace_device_s"), 2),
)
_RESOURCES = {
    "workers": _AT_LEAST_ONE,
    "workers_least": _AT_LEAST_ONE,
    "cpus_per_worker": _ABOVE_ZERO,
    "gpus_per_worker": _Limit(0),
}


def read_replicates(written: Mapping[Any, Any]) -> Replicates:
    return Replicates(**_numbers(written, "replicates", dict.fromkeys(("seeds", "of_best"), _AT_LEAST_ONE)))


def read_budget(written: Mapping[Any, Any]) -> Budget:
    """Return the block `budget`; a metric that says nothing about learning is refused as `stop_by`."""
    numbers = {key: value for key, value in written.items() if key not in ("stop_by", "within")}
    given: dict[str, Any] = _numbers(numbers, "budget", _BUDGET)
    if (stop_by := written.get("stop_by")) is not None:
        if stop_by not in STOP_BY:
            hint = did_you_mean(str(stop_by), STOP_BY) or f"; it may be {', '.join(STOP_BY)}"
            raise UserError(f"`budget.stop_by` is {stop_by!r}, which does not say how well a trial learns{hint}")
        given["stop_by"] = stop_by
    if (within := written.get("within")) is not None:
        given["within"] = tuple(knob(str(key)).key for key in (within if isinstance(within, list) else [within]))
    for one, other in _EXCLUSIVE:
        if one in given and other in given:
            raise UserError(f"`budget.{one}` is given, and so is `budget.{other}`; keep one of the two")
    return Budget(**given)


def read_resources(written: Mapping[Any, Any]) -> Resources:
    given = _numbers(written, "resources", _RESOURCES)
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


def _numbers(written: Mapping[Any, Any], block: str, limits: Mapping[str, _Limit]) -> dict[str, Any]:
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
