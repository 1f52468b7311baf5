"""What a sweep keeps on its storage, whole: each trial's newest two checkpoints and the best, and what Tune knows.

Ray Train's own bookkeeping is a file that it overwrites in place: cut short by a crash, or naming a checkpoint that is
gone, it makes every later attempt of the trial fail. So a trial goes on from what lies in its folder instead.

Ray Tune writes its state into a folder of its own on this machine and then copies it, file by file and over the one
before, to the sweep's folder. A crash in the middle leaves a file cut short or two of different moments, and Ray then
begins the sweep anew without a word. It also takes the file with the latest time in its name for the newest, which
after a clock was set back is an old one. So we keep copies of our own, each whole, and give Ray the one to go on from.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stemtune._files import damage, seal, whole_file, whole_folder
from stemtune.errors import UserError

NOTE = ".metadata.json"  # the note in a checkpoint: its epoch, and what was reported after each epoch up to it
ENDED = "ended"
RAYS_OWN = "checkpoint_manager_snapshot.json"


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint on storage."""

    folder: Path  # where it lies
    epoch: int  # epochs trained, from 1
    history: list[dict[str, Any]]  # what was reported after each of them, in order

    @property
    def metrics(self) -> dict[str, Any]:
        """What the checkpoint was reported with."""
        return self.history[-1]


def train_folder(sweep_folder: str | Path, trial_id: str) -> Path:
    """Return where a trial's checkpoints lie, on storage that all nodes see."""
    return Path(sweep_folder) / "train" / f"train-{trial_id}"


def annotate(folder: Path, history: Sequence[dict[str, Any]]) -> None:
    """Write into a checkpoint that is about to be stored what was reported after each epoch."""
    (folder / NOTE).write_text(json.dumps({"epoch": int(history[-1]["epoch"]), "history": list(history)}))
    seal(folder, NOTE)


def store(source: Path, run: Path, name: str, metric: str, mode: str) -> Path:
    """Copy a checkpoint to storage, whole or not at all, and drop those that are not kept."""
    with whole_folder(run / name, durable=True) as part:
        shutil.copytree(source, part, dirs_exist_ok=True)
    _prune(run, name, metric, mode)
    return run / name


def stored_checkpoints(run: Path) -> list[StoredCheckpoint]:
    """Return a trial's checkpoints by epoch, corrupt ones included as long as their note can be read."""
    found = []
    for note in run.glob(f"checkpoint_*/{NOTE}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
            read = json.loads(note.read_text())
            entry = StoredCheckpoint(note.parent, int(read["epoch"]), [dict(report) for report in read["history"]])
            if entry.metrics["epoch"] == entry.epoch:
                found.append(entry)
    return sorted(found, key=lambda entry: (entry.epoch, entry.folder.name))


def _folders(run: Path) -> list[Path]:
    """Return the folders of a trial's checkpoints; a file of Ray's has such a name too."""
    return [entry for entry in run.glob("checkpoint_*") if entry.is_dir()]


def newest_intact(run: Path) -> tuple[StoredCheckpoint | None, list[str]]:
    """Return the newest checkpoint that is as it was written, and what is wrong with others."""
    entries = stored_checkpoints(run)
    readable = {entry.folder for entry in entries}
    faults = [f"'{folder / NOTE}' cannot be read" for folder in _folders(run) if folder not in readable]
    for entry in reversed(entries):
        fault = damage(entry.folder)
        if not fault:
            return entry, faults
        faults.append(fault)
    return None, faults


def ranked(entries: Sequence[StoredCheckpoint], metric: str, mode: str) -> list[StoredCheckpoint]:
    """Return those checkpoints that have a figure, best first."""
    having = [entry for entry in entries if not math.isnan(float(entry.metrics.get(metric, math.nan)))]
    return sorted(having, key=lambda entry: float(entry.metrics[metric]) * (1 if mode == "min" else -1))


def _prune(run: Path, newest: str, metric: str, mode: str) -> None:
    """Keep the newest checkpoint, the one before it and the best.

    What claims to be as far or further was corrupt, or else the run would have gone on from there.
    """
    entries = stored_checkpoints(run)
    last = next((entry for entry in entries if entry.folder.name == newest), None)
    if last is None:
        return
    earlier = [entry for entry in entries if entry.epoch < last.epoch]
    stay = {last.folder, *(entry.folder for entry in earlier[-1:])}
    stay |= {entry.folder for entry in ranked([*earlier, last], metric, mode)[:1]}
    for folder in _folders(run):
        gone = folder.with_name(f".{folder.name}.gone")  # so that no half of it is ever taken for a checkpoint
        if folder not in stay:
            with contextlib.suppress(OSError):
                folder.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)


