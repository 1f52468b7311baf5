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
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import numpy.typing as npt

from stemtune import __version__
from stemtune.data.layout import (
    COLUMNS,
    PATTERN_TYPES,
    SCHEMA,
    check_layout,
    open_hdf5,
    plain,
    replaceable_store,
    set_attribute,
)
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError
from stemtune.files import existing, whole_file

if TYPE_CHECKING:
    from stemtune.crystal.phase import Phase

SPLITS = ("train", "validation", "test")
"""Names of the values 0, 1, 2 of `split`."""

_SAMPLED = 64  # patterns that enter the content hash, and whose counts are checked
_ALIGNMENT = 4096  # patterns start on a page boundary of the file


class Store:
    """A store opened for reading; use `Store.open`.

    Attributes
    ----------
    path
        The file.
    n, size
        Number of patterns; their width and height in pixels.
    geometry
        Calibration that all patterns of the store share.
    attrs
        All attributes of the file as plain Python values.
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

        Raises
        ------
        UserError
            When the file is missing, truncated, no HDF5, not laid out as a store, or holds NaN or negative counts
            (of those stored as float32 a sample is looked at).
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

    def __reduce__(self) -> tuple[Any, ...]:
        return (Store.open, (str(self.path),))

    @cached_property
    def patterns(self) -> Any:
        """Patterns (n, size, size): a read-only memory-mapped array, or an `h5py.Dataset` if stored in chunks."""
        data = self._file["patterns"]
        offset = data.id.get_offset()  # None for chunks
        if offset is None or data.external:
            return data
        with self.path.open("rb") as raw:
            self._map = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
        self._map_offset = offset
        return np.frombuffer(self._map, data.dtype, data.size, offset).reshape(data.shape)

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

    @cached_property
    def orientation(self) -> npt.NDArray[np.float64]:
        """Unit quaternions (n, 4), scalar first, lab-to-crystal; NaN where unlabelled."""
        return np.asarray(self._file["orientation"][()], dtype=np.float64)

    @cached_property
    def confidence(self) -> npt.NDArray[np.float32]:
        """Confidence of each label (n,), larger is better; NaN where unlabelled."""
        return np.asarray(self._file["confidence"][()], dtype=np.float32)

    @cached_property
    def phase(self) -> npt.NDArray[np.int16]:
        """Index (n,) into `phases`; -1 where not indexed."""
        return np.asarray(self._file["phase"][()], dtype=np.int16)

    @cached_property
    def position(self) -> npt.NDArray[np.int32]:
        """Scan (row, column) of each pattern (n, 2); -1 where the patterns are no scan."""
        return np.asarray(self._file["position"][()], dtype=np.int32)

    @cached_property
    def group(self) -> npt.NDArray[np.int32]:
        """Group (n,) of each pattern: one group never stands on both sides of a split."""
        return np.asarray(self._file["group"][()], dtype=np.int32)

    @cached_property
    def split(self) -> npt.NDArray[np.int8]:
        """0 train, 1 validation, 2 test (n,)."""
        return np.asarray(self._file["split"][()], dtype=np.int8)

    @cached_property
    def labelled(self) -> npt.NDArray[np.bool_]:
        """Which patterns (n,) have an orientation to learn from: finite, and of a phase."""
        return np.isfinite(self.orientation).all(axis=1) & (self.phase >= 0)

    @cached_property
    def scores(self) -> dict[str, npt.NDArray[Any]]:
        """The labeller's own scores (n,) under the names it gave them."""
        return {name: data[()] for name, data in self._file["scores"].items()} if "scores" in self._file else {}

    @property
    def scan_shape(self) -> tuple[int, int] | None:
        """Rows and columns of the scan; None when the patterns are no scan."""
        shape = self.attrs.get("scan_shape")
        return (int(shape[0]), int(shape[1])) if shape else None

    @property
    def step_nm(self) -> tuple[float, float] | None:
        """Distance between scan rows and between scan columns in nm; None when it is not known."""
        step = self.attrs.get("step_nm")
        if not step:
            return None
        return (float(step), float(step)) if isinstance(step, int | float) else (float(step[0]), float(step[1]))

    @cached_property
    def phases(self) -> list[Phase]:
        """The crystal phases, rebuilt from the CIF text in the store."""
        from stemtune.crystal.phase import Phase  # here, because opening a store needs no crystallography

        return [Phase.from_cif_text(text, f"a CIF in '{self.path}'") for text in self.attrs.get("phases_cif", [])]

    @cached_property
    def sha256(self) -> str:
        """Hash of the content: calibration, phases, all labels, and patterns sampled evenly over the store."""
        digest = hashlib.sha256()
        facts = {name: self.attrs.get(name) for name in ("phases_cif", "scan_shape", "step_nm")}
        digest.update(json.dumps([self.n, self.geometry.to_dict(), facts]).encode())
        for name in COLUMNS:
            digest.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        digest.update(self.take(_spread(self.n)).tobytes())
        return digest.hexdigest()


def _spread(n: int) -> npt.NDArray[np.intp]:
    """Return rows spread evenly over a store of `n` patterns."""
    return np.unique(np.linspace(0, n - 1, _SAMPLED).astype(np.intp))


