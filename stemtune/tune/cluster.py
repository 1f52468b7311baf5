"""Joining or starting Ray, quietly, and whether it holds what a trial asks for."""

from __future__ import annotations

import logging
import os
from typing import Any

import ray

from stemtune.errors import UserError
from stemtune.tune.space import SearchSpace
from stemtune.tune.trial import ENVIRONMENT

HEAD = "node:__internal_head__"
"""Ray's own resource of the head node: trial drivers take a crumb of it, and so no CPU from the workers."""

QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "5",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def connect(local: bool = False) -> dict[str, float]:
    """Start Ray on this machine, or join the Ray that runs here, and return its resources.

    Parameters
    ----------
    local
        Start a Ray of our own even where one is running. Without it the Ray of `RAY_ADDRESS`, else the one that
        was started on this machine last (as on a cluster's head node), is joined, and only where there is none is
        one started.

    Raises
    ------
    UserError
        When the Ray to join does not answer.
    """
    for name, value in {**QUIET, **ENVIRONMENT}.items():
        os.environ.setdefault(name, value)
    for name in ("ray", "ray.tune", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not ray.is_initialized():
        options: dict[str, Any] = {
            "logging_level": logging.ERROR,
            "log_to_driver": bool(os.environ.get("STEMTUNE_RAY_LOGS")),
            "runtime_env": {"env_vars": dict(ENVIRONMENT)},
        }
        if local:
            options |= {"address": "local", "include_dashboard": False}
        try:
            ray.init(**options)
        except (ConnectionError, ValueError, RuntimeError) as problem:
            reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
            raise UserError(f"cannot reach Ray ({reason}); start it, or use --local to run on this machine") from None
    for name in ("ray", "ray.tune", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    resources: dict[str, float] = ray.cluster_resources()
    return resources


def concurrency(space: SearchSpace, resources: dict[str, float]) -> int:
    """Return how many trials can run at a time.

    Raises
    ------
    UserError
        When the largest trial asks for more than there is: it would wait for ever.
    """
    fewest, most, _ = space.extremes
    asked = {"CPU": space.resources.cpus_per_worker, "GPU": space.resources.gpus_per_worker}
    fits = [space.budget.trials]
    for kind, each in asked.items():
        there = resources.get(kind, 0.0)
        if each * most > there + 1e-9:
            raise UserError(
                f"a trial of {most} worker(s) asks for {each * most:g} {kind}s, but Ray has {there:g};"
                f" lower resources.{kind.lower()}s_per_worker (fractions share) or the number of workers"
            )
        if each:
            fits.append(int((there + 1e-9) / (each * fewest)))
    limit = space.budget.concurrent
    return max(1, min([*fits, limit] if limit else fits))
