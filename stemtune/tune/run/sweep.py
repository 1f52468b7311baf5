"""The search itself: Ray Tune runs the trials, Optuna proposes them, ASHA ends the weak ones early.

A sweep lives in one folder, `sweeps/NAME`, on storage that every node sees: Tune's snapshots, Optuna's study, the
journal of what MLflow is to know, and each trial's checkpoints. With it an interrupted sweep goes on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stemtune._files import whole_file, writable_folder
from stemtune._version import __version__
from stemtune.config import Config
from stemtune.errors import UserError, did_you_mean, masked
from stemtune.tune.run.trial import NO_SPACE
from stemtune.tune.run.trial_state import DRIVER, SHEET, TrialState, best_checkpoint, better
from stemtune.tune.space.paths import absolute, named_files
from stemtune.tune.space.space import SearchSpace, space_from_text

COMPARISON = "comparison"
"""Folder of the sweep, and of the artifacts of its run in MLflow, for what `stemtune compare` writes."""


@dataclass(frozen=True)
class SweepOutcome:
    """How a sweep ended.

    Attributes
    ----------
    name, folder
        The sweep and where its files lie.
    status
        finished, or interrupted.
    trials
        Every trial, in the order of proposal.
    champion, value, model
        The best trial, its figure and its model folder; None when no trial left a model.
    unsent
        Records that wait for the tracking server.
    """

    name: str
    folder: Path
    status: str
    trials: list[TrialState]
    champion: TrialState | None
    value: float
    model: Path | None
    unsent: int = 0


def sweeps_folder() -> Path:
    """Return where sweeps live: `STEMTUNE_SWEEPS`, or `sweeps` in the working folder."""
    return Path(os.environ.get("STEMTUNE_SWEEPS") or "sweeps").expanduser().absolute()


def run_sweep(
    space: SearchSpace,
    name: str | None = None,
    *,
    local: bool = False,
    trials: int | None = None,
    resume: bool = False,
    tracked: bool = True,
    nodes: int = 1,
    study: str = "",
) -> SweepOutcome:
    """Run a search, or go on with an interrupted one.

    Parameters
    ----------
    space
        What to search; with `resume` the space the sweep began with counts.
    name
        Name of the sweep and of its MLflow experiment; the space's own name by default.
    local
        Run on a Ray of our own on this machine, even where a cluster could be joined.
    trials
        Number of trials, instead of the space's.
    resume
        Continue the sweep of this name. Finished trials are not run again.
    tracked
        Whether MLflow keeps records.
    nodes
        Nodes of the cluster to wait for before trials begin.
    study
        A study to share with other sweeps: another sweep's name, or the address of a database.

    Raises
    ------
    UserError
        For a name that is taken, or unknown with `resume`, a missing store, too few CPUs or GPUs, or a node that
        sees other files or runs other versions.
    KeyboardInterrupt
        After Ctrl-C, when everything that a resume needs is on disk.
    """
    name = checked_name(name or space.name)
    folder = sweeps_folder() / name
    with contextlib.ExitStack() as held:
        if resume:
            sheet = read_sheet(folder)
            held.enter_context(_alone(folder))
            space = absolute(space_from_sheet(sheet), Path(sheet.get("home", ".")))
        else:
            _name_free(folder)
            space = absolute(space if trials is None else _with_trials(space, trials), Path.cwd())
            sheet = new_sheet(space, name) | ({"study": study} if study else {})
        _study_ready(str(sheet.get("study", "")), folder, space)
        store_hash = _store_hash(space)
        if tracked:
            from stemtune.tracking import address, greet

            greet(address(), name)  # a wrong MLFLOW_TRACKING_URI or password is told before anything starts
        at_once = _nodes_ready(space, folder, local, nodes)
        if not resume:
            held.enter_context(_alone(folder))
            _name_free(folder)
            _write_sheet(folder, sheet)
        return _run(space, name, folder, sheet, at_once, tracked, store_hash, resume)


def _name_free(folder: Path) -> None:
    if (folder / SHEET).exists():
        raise UserError(
            f"there is a sweep called '{folder.name}' already; --resume {folder.name} goes on with it, --name NAME"
            " starts another"
        )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Be the only driver of the sweep in `folder`: two would each take the other's trials for lost."""
    with (folder / DRIVER).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip() or "elsewhere"
            raise UserError(f"the sweep '{folder.name}' is running ({who}); wait for its end, or stop it") from None
        except OSError:
            pass  # a file system that knows no locks
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _study_ready(study: str, folder: Path, space: SearchSpace) -> None:
    """See that a shared study can be opened and searches what this sweep does."""
    if not study:
        return
    from stemtune.tune.run.study import find_study, join, open_storage

    place = find_study(study, folder, space)
    if place.file is not None:
        from stemtune.tune.run.searcher import mend_study

        checked_name(place.name)
        mend_study(place.file)
    join(place, open_storage(place), space)


