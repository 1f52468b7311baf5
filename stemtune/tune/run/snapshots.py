"""What Ray Tune knows of a sweep, kept whole.

Ray writes its state into a folder of its own on this machine and then copies it, file by file and over the one before,
to the sweep's folder. A crash in the middle leaves a file cut short or two of different moments, and Ray then begins
the sweep anew without a word. It also takes the file with the latest time in its name for the newest, which after a
clock was set back is an old one. So we keep copies of our own, each whole, and give Ray the one to go on from.
"""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

from stemtune._files import damage, seal, whole_folder
from stemtune.errors import UserError

FOLDER = "snapshots"
STATE = "experiment_state-"
OF_TUNE = (f"{STATE}*.json", "search_gen_state-*.json", "searcher-state-*.pkl", "callback-states-*.pkl")
"""Files of one state of Tune; what stands for the star is the session."""

LATEST = "9999"  # the session as which Tune finds what it is to go on from: later than any clock says
_KEPT = 2
_LOOK_S = 0.5
_SHARE = 5  # at most this part of the time goes into snapshots


class Snapshots:
    """Copies Tune's state into the sweep's `folder` each time that Tune has written it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER
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
        numbers = _numbers(self._folder)
        # Not waited for until it is on the disk: a busy one takes seconds, and the one before is there as well.
        with whole_folder(self._folder / f"{max(numbers, default=0) + 1:08d}") as part:
            for file in files:
                shutil.copyfile(file, part / file.name)
            seal(part)
        for number in numbers[: 1 - _KEPT]:
            shutil.rmtree(self._folder / f"{number:08d}", ignore_errors=True)


def _numbers(folder: Path) -> list[int]:
    return sorted(int(entry.name) for entry in folder.glob("*") if re.fullmatch(r"\d{8}", entry.name))


def check_resumable(folder: Path) -> None:
    """Refuse the sweep in `folder` if stemtune 0.1 began it: its state names modules that are gone."""
    names = ("searcher-state-*", "search_gen_state-*", f"{STATE}*", "tuner.pkl")
    files = [file for place in (folder, *(folder / FOLDER).glob("*")) for name in names for file in place.glob(name)]
    if any(b"stemtune.tune.searcher" in file.read_bytes() for file in files):
        raise UserError(
            f"the sweep '{folder.name}' was begun by stemtune 0.1, and this version cannot resume it; finish it with"
            " stemtune 0.1, or start it again under another --name"
        )


def restore_snapshot(folder: Path) -> bool:
    """Put the newest intact snapshot of the sweep in `folder` where Tune finds it; return whether there is one."""
    snapshots = folder / FOLDER
    for number in reversed(_numbers(snapshots)):
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
