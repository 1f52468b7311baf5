"""The search itself: Ray Tune runs the trials, Optuna proposes them, ASHA ends the weak ones early.

A sweep lives in one folder, `sweeps/NAME`, on storage that every node sees: Tune's snapshots, Optuna's study, the
journal of what MLflow is to know, and each trial's checkpoints. With it an interrupted sweep goes on.
"""

from __future__ import annotations

import errno
import math
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stemtune._files import writable_folder
from stemtune._progress import say
from stemtune.config import Config
from stemtune.errors import Interrupted, UserError, masked
from stemtune.tracking import NullTracker, Tracker, address, check_server, log_files, resend
from stemtune.tracking.events import NOTE_TAG
from stemtune.tune.run.checkpoints import StoredCheckpoint, check_resumable
from stemtune.tune.run.manifest import (
    absolute,
    check_name_free,
    checked_name,
    extended,
    located,
    named_files,
    new_manifest,
    read_manifest,
    single_driver,
    space_from_manifest,
    sweeps_folder,
    write_manifest,
)
from stemtune.tune.run.promotion import NOBODY, Verdict, judge, note_nothing_learned
from stemtune.tune.run.trial import NO_SPACE
from stemtune.tune.run.trial_state import (
    TrialState,
    driver_state,
    drop_driver_state,
    kept_checkpoints,
    recorded_trials,
)
from stemtune.tune.space.budget import Replicates
from stemtune.tune.space.space import SearchSpace

COMPARISON = "comparison"
"""Folder of the sweep, and of the artifacts of its run in MLflow, for what `stemtune compare` writes."""


@dataclass(frozen=True)
class SweepOutcome:
    """How a sweep ended."""

    name: str
    folder: Path  # where its files lie
    metric: str  # what it optimised
    mode: str  # whether less ("min") or more ("max") of the metric is better
    status: str  # finished, or interrupted
    trials: list[TrialState]  # every trial, in the order of proposal
    champion: TrialState | None  # the trial that was crowned; None when none was
    value: float  # the figure of that trial, else of the best one
    model: Path | None  # its model folder; None when no trial left a model
    unsent: int = 0  # records that wait for the tracking server
    verdict: tuple[str, ...] = ()  # what the test split said, and why nobody was crowned
    replicates: Replicates | None = None  # what `replicates.promote` is to train next


def run_sweep(
    space: SearchSpace,
    name: str | None = None,
    *,
    local: bool = False,
    trials: int | None = None,
    hours: float | None = None,
    tracked: bool = True,
    nodes: int = 1,
    study: str = "",
) -> SweepOutcome:
    """Run a search, for all that `stemtune.sweep` says; `tracked` is whether MLflow keeps records.

    A `UserError` says that a name is taken, a store is missing, CPUs or GPUs are too few, or a node sees other files or
    runs other versions; after Ctrl-C before the first trial began it is a `KeyboardInterrupt`.
    """
    if trials is not None and trials < 1:
        raise UserError(f"--trials is {trials}, but must be at least 1")
    name = checked_name(name or space.name)
    folder = sweeps_folder() / name
    check_name_free(folder)
    space = absolute(space.with_budget(trials=trials, hours=hours), Path.cwd()).enumerated()
    manifest = new_manifest(space, name) | ({"study": study} if study else {})
    store_hash, at_once = _prepare(space, folder, manifest, tracked, local, nodes)
    with single_driver(folder):
        check_name_free(folder)  # another driver may have been quicker
        write_manifest(folder, manifest)
        return _run(space, folder, manifest, at_once, tracked, store_hash, resume=False)


def resume_sweep(
    name: str,
    *,
    local: bool = False,
    trials: int | None = None,
    hours: float | None = None,
    tracked: bool = True,
    nodes: int = 1,
) -> SweepOutcome:
    """Go on with the interrupted sweep `name`, or try its failed trials again; finished ones are not run again.

    More `trials` or `hours` than it began with extend it, a finished one as well. A sweep whose folder was copied or
    moved goes on where it lies now.
    """
    folder = sweeps_folder() / checked_name(name)
    manifest = read_manifest(folder)
    if manifest["status"] != "finished":
        check_resumable(folder)
    with single_driver(folder):
        found = located(folder, manifest)
        space = absolute(space_from_manifest(found), Path(found.get("home", ".")))
        states = recorded_trials(folder, space.metric, space.mode)
        manifest, before = extended(found, states, trials, hours), manifest
        space = absolute(space_from_manifest(manifest), Path(manifest.get("home", "."))).enumerated()
        nothing_left = len(states) >= space.budget.trials or (trials is None and hours is None)
        if manifest["status"] == "finished" and nothing_left and all(state.status != "failed" for state in states):
            _take_over(folder, manifest, before)
            return _send_rest(space, folder, manifest, states, tracked)
        check_resumable(folder)
        store_hash, at_once = _prepare(space, folder, manifest, tracked, local, nodes)
        _take_over(folder, manifest, before)
        return _run(space, folder, manifest, at_once, tracked, store_hash, resume=True)


