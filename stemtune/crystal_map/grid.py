"""Points of a map file on the rows and columns of a scan, from coordinates that headers often contradict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stemtune.crystal_map.frame_rotations import from_frame
from stemtune.crystal_map.frames import AXES_SWAPPED
from stemtune.crystal_map.orientation_map import NOT_INDEXED, OrientationMap, PhaseDescription
from stemtune.errors import UserError


class GridHeader(NamedTuple):
    """What a header says of the grid; None where it says nothing.

    `points` counts them all; on a hexagonal grid rows may take turns in their length, and `columns` is the longer.
    `steps` are the distances between rows and between columns, `names` what the header calls them.
    """

    rows: int | None = None
    columns: int | None = None
    points: int | None = None
    steps: tuple[float, float] | None = None
    names: tuple[str, str] = ("the row step", "the column step")
    hexagonal: bool | None = None


class Grid(NamedTuple):
    """The grid that the points make: pixels run row by row, and point i is at `pixel[i]`.

    `steps` are the distances between rows and between columns in the file's unit, None where there is only one point.
    """

    shape: tuple[int, int]
    pixel: npt.NDArray[np.intp]
    steps: tuple[float, float] | None
    notes: list[str]


@dataclass(frozen=True)
class Points:
    """What a file holds of its m points, in its own order and frame.

    `orientation` (m, 4) unit quaternions or NaN; `phase` (m,) index into `phases`, -1 where not indexed; `scores` (m,)
    by name; `confidence` (m,) larger is better, None where there is nothing of the kind; `notes` for the user.
    """

    orientation: npt.NDArray[np.float64]
    phase: npt.NDArray[np.int16]
    phases: Sequence[PhaseDescription]
    scores: Mapping[str, npt.NDArray[np.floating]] = field(default_factory=dict)
    confidence: npt.NDArray[np.floating] | None = None
    program: str = ""
    notes: Sequence[str] = ()


def map_of(points: Points, grid: Grid, frame: str, nm_per_unit: float | None) -> OrientationMap:
    """Return the map of `points` on `grid`; `nm_per_unit` is the length of the grid's unit, None if not known."""
    orientation = np.full_like(points.orientation, np.nan)
    for index, phase in enumerate(points.phases):
        own = points.phase == index
        laue = None if phase.stated is None else phase.stated.laue
        orientation[own] = from_frame(points.orientation[own], frame, phase.lattice, laue)
    shape, pixel, steps = grid.shape, grid.pixel, grid.steps
    if frame in AXES_SWAPPED:
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
    phases[pixel] = points.phase
    known = steps is not None and nm_per_unit is not None
    confidence = np.full(n, np.nan, np.float32) if points.confidence is None else laid(points.confidence)
    return OrientationMap(
        shape=shape,
        answers=everywhere[:, None],
        answer_confidence=confidence[:, None],
        phase=phases,
        phases=list(points.phases),
        step_nm=(steps[0] * nm_per_unit, steps[1] * nm_per_unit) if known and steps and nm_per_unit else None,
        layers={name: laid(values) for name, values in points.scores.items()},
        attrs={"frame": frame, "program": points.program, "notes": [*points.notes, *grid.notes]},
    )


def grid_of(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], header: GridHeader, source: str) -> Grid:
    """Return the grid of points with coordinates `x` and `y` (m,), in any order.

    The points of a hexagonal grid keep the row and the place in the row that they have, so each is at most a
    quarter of a step from the middle of its pixel on either side.

    Raises `UserError` when the file is cut off, two points stand at one place, or the points make no grid.
    """
    m = len(x)
    if header.rows == 0 or header.columns == 0:
        raise UserError(f"{source} says in its header that it has 0 rows or columns, but holds {m} points; correct it")
    if not m:
        raise UserError(f"{source} holds no points; export it again")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise UserError(f"{source} has points without coordinates; export it again")
    found = _from_coordinates(x, y)
    if found is None:
        if header.rows and header.columns and header.rows * header.columns == m and not header.hexagonal:
            note = "its coordinates are too coarse for its step, so the points count in the order of the file"
            return Grid((header.rows, header.columns), np.arange(m), header.steps, [note])
        raise UserError(f"{source} has points that make no grid of rows and columns, or several at one place")
    shape, pixel, steps, hexagonal = found
    _refuse_cut_off(pixel, shape, header, source)
    notes = _contradictions(m, shape, steps, hexagonal, header)
    if header.steps is not None:
        steps = _better(steps, header.steps)
    return Grid(shape, pixel, steps, notes)


