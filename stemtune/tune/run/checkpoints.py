"""A trial's checkpoints on the sweep's storage: written whole, corruption noticed, the newest two and the best kept.

Ray Train's own bookkeeping is a file that it overwrites in place: cut short by a crash, or naming a checkpoint that is
gone, it makes every later attempt of the trial fail. So a trial goes on from what lies in its folder instead.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stemtune._files import damage, seal, whole_file, whole_folder

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
    sign = 1.0 if mode == "min" else -1.0
    having = [entry for entry in entries if not math.isnan(float(entry.metrics.get(metric, math.nan)))]
    return sorted(having, key=lambda entry: sign * float(entry.metrics[metric]))


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
        if folder not in stay:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a folder such that no half of it is ever taken for a checkpoint."""
    gone = folder.with_name(f".{folder.name}.gone")
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
    try:
        return (run / ENDED).read_text()
    except OSError:
        return ""


def remove_partial(run: Path) -> None:
    """Remove what an attempt that was killed left half done (before the next one starts)."""
    (run / RAYS_OWN).unlink(missing_ok=True)
    for rest in run.glob(".checkpoint_*"):
        shutil.rmtree(rest, ignore_errors=True)