def mark_ended(run: Path, status: str) -> None:
    """Note in a trial's folder that it ended: a crash may come before Tune has written that down."""
    if run.exists():
        with whole_file(run / ENDED) as part:
            part.write_text(status)


def how_ended(run: Path) -> str:
    """Return the status with which the trial ended; an empty string when it has not."""
    with contextlib.suppress(OSError):
        return (run / ENDED).read_text()
    return ""


def remove_partial(run: Path) -> None:
    """Remove what an attempt that was killed left half done (before the next one starts)."""
    (run / RAYS_OWN).unlink(missing_ok=True)
    for rest in run.glob(".checkpoint_*"):
        shutil.rmtree(rest, ignore_errors=True)


SNAPSHOTS = "snapshots"  # folder of them in the sweep's
STATE = "experiment_state-"
OF_TUNE = (f"{STATE}*.json", "search_gen_state-*.json", "searcher-state-*.pkl", "callback-states-*.pkl")
"""Files of one state of Tune; what stands for the star is the session."""

LATEST = "9999"  # the session as which Tune finds what it is to go on from: later than any clock says
_SNAPSHOTS_KEPT = 2
_LOOK_S = 0.5
_SHARE = 5  # at most this part of the time goes into snapshots


class Snapshots:
    """Copies Tune's state into the sweep's `folder` each time that Tune has written it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / SNAPSHOTS
        self._seen: dict[str, tuple[int, int]] | None = None
        self._next_look = 0.0

    def copy_if_new(self, staging: Path, now: bool = False) -> None:
        """Copy the state in Tune's `staging` folder if it is a new one; call it where Tune is not writing."""
        began = time.monotonic()
        if began < self._next_look and not now:
            return
        self._next_look = began + _LOOK_S
        states = {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in staging.glob(f"{STATE}*.json")}
        before, self._seen = self._seen, states
        fresh = [name for name, stamp in states.items() if before is not None and before.get(name) != stamp]
        if before is None or not fresh:
            return
        session = fresh[0].removeprefix(STATE).removesuffix(".json")
        self._take([file for file in staging.iterdir() if session in file.name and not file.name.startswith(".")])
        self._next_look = max(self._next_look, time.monotonic() + _SHARE * (time.monotonic() - began))

    def _take(self, files: list[Path]) -> None:
        numbers = _snapshot_numbers(self._folder)
        # Not waited for until it is on the disk: a busy one takes seconds, and the one before is there as well.
        with whole_folder(self._folder / f"{max(numbers, default=0) + 1:08d}") as part:
            for file in files:
                shutil.copyfile(file, part / file.name)
            seal(part)
        for number in numbers[: 1 - _SNAPSHOTS_KEPT]:
            shutil.rmtree(self._folder / f"{number:08d}", ignore_errors=True)


def _snapshot_numbers(folder: Path) -> list[int]:
    return sorted(int(entry.name) for entry in folder.glob("*") if re.fullmatch(r"\d{8}", entry.name))


def check_resumable(folder: Path) -> None:
    """Refuse the sweep in `folder` if stemtune 0.1 began it: its state names modules that are gone."""
    names = ("searcher-state-*", "search_gen_state-*", f"{STATE}*", "tuner.pkl")
    files = [file for place in (folder, *(folder / SNAPSHOTS).glob("*")) for name in names for file in place.glob(name)]
    if any(b"stemtune.tune.searcher" in file.read_bytes() for file in files):
        raise UserError(
            f"the sweep '{folder.name}' was begun by stemtune 0.1, and this version cannot resume it; finish it with"
            " stemtune 0.1, or start it again under another --name"
        )


def restore_snapshot(folder: Path) -> bool:
    """Put the newest intact snapshot of the sweep in `folder` where Tune finds it; return whether there is one."""
    snapshots = folder / SNAPSHOTS
    for number in reversed(_snapshot_numbers(snapshots)):
        snapshot = snapshots / f"{number:08d}"
        if damage(snapshot):
            continue
        for pattern in OF_TUNE:
            for stale in folder.glob(pattern):
                stale.unlink()
        for state in snapshot.glob(f"{STATE}*.json"):
            session = state.name.removeprefix(STATE).removesuffix(".json")
            for file in snapshot.glob(f"*{session}*"):
                shutil.copyfile(file, folder / file.name.replace(session, LATEST))
        return True
    return False
