"""Ray Tune set up for a sweep, or taken up again where an interrupted one stopped, and who lives in it."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import Stopper
from ray.tune.schedulers import FIFOScheduler

from stemtune.tune.cluster.connect import HEAD, QUIET
from stemtune.tune.run.callback import SweepCallback
from stemtune.tune.run.checkpoints import SNAPSHOTS, restore_snapshot
from stemtune.tune.run.manifest import DRIVER, MANIFEST
from stemtune.tune.run.scheduler import SuccessiveHalving
from stemtune.tune.run.searcher import STUDY, Limiter, Proposals, StudySearch, repair_journal
from stemtune.tune.run.trial import FAILURE, passed_on, run_trial, worker_resources
from stemtune.tune.run.trial_state import driver_state
from stemtune.tune.space.space import SearchSpace

_LARGE = 500  # trials, above which a snapshot takes a noticeable part of 5 s


class TimeBudget(Stopper):  # type: ignore[misc]
    """Ends a sweep after so many hours of running, however often it is interrupted and whatever the clock is set to.

    Trials end with the epoch that they are in, and the searcher proposes no others. The hours are those of the space
    in force: a resume may grant more.
    """

    def __init__(self, sweep_id: str = "") -> None:
        self._spent_s, self._sweep = 0.0, sweep_id
        self._last: float | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether a trial that has just reported is to end."""
        return driver_state(self._sweep).time_over

    def stop_all(self) -> bool:
        """Look at the time; Tune asks before each step. To end all at once would leave records open."""
        now, driver = time.monotonic(), driver_state(self._sweep)
        self._spent_s += now - self._last if self._last is not None else 0.0
        self._last = now
        hours = driver.space.budget.hours if driver.space else None
        driver.time_over = hours is not None and self._spent_s >= hours * 3600.0
        return False

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _last=None)


def driver() -> Any:
    """Return the function that Tune starts per trial, with what it needs."""
    return tune.with_resources(run_trial, _resources)


def _resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
    """Return what the process of a trial takes: its one worker's share, or next to nothing where workers are others."""
    alone = config.get("knobs", {}).get("train.workers") == 1
    return tune.PlacementGroupFactory([worker_resources(config["sweep"]) if alone else {HEAD: 0.001}])


def trial_name(trial: Any) -> str:
    return f"trial-{trial.trial_id}"


def _set_snapshot_interval(trials: int) -> None:
    """Have Tune write its snapshot every 5 s, of a large sweep no more often than costs a twentieth of the time.

    A snapshot holds all trials; what happened since the last is in the study and in MLflow's journal.
    """
    name, usual = "TUNE_GLOBAL_CHECKPOINT_S", QUIET["TUNE_GLOBAL_CHECKPOINT_S"]
    if os.environ.get(name) in (usual, "auto"):
        os.environ[name] = "auto" if trials > _LARGE else usual


def new_tuner(
    space: SearchSpace,
    folder: Path,
    callback: SweepCallback,
    at_once: int,
    study: str = "",
) -> Any:
    """Return Tune set up for a new sweep of at most `at_once` trials at a time.

    `study` is the study to share with other sweeps, if any.
    """
    _set_snapshot_interval(space.budget.trials)
    driver_state(callback.sweep_id).at_once = at_once
    settings = {
        "folder": str(folder),
        "metric": space.metric,
        "objectives": [metric for metric, _ in space.objectives],
        "mode": space.mode,
        "workers_least": space.resources.workers_least,
        "cpus_per_worker": space.resources.cpus_per_worker,
        "gpus_per_worker": space.resources.gpus_per_worker,
        "environment": passed_on(),
    }
    seed = space.fixed.get("train.seed", 0)
    return tune.Tuner(
        driver(),
        tune_config=tune.TuneConfig(
            metric=space.metric,
            mode=space.mode,
            search_alg=Proposals(
                Limiter(StudySearch(space, folder, settings, int(seed), callback.sweep_id, study), at_once)
            ),
            scheduler=FIFOScheduler() if space.design == "grid" else SuccessiveHalving(space.budget, callback.sweep_id),
            num_samples=space.budget.trials,
            reuse_actors=True,  # the next trial starts in a process that has imported everything
            trial_name_creator=trial_name,
            trial_dirname_creator=trial_name,
        ),
        run_config=tune.RunConfig(
            stop=TimeBudget(callback.sweep_id),
            name=folder.name,
            storage_path=str(folder.parent),
            callbacks=[callback],
            failure_config=tune.FailureConfig(max_failures=1),
            verbose=0,
        ),
    )


def restored_tuner(folder: Path, sweep_id: str, trials: int, at_once: int) -> Any | None:
    """Return Tune as the interrupted sweep of `trials` trials in `folder` left it; None when it left nothing.

    It runs `at_once` trials at a time from now on, for the cluster may be another one.
    """
    _set_snapshot_interval(trials)
    driver_state(sweep_id).at_once = at_once
    handed_over = restore_snapshot(folder)
    if not tune.Tuner.can_restore(str(folder)) or ((folder / SNAPSHOTS).exists() and not handed_over):
        discard(folder)
        return None
    for note in (folder / "train").glob(f"*/{FAILURE}"):  # so that failed trials are tried again
        note.unlink(missing_ok=True)
    repair_journal(folder / STUDY)
    driver_state(sweep_id).restored = False
    return tune.Tuner.restore(str(folder), trainable=driver(), resume_unfinished=True, resume_errored=True)


def discard(folder: Path) -> None:
    """Empty the folder of a sweep that has no snapshot: it died before the first, or all are corrupt.

    The study stays: another sweep may share it.
    """
    for entry in folder.iterdir():
        if entry.name in (MANIFEST, DRIVER) or entry.name.startswith(("tracking.", STUDY)):
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