def _from_coordinates(
    x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]
) -> tuple[tuple[int, int], npt.NDArray[np.intp], tuple[float, float] | None, bool] | None:
    """Return shape, pixels, steps and whether the grid is hexagonal; None where the points make no grid."""
    laid = _levels(y)
    if laid is None:
        return None
    row, dy = laid
    order = np.lexsort((x, row))
    along, same = np.diff(x[order]), np.diff(row[order]) == 0
    gaps = along[same]
    dx = 0.0
    if gaps.size:
        fullest = np.sort(x[row == np.bincount(row).argmax()])
        between = np.diff(fullest)
        even = between.min() > 0.3 * between.max() and len(between) > 0
        dx = float((fullest[-1] - fullest[0]) / len(between)) if even else float(np.median(gaps))
        if dx <= 0 or gaps.min() < 0.3 * dx:
            return None  # points on top of one another
    place = (x - x.min()) / dx if dx else np.zeros(len(x))
    fraction = place - np.floor(place + 0.25)  # -0.25 to 0.75: 0 on a square grid, 0.5 on the shifted rows
    shifted = np.abs(fraction - 0.5) < 0.2
    hexagonal = bool(dx and row.max() > 0 and _takes_turns(row, shifted))
    if not hexagonal:
        levels = _levels(x)
        if levels is None:
            return None
        column, dx = levels
    else:
        column = np.floor(place + 0.25).astype(np.intp)
    shape = (int(row.max()) + 1, int(column.max()) + 1)
    pixel = row * shape[1] + column
    if shape[0] * shape[1] > 4 * len(x) + 4 or len(np.unique(pixel)) != len(pixel):
        return None
    steps = None if not dx and not dy else (dy or dx, dx or dy)
    return shape, pixel, steps, hexagonal


def _takes_turns(row: npt.NDArray[np.intp], shifted: npt.NDArray[np.bool_]) -> bool:
    """Say whether every other row is shifted by half a step."""
    odd = row % 2 == 1
    return bool((shifted == odd).all() or (shifted != odd).all())


def _levels(values: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.intp], float] | None:
    """Return the index (m,) of each coordinate on an even ladder and its step (0 for one rung); None for no ladder."""
    spread = float(np.ptp(values))
    rungs = np.unique(values)
    rungs = rungs[np.concatenate(([True], np.diff(rungs) > 1e-6 * spread))]
    if len(rungs) == 1:
        return np.zeros(len(values), dtype=np.intp), 0.0
    gaps = np.diff(rungs)
    for step in (float(spread / len(gaps)), float(np.median(gaps))):
        place = (rungs - rungs[0]) / step
        index = np.rint(place)
        if np.abs(place - index).max() < 0.3 and (np.diff(index) > 0).all():
            nearest = np.rint((values - rungs[0]) / step).astype(np.intp)
            return nearest, step
    return None


def _refuse_cut_off(pixel: npt.NDArray[np.intp], shape: tuple[int, int], header: GridHeader, source: str) -> None:
    """Raise a `UserError` where the points end before the last row is full."""
    m = len(pixel)
    in_row = np.bincount(pixel // shape[1], minlength=shape[0])
    short_end = shape[0] > 2 and in_row[-1] < in_row[-3] and (in_row[:-1] >= in_row[:-1].max() - 1).all()
    if header.points and header.rows and m < header.points and (short_end or shape[0] < header.rows):
        raise UserError(
            f"{source} is cut off: its header says {header.rows} rows of {header.columns} points ({header.points:,}),"
            f" but it holds {m:,}; export or copy it again"
        )
    if short_end and not header.points:
        raise UserError(
            f"{source} is cut off: its last row holds {in_row[-1]} of {in_row[-3]} points; export or copy it again"
        )


def _contradictions(
    m: int, shape: tuple[int, int], steps: tuple[float, float] | None, hexagonal: bool, header: GridHeader
) -> list[str]:
    """Return what the header says otherwise than the points, a sentence each."""
    notes = []
    if header.rows and header.columns and (header.rows, header.columns) != shape:
        notes.append(
            f"its header says {header.rows} rows of {header.columns} points, but they make {shape[0]} rows of"
            f" {shape[1]}; the points count"
        )
    if steps is not None and header.steps is not None:
        for name, stated, seen, many in zip(header.names, header.steps, steps, shape, strict=True):
            if many > 1 and abs(seen - stated) > 0.02 * max(abs(stated), seen):
                apart = f"but the points are {seen:.4g} apart; the points count"
                notes.append(f"its header says {name} {stated:g}, {apart}")
    if hexagonal:
        notes.append(
            "its points make a hexagonal grid; each keeps its row and its place in the row, so every other row is"
            " half a step beside the scan's columns"
        )
    elif header.hexagonal:
        notes.append("its header says the grid is hexagonal, but the points make a square one; the points count")
    missing = shape[0] * shape[1] - m
    if missing > 0 and not (hexagonal and missing <= shape[0]):
        notes.append(f"{missing:,} of its {shape[0]} x {shape[1]} positions have no point; they count as not indexed")
    return notes


def _better(seen: tuple[float, float] | None, stated: tuple[float, float]) -> tuple[float, float] | None:
    """Return the steps that the points make, or the header's where both agree, for it has more digits."""
    if seen is None:
        return stated if min(stated) > 0 else None
    first, second = (
        head if abs(head - step) <= 0.02 * abs(head) else step for step, head in zip(seen, stated, strict=True)
    )
    return first, second