def _take_over(folder: Path, manifest: dict[str, Any], before: dict[str, Any]) -> None:
    """Write down what is new; of a copy that becomes a sweep of its own in MLflow, every record is sent again."""
    if manifest.get("records_id") != before.get("records_id"):
        resend(folder)
    if manifest != before:
        write_manifest(folder, manifest)


def _send_rest(
    space: SearchSpace, folder: Path, manifest: dict[str, Any], states: list[TrialState], tracked: bool
) -> SweepOutcome:
    """Send what the tracking server missed of a finished sweep, and return how it ended: nothing is left to run."""
    records_id = str(manifest.get("records_id") or manifest["sweep_id"])
    tracker = Tracker(folder, folder.name, records_id, address()) if tracked else NullTracker()
    kept = kept_checkpoints(folder, states, space.metric, space.mode)
    crowned = [state for state in states if state.trial == manifest.get("champion")]
    outcome = _outcome(space, folder, "finished", states, kept, next(iter(crowned), None), tracker.close())
    return replace(outcome, replicates=None)


def _outcome(
    space: SearchSpace,
    folder: Path,
    status: str,
    states: list[TrialState],
    kept: Mapping[str, StoredCheckpoint],
    champion: TrialState | None,
    unsent: int,
    verdict: tuple[str, ...] = (),
) -> SweepOutcome:
    """Return how a sweep ended: with its champion's model, else with that of its best trial."""
    having = [state for state in states if state.trial in kept]
    shown = champion or min(having, key=lambda state: state.best * (1 if space.mode == "min" else -1), default=None)
    value, model = (shown.best, kept[shown.trial].folder / "model") if shown else (math.nan, None)
    named = (folder.name, folder, space.metric, space.mode, status, states)
    return SweepOutcome(*named, champion, value, model, unsent, verdict, space.replicates)


def _prepare(
    space: SearchSpace, folder: Path, manifest: dict[str, Any], tracked: bool, local: bool, nodes: int
) -> tuple[str, int]:
    """Find what would fail later, and join Ray; return the store's hash and how many trials run at a time."""
    if study := str(manifest.get("study", "")):  # of another sweep: see that it can be opened and searches the same
        from stemtune.tune.run.searcher import find_study, join, open_storage, repair_journal

        place = find_study(study, folder, space)
        if place.file is not None:
            checked_name(place.name)
            repair_journal(place.file)
        join(place, open_storage(place), space)
    store_hash = _store_hash(space)
    if tracked:
        check_server(address(), folder.name)  # a wrong MLFLOW_TRACKING_URI or password is found before anything starts
    return store_hash, _join_nodes(space, folder, local, nodes)


def _join_nodes(space: SearchSpace, folder: Path, local: bool, count: int) -> int:
    """Join Ray, see that every node can run trials of this sweep, and return how many run at a time."""
    from stemtune.tune.cluster.connect import concurrency, connect
    from stemtune.tune.cluster.node_check import alive, check, wait_for

    connect(local)
    wait_for(count)
    at_once = concurrency(space, [node["Resources"] for node in alive()])
    fresh = not folder.exists()
    writable_folder(folder)
    try:
        check(folder, named_files(space))
    except UserError:
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return at_once


def _store_hash(space: SearchSpace) -> str:
    """Open the training store as the trials will, and return its content hash."""
    config = Config.from_flat({key: value for key, value in space.fixed.items() if key.startswith("data.")})
    if config.data.source != "store":
        return ""
    if not config.data.store:
        if "data.store" in space.search or "data.source" in space.search:
            return ""
        raise UserError("no training store is named; give --set data.store=FILE, or --set data.source=simulate")
    from stemtune.dataset.store import Store

    with Store.open(config.data.store) as store:
        return str(store.sha256)