class StoreWriter(AbstractContextManager["StoreWriter"]):
    """Writes a store row by row; the file appears under its name only when the block ends well.

    Parameters
    ----------
    path
        Final name of the store.
    n
        Number of patterns; every row has to be written.
    geometry
        Their common calibration.
    phases
        Crystal phases that `phase` counts in; only their `name` and `cif` text are kept.
    dtype
        uint8, uint16 or float32.
    attrs
        Further attributes: scan_shape, step_nm, origin, the command's options ... Mappings become JSON text.
    split_seed
        Seed of `make_splits`, which fills `split` over groups unless every row came with its own.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        n: int,
        geometry: Geometry,
        phases: Sequence[Phase] = (),
        dtype: npt.DTypeLike = np.uint16,
        attrs: Mapping[str, Any] | None = None,
        split_seed: int = 0,
    ) -> None:
        self.path, self.n, self.geometry, self.dtype = Path(path), n, geometry, np.dtype(dtype)
        if n < 1:
            raise UserError(f"a store of {n} patterns is asked for, but it needs at least 1")
        if self.dtype.name not in PATTERN_TYPES:
            raise ValueError(f"patterns are {self.dtype}, but a store holds {', '.join(PATTERN_TYPES)}")
        self._phases, self._attrs, self._split_seed = list(phases), dict(attrs or {}), split_seed
        self._written = np.zeros(n, dtype=bool)
        self._stack = ExitStack()
        self._columns = {
            name: np.full((n, *shape), unknown, dtype=kind) for name, (shape, kind, unknown) in COLUMNS.items()
        }
        self._columns["group"] = np.arange(n, dtype=np.int32)
        self._scores: dict[str, npt.NDArray[np.float32]] = {}

    def __enter__(self) -> StoreWriter:
        with ExitStack() as stack:
            part = stack.enter_context(whole_file(replaceable_store(self.path)))
            self._file = stack.enter_context(
                h5py.File(part, "w", alignment_threshold=_ALIGNMENT, alignment_interval=_ALIGNMENT)
            )
            shape = (self.n, self.geometry.size, self.geometry.size)
            self._patterns = self._file.create_dataset("patterns", shape=shape, dtype=self.dtype, fill_time="never")
            self._stack = stack.pop_all()
        return self

    def write(
        self,
        start: int,
        patterns: npt.ArrayLike,
        *,
        scores: Mapping[str, npt.ArrayLike] | None = None,
        **columns: npt.ArrayLike,
    ) -> None:
        """Write `patterns` (B, size, size) at rows `start` to `start + B`, with their labels.

        Parameters
        ----------
        start
            First row.
        patterns
            Counts; they are stored as the writer's type, so they have to fit it.
        scores
            The labeller's own scores, each (B,), by name.
        **columns
            Any of orientation, confidence, phase, position, group and split (see `Store`). Left out, a row is
            unlabelled, no part of a scan, a group of its own, and put into a split at the end.
        """
        block = np.asarray(patterns)
        rows = slice(start, start + len(block))
        self._patterns[rows] = block
        for name, values in columns.items():
            if name not in self._columns:
                raise TypeError(f"a store has no column '{name}'")
            self._columns[name][rows] = np.asarray(values)
        for name, values in (scores or {}).items():
            self._scores.setdefault(name, np.full(self.n, np.nan, dtype=np.float32))[rows] = np.asarray(values)
        self._written[rows] = True

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if problem is None:
            try:
                self._finish()
            except BaseException:
                self._stack.__exit__(*sys.exc_info())
                raise
        self._stack.__exit__(kind, problem, trace)

    def _finish(self) -> None:
        if not self._written.all():
            raise RuntimeError(f"{int((~self._written).sum())} of {self.n} rows of the store were never written")
        if (self._columns["split"] < 0).any():
            self._columns["split"] = make_splits(self._columns["group"], seed=self._split_seed)
        for name, values in self._columns.items():
            self._file.create_dataset(name, data=values)
        for name, scores in self._scores.items():
            self._file.create_dataset(f"scores/{name}", data=scores)
        facts = {
            "schema": SCHEMA,
            "stemtune_version": __version__,
            "kv": self.geometry.kv,
            "scale_inv_angstrom": self.geometry.scale_inv_angstrom,
            "centre_px": self.geometry.centre_px,
            "phases_name": [phase.name for phase in self._phases],
            "phases_cif": [phase.cif for phase in self._phases],
        }
        for name, value in {**self._attrs, **facts}.items():
            set_attribute(self._file, name, value)


def make_splits(
    group: npt.ArrayLike, fractions: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0
) -> npt.NDArray[np.int8]:
    """Deal whole groups to train (0), validation (1) and test (2).

    Parameters
    ----------
    group
        Group number of each pattern (n,).
    fractions
        Wanted share of the patterns in each split.
    seed
        Seed of the order in which groups are dealt.

    Returns
    -------
    split
        Number of the split (n,) of each pattern. Every split with a positive share gets at least one group as long
        as there are enough groups.
    """
    _, index, count = np.unique(np.asarray(group), return_inverse=True, return_counts=True)
    missing = np.asarray(fractions, dtype=float) / sum(fractions) * len(index)
    empty = set(np.flatnonzero(missing > 0).tolist())
    shares = sorted(empty)
    dealt = np.zeros(len(count), dtype=np.int8)
    for dealt_so_far, chosen in enumerate(np.random.default_rng(seed).permutation(len(count))):
        only_empty = len(count) - dealt_so_far <= len(empty)  # the last groups go where nothing is yet
        best = max(empty if only_empty and empty else shares, key=lambda number: missing[number])
        dealt[chosen] = best
        missing[best] -= count[chosen]
        empty.discard(best)
    return dealt[index]
