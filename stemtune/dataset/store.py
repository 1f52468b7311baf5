"""The store: patterns and their labels in one HDF5 file that anyone can open with plain h5py.

`patterns` lies contiguous and uncompressed in the file, so it is memory-mapped instead of read: a shuffled reader
fetches single patterns, a whole-scan reader streams, and every process on a node shares the one copy in the page
cache. A store that somebody else wrote in chunks is read through h5py instead, slower but the same.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import numpy.typing as npt

from stemtune._files import existing
from stemtune.dataset.schema import (
    COLUMNS,
    CONTENT_SHA256,
    LABELLED,
    OVERLAP,
    SPLITS,
    check_layout,
    make_splits,
    open_hdf5,
    plain,
)
from stemtune.dataset.writer import StoreWriter
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError
from stemtune.scan.corrections import describe_corrections
from stemtune.scan.readers.scan import describe_positions

if TYPE_CHECKING:
    from stemtune.crystal.phase import Phase

__all__ = ["SPLITS", "Store", "StoreWriter", "make_splits"]

_PIECE = 2**22  # bytes at a time of what is only read into the page cache
_SAMPLED = 64  # patterns whose counts are checked, and that stand for all in the hash of a store of version 0.1


OLD_SCORES = {  # names of the labellers' own scores in stores of this version and of those up to 0.1, either way
    **(_renamed := {"spot_z_score": "signal", "explained_intensity": "fit", "ncc": "goodness"}),
    **{old: new for new, old in _renamed.items()},
}


def _column(name: str) -> Any:
    """Return a property of a store: its column of this name, read once, in the type that the schema gives it."""
    return cached_property(lambda store: np.asarray(store._file[name][()], dtype=COLUMNS[name][1]))


class Store:
    """A store opened for reading; use `Store.open`.

    It has `n` patterns of `size` x `size` pixels from the file `path`, which share the calibration `geometry`; `attrs`
    are all attributes of the file as plain Python values.
    """

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self._file = file
        self.attrs: dict[str, Any] = {name: plain(value) for name, value in file.attrs.items()}
        self.n, self.size = (int(length) for length in file["patterns"].shape[:2])
        try:
            self.geometry = Geometry.from_dict({**self.attrs, "size": self.size})
        except UserError as problem:
            raise UserError(f"'{path}' is not a stemtune store: {problem}") from None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Store:
        """Open the store at `path`.

        A `UserError` says that the file is missing, truncated, no HDF5, not laid out as a store, or holds NaN or
        negative counts (of those stored as float32 a sample is looked at).
        """
        found = existing(path, "the store")
        file = open_hdf5(found)
        try:
            check_layout(found, file)
            store = cls(found, file)
            store._check_counts()
            return store
        except BaseException:
            file.close()
            raise

    def _check_counts(self) -> None:
        if self._file["patterns"].dtype.kind != "f":
            return
        rows = _spread(self.n)
        wrong = ~(np.isfinite(sample := self.take(rows)) & (sample >= 0)).all(axis=(1, 2))
        if wrong.any():
            raise UserError(
                f"'{self.path}' has NaN or negative counts in pattern {rows[wrong.argmax()]}, but counts must be finite"
                " and 0 or more; make the store again with `stemtune ingest`"
            )

    def close(self) -> None:
        """Close the file; arrays already handed out stay valid."""
        self._file.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self.n

    def __str__(self) -> str:
        return f"a store of {self.n:,} patterns of {self.size} x {self.size} pixels, {self.patterns.dtype}"

    def __reduce__(self) -> tuple[Any, ...]:
        return (Store.open, (str(self.path),))

    @cached_property
    def patterns(self) -> Any:
        """Patterns (n, size, size): a read-only memory-mapped array, or an `h5py.Dataset` if stored in chunks."""
        data = self._file["patterns"]
        self._map_offset = data.id.get_offset()  # None for chunks
        if self._map_offset is None or data.external:
            return data
        with self.path.open("rb") as raw:
            self._map = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(self._map, data.dtype, data.size, self._map_offset).reshape(data.shape)

    @property
    def is_mapped(self) -> bool:
        """Whether `patterns` comes from the page cache without copies of its own."""
        return isinstance(self.patterns, np.ndarray)

    def take(self, rows: npt.NDArray[np.intp]) -> npt.NDArray[Any]:
        """Return the patterns of `rows` (any order, repeats allowed) as a new array in native byte order."""
        if self.is_mapped:
            taken = np.take(self.patterns, rows, axis=0)
        else:
            unique, back = np.unique(rows, return_inverse=True)
            taken = self.patterns[unique][back]
        return np.asarray(taken, dtype=taken.dtype.newbyteorder("="))

    def expect(self, rows: npt.NDArray[np.intp]) -> None:
        """Ask the system to read the patterns of `rows` from disk into the page cache, all at once, without waiting.

        Reading patterns one after the other as they are touched leaves a disk idle most of the time.
        """
        if not self.is_mapped:
            return
        length = self.size * self.size * self.patterns.dtype.itemsize
        for row in rows:
            start = self._map_offset + int(row) * length
            page = start - start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, page, start + length - page)

    def read_through(self) -> None:
        """Read the file once from its beginning to its end, so that the page cache holds all of it.

        This is as fast as the disk, and the kernel caches what is read in order in large pages: shuffled reading from
        them is as fast as from an array in memory, from the small pages of single patterns about a tenth slower.
        """
        piece = bytearray(_PIECE)
        with self.path.open("rb", buffering=0) as raw:
            while raw.readinto(piece):
                pass

    # Unit quaternions (n, 4), scalar first, lab-to-crystal; NaN where unlabelled.
    orientation: cached_property[npt.NDArray[np.float64]] = _column("orientation")
    # Confidence of each label (n,), larger is better; NaN where unlabelled.
    confidence: cached_property[npt.NDArray[np.float32]] = _column("confidence")
    # Index (n,) into `phases`; -1 where not indexed.
    phase: cached_property[npt.NDArray[np.int16]] = _column("phase")
    # Scan (row, column) of each pattern (n, 2); -1 where the patterns are no scan.
    position: cached_property[npt.NDArray[np.int32]] = _column("position")
    # Group (n,) of each pattern: one group is never on both sides of a split.
    group: cached_property[npt.NDArray[np.int32]] = _column("group")
    # 0 train, 1 validation, 2 test (n,).
    split: cached_property[npt.NDArray[np.int8]] = _column("split")

    @cached_property
    def overlap_orientation(self) -> npt.NDArray[np.float64] | None:
        """Orientations (n, 2, 4) of the second and third strongest grain, NaN: there is none; None: no overlaps."""
        return self._file["overlap_orientation"][()] if "overlap_orientation" in self._file else None

    @cached_property
    def overlap_weight(self) -> npt.NDArray[np.float32] | None:
        """Shares (n, 3) of the grains, strongest first, in the diffracted intensity; None: no overlaps."""
        return self._file["overlap_weight"][()] if "overlap_weight" in self._file else None

    @cached_property
    def labelled(self) -> npt.NDArray[np.bool_]:
        """Which patterns (n,) have an orientation to learn from: finite, and of a phase."""
        return np.isfinite(self.orientation).all(axis=1) & (self.phase >= 0)

    @cached_property
    def scores(self) -> dict[str, npt.NDArray[Any]]:
        """The labeller's own scores (n,) under the names it gave them."""
        return {name: data[()] for name, data in self._file["scores"].items()} if "scores" in self._file else {}

    def score(self, name: str) -> npt.NDArray[Any] | None:
        """Return the score (n,) called `name`, also under the name that it had up to version 0.1; None without it."""
        return next((self.scores[known] for known in (name, OLD_SCORES.get(name)) if known in self.scores), None)

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Rows and columns of the scan; a store that is no scan counts as one row."""
        return self.scan_shape or (1, self.n)

    def grid_pixel(self) -> npt.NDArray[np.intp]:
        """Return the pixel (n,) of the row-by-row grid of `grid_shape` where each pattern was recorded."""
        if self.scan_shape is None:
            return np.arange(self.n)
        rows, columns = self.scan_shape
        row, column = self.position.astype(np.intp).T
        if ((row < 0) | (row >= rows) | (column < 0) | (column >= columns)).any():
            raise UserError(f"'{self.path}' has positions outside its scan of {rows} x {columns}")
        pixel: npt.NDArray[np.intp] = row * columns + column
        if len(np.unique(pixel)) != len(pixel):
            raise UserError(f"'{self.path}' has several patterns at one scan position, which a map cannot show")
        return pixel

    @cached_property
    def calibration(self) -> dict[str, npt.NDArray[Any]]:
        """What shows how a measured scan was calibrated, by name (see `scan.plan`); empty where nothing is kept."""
        group = self._file.get("calibration")
        return {name: data[()] for name, data in group.items()} if isinstance(group, h5py.Group) else {}

    @property
    def scan_shape(self) -> tuple[int, int] | None:
        """Rows and columns of the scan; None when the patterns are no scan."""
        shape = self.attrs.get("scan_shape")
        return (int(shape[0]), int(shape[1])) if shape else None

    @property
    def step_nm(self) -> tuple[float, float] | None:
        """Distance between scan rows and between scan columns in nm; None when it is not known."""
        step = self.attrs.get("step_nm")
        rows, columns = (step, step) if isinstance(step, int | float) else (step or (0, 0))
        return (float(rows), float(columns)) if step else None

    @cached_property
    def phases(self) -> list[Phase]:
        """The crystal phases, rebuilt from the CIF text in the store."""
        from stemtune.crystal.phase import Phase  # here, because opening a store needs no crystallography

        return [Phase.from_cif_text(text, f"a CIF in '{self.path}'") for text in self.attrs.get("phases_cif", [])]

    @cached_property
    def sha256(self) -> str:
        """Hash of the content: calibration, phases, all labels, and the hash of all patterns that the writer kept.

        Stores up to version 0.1 keep none; for them it is a fingerprint, which covers 64 patterns spread evenly.
        """
        digest = hashlib.sha256()
        facts = {name: self.attrs.get(name) for name in ("phases_cif", "scan_shape", "step_nm")}
        digest.update(json.dumps([self.n, self.geometry.to_dict(), facts]).encode())
        for name in (*COLUMNS, *(OVERLAP if self.overlap_weight is not None else ())):
            digest.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        digest.update(self.take(_spread(self.n)).tobytes())
        digest.update(str(self.attrs.get(CONTENT_SHA256, "")).encode())
        return digest.hexdigest()

    def describe(self) -> tuple[str, dict[str, str]]:
        """Return a title, and what the store holds by topic, for people."""
        geometry, attrs = self.geometry, self.attrs
        made = " ".join(str(attrs[key]) for key in ("origin", "command") if attrs.get(key))
        digest = attrs.get("origin_sha256")
        sums = self.take(spread_evenly(self.n, 256)).sum(axis=(1, 2), dtype=np.float64)
        hashed = "sha256" if attrs.get(CONTENT_SHA256) else f"fingerprint (of {_SAMPLED} patterns and all labels)"
        facts = {
            "scan": describe_positions(self.scan_shape, self.step_nm) if self.scan_shape else "",
            "calibration": f"{geometry.kv:g} kV (wavelength {geometry.wavelength_angstrom:.5f} Å), "
            f"{geometry.scale_inv_angstrom:g} 1/Å per pixel, {geometry.radius_inv_angstrom:.3g} 1/Å to the edge, "
            f"direct beam at row {geometry.centre_px[0]:g}, column {geometry.centre_px[1]:g}",
            "counts": f"{np.median(sums):,.0f} per pattern (median), {sums.min():,.0f} to {sums.max():,.0f}",
            "labels": self._describe_labels(),
            "labelled": _options(attrs.get(LABELLED)),
            "overlaps": self._describe_overlaps(),
            "phases": self._describe_phases(),
            "splits": ", ".join(f"{name} {(self.split == number).sum():,}" for number, name in enumerate(SPLITS))
            + f"; whole groups, of which there are {len(np.unique(self.group)):,}",
            "origin": made + (f", sha256 {digest[:12]}" if digest else ""),
            "corrected": describe_corrections(attrs),
            "options": _options(attrs.get("options")),
            "layout": "mapped from the page cache" if self.is_mapped else "in chunks, so loading is slower",
            "content": f"{hashed} {self.sha256[:16]}, written by stemtune {attrs.get('stemtune_version', '?')}",
        }
        return str(self), facts

    def _describe_labels(self) -> str:
        labelled = int(self.labelled.sum())
        if not labelled:
            return "none: these patterns can be predicted, not trained on"
        confidence = self.confidence[self.labelled]
        confidence = confidence[np.isfinite(confidence)]
        known = f"confidence {np.median(confidence):.3g} (median)" if len(confidence) else "no confidence"
        if len(confidence) and confidence.min() < confidence.max():
            known += f", {confidence.min():.3g} to {confidence.max():.3g}"
        scores = f"; scores {', '.join(self.scores)}" if self.scores else ""
        return f"{labelled:,} of {self.n:,} patterns have an orientation; {known}{scores}"

    def _describe_overlaps(self) -> str:
        if self.overlap_weight is None:
            return ""
        grains = (self.overlap_weight > 0).sum(axis=1)
        if not (grains > 1).any():
            return "no pattern shows more than one grain"
        return (
            f"{(grains > 1).sum():,} patterns show further grains ({(grains == 3).sum():,} show three), the"
            f" strongest has {np.median(self.overlap_weight[grains > 1, 0]):.0%} of the beam in them (median)"
        )

    def _describe_phases(self) -> str:
        parts = [
            f"{number} {phase.name} (space group {phase.space_group}, Laue class {phase.symmetry.laue}), "
            f"{int((self.phase == number).sum()):,} patterns"
            for number, phase in enumerate(self.phases)
        ]
        missing = int((self.phase < 0).sum())
        return "; ".join(parts + ([f"no phase, {missing:,} patterns"] if parts and missing else []))


def _options(text: Any) -> str:
    """Return the JSON text of a command's options, without those that were not given, for people."""
    try:
        options = json.loads(text)
    except (TypeError, ValueError):
        return ""
    return ", ".join(f"{key} {value}" for key, value in options.items() if value is not None)


def spread_evenly(length: int, count: int) -> npt.NDArray[np.intp]:
    """Return about `count` indices spread evenly over `length`, from the middle of equal parts."""
    count = min(length, count)
    return ((np.arange(count) + 0.5) * length / count).astype(np.intp)


def _spread(n: int) -> npt.NDArray[np.intp]:
    return np.unique(np.linspace(0, n - 1, _SAMPLED).astype(np.intp))
