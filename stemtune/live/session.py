"""One scan while it is being written: its frames are answered as they land, kept on disk, and become a map at the end.

The direct beam, bad pixels and whatever else is corrected are found in the first rows and stay as they are. When the
scan is whole, they are found anew in all of it, as `predict` does; patterns that come out otherwise are answered
again, so the map is the one that `predict` makes.

What was answered lies in a folder beside the maps, a file for each run of frames, written whole or not at all: a
watcher that was killed goes on behind the last of them.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import math
import shutil
import time
from collections import deque
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stemtune._files import whole_file
from stemtune.dataset.ingest import kept_window, pair, plan_for
from stemtune.errors import UserError
from stemtune.indexing.predictor import Indexer, Predictions, Predictor, joined
from stemtune.learning.model import OrientationModel
from stemtune.live.growing_file import GrowingFile, NotReady
from stemtune.map_folder.predict import predict
from stemtune.plot.ipf import ipf_colours
from stemtune.scan.corrections import CorrectionOptions, Corrections
from stemtune.scan.readers.scan import Window, stored_type, valid_counts

RUN = 64  # frames that are answered at a time: few enough that other scans do not wait long for their turn
_PLAN_FRAMES = 48  # frames that the corrections are found in
_MAX_GROWTH = 16  # of the rows that they are found in, before a failure is the scan's own
_MARKS = 4  # numbers that a pattern is recognised by
_TOLERANCE = 1e-5  # relative difference of two marks below which the patterns are the same
_MIN_PICTURE_PX = 320  # least edge of the live picture
_EMPTY = (0.12, 0.13, 0.16)
_CORRECTING = ("descan", "ellipse", "bad_pixels", "beam_stop", "background", "flip", "scan_rotation", "calibrate")


@dataclass(frozen=True)
class LiveOptions:
    """How scans are answered: the model and its folder, `refine` as in `predict`, and `calibration` as `ingest`."""

    model: OrientationModel
    folder: str
    refine: bool = False
    calibration: dict[str, Any] = field(default_factory=dict)

    @property
    def corrections(self) -> CorrectionOptions:
        """The corrections; a descan surface through a few rows says nothing of the rest."""
        given = {name: self.calibration.get(name) for name in _CORRECTING}
        return replace(CorrectionOptions.of(given), descan="off")

    @property
    def shape(self) -> tuple[int, int] | None:
        """The scan's shape, where it was given."""
        return None if (shape := self.calibration.get("shape")) is None else pair(shape, "--shape")

    def warm_up(self) -> None:
        """Let the model answer something, so that what is made at the first answer is there before a scan lands."""
        size = self.model.geometry.size
        noise = np.random.default_rng(0).poisson(1.0, (RUN, size, size)).astype(np.uint16)
        answered = Indexer(self.model, self.model.geometry, refine=self.refine).index(noise)
        ipf_colours(answered.candidates[:, 0], self.model.phase)

    def key(self) -> dict[str, Any]:
        """What answers depend on, to be compared with that of answers on disk."""
        given = {name: value for name, value in self.calibration.items() if value is not None}
        return {"model": str(Path(self.folder).expanduser().absolute()), "refine": self.refine, **given}