def _run(
    space: SearchSpace,
    folder: Path,
    manifest: dict[str, Any],
    at_once: int,
    tracked: bool,
    store_hash: str,
    resume: bool,
) -> SweepOutcome:
    from stemtune.tune.run.callback import SweepCallback
    from stemtune.tune.run.tuner import new_tuner, restored_tuner

    sweep_id = str(manifest["sweep_id"])
    drop_driver_state(sweep_id)
    driver = driver_state(sweep_id)
    driver.folder, driver.space, driver.records_id = folder, space, str(manifest.get("records_id", ""))
    if tracked:
        where = address()
        opened = "" if where.is_server else f"; to open them: mlflow ui --backend-store-uri '{where.shown}'"
        say(f"records: {where.shown}, experiment {folder.name}{opened}")
    try:
        tuner = restored_tuner(folder, sweep_id, space.budget.trials, at_once) if resume else None
        if tuner is None:
            callback = SweepCallback(space, folder, folder.name, sweep_id, tracked, store_hash)
            tuner = new_tuner(space, folder, callback, at_once, str(manifest.get("study", "")))
        interrupted = False
        try:
            tuner.fit()
        except KeyboardInterrupt:
            interrupted = True
        except Exception as problem:
            if not disk_full(problem):
                raise
            raise UserError(
                f"the disk with the sweep's folder {folder} is full; make room there, then stemtune sweep --resume"
                f" {folder.name}"
            ) from None
        current = driver_state(sweep_id).callback
        if current is None:
            raise KeyboardInterrupt
        return _finish(current, folder, manifest, interrupted)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted: stemtune sweep --resume {folder.name} goes on with it") from None
    finally:
        if (current := driver_state(sweep_id).callback) is not None:
            current.progress.close(finished=False)
        drop_driver_state(sweep_id)


def _finish(callback: Any, folder: Path, manifest: dict[str, Any], interrupted: bool) -> SweepOutcome:
    """Tell MLflow how the trials ended, and have the best of a sweep that was not interrupted judged."""
    callback.snapshot()
    space, states = callback.space, sorted(callback.trials.values(), key=lambda state: int(state.number))
    ended = [state for state in states if state.status in ("finished", "stopped", "failed")]
    interrupted = interrupted or (len(ended) < space.budget.trials and not callback.over_time)
    callback.catch_up()
    kept = kept_checkpoints(folder, states, space.metric, space.mode)
    note_nothing_learned(states, kept)
    for state in states:
        if state.status == "running":
            state.status = "interrupted"
            callback.tracker.end(state.trial, "interrupted", "the sweep was interrupted", {}, {})
    verdict = NOBODY
    if not interrupted:
        verdict, interrupted = _judged(callback, folder, states, kept)
    champion = verdict.champion
    status = "interrupted" if interrupted else "finished"
    totals = {
        "time/wall_s": time.time() - float(manifest["started"]),
        "time/device_s": sum(state.device_s for state in states),
        "trials": float(len(ended)),
    }
    outcome = _outcome(space, folder, status, states, kept, champion, 0, verdict.lines)
    if outcome.model is not None:
        totals["best"] = _outcome(space, folder, status, states, kept, None, 0).value
    callback.tracker.done(status, totals, {})
    callback.progress.close(not interrupted)
    unsent = callback.tracker.close(10.0 if interrupted else 60.0)
    # First: what follows needs a server and is no part of the sweep.
    write_manifest(folder, {**manifest, "status": status, "champion": champion.trial if champion else None})
    if callback.tracked and outcome.model and not unsent and not interrupted:
        _keep_comparison(callback.name, folder)
    return replace(outcome, unsent=unsent)


def _judged(
    callback: Any, folder: Path, states: list[TrialState], kept: Mapping[str, StoredCheckpoint]
) -> tuple[Verdict, bool]:
    """Judge a sweep's best trials, keep what came out with their records, and return it; Ctrl-C ends the judging."""
    again = Verdict(None, ("nobody is crowned yet: the best settings run again with several seeds",), {})
    try:
        asked = callback.space.replicates is None
        verdict = judge(callback.space, folder, states, kept, callback.tracked) if asked else again
    except KeyboardInterrupt:
        return NOBODY, True
    for state in states:
        if state.test or state.note:
            callback.tracker.figures(state.trial, state.epoch, state.test, {NOTE_TAG: state.note})
    if verdict.champion is not None:
        tags = {"stemtune.champion_metric": callback.space.metric, **verdict.tags}
        tags["stemtune.champion_value"] = f"{verdict.champion.best:.6g}"
        trial = verdict.champion.trial
        callback.tracker.champion(trial, str((kept[trial].folder / "model").relative_to(folder)), tags)
    return verdict, False


def _keep_comparison(name: str, folder: Path) -> None:
    """Write the comparison into the sweep's folder and keep it with the sweep's run; a sweep does not fail by it."""
    from stemtune.tune.report import compare_trials, write_comparison

    try:
        found = compare_trials([name])
        write_comparison(found, folder / COMPARISON)
        log_files(found.sweep.run_id, folder / COMPARISON, ["*"], COMPARISON)
    except Exception as problem:  # MLflow and matplotlib fail in ways of their own
        reason = (masked(str(problem)) or type(problem).__name__).splitlines()[0][:200]
        print(f"note: the comparison is not kept in MLflow: {reason}", file=sys.stderr)


def disk_full(problem: BaseException | None) -> bool:
    """Whether a full disk is behind an exception."""
    while problem is not None:
        if getattr(problem, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or NO_SPACE in str(problem):
            return True
        problem = problem.__cause__ or problem.__context__
    return False
