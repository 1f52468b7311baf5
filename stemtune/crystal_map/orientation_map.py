"""The orientation map: one answer per scan position, and the file `map.h5` that keeps it.

`map.h5` is a crystal map in orix's own HDF5 layout, so `orix.io.load` opens it, with one more group, `stemtune`,
that holds what orix has no place for: quaternions instead of Euler angles, the n best answers of every pixel, the
CIF text of the phases and how the map was made.

Frames. An orientation turns the lab frame into the crystal frame. The lab frame of a map is the scan's: x along a scan
line, y towards smaller rows, z towards the electron source. It is the pattern's, turned by the scan rotation that the
store was made with (`crystal_map.scan_rotation`); where none was given the two are taken as one.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import numpy.typing as npt

from stemtune._files import existing
from stemtune.errors import UserError

if TYPE_CHECKING:
    from orix.crystal_map import CrystalMap
    from orix.crystal_map import Phase as OrixPhase

    from stemtune.crystal.phase import Phase

SCHEMA = 1
"""Version of the group `stemtune` in map.h5."""

NOT_INDEXED = -1
"""Phase of a pixel that shows no crystal."""

_COLUMNS = ("answers", "answer_confidence", "phase", "signal", "fit")
_OPTIONAL = "goodness"
_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")


@dataclass(frozen=True)
class OrientationMap:
    """Orientations on a scan of `shape` rows and columns; pixels run row by row, n = rows x columns.

    Parameters
    ----------
    shape
        Rows and columns of the scan.
    answers
        Unit quaternions (n, k, 4), the k best answers per pixel, best first, lab-to-crystal, scalar first. They are
        kept for pixels that are not indexed too; NaN where no pattern was measured.
    answer_confidence
        The model's confidence (n, k) in them, from 0 to 1.
    phase
        Index (n,) into `phases`; -1 where the pixel is not indexed.
    signal
        Evidence (n,) that the predicted spots are in the pattern, in standard deviations; see `indexing.spot_check`.
    fit
        Share (n,) of the scattered intensity that the predicted spots explain beyond chance; see `indexing.spot_check`.
    phases
        Crystal phases.
    step_nm
        Distance between rows and between columns in nm; None when it is not known.
    attrs
        How the map was made: model, source, calibration, versions.
    goodness
        Correlation (n, k), 0 to 1, of the patterns with the fitted spots of each answer, NaN for those that were not
        fitted; None where no answer was refined; see `indexing.refine`.
    layers
        What else is known of every pixel, by name: arrays (n, ...), `grain` and `kam` for instance.
    tables
        What is known of parts of the map, of grains for instance: by name of the table and name of the column.
    """

    shape: tuple[int, int]
    answers: npt.NDArray[np.float64]
    answer_confidence: npt.NDArray[np.float32]
    phase: npt.NDArray[np.int16]
    signal: npt.NDArray[np.float32]
    fit: npt.NDArray[np.float32]
    phases: list[Phase]
    step_nm: tuple[float, float] | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)
    goodness: npt.NDArray[np.float32] | None = None
    layers: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, npt.NDArray[Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows, columns = self.shape
        held = {name: getattr(self, name) for name in self._columns} | dict(self.layers)
        for name, values in held.items():
            length = len(values)
            if length != rows * columns:
                raise ValueError(f"{name} has {length} entries, but the map has {rows} x {columns} pixels")

    @property
    def _columns(self) -> tuple[str, ...]:
        return _COLUMNS if self.goodness is None else (*_COLUMNS, _OPTIONAL)

    @property
    def indexed(self) -> npt.NDArray[np.bool_]:
        """Which pixels (n,) have an orientation."""
        return self.phase >= 0

    @property
    def measured(self) -> npt.NDArray[np.bool_]:
        """Which pixels (n,) had a pattern at all."""
        return np.asarray(np.isfinite(self.answers[:, 0]).all(axis=-1))

    @property
    def orientation(self) -> npt.NDArray[np.float64]:
        """Best orientation (n, 4) per pixel; NaN where not indexed."""
        best: npt.NDArray[np.float64] = np.where(self.indexed[:, None], self.answers[:, 0], np.nan)
        return best

    @property
    def confidence(self) -> npt.NDArray[np.float32]:
        """The model's confidence (n,) in its best answer; 0 where not indexed."""
        return np.where(self.indexed, self.answer_confidence[:, 0], 0).astype(np.float32)

    @property
    def scan_unit(self) -> str:
        """nm, or px when the step is not known."""
        return "px" if self.step_nm is None else "nm"

    def to_orix(self) -> CrystalMap:
        """Return the map for orix: coordinates in `scan_unit`, properties confidence, signal and fit, of a
        refined map goodness too, and every layer of one number per pixel.

        orix has no orientation without numbers: pixels that are not indexed carry the identity there, with the
        phase -1 that orix reads as *not_indexed*, and where a pixel has fewer than k answers its best one repeats.
        """
        from orix.crystal_map import CrystalMap, PhaseList, create_coordinate_arrays
        from orix.quaternion import Rotation

        best = np.where(self.indexed[:, None], self.orientation, (1.0, 0.0, 0.0, 0.0))[:, None]
        offered = self.indexed[:, None] & np.isfinite(self.answers).all(axis=-1)
        quaternions = np.where(offered[..., None], self.answers, best)
        if quaternions.shape[1] == 1:
            quaternions = quaternions[:, 0]
        properties = {
            "confidence": self.confidence,
            "signal": np.nan_to_num(self.signal),
            "fit": np.nan_to_num(self.fit),
        }
        if self.goodness is not None:
            properties[_OPTIONAL] = np.nan_to_num(self.goodness[:, 0])
        properties |= {name: values for name, values in self.layers.items() if values.ndim == 1}
        coordinates, _ = create_coordinate_arrays(self.shape, self.step_nm or (1, 1))
        phases = PhaseList([orix_phase(phase, _COLOURS[i % len(_COLOURS)]) for i, phase in enumerate(self.phases)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = CrystalMap(
                rotations=Rotation(quaternions),
                phase_id=self.phase.astype(int),
                x=coordinates["x"],
                y=coordinates["y"],
                phase_list=phases,
                prop=properties,
                scan_unit=self.scan_unit,
            )
        if not self.indexed.all():
            phases.add_not_indexed()
        made.phases = phases  # orix has dropped those that no pixel has
        return made

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write `map.h5`; the caller sees to it that the name is a temporary one."""
        from orix import io

        io.save(str(path), self.to_orix(), overwrite=True)
        with h5py.File(path, "a") as file:
            group = file.create_group("stemtune")
            for name in self._columns:
                group.create_dataset(name, data=getattr(self, name))
            for name, values in self.layers.items():
                group.create_dataset(f"layers/{name}", data=values, compression="gzip", compression_opts=1)
            for table, columns in self.tables.items():
                for name, values in columns.items():
                    kind = h5py.string_dtype() if values.dtype.kind == "U" else values.dtype
                    group.create_dataset(f"tables/{table}/{name}", data=values.astype(kind))
            group.attrs["schema"] = SCHEMA
            group.attrs["shape"] = self.shape
            group.attrs["phases_cif"] = json.dumps([phase.cif for phase in self.phases])
            if self.step_nm is not None:
                group.attrs["step_nm"] = self.step_nm
            group.attrs["facts"] = json.dumps(dict(self.attrs))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> OrientationMap:
        """Read a `map.h5` that `write` made, or the one in the map folder `path`.

        Raises
        ------
        UserError
            When the file is missing, no HDF5, truncated, or not written by stemtune.
        """
        from stemtune.crystal.phase import Phase

        found = map_file(path)
        try:
            with h5py.File(found) as file:
                group = file.get("stemtune")
                if group is None or "schema" not in group.attrs or any(name not in group for name in _COLUMNS):
                    raise UserError(f"'{found}' is HDF5, but no map of stemtune: it lacks the group 'stemtune'")
                if int(group.attrs["schema"]) > SCHEMA:
                    raise UserError(f"'{found}' was written by a newer stemtune; update stemtune to read it")
                columns = {name: group[name][()] for name in (*_COLUMNS, _OPTIONAL) if name in group}
                layers = {name: values[()] for name, values in group.get("layers", {}).items()}
                tables = {name: _table(columns) for name, columns in group.get("tables", {}).items()}
                attrs = dict(group.attrs)
        except OSError as problem:
            raise UserError(f"'{found}' cannot be read as HDF5 ({_first_line(problem)}); is it truncated?") from None
        step = attrs.get("step_nm")
        return cls(
            shape=(int(attrs["shape"][0]), int(attrs["shape"][1])),
            phases=[Phase.from_cif_text(text) for text in json.loads(attrs["phases_cif"])],
            step_nm=None if step is None else (float(step[0]), float(step[1])),
            attrs=json.loads(attrs["facts"]),
            layers=layers,
            tables=tables,
            **columns,
        )


def _table(columns: h5py.Group) -> dict[str, npt.NDArray[Any]]:
    return {
        name: values.asstr()[()].astype(str) if h5py.check_string_dtype(values.dtype) else values[()]
        for name, values in columns.items()
    }


def map_file(path: str | os.PathLike[str]) -> Path:
    """Return the file of a map: `path` itself, or `map.h5` inside the map folder `path`."""
    found = existing(path, "the map")
    return existing(found / "map.h5", "the map") if found.is_dir() else found


def orix_phase(phase: Phase, colour: str = "tab:blue") -> OrixPhase:
    """Return `phase` for orix, with its true space group, lattice and all atoms of the cell."""
    from diffpy.structure import Atom, Lattice, Structure
    from orix.crystal_map import Phase as OrixPhase

    atoms = [
        Atom(str(element), xyz=np.asarray(place, dtype=float), occupancy=float(share))
        for element, place, share in zip(phase.elements, np.asarray(phase.fractional), phase.occupancy, strict=True)
    ]
    lattice = Lattice(phase.a, phase.b, phase.c, phase.alpha, phase.beta, phase.gamma)
    structure = Structure(atoms=atoms, lattice=lattice, title=phase.name)
    return OrixPhase(name=phase.name, space_group=int(phase.space_group), structure=structure, color=colour)


def _first_line(problem: BaseException) -> str:
    return str(problem).splitlines()[0]
