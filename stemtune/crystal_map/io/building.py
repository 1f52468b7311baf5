"""From the columns of a map file to a `ForeignMap`: points onto the grid, angles into our frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from stemtune.crystal.rotations import from_euler_deg
from stemtune.crystal_map.foreign import NOT_INDEXED, ForeignMap, ForeignPhase
from stemtune.crystal_map.frame_turns import from_frame
from stemtune.crystal_map.frames import SWAPPED
from stemtune.crystal_map.grid import Grid


@dataclass(frozen=True)
class Columns:
    """What a file holds of its m points, in its own order and frame.

    Parameters
    ----------
    orientation
        Unit quaternions (m, 4), or NaN.
    phase
        Index (m,) into `phases`; -1 where not indexed.
    phases
        The file's phases.
    scores
        Values (m,) by name.
    confidence
        (m,) larger is better; None where there is nothing of the kind.
    program
        What wrote the file.
    notes
        What the user ought to know.
    """

    orientation: npt.NDArray[np.float64]
    phase: npt.NDArray[np.int16]
    phases: Sequence[ForeignPhase]
    scores: Mapping[str, npt.NDArray[np.floating]] = field(default_factory=dict)
    confidence: npt.NDArray[np.floating] | None = None
    program: str = ""
    notes: Sequence[str] = ()


def build(columns: Columns, grid: Grid, frame: str, nm_per_unit: float | None) -> ForeignMap:
    """Return the map of `columns` on `grid`; `nm_per_unit` is the length of the grid's unit, None if not known."""
    orientation = np.full_like(columns.orientation, np.nan)
    for index, phase in enumerate(columns.phases):
        own = columns.phase == index
        laue = None if phase.symmetry is None else phase.symmetry.laue
        orientation[own] = from_frame(columns.orientation[own], frame, phase.lattice, laue)
    shape, pixel, steps = grid.shape, grid.pixel, grid.steps
    if frame in SWAPPED:
        row, column = np.divmod(pixel, shape[1])
        shape, pixel = (shape[1], shape[0]), column * shape[0] + row
        steps = None if steps is None else (steps[1], steps[0])
    n = shape[0] * shape[1]

    def laid(values: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        full = np.full(n, np.nan, dtype=np.float32)
        full[pixel] = values
        return full

    everywhere = np.full((n, 4), np.nan)
    everywhere[pixel] = orientation
    phases = np.full(n, NOT_INDEXED, dtype=np.int16)
    phases[pixel] = columns.phase
    known = steps is not None and nm_per_unit is not None
    return ForeignMap(
        shape=shape,
        orientation=everywhere,
        phase=phases,
        phases=list(columns.phases),
        scores={name: laid(values) for name, values in columns.scores.items()},
        confidence=None if columns.confidence is None else laid(columns.confidence),
        step_nm=(steps[0] * nm_per_unit, steps[1] * nm_per_unit) if known and steps and nm_per_unit else None,
        frame=frame,
        program=columns.program,
        notes=[*columns.notes, *grid.notes],
    )


def from_euler(euler_deg: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the orientations (m, 4) of Bunge's Euler angles (m, 3) in degrees, as the file means them."""
    return np.asarray(from_euler_deg(torch.from_numpy(np.ascontiguousarray(euler_deg))).numpy())
