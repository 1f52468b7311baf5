"""Watching a folder: each scan that lands in it, and each line of one that grows, is answered as it comes.

One thread looks and answers, a few frames of every scan in turn, so that no scan waits for a long one to end; another
writes the maps of the scans that are whole. Nothing is told by the system when a file changes, since network drives
do not: the folder is looked at several times a second.

Beside the maps lies `.live`: `scans.json` says which files have become maps, and a folder for each unfinished scan
holds what has been answered of it. So a watcher that was stopped or killed goes on where it was.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from stemtune._files import existing, whole_file, writable_folder
from stemtune._progress import Progress
from stemtune.errors import Interrupted, UserError
from stemtune.learning.checkpoint import load_model
from stemtune.live.growing_file import ENDINGS, QUIET_S, NotGrowing, growing
from stemtune.live.session import How, LiveScan
from stemtune.live.status_page import Board, Shown, served
from stemtune.map_folder.predict import predict

FINISHED_ONLY = (".hspy", ".npz", ".raw", ".blo", ".dm3", ".dm4", ".tvips", ".mrc")
"""Endings of scan files that are read when they have been left alone for a moment."""

_DRAW_S = 0.5  # between two pictures of a scan
_RATE_S = 5.0  # that rates are taken over


class _Stamp(NamedTuple):
    """What tells a file from one that has been changed or replaced."""

    size: int = 0
    modified_ns: int = 0
    node: int = 0


@dataclass
class _Entry:
    """A file in the folder, and where it stands: `state` is growing, stalled, writing, done or failed."""

    path: Path
    name: str
    scan: LiveScan | None
    state: str = "growing"
    note: str = ""
    stamp: _Stamp = field(default_factory=_Stamp)
    still_since: float = field(default_factory=time.monotonic)
    drawn: float = 0.0
    recent: deque[tuple[float, int]] = field(default_factory=deque)
    progress: Progress | None = None
    writing: Future[dict[str, Any]] | None = None
    partial: bool = False

    def changed(self) -> bool:
        """Whether the file has become another since it was done with; one that failed may grow, it stays as bad."""
        now = _stamp(self.path)
        if self.state == "failed":
            return now.node != self.stamp.node or now.size < self.stamp.size
        return self.state == "done" and now != self.stamp


class Watch:
    """Answers the scans in `folder` and writes a map folder of each into `out`.

    Parameters
    ----------
    folder, out
        Where scans land, and where maps go: `out`/NAME for a file NAME.npy.
    how
        How to answer.
    stall_s
        How long a file must not have grown to be called stalled.
    """

    def __init__(self, folder: Path, out: Path, how: How, stall_s: float = 10.0) -> None:
        self.folder, self.out, self.how, self.stall_s = folder, out, how, stall_s
        self.room = writable_folder(out / ".live")
        self.entries: dict[str, _Entry] = {}
        self.board = Board(f"stemtune watch {folder}")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="maps")
        try:
            self._known: dict[str, dict[str, Any]] = json.loads((self.room / "scans.json").read_text())
        except (OSError, ValueError):
            self._known = {}

    def turn(self) -> bool:
        """Look at every file once, answer a few frames of each; return whether there was anything to do."""
        self._discover()
        busy = [self._turn(entry) for entry in self.entries.values()]
        self.board.show([self._shown(entry) for entry in self.entries.values()])
        return any(busy)

    @property
    def idle(self) -> bool:
        """Whether nothing more happens unless a file changes."""
        return all(entry.state in ("done", "failed", "stalled") for entry in self.entries.values())

    def finish_stalled(self) -> None:
        """Write maps of the lines that are there of stalled scans, and wait for all maps that are being written."""
        for entry in self.entries.values():
            if entry.state == "stalled":
                self._finish(entry, partial=True)
        for entry in self.entries.values():
            if entry.writing is not None:
                self._written(entry, wait=True)
        self.board.show([self._shown(entry) for entry in self.entries.values()])

    def close(self) -> None:
        for entry in self.entries.values():
            if entry.progress:
                entry.progress.close(finished=False)
        self._writer.shutdown(wait=True)

    def _discover(self) -> None:
        for path in sorted(self.folder.iterdir()):
            known = path.suffix.lower() in (*ENDINGS, *FINISHED_ONLY)
            if path.name.startswith(".") or not known or not path.is_file():
                continue
            entry = self.entries.get(path.name)
            if entry is not None and not entry.changed():
                continue
            told = self._known.get(path.name)
            if told is not None and _Stamp(*told["stamp"]) == _stamp(path) and told["key"] == self._key():
                done = _Entry(path, told["name"], None, told["state"], told["note"], _stamp(path))
                self.entries[path.name] = done
                continue
            self.entries[path.name] = self._begun(path)

    def _begun(self, path: Path) -> _Entry:
        name = self._name(path)
        file = growing(path, self.how.shape, self.how.calibration.get("dataset"), self.stall_s)
        scan = None if file is None else LiveScan(file, self.room / name, self.how)
        return _Entry(path, name, scan)

    def _name(self, path: Path) -> str:
        """Return the map folder's name: the file's without its ending, or with it where two scans would share one."""
        if path.name in self._known:
            return str(self._known[path.name]["name"])
        taken = {told["name"] for told in self._known.values()} | {entry.name for entry in self.entries.values()}
        name = path.name if path.stem in taken else path.stem
        self._record(path.name, name=name, stamp=_Stamp(), key=None, state="growing", note="")
        return name

    def _turn(self, entry: _Entry) -> bool:
        """Do what is to be done next for a file."""
        if entry.state == "writing":
            return self._written(entry, wait=False)
        if entry.state in ("done", "failed"):
            return False
        try:
            if entry.scan is None:
                return self._whole(entry)
            return self._answered(entry, entry.scan)
        except NotGrowing:
            entry.scan = None
        except FileNotFoundError:
            self._fail(entry, "the file is gone")
        except UserError as problem:
            self._fail(entry, str(problem))
        return False

    def _answered(self, entry: _Entry, scan: LiveScan) -> bool:
        before = scan.done
        worked = scan.turn()
        now = time.monotonic()
        if worked:
            entry.recent.append((now, scan.done - before))
            if entry.progress:
                entry.progress.update(scan.done - before)
            else:
                entry.progress = Progress(scan.total, entry.name, "frame", scan.done)
        if entry.progress and (scan.whole or scan.stalled):
            entry.progress.close(scan.whole)
            entry.progress = None
        if scan.whole or now - entry.drawn > _DRAW_S:
            scan.draw()
            entry.drawn = now
        if scan.waiting != entry.note:
            entry.note = scan.waiting
            if "because" in entry.note:
                _tell(f"{entry.path.name}: {entry.note}")
        if scan.whole:
            self._finish(entry)
        elif scan.stalled and entry.state != "stalled":
            entry.state = "stalled"
            _tell(f"{entry.path.name} has not grown for {self.stall_s:g} s: {self._stand(scan)}")
        elif entry.state == "stalled" and not scan.stalled:
            entry.state = "growing"
            _tell(f"{entry.path.name} grows again")
        return worked

    def _whole(self, entry: _Entry) -> bool:
        """Have the map of a file written that is only read whole, once it has been left alone for a moment."""
        stamp, now = _stamp(entry.path), time.monotonic()
        if stamp != entry.stamp:
            entry.stamp, entry.still_since = stamp, now
        if now - entry.still_since < QUIET_S or not stamp.size:
            return False
        self._finish(entry)
        return True

    def _finish(self, entry: _Entry, partial: bool = False) -> None:
        target = self.out / entry.name
        entry.stamp, entry.state, entry.partial = _stamp(entry.path), "writing", partial
        if entry.scan is not None:
            entry.writing = self._writer.submit(entry.scan.finish, target)
        else:
            given = {"refine": self.how.refine, **self.how.calibration}
            entry.writing = self._writer.submit(predict, entry.path, self.how.folder, target, **given)

    def _written(self, entry: _Entry, wait: bool) -> bool:
        """Take note of a map that has been written."""
        writing = entry.writing
        if writing is None or not (wait or writing.done()):
            return False
        entry.writing = None
        try:
            summary = writing.result()
        except UserError as problem:
            self._fail(entry, str(problem))
            return True
        told = f"{summary['patterns']:,} patterns, {summary['indexed_fraction']:.1%} of them indexed"
        if entry.partial:
            told += "; the scan is not whole"
        elif entry.scan is not None and entry.scan.latency_s:
            told += f"; no line waited longer than {max(entry.scan.latency_s):.2f} s"
        if entry.scan is not None and entry.scan.anew:
            told += f"; {entry.scan.anew:,} were answered again, for the whole scan has another centre or bad pixels"
        entry.state, entry.note = ("stalled" if entry.partial else "done"), told
        _tell(f"{entry.path.name}: {told}; the map is in {self.out / entry.name}")
        if not entry.partial:
            self._settle(entry)
            if entry.scan is not None:
                entry.scan.forget()
        return True

    def _fail(self, entry: _Entry, why: str) -> None:
        entry.state, entry.note = "failed", why
        entry.stamp = _stamp(entry.path)
        _tell(f"{entry.path.name}: {why}")
        self._settle(entry)

    def _settle(self, entry: _Entry) -> None:
        """Write down that a file, as it is now, needs nothing more."""
        self._record(
            entry.path.name, name=entry.name, stamp=entry.stamp, key=self._key(), state=entry.state, note=entry.note
        )

    def _record(self, file: str, **facts: Any) -> None:
        self._known[file] = facts
        with whole_file(self.room / "scans.json") as part:
            part.write_text(json.dumps(self._known, indent=1) + "\n")

    def _key(self) -> dict[str, Any]:
        key: dict[str, Any] = json.loads(json.dumps(self.how.key()))
        return key

    def _stand(self, scan: LiveScan) -> str:
        return f"{scan.landed:,} of {scan.total:,} frames are there" if scan.total else "nothing can be read of it"

    def _shown(self, entry: _Entry) -> Shown:
        scan, now = entry.scan, time.monotonic()
        while entry.recent and now - entry.recent[0][0] > _RATE_S:
            entry.recent.popleft()
        picture = self.out / entry.name / "ipf_z.png" if entry.state == "done" else self.room / entry.name / "map.png"
        shown = picture if picture.exists() else None
        if scan is None:
            return Shown(entry.path.name, entry.state, entry.note, picture=shown)
        latency = list(scan.latency_s)
        return Shown(
            entry.path.name,
            entry.state,
            entry.note,
            scan.done,
            scan.landed,
            scan.total,
            sum(count for _, count in entry.recent) / _RATE_S,
            max(latency[-8:], default=None),
            max(latency, default=None),
            shown,
        )


def watch(
    folder: str | os.PathLike[str],
    model_folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    once: bool = False,
    stall_s: float = 10.0,
    poll_s: float = 0.1,
    port: int | None = 0,
    refine: bool = False,
    **calibration: Any,
) -> dict[str, str]:
    """Answer the scans in `folder` as they land, until Ctrl-C, and write their maps into `out`.

    Parameters
    ----------
    folder
        Where scans land; folders in it are not looked into.
    model_folder
        The model.
    out
        Where the maps go, a folder for each scan.
    once
        End when every scan is done or has stalled; of those that have stalled, map the lines that are there.
    stall_s
        How long a file must not have grown to be called stalled.
    poll_s
        How long to wait before looking again when there was nothing to do.
    port
        Where the page is served on this machine; 0: any free port; None: no page.
    refine
        As `predict`.
    **calibration
        What `dataset.ingest.ingest` takes.

    Returns
    -------
    dict
        The state of every scan file: done, failed, or stalled.

    Raises
    ------
    UserError
        When the folder is missing, or another watcher writes to `out`.
    Interrupted
        Ctrl-C while scans were under way; the same command goes on with them.
    """
    source = existing(folder, "the folder to watch")
    if not source.is_dir():
        raise UserError(f"'{folder}' is a file; give the folder that scans land in")
    how = How(load_model(model_folder), str(model_folder), refine, calibration)
    _ = how.wanted, how.shape  # say at once what is wrong with them
    target = writable_folder(out)
    how.warm_up()
    with _alone(target):
        watching = Watch(source, target, how, stall_s)
        try:
            with served(watching.board, port) if port is not None else nullcontext(None) as page:
                _tell(f"watching {source}; maps go to {target}" + (f"; the page is {page}" if page else ""))
                _until_done(watching, once, poll_s)
        finally:
            watching.close()
    return {name: entry.state for name, entry in watching.entries.items()}


def _until_done(watching: Watch, once: bool, poll_s: float) -> None:
    try:
        while True:
            busy = watching.turn()
            if once and not busy and watching.idle:
                break
            if not busy:
                time.sleep(poll_s)
    except KeyboardInterrupt:
        watching.finish_stalled()
        left = [entry.path.name for entry in watching.entries.values() if entry.state == "growing"]
        if left:
            raise Interrupted(f"{', '.join(left)} under way; the same command goes on where it was") from None
        return
    watching.finish_stalled()


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Let no second watcher write to the same folder: lines would be answered twice."""
    with (writable_folder(out / ".live") / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another stemtune watch writes to '{out}'; choose another --out") from None
        yield


def _stamp(path: Path) -> _Stamp:
    try:
        stat = path.stat()
    except OSError:
        return _Stamp()
    return _Stamp(stat.st_size, stat.st_mtime_ns, stat.st_ino)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