def _nodes_ready(space: SearchSpace, folder: Path, local: bool, count: int) -> int:
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


def checked_name(name: str) -> str:
    """Return `name` if it can name a folder, an experiment and a model."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UserError(f"the name '{name}' of a sweep may hold letters, digits, '.', '_' and '-' only")
    return name


def _with_trials(space: SearchSpace, trials: int) -> SearchSpace:
    from dataclasses import replace

    return replace(space, budget=replace(space.budget, trials=trials))


def _store_hash(space: SearchSpace) -> str:
    """Open the training store as the trials will, and return its content hash."""
    config = Config.from_flat({key: value for key, value in space.fixed.items() if key.startswith("data.")})
    if config.data.source != "store":
        return ""
    if not config.data.store:
        if any(key == "data.store" for key in space.search) or "data.source" in space.search:
            return ""
        raise UserError("no training store is named; give --set data.store=FILE, or --set data.source=simulate")
    from stemtune.dataset.store import Store

    with Store.open(config.data.store) as store:
        return str(store.sha256)


def new_sheet(space: SearchSpace, name: str) -> dict[str, Any]:
    """Return what a sweep writes down about itself when it starts."""
    return {
        "name": name,
        "sweep_id": uuid.uuid4().hex,
        "version": __version__,
        "started": time.time(),
        "status": "running",
        "space": space.text,
        "space_name": space.name,
        "fixed": dict(space.fixed),
        "home": str(Path.cwd()),
        "trials": space.budget.trials,
    }


def space_from_sheet(sheet: dict[str, Any]) -> SearchSpace:
    """Return the space that a sweep began with, `--set` and `--trials` included."""
    space = space_from_text(sheet["space"], sheet["space_name"])
    changed = {key: value for key, value in sheet["fixed"].items() if space.fixed.get(key) != value}
    return _with_trials(space.with_settings(changed), int(sheet["trials"]))


def read_sheet(folder: Path) -> dict[str, Any]:
    """Read what the sweep in `folder` wrote down when it started."""
    try:
        sheet: dict[str, Any] = json.loads((folder / SHEET).read_text())
    except FileNotFoundError:
        known = sorted(found.parent.name for found in folder.parent.glob(f"*/{SHEET}"))
        hint = did_you_mean(folder.name, known) or (f"; there are {', '.join(known)}" if known else "")
        raise UserError(f"there is no sweep called '{folder.name}' in {folder.parent}{hint}") from None
    except (OSError, ValueError) as problem:
        raise UserError(f"'{folder / SHEET}' is damaged: {problem}") from None
    return sheet


def space_of(folder: Path) -> SearchSpace:
    """Return the space of the sweep in `folder`."""
    return space_from_sheet(read_sheet(folder))


def unfinished() -> list[str]:
    """Return the names of the sweeps here that did not finish, the newest first."""
    found = []
    for file in sweeps_folder().glob(f"*/{SHEET}"):
        sheet = read_sheet(file.parent)
        if sheet.get("status") != "finished":
            found.append((float(sheet["started"]), str(sheet["name"])))
    return [name for _, name in sorted(found, reverse=True)]


def _write_sheet(folder: Path, sheet: dict[str, Any]) -> None:
    with whole_file(folder / SHEET) as part:
        part.write_text(json.dumps(sheet, indent=1) + "\n")


def _run(
    space: SearchSpace,
    name: str,
    folder: Path,
    sheet: dict[str, Any],
    at_once: int,
    tracked: bool,
    store_hash: str,
    resume: bool,
) -> SweepOutcome:
    from stemtune.tune.run.callback import Watch
    from stemtune.tune.run.tuner import made_tuner, restored_tuner

    Watch.current = None
    tuner = restored_tuner(folder, space.budget.trials, at_once) if resume else None
    if tuner is None:
        watch = Watch(space, folder, name, sheet["sweep_id"], tracked, store_hash)
        tuner = made_tuner(space, folder, watch, at_once, str(sheet.get("study", "")))
    interrupted = False
    try:
        tuner.fit()
    except KeyboardInterrupt:
        interrupted = True
    except Exception as problem:
        if not disk_full(problem):
            raise
        raise UserError(
            f"the disk with the sweep's folder {folder} is full; make room there, then stemtune sweep --resume {name}"
        ) from None
    seen: Watch | None = Watch.current
    if seen is None:
        raise KeyboardInterrupt
    return _finish(seen, folder, sheet, interrupted)


def _finish(watch: Any, folder: Path, sheet: dict[str, Any], interrupted: bool) -> SweepOutcome:
    """Crown the champion, tell MLflow, and say how to go on after an interrupt."""
    watch.snapshot()
    space, states = watch.space, sorted(watch.trials.values(), key=lambda state: int(state.number))
    ended = [state for state in states if state.status in ("finished", "stopped", "failed")]
    interrupted = interrupted or (len(ended) < space.budget.trials and not watch.over_time)
    watch.catch_up()
    champion, value, model = crowned(folder, states, space.metric, space.mode)
    for state in states:
        if state.status == "running":
            state.status = "interrupted"
            watch.tracker.end(state.trial, "interrupted", "the sweep was interrupted", {}, {})
    told = sheet["status"] == "finished"  # resumed only to send what the tracking server missed
    if champion and model and not told:
        tags = {"stemtune.champion_metric": space.metric, "stemtune.champion_value": f"{value:.6g}"}
        watch.tracker.champion(champion.trial, str(model), tags)
    status = "interrupted" if interrupted else "finished"
    totals = {
        "time/wall_s": time.time() - float(sheet["started"]),
        "time/device_s": sum(state.device_s for state in states),
        "trials": float(len(ended)),
    }
    watch.tracker.done(status, {} if told else totals | ({} if champion is None else {"best": value}), {})
    watch.progress.close()
    unsent = watch.tracker.close(10.0 if interrupted else 60.0)
    _write_sheet(folder, {**sheet, "status": status})  # first: what follows needs a server and is no part of the sweep
    if watch.tracked and champion and not unsent and not interrupted and not told:
        _keep_comparison(watch.name, folder)
    return SweepOutcome(watch.name, folder, status, states, champion, value, model, unsent)


def _keep_comparison(name: str, folder: Path) -> None:
    """Write the comparison into the sweep's folder and keep it with the sweep's run; a sweep does not fail by it."""
    from stemtune.tracking.artifacts import put_files
    from stemtune.tune.report import compared, write_comparison

    try:
        found = compared(name)
        write_comparison(found, folder / COMPARISON)
        put_files(found.sweep.run_id, folder / COMPARISON, ["*"], COMPARISON)
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


def crowned(
    folder: Path, states: list[TrialState], metric: str, mode: str
) -> tuple[TrialState | None, float, Path | None]:
    """Return the best trial by its best kept checkpoint, with that figure and model folder."""
    best: tuple[TrialState | None, float, Path | None] = (None, float("nan"), None)
    for state in states:
        found = best_checkpoint(folder, state.trial, metric, mode)
        if found and (best[0] is None or better(found[0], best[1], mode)):
            best = (state, *found)
    return best
