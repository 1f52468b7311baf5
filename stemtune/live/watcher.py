"""Watching a folder: each scan that lands in it, and each line of one that grows, is answered as it comes.

One thread looks and answers, a few frames of every scan in turn, so that no scan waits for a long one to end; another
writes the maps of the scans that are whole. The system is not asked to say when a file changes, since network drives
do not: the folder is looked at several times a second. Whatever is wrong with one scan is reported, and the others go
on.

Beside the maps lies `.live`: `scans.json` says which files have become maps, and a folder for each unfinished scan
holds what has been answered of it. So a watcher that was stopped or killed goes on where it was.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import traceback
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from stemtune._files import existing, whole_file, writable_folder
from stemtune._progress import Progress, say
from stemtune.errors import Interrupted, UserError
from stemtune.learning.checkpoint import load_model
from stemtune.live.growing_file import ENDINGS, QUIET_S, NotIncremental, open_growing
from stemtune.live.session import LiveOptions, LiveScan
from stemtune.live.status_page import ScanStatus, StatusBoard, serve_page
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
    """A file in the folder; `state` is growing, stalled, writing, done or failed."""

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

    def end_progress(self, finished: bool = False) -> None:
        if self.progress:
            self.progress.close(finished)
        self.progress = None

    def changed(self) -> bool:
        """Whether the file has become another since it was done with; one that failed may grow, it stays as bad."""
        now = _stamp(self.path)
        if self.state == "failed":
            return now.node != self.stamp.node or now.size < self.stamp.size
        return self.state == "done" and now != self.stamp


class Watch:
    """Answers the scans in `folder` and writes a map folder of each into `out`: `out`/NAME for a file NAME.npy.

    A file that has not grown for `stall_s` is called stalled.
    """

    def __init__(self, folder: Path, out: Path, options: LiveOptions, stall_s: float = 10.0) -> None:
        self.folder, self.out, self.options, self.stall_s = folder, out, options, stall_s
        self.cache = writable_folder(out / ".live")
        self.entries: dict[str, _Entry] = {}
        self.board = StatusBoard(f"stemtune watch {folder}")
        self._key: dict[str, Any] = json.loads(json.dumps(options.key()))
        self.unlisted = self._complaint = ""
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="maps")
        try:
            self._known: dict[str, dict[str, Any]] = json.loads((self.cache / "scans.json").read_text())
        except (OSError, ValueError):
            self._known = {}

    def turn(self) -> bool:
        """Look at every file once, answer a few frames of each; return whether there was anything to do."""
        self._discover()
        busy = [self._turn(entry) for entry in self.entries.values()]
        self.board.show([self._status(entry) for entry in self.entries.values()])
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
        self.board.show([self._status(entry) for entry in self.entries.values()])

    def close(self) -> None:
        for entry in self.entries.values():
            entry.end_progress()
        self._writer.shutdown(wait=True)

    def _discover(self) -> None:
        try:
            paths = sorted(self.folder.iterdir())
        except OSError as problem:
            self.unlisted = f"{self.folder} cannot be listed ({problem.strerror or problem})"
            self._complain(f"{self.unlisted}; it is tried again")
            return
        self.unlisted = ""
        for path in paths:
            if path.name.startswith(".") or path.suffix.lower() not in (*ENDINGS, *FINISHED_ONLY):
                continue
            entry = self.entries.get(path.name)
            try:
                if path.is_file() and (entry is None or entry.changed()):
                    self.entries[path.name] = self._open(path)
            except Exception as problem:
                self.entries.setdefault(path.name, _Entry(path, path.stem, None))
                if entry is None or entry.state != "failed":
                    self._fail(self.entries[path.name], problem)

    def _open(self, path: Path) -> _Entry:
        """Return the entry of a file: done, where it has become a map and is the same since, else to be answered."""
        known = self._known.get(path.name)
        done = known is not None and known["state"] == "done" and known["key"] == self._key
        if known is not None and done and _Stamp(*known["stamp"]) == _stamp(path):
            return _Entry(path, known["name"], None, "done", known["note"], _stamp(path))
        entry = _Entry(path, str(known["name"]) if known is not None else self._new_name(path), None)
        if known is None:
            self._record(entry, key=None)
        file = open_growing(path, self.options.shape, self.options.calibration.get("dataset"), self.stall_s)
        if file is not None:
            entry.scan = LiveScan(file, self.cache / entry.name, self.options)
        return entry

    def _new_name(self, path: Path) -> str:
        """Return a map folder's name: the file's without its ending, or with it where two scans would share one."""
        taken = {known["name"] for known in self._known.values()} | {entry.name for entry in self.entries.values()}
        return path.name if path.stem in taken else path.stem

    def _turn(self, entry: _Entry) -> bool:
        """Do what is to be done next for a file."""
        if entry.state == "writing":
            return self._written(entry, wait=False)
        if entry.state in ("done", "failed"):
            return False
        try:
            return self._whole(entry) if entry.scan is None else self._answered(entry, entry.scan)
        except NotIncremental:
            entry.end_progress()
            entry.scan = None
        except Exception as problem:
            self._fail(entry, problem)
        return False

    def _answered(self, entry: _Entry, scan: LiveScan) -> bool:
        before = scan.done
        worked = scan.turn()
        now = time.monotonic()
        if worked:
            entry.recent.append((now, scan.done - before))
            entry.progress = entry.progress or Progress(scan.total, entry.name, "frame", before)
            entry.progress.total = scan.total  # of an open-ended file it grows
            entry.progress.update(scan.done - before)
        if scan.whole or scan.stalled:
            entry.end_progress(scan.whole)
        if scan.whole or now - entry.drawn > _DRAW_S:
            scan.draw()
            entry.drawn = now
        if scan.waiting != entry.note and "because" in scan.waiting:
            say(f"{entry.path.name}: {scan.waiting}")
        entry.note = scan.waiting
        if scan.whole:
            self._finish(entry)
        elif scan.stalled and entry.state != "stalled":
            entry.state = "stalled"
            there = f"{scan.landed:,} of {scan.total:,} frames are there" if scan.total else "nothing can be read of it"
            say(f"{entry.path.name} has not grown for {self.stall_s:g} s: {there}")
        elif entry.state == "stalled" and not scan.stalled:
            entry.state = "growing"
            say(f"{entry.path.name} grows again")
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
            given = {"refine": self.options.refine, **self.options.calibration}
            entry.writing = self._writer.submit(predict, entry.path, self.options.folder, target, **given)

    def _written(self, entry: _Entry, wait: bool) -> bool:
        """Take note of a map that has been written."""
        writing = entry.writing
        if writing is None or not (wait or writing.done()):
            return False
        entry.writing = None
        try:
            summary = writing.result()
        except Exception as problem:
            self._fail(entry, problem)
            return True
        text, scan = f"{summary['patterns']:,} patterns, {summary['indexed_fraction']:.1%} of them indexed", entry.scan
        if entry.partial:
            text += "; the scan is not whole"
        elif scan is not None and scan.latency_s:
            text += f"; no line waited longer than {max(scan.latency_s):.2f} s"
        if scan is not None and scan.anew:
            text += f"; {scan.anew:,} were answered again, for the whole scan has another centre or bad pixels"
        entry.state, entry.note = ("stalled" if entry.partial else "done"), text
        say(f"{entry.path.name}: {text}; the map is in {self.out / entry.name}")
        if not entry.partial:
            self._record(entry, key=self._key)
            if scan is not None:
                scan.forget()
        return True

    def _fail(self, entry: _Entry, problem: Exception) -> None:
        """Report that a scan cannot be answered, and leave it; the next watch tries it again."""
        if isinstance(problem, UserError):
            reason = str(problem)
        elif isinstance(problem, FileNotFoundError) and not _stamp(entry.path).node:
            reason = "the file is gone"
        else:
            log = self.cache / "errors.log"
            reason = f"{type(problem).__name__}: {problem}; the traceback is in {log}"
            with suppress(OSError), log.open("a") as file:  # the disk may be full
                file.write(f"{time.ctime()} {entry.path}\n{''.join(traceback.format_exception(problem))}\n")
        entry.end_progress()
        entry.state, entry.note, entry.stamp = "failed", reason, _stamp(entry.path)
        say(f"{entry.path.name}: {reason}")

    def _complain(self, text: str) -> None:
        """Say what is wrong with more than one scan, once."""
        if text != self._complaint:
            say(text)
        self._complaint = text

    def _record(self, entry: _Entry, key: dict[str, Any] | None) -> None:
        """Write down what the map of a file is called, and with a `key` that it needs nothing more as it is now."""
        facts = {"name": entry.name, "stamp": entry.stamp, "key": key, "state": entry.state, "note": entry.note}
        self._known[entry.path.name] = facts
        try:
            with whole_file(self.cache / "scans.json") as part:
                part.write_text(json.dumps(self._known, indent=1) + "\n")
        except (OSError, UserError) as problem:  # no reason to stop answering; the next change writes all of it
            self._complain(f"{self.cache / 'scans.json'} cannot be written ({problem}), so a restart begins anew")

    def _status(self, entry: _Entry) -> ScanStatus:
        scan, now = entry.scan, time.monotonic()
        while entry.recent and now - entry.recent[0][0] > _RATE_S:
            entry.recent.popleft()
        picture = self.out / entry.name / "ipf_z.png" if entry.state == "done" else self.cache / entry.name / "map.png"
        status = ScanStatus(entry.path.name, entry.state, entry.note, picture=picture if _stamp(picture).size else None)
        if scan is None:
            return status
        latency = list(scan.latency_s)
        return replace(
            status,
            done=scan.done,
            landed=scan.landed,
            total=scan.total,
            rate=sum(count for _, count in entry.recent) / _RATE_S,
            latency_s=max(latency[-8:], default=None),
            worst_latency_s=max(latency, default=None),
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
    """Answer the scans in `folder` as they land, until Ctrl-C, and write their maps into `out`, a folder for each.

    Folders in `folder` are not looked into. With `once` it ends when every scan is done or has stalled; of those that
    have stalled, the lines that are there are mapped. A file that has not grown for `stall_s` is called stalled;
    `poll_s` is waited when there was nothing to do. The page is served on this machine at `port`; 0: any free one,
    None: no page. `refine` is as in `predict`, and `calibration` what `dataset.ingest.ingest` takes.

    Returns the state of every scan file: done, failed, or stalled. A `UserError` says that the folder is missing, or
    that another watcher writes to `out`; `Interrupted`, that Ctrl-C came while scans were under way; the same command
    goes on with them.
    """
    source = existing(folder, "the folder to watch")
    if not source.is_dir():
        raise UserError(f"'{folder}' is a file; give the folder that scans land in")
    options = LiveOptions(load_model(model_folder), str(model_folder), refine, calibration)
    _ = options.corrections, options.shape  # a UserError says at once what is wrong with them
    target = writable_folder(out)
    options.warm_up()
    with _locked(target):
        watching = Watch(source, target, options, stall_s)
        try:
            with serve_page(watching.board, port) if port is not None else nullcontext(None) as page:
                say(f"watching {source}; maps go to {target}" + (f"; the page is {page}" if page else ""))
                _until_done(watching, once, poll_s)
        finally:
            watching.close()
    return {name: entry.state for name, entry in watching.entries.items()}


def _until_done(watching: Watch, once: bool, poll_s: float) -> None:
    with suppress(KeyboardInterrupt):
        while (busy := watching.turn()) or not (once and watching.idle):
            if not busy:
                time.sleep(poll_s)
    watching.finish_stalled()
    if once and watching.unlisted:
        raise UserError(f"{watching.unlisted}; see to its permissions, or that its disk is there")
    if left := [entry.path.name for entry in watching.entries.values() if entry.state == "growing"]:
        raise Interrupted(f"{', '.join(left)} under way; the same command goes on where it was")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
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