class LiveScan:
    """A scan that is answered as it lands; `cache` holds what has been answered, and `map.png`, the picture so far."""

    def __init__(self, file: GrowingFile, cache: Path, options: LiveOptions) -> None:
        self.file, self.cache, self.options = file, cache, options
        self.landed = self.done = self.anew = 0  # kept frames on the disk, answered, answered again at the end
        self.waiting = ""  # for what, for people; empty while frames come
        self.latency_s: deque[float] = deque(maxlen=10_000)  # how long the oldest line of a run waited at most
        self._window = Window(0, 0, 0, 0)
        self._rows = 0  # that the corrections are found in
        self._looked: float | None = None
        self._landings: list[tuple[int, float]] = []
        self._indexer: Indexer | None = None
        self._corrections: Corrections
        self._parts: list[Predictions] = []
        self._marks: list[npt.NDArray[np.float64]] = []
        self._picture = np.empty((0, 0, 3))
        self._drawn, self._seconds, self._recalled = 0, 0.0, False

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns that are kept, as far as is known."""
        return self._window.bottom - self._window.top, self._window.right - self._window.left

    @property
    def total(self) -> int:
        """Frames that are kept of the whole scan, as far as is known."""
        return math.prod(self.shape)

    @property
    def whole(self) -> bool:
        """Whether the scan is there and answered to its last frame."""
        return self.file.whole and self.done == self.total > 0

    @property
    def stalled(self) -> bool:
        """Whether the file has not grown for so long that it seems to have been given up."""
        return not self.file.whole and self.file.quiet_s() > self.file.stall_s and self.done >= self._lines(self.landed)

    def turn(self) -> bool:
        """Look at the file and answer what has landed, at most `RUN` frames; return whether there were any.

        A `UserError` says that the file never will be a scan, or that the options do not suit it.
        """
        now = time.monotonic()
        try:
            self.file.look()
            self._landed(now)
            if self._indexer is None and not self._planned():
                return False
            lines = self._lines(self.landed)
            end = min(self.done + RUN, lines if lines > self.done else self.landed)
            if lines <= self.done and end - self.done < RUN:
                return False
            self._answer(self.done, end)
            return True
        except NotReady as reason:
            self.waiting = f"waits for {reason}"
            return False

    def _landed(self, now: float) -> None:
        """Take note of the frames that are new, and of when the file was last looked at without them."""
        if not any(self.file.layout):
            return
        self._window = kept_window(self.options.calibration.get("keep"), self.file.layout[:2])
        landed = int(np.searchsorted(self._places(0, self.total), self.file.frames))
        if landed > self.landed:
            self._landings.append((landed, self._looked if self._looked is not None else math.inf))
            self.waiting = ""
        self.landed, self._looked = landed, now

    def _places(self, first: int, end: int) -> npt.NDArray[np.intp]:
        """Return the numbers in the file of the kept frames from `first` to before `end`."""
        row, column = np.divmod(np.arange(first, end), max(1, self.shape[1]))
        return (row + self._window.top) * self.file.layout[1] + column + self._window.left

    def _lines(self, frames: int) -> int:
        """Return how many of the first `frames` kept frames are in whole lines."""
        return frames - frames % max(1, self.shape[1])

    def _planned(self) -> bool:
        """Find the corrections in the first rows, once there are enough of them; return whether they are known."""
        if not self.total:
            return False
        if not self._recalled:
            self._recall()
        columns = self.shape[1]
        self._rows = min(self._rows or -(-_PLAN_FRAMES // columns), self.shape[0])
        there = self.landed // columns
        if self.file.quiet_s() > self.file.stall_s:  # no more will come
            self._rows = min(self._rows, there)
        if not self._rows or there < self._rows:
            self.waiting = self.waiting or f"waits for the first {self._rows} rows, to find the beam in them"
            return False
        given: dict[str, Any] = {name: self.options.calibration.get(name) for name in ("kv", "scale", "size")}
        given["centre"] = self.options.calibration.get("centre") or "auto"
        window = self._window._replace(bottom=self._window.top + self._rows)
        try:
            planned, geometry = plan_for(self.file.scan(window.bottom), window, self.options.corrections, **given)
        except UserError as problem:
            if self._rows >= min(self.shape[0], _MAX_GROWTH * _PLAN_FRAMES // columns + 1):
                raise
            self._rows *= 2
            self.waiting = f"waits for {self._rows} rows, because in those that are there: {problem}"
            return False
        self._corrections = planned.corrections
        self._indexer = Indexer(self.options.model, geometry, refine=self.options.refine)
        self.waiting = ""
        self._recall_parts()
        return True

    def _patterns(self, first: int, end: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.intp]]:
        """Return the kept frames from `first` to before `end` as the store has them, and their places in the scan."""
        places = self._places(first, end)
        counts = self.file.read(int(places[0]), int(places[-1]) + 1)[places - places[0]]
        if not valid_counts(counts):
            raise UserError(f"{self.file.path.name} has counts that are negative or no numbers; correct the file")
        counts = np.ascontiguousarray(counts, dtype=stored_type(counts.dtype))
        place = np.stack(np.divmod(np.arange(first, end), self.shape[1]), axis=1)
        return self._corrections(counts, place), place

    def _answer(self, first: int, end: int) -> None:
        """Answer the kept frames from `first` to before `end`, and write the answers down."""
        assert self._indexer is not None
        started = time.perf_counter()
        patterns, place = self._patterns(first, end)
        answered, marks = self._indexer.index(patterns), pattern_marks(patterns)
        self._seconds += time.perf_counter() - started
        columns = {name: value for name, value in answered._asdict().items() if value is not None}
        with whole_file(self.cache / f"{first:09d}-{end:09d}.npz") as part, part.open("wb") as file:
            np.savez(file, marks=marks, seconds=time.perf_counter() - started, **columns)
        self._take(answered, marks, place)
        self.done = end
        line = self._lines(first) + self.shape[1]  # the first line that ends among these frames
        seen = bisect.bisect_left(self._landings, (min(line, end), -math.inf))
        since = self._landings[seen][1] if seen < len(self._landings) else math.inf
        if since < math.inf:  # else it lay there before the watch began
            self.latency_s.append(time.monotonic() - since)

    def _take(self, answered: Predictions, marks: npt.NDArray[np.float64], place: npt.NDArray[np.intp]) -> None:
        self._parts.append(answered)
        self._marks.append(marks)
        rows, columns = self.shape
        if len(self._picture) < rows:
            more = np.full((rows - len(self._picture), columns, 3), _EMPTY)
            self._picture = np.concatenate((self._picture.reshape(-1, columns, 3), more))
        best = np.where(answered.indexed[:, None], answered.candidates[:, 0], np.nan)
        self._picture[place[:, 0], place[:, 1]] = ipf_colours(best, self.options.model.phase)

    def draw(self) -> None:
        """Bring the picture, IPF along the beam, up to date: grey is not indexed, dark not there yet."""
        if not len(self._picture) or self._drawn == self.done:
            return
        from matplotlib.image import imsave

        grow = max(1, -(-_MIN_PICTURE_PX // max(self._picture.shape[:2])))
        with whole_file(self.cache / "map.png") as part:
            imsave(part, np.clip(self._picture.repeat(grow, axis=0).repeat(grow, axis=1), 0, 1))
        self._drawn = self.done

    def _recall(self) -> None:
        """Look whether frames were answered before, in the same way and of the same file; else begin anew."""
        if not self.file.frames:
            return
        first = pattern_marks(self.file.read(0, 1))[0].tolist()
        key = {**self.options.key(), "columns": Predictions._fields, "first": first}
        self._recalled = True
        with contextlib.suppress(OSError, ValueError, KeyError):
            known = json.loads((self.cache / "state.json").read_text())
            if known["key"] == json.loads(json.dumps(key)):
                self._rows = int(known["rows"])
                return
        shutil.rmtree(self.cache, ignore_errors=True)
        self.cache.mkdir(parents=True)
        self._key = key

    def _recall_parts(self) -> None:
        """Take up the answers on disk, as far as they follow each other; write down how they are to be recognised."""
        state = self.cache / "state.json"
        if not state.exists():
            with whole_file(state) as part:
                part.write_text(json.dumps({"key": self._key, "rows": self._rows}) + "\n")
        for entry in sorted(self.cache.glob("[0-9]*-*.npz")):
            first, end = (int(number) for number in entry.stem.split("-"))
            if first != self.done or end > self.landed:
                break
            with np.load(entry, allow_pickle=False) as held:
                if "candidates" not in held:  # written before version 0.2
                    break
                answered = Predictions(*(held.get(name) for name in Predictions._fields))
                self._seconds += float(held["seconds"])
                place = np.stack(np.divmod(np.arange(first, end), self.shape[1]), axis=1)
                self._take(answered, held["marks"], place)
            self.done = end

    def finish(self, out: Path) -> dict[str, Any]:
        """Write the map folder of the scan, or of the whole lines of it that are there, and return its summary."""
        rows = self._window.top + self.done // self.shape[1]
        if rows <= self._window.top:
            raise UserError(f"{self.file.path.name} has not a single line, so there is no map of it")
        calibration = dict(self.options.calibration)
        if calibration.get("keep") is not None:
            top, left, _, right = self._window
            calibration["keep"] = f"{top}:{rows},{left}:{right}"
        kept = EarlierPredictions(self.options.model, joined(self._parts), np.concatenate(self._marks), self._seconds)
        scan = self.file.scan(rows if self._window.bottom > rows else self.file.layout[0])
        summary = predict(scan, self.options.folder, out, refine=self.options.refine, earlier=kept, **calibration)
        self.anew = kept.anew
        return summary

    def forget(self) -> None:
        """Remove what was kept of the scan, for it has become a map."""
        shutil.rmtree(self.cache, ignore_errors=True)
        self._parts, self._marks, self._picture = [], [], np.empty((0, 0, 3))


class EarlierPredictions:
    """Answers given while a scan was written, and the `pattern_marks` of the patterns that they were given to."""

    def __init__(
        self, model: OrientationModel, answered: Predictions, marks: npt.NDArray[np.float64], seconds: float
    ) -> None:
        self.model, self._answered, self._marks, self._seconds = model, answered, marks, seconds
        self.anew = 0

    def predictions(self, predictor: Predictor) -> tuple[Predictions, float]:
        """Return the answers to the patterns of the predictor's store; those given to other patterns are given anew."""
        started = time.perf_counter()
        n = predictor.store.n
        columns = [None if column is None else column[:n].copy() for column in self._answered]
        other = np.zeros(n, dtype=bool)
        for start in range(0, n, RUN):
            rows = np.arange(start, min(start + RUN, n))
            marks, kept = pattern_marks(predictor.store.take(rows)), self._marks[rows]
            size = np.maximum(np.abs(marks), np.abs(kept)).max(axis=1, keepdims=True)
            other[rows] = (np.abs(marks - kept) > _TOLERANCE * size).any(axis=1)
        self.anew = int(other.sum())
        if self.anew:
            fresh = predictor.run(np.flatnonzero(other), progress=False)
            for column, new in zip(columns, fresh, strict=True):
                if column is not None:
                    column[other] = new
        answered = Predictions(*columns)  # type: ignore[arg-type]
        return answered, self._seconds + time.perf_counter() - started


def pattern_marks(patterns: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return numbers (n, `_MARKS` + 1) that patterns (n, H, W) are recognised by, whatever the order of summing them.

    The projections on a few fixed directions and the length: another pattern, or the same one moved a little, has
    others.
    """
    flat = patterns.reshape(len(patterns), -1).astype(np.float64)
    return np.column_stack((flat @ _directions(flat.shape[1]), np.linalg.norm(flat, axis=1)))


@cache
def _directions(pixels: int) -> npt.NDArray[np.float64]:
    return np.random.default_rng(0).standard_normal((pixels, _MARKS))
