"""Writing stores, row by row: whole or absent, and where asked for, in a file that a later run resumes.

All arrays and attributes are laid out, at their places in the file, before the first pattern is written. From then
on only numbers inside the arrays change, so the file stays intact HDF5 whenever the process is killed. What is written
is hashed while it is written: `content_sha256` is the hash of the hashes of all patterns, in their order.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import numpy.typing as npt

from stemtune._files import replaceable_file, whole_file
from stemtune._version import __version__
from stemtune.dataset.schema import (
    COLUMNS,
    CONTENT_SHA256,
    OVERLAP,
    PATTERN_TYPES,
    SCHEMA,
    UNFINISHED,
    attribute_form,
    disk_is_full,
    make_splits,
    plain,
    replaceable_store,
    set_attribute,
)
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import Interrupted, UserError

if TYPE_CHECKING:
    from stemtune.crystal.phase import Phase

_ALIGNED = {"alignment_threshold": 4096, "alignment_interval": 4096}  # patterns start on a page boundary of the file
_KEEP_EVERY_S = 5.0  # how often what was written is made sure to be on the disk
_HASHED_ROWS = 256  # that are read at a time to be hashed, of a run before this one


class StoreWriter(AbstractContextManager["StoreWriter"]):
    """Writes a store of `n` patterns row by row; the file appears at `path` only when the block ends well.

    Every row has to be written. All patterns share one `geometry`; of `phases`, the crystals that the column `phase`
    counts in, `name` and `cif` text are kept; `dtype` is uint8, uint16 or float32. `attrs` are further attributes:
    scan_shape, step_nm, origin, the command's options ...; mappings become JSON text. `split_seed` is that of
    `make_splits`, which fills `split` over groups unless every row came with its own. With `overlap` rows may have
    several grains, and the columns of `schema.OVERLAP` are kept too. `calibration` are arrays that show how the
    patterns were calibrated, kept in a group of that name. `hashed` says whether the patterns are hashed; where what
    they are read from is hashed already, `amend` sets `content_sha256`.
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
        overlap: bool = False,
        calibration: Mapping[str, npt.NDArray[Any]] | None = None,
        hashed: bool = True,
    ) -> None:
        self.path, self.n, self.geometry, self.dtype = Path(path), n, geometry, np.dtype(dtype)
        if n < 1:
            raise UserError(f"a store of {n} patterns is asked for, but it needs at least 1")
        if self.dtype.name not in PATTERN_TYPES:
            raise ValueError(f"patterns are {self.dtype}, but a store holds {', '.join(PATTERN_TYPES)}")
        self._split_seed, self._hashed = split_seed, hashed
        self._columns = {**COLUMNS, **(OVERLAP if overlap else {})}
        self._calibration = dict(calibration or {})
        self._attrs = {
            **(attrs or {}),
            "stemtune_version": __version__,
            "kv": geometry.kv,
            "scale_inv_angstrom": geometry.scale_inv_angstrom,
            "centre_px": geometry.centre_px,
            "phases_name": [phase.name for phase in phases],
            "phases_cif": [phase.cif for phase in phases],
        }
        self.done = np.zeros(n, dtype=bool)
        self._hashes = np.zeros((n, 32), dtype=np.uint8)  # of the rows that this run has written
        self._data: dict[str, h5py.Dataset] = {}  # open arrays; to open one anew for every block costs time
        self._stack = ExitStack()

    def __enter__(self) -> StoreWriter:
        with ExitStack() as stack:
            part = stack.enter_context(whole_file(replaceable_store(self.path)))
            self._file = stack.enter_context(h5py.File(part, "w", **_ALIGNED))
            self._lay_out(self._file)
            self._open_arrays()
            self._stack = stack.pop_all()
        return self

    def _open_arrays(self) -> None:
        self._data = {name: self._file[name] for name in ("patterns", *self._columns)}

    def _lay_out(self, file: h5py.File) -> None:
        """Write all that is known before the first pattern comes into a new file."""
        at_once = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        at_once.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        shape = (self.n, self.geometry.size, self.geometry.size)
        file.create_dataset("patterns", shape, self.dtype, dcpl=at_once, fill_time="never")
        for name, (inner, kind, unknown) in self._columns.items():
            file.create_dataset(name, data=np.full((self.n, *inner), unknown, dtype=kind))
        for name, array in self._calibration.items():
            file.create_dataset(f"calibration/{name}", data=array)
        file["group"][...] = np.arange(self.n)
        for name, value in {**self._attrs, "schema": UNFINISHED}.items():
            set_attribute(file, name, value)
        file.attrs[CONTENT_SHA256] = np.bytes_("0" * 64)  # of fixed length: text would move when it is changed

    def write(
        self,
        start: int,
        patterns: npt.ArrayLike,
        *,
        scores: Mapping[str, npt.ArrayLike] | None = None,
        **columns: npt.ArrayLike,
    ) -> None:
        """Write `patterns` (B, size, size) at rows `start` to `start + B`, with their labels.

        Counts are stored as the writer's type, so they have to fit it. `scores` are the labeller's own (B,), by name;
        `columns` any of orientation, confidence, phase, position, group, split and those of `schema.OVERLAP` (see
        `Store`). Left out, a row is unlabelled, no part of a scan, a group of its own, and put into a split at the end.
        """
        block = np.asarray(patterns)
        rows = slice(start, start + len(block))
        self._put(start, block)
        for name, values in columns.items():
            if name not in self._columns:
                raise TypeError(f"a store has no column '{name}'")
            self._data[name][rows] = np.asarray(values)
        for name, values in (scores or {}).items():
            place = f"scores/{name}"
            if place not in self._data:
                self._data[place] = self._file.create_dataset(place, data=np.full(self.n, np.nan, dtype=np.float32))
            self._data[place][rows] = np.asarray(values)
        self.done[rows] = True

    def _put(self, start: int, block: npt.NDArray[Any]) -> None:
        """Write patterns to their place in the file, past HDF5, whose lock would stop a thread that reads HDF5."""
        data = self._data["patterns"]
        if block.dtype != data.dtype or not block.size:
            data[start : start + len(block)] = block
            if self._hashed:
                self._hash(start, data[start : start + len(block)])
            return
        if start < 0 or start + len(block) > self.n or block.shape[1:] != data.shape[1:]:
            raise ValueError(f"patterns of shape {block.shape} do not fit {data.shape} from row {start} on")
        block = np.ascontiguousarray(block)
        hashing = _hasher().submit(self._hash, start, block) if self._hashed else None
        left = block.reshape(-1).view(np.uint8).data
        place, descriptor = data.id.get_offset() + start * block[0].nbytes, self._file.id.get_vfd_handle()
        while left:
            written = os.pwrite(descriptor, left, place)
            left, place = left[written:], place + written
        if hashing is not None:
            hashing.result()

    def _hash(self, start: int, block: npt.NDArray[Any]) -> None:
        digests = [hashlib.sha256(pattern.data).digest() for pattern in np.ascontiguousarray(block)]
        self._hashes[start : start + len(block)] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)

    def amend(self, name: str, text: str | bytes) -> None:
        """Change an attribute that the writer was made with to a text of the same length."""
        self._file.attrs.modify(name, text)

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
        if disk_is_full(problem):
            raise UserError(f"the disk is full, so '{self.path}' was not written; make room, or choose another --out")

    def _finish(self) -> None:
        if not self.done.all():
            raise RuntimeError(f"{int((~self.done).sum())} of {self.n} rows of the store were never written")
        self._deal()
        if self._hashed:
            rows = np.flatnonzero(~self._hashes.any(axis=1))  # those of a run before this one are read again
            for start in np.unique(rows // _HASHED_ROWS) * _HASHED_ROWS:
                self._hash(start, self._data["patterns"][start : start + _HASHED_ROWS])
            self.amend(CONTENT_SHA256, np.bytes_(hashlib.sha256(self._hashes.tobytes()).hexdigest()))
        self._file.attrs.modify("schema", SCHEMA)  # in its place: nothing else in the file moves

    def _deal(self) -> None:
        if (self._data["split"][()] < 0).any():
            self._data["split"][...] = make_splits(self._data["group"][()], seed=self._split_seed)


class ResumableWriter(StoreWriter):
    """A `StoreWriter` whose unfinished file stays, as `PATH.part`, for the next run with the same settings.

    What is written is on the disk after a few seconds at most, and only then counts as done: a row whose `split` is
    below 0 is yet to be written. So neither Ctrl-C nor a kill nor a crash of the machine costs more than that. With
    `restart` it begins anew, even if there is an unfinished file, `part`. After entering the block `done` (n,) says
    which rows an earlier run wrote. A `UserError` says on entering that the unfinished file was made with other
    settings or is being written by another process, `Interrupted` on leaving that Ctrl-C ended the block and rows are
    kept.
    """

    def __init__(self, *arguments: Any, restart: bool = False, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._restart = restart
        self._pending: list[slice] = []
        self._kept_at = time.monotonic()

    def __enter__(self) -> ResumableWriter:
        target = replaceable_file(replaceable_store(self.path))
        self.part = target.with_name(target.name + ".part")
        if self._restart and self.part.exists():
            self._opened().close()  # only what is ours goes
            self.part.unlink()
        if not self.part.exists():
            with whole_file(self.part) as new, h5py.File(new, "w", **_ALIGNED) as file:
                self._lay_out(file)
        self._file = self._opened()
        try:
            self._check_same_settings()
            self._open_arrays()
            self.done = np.asarray(self._data["split"][()] >= 0)
        except BaseException:
            self._file.close()
            raise
        return self

    def _opened(self) -> h5py.File:
        """Return the unfinished file, opened and locked for writing."""
        place = f"'{self.part}'"
        try:
            file = h5py.File(self.part, "r+")
        except BlockingIOError:
            raise UserError(
                f"{place} is being written by another process; wait for it, or choose another --out"
            ) from None
        except OSError as problem:
            reason = str(problem).splitlines()[0]
            raise UserError(f"{place} cannot be resumed ({reason}); remove it, then repeat the command") from None
        if "schema" not in file.attrs or not set(COLUMNS) <= set(file):
            file.close()
            raise UserError(f"{place} is no unfinished store; remove it, or choose another --out")
        return file

    def _check_same_settings(self) -> None:
        data = self._file["patterns"]
        columns = sorted(set(self._file) - {"patterns", "calibration"})
        found = {name: plain(value) for name, value in self._file.attrs.items()}
        found |= {"patterns": data.shape[0], "type": data.dtype.name, "columns": columns}
        wanted = {name: attribute_form(value) for name, value in self._attrs.items() if value is not None}
        wanted |= {"patterns": self.n, "type": self.dtype.name, "columns": sorted(self._columns)}
        for name, value in wanted.items():
            if found.get(name) != value:
                raise UserError(
                    f"'{self.part}' was begun with other settings ({_difference(name, found.get(name), value)}); "
                    "repeat its command to resume it, give --restart to begin anew, or choose another --out"
                )

    def write(self, start: int, patterns: npt.ArrayLike, **columns: Any) -> None:
        """Write rows as `StoreWriter.write` does; `scores` and `split` cannot be resumed and are refused."""
        if columns.get("scores") or "split" in columns:
            raise TypeError("a store that can be resumed takes neither scores nor splits")
        super().write(start, patterns, **columns)
        self._pending.append(slice(start, start + len(np.asarray(patterns))))
        if time.monotonic() - self._kept_at > _KEEP_EVERY_S:
            self._keep()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.id.get_vfd_handle())

    def _keep(self) -> None:
        """Bring what was written to the disk, then mark its rows as done."""
        self._sync()
        for rows in self._pending:
            self._data["split"][rows] = 0
        self._pending.clear()
        self._file.flush()
        self._kept_at = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if problem is None:
                self._finish()
            else:
                with suppress(OSError):  # a full disk, perhaps what ended the block
                    self._keep()
        except KeyboardInterrupt as interrupt:
            problem = interrupt
        finally:
            kept = int((self._data["split"][()] >= 0).sum())
            self._file.close()
        if problem is None:
            self.part.replace(self.path.expanduser())
            return
        if not kept:
            self.part.unlink(missing_ok=True)
        if disk_is_full(problem):
            raise UserError(
                f"the disk is full; {kept:,} of {self.n:,} patterns of '{self.path}' are kept: make room, then repeat "
                "the command, or choose another --out"
            )
        if kept and isinstance(problem, KeyboardInterrupt):
            raise Interrupted(
                f"interrupted; {kept:,} of {self.n:,} patterns are kept in '{self.part}', and the same command goes on "
                "from there"
            ) from None

    def _finish(self) -> None:
        self._keep()
        super()._finish()
        self._sync()

    def _deal(self) -> None:
        self._data["split"][...] = make_splits(self._data["group"][()], seed=self._split_seed)


@cache
def _hasher() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="hash")


def _difference(name: str, was: Any, now: Any) -> str:
    """Return how a setting differs between the unfinished store and the one that is asked for, for people."""
    if name == "options":
        before, after = json.loads(was), json.loads(now)
        name = next(key for key in (*after, *before) if before.get(key) != after.get(key))
        was, now = before.get(name), after.get(name)
    return "another crystal" if name == "phases_cif" else f"`{name}` is {was} there and {now} here"
