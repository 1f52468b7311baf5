"""The orientation map: for every scan position an orientation, its phase and what else is known of it.

Maps of every origin are one class: predicted ones, those of other programs (`crystal_map.io`) and the labels of a
store (`dataset.labels`). An orientation turns the lab frame into the crystal frame; the lab frame of a map is the
scan's, see `crystal_map.frame_rotations`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stemtune.crystal.lattice import Lattice
from stemtune.crystal.phase import Phase
from stemtune.crystal.symmetry import Symmetry
from stemtune.errors import UserError

if TYPE_CHECKING:
    from orix.crystal_map import CrystalMap
    from orix.crystal_map import Phase as OrixPhase

NOT_INDEXED = -1
"""Phase of a pixel that shows no crystal."""

_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")


@dataclass(frozen=True)
class PhaseDescription:
    """What a map file says of a phase; it lists no atoms.

    `name` and `point_group` ("43" or "m-3m" for instance) are as the file has them; `stated` Laue class and setting,
    `lattice` (rhombohedral cells rewritten on hexagonal axes) and `space_group` are None where the file does not say.
    """

    name: str
    stated: Symmetry | None = None
    lattice: Lattice | None = None
    space_group: int | None = None
    point_group: str = ""

    @property
    def symmetry(self) -> Symmetry:
        """The symmetry; a `UserError` where the file does not state it."""
        if self.stated is None:
            raise UserError(f"the map does not say the symmetry of its phase '{self.name}'")
        return self.stated

    def __str__(self) -> str:
        known = [] if self.stated is None else [f"Laue class {self.stated.laue}"]
        if self.space_group:
            known.append(f"space group {self.space_group}")
        if self.lattice is not None:
            known.append(str(self.lattice))
        return f"'{self.name}'" + (f" ({', '.join(known)})" if known else "")


@dataclass(frozen=True)
class OrientationMap:
    """Orientations on a scan of `shape` rows and columns; pixels run row by row, n = rows x columns.

    `map[rows, columns]` is the part of the map that the two slices cut out.

    Parameters
    ----------
    shape
        Rows and columns of the scan.
    answers
        Unit quaternions (n, k, 4), the k best answers per pixel, best first, lab-to-crystal, scalar first. They are
        kept for pixels that are not indexed too; NaN where no pattern was measured.
    answer_confidence
        The confidence (n, k) in them, of a model a probability; larger is better, NaN where there is none.
    phase
        Index (n,) into `phases`; -1 where the pixel is not indexed.
    phases
        Crystal phases, or what a file of another program says of them.
    spot_z_score
        Evidence (n,) that the predicted spots are in the pattern, in standard deviations; see `indexing.spot_check`.
        None where the patterns were not asked.
    explained_intensity
        Share (n,) of the scattered intensity that the predicted spots explain beyond chance; None likewise.
    step_nm
        Distance between rows and between columns in nm; None when it is not known.
    attrs
        How the map was made: model, source, calibration, versions; of a file `program`, `frame` and `notes`, what the
        user ought to know of it in one sentence each.
    ncc
        Normalised correlation (n, k), 0 to 1, of the patterns with the fitted spots of each answer, NaN for those that
        were not fitted; None where no answer was refined; see `indexing.refine`.
    layers
        What else is known of every pixel, by name: arrays (n, ...), `grain` and `kam_deg` for instance, or the scores
        of another program under its own names.
    tables
        What is known of parts of the map, of grains for instance: by name of the table and name of the column.
    """

    shape: tuple[int, int]
    answers: npt.NDArray[np.float64]
    answer_confidence: npt.NDArray[np.float32]
    phase: npt.NDArray[np.int16]
    phases: Sequence[Phase | PhaseDescription]
    spot_z_score: npt.NDArray[np.float32] | None = None
    explained_intensity: npt.NDArray[np.float32] | None = None
    step_nm: tuple[float, float] | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)
    ncc: npt.NDArray[np.float32] | None = None
    layers: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, npt.NDArray[Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows, columns = self.shape
        for name, values in {**self.columns(), **self.layers}.items():
            if len(values) != rows * columns:
                raise ValueError(f"{name} has {len(values)} entries, but the map has {rows} x {columns} pixels")

    def columns(self) -> dict[str, Any]:
        """Return the arrays (n, ...) of the map by name, without layers and those that are None."""
        names = ("answers", "answer_confidence", "phase", "spot_z_score", "explained_intensity", "ncc")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def score(self, name: str) -> npt.NDArray[np.float32]:
        """Return `spot_z_score`, `explained_intensity` or `ncc` of the best answer (n,); NaN where there is none."""
        values = getattr(self, name)
        if values is None:
            return np.full(len(self.phase), np.nan, dtype=np.float32)
        return np.asarray(values if values.ndim == 1 else values[:, 0])

    def __getitem__(self, key: tuple[slice, slice]) -> OrientationMap:
        rows, columns = key
        pixel = np.arange(len(self.phase)).reshape(self.shape)[rows, columns]
        if pixel.ndim != 2 or not pixel.size:
            raise ValueError(f"a map of {self.shape} is cut by two slices that leave a pixel, not by {key}")
        kept = pixel.ravel()
        dy, dx = rows.step or 1, columns.step or 1
        step = None if self.step_nm is None else (abs(dy) * self.step_nm[0], abs(dx) * self.step_nm[1])
        changes = {name: values[kept] for name, values in self.columns().items()}
        changes["layers"] = {name: values[kept] for name, values in self.layers.items()}
        return dataclasses.replace(self, shape=(pixel.shape[0], pixel.shape[1]), step_nm=step, tables={}, **changes)

    def __str__(self) -> str:
        title, facts = self.describe()
        return "\n".join([title, *(f"  {name:<10}  {text}" for name, text in facts.items() if text)])

    __repr__ = __str__

    def describe(self) -> tuple[str, dict[str, str]]:
        """Return a title, and what the map holds by topic, for people."""
        shares = [f"{name} {np.mean(self.phase == number):.1%}" for number, name in enumerate(self.phase_names)]
        confidence = self.confidence[self.indexed]
        step = "{:g} x {:g} nm apart".format(*self.step_nm) if self.step_nm else "at an unknown distance"
        refined = self.score("ncc")[self.indexed]
        facts = {
            "scan": f"{self.shape[0]} rows x {self.shape[1]} columns, {step}",
            "indexed": f"{self.indexed.mean():.1%} of {len(self.phase):,} pixels ({', '.join(shares)})",
            "confidence": f"{np.median(confidence):.3g} (median of the indexed pixels)" if len(confidence) else "",
            "answers": f"the best {self.answers.shape[1]} of every pixel"
            + (
                f", refined: ncc {np.nanmedian(refined):.3g} (median of the indexed pixels)"
                if np.isfinite(refined).any()
                else ""
            ),
            **{name: str(value) for name, value in self.attrs.items() if isinstance(value, str | int | float)},
        }
        return f"an orientation map of {self.shape[0]} x {self.shape[1]} pixels", facts

    @property
    def crystals(self) -> list[Phase]:
        """The phases with their atoms; a `UserError` where one is only described."""
        for phase in self.phases:
            if not isinstance(phase, Phase):
                raise UserError(f"the map does not list the atoms of its phase {phase}; predict or label with its CIF")
        return [phase for phase in self.phases if isinstance(phase, Phase)]

    @property
    def phase_names(self) -> list[str]:
        """A name for each phase that no other has: "Fe (229)" and "Fe (225)", by space group, for two called Fe."""
        names = [phase.name for phase in self.phases]
        groups = [f"{p.name} ({p.space_group})" if p.space_group else p.name for p in self.phases]
        names = [group if names.count(name) > 1 else name for name, group in zip(names, groups, strict=True)]
        return [f"{name} #{place}" if names.count(name) > 1 else name for place, name in enumerate(names, start=1)]

    @property
    def laue(self) -> npt.NDArray[np.str_]:
        """Laue class (n,) of every pixel, "" where not indexed."""
        names = [phase.symmetry.laue for phase in self.phases]
        return np.array([*names, ""])[self.phase]

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
        """The confidence (n,) in the best answer; 0 where not indexed."""
        return np.where(self.indexed, self.answer_confidence[:, 0], 0).astype(np.float32)

    @property
    def scan_unit(self) -> str:
        """nm, or px when the step is not known."""
        return "px" if self.step_nm is None else "nm"

    def to_orix(self) -> CrystalMap:
        """Return the map for orix: coordinates in `scan_unit`, the properties confidence, spot_z_score,
        explained_intensity and ncc where the map has them, and every layer of one number per pixel.

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
        properties = {"confidence": np.nan_to_num(self.confidence)}
        for name in ("spot_z_score", "explained_intensity", "ncc"):
            if getattr(self, name) is not None:
                properties[name] = np.nan_to_num(self.score(name))
        properties |= {name: values for name, values in self.layers.items() if values.ndim == 1}
        coordinates, _ = create_coordinate_arrays(self.shape, self.step_nm or (1, 1))
        phases = PhaseList([orix_phase(phase, _COLOURS[i % len(_COLOURS)]) for i, phase in enumerate(self.crystals)])
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


def orix_phase(phase: Phase, colour: str = "tab:blue") -> OrixPhase:
    """Return `phase` for orix, with its true space group, lattice and all atoms of the cell."""
    from diffpy.structure import Atom, Structure
    from diffpy.structure import Lattice as DiffpyLattice
    from orix.crystal_map import Phase as OrixPhase

    atoms = [
        Atom(str(element), xyz=np.asarray(place, dtype=float), occupancy=float(share))
        for element, place, share in zip(phase.elements, np.asarray(phase.fractional), phase.occupancy, strict=True)
    ]
    structure = Structure(atoms=atoms, lattice=DiffpyLattice(*phase.lattice), title=phase.name)
    return OrixPhase(name=phase.name, space_group=int(phase.space_group), structure=structure, color=colour)
