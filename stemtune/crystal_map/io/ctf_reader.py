"""`.ctf`, the Channel Text File of Oxford Instruments (HKL), which Bruker, ASTAR, EMsoft, MTEX and stemtune write too.

Angles are in degrees, lengths in µm; a phase is a line of the header with its lattice, name, number of the Laue class
(1 to 11, as in the International Tables) and space group (0: not said, as MTEX writes it). Phase 0 is not indexed. The
crystal axes are X || a*, Z || c (see `frames`): 30 degrees about c from orix's for trigonal and hexagonal cells, which
orix's own reader leaves out. Numbers may have decimal commas. The sign of MAD, the mean angular deviation in degrees,
is turned for the confidence: exp(-MAD / 1 degree); where MAD is 0 throughout, the band contrast counts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stemtune.crystal.lattice import Lattice
from stemtune.crystal.point_groups import LAUE_CLASSES
from stemtune.crystal_map.foreign import NOT_INDEXED, ForeignMap, ForeignPhase, on_hexagonal_axes, symmetry_of
from stemtune.crystal_map.frames import AUTO
from stemtune.crystal_map.grid import Header, lay
from stemtune.crystal_map.io.building import Columns, build, from_euler
from stemtune.crystal_map.io.text import number, numbers, read_lines, table
from stemtune.errors import UserError

_NEEDED = ("Phase", "X", "Y", "Euler1", "Euler2", "Euler3")
_EMSOFT = {"MAD": "DP", "BC": "OSM", "BS": "IQ"}


def read_ctf(path: Path, frame: str = AUTO) -> ForeignMap:
    """Read the `.ctf` file `path`; `frame` "auto" is "oxford", whoever wrote it.

    Raises
    ------
    UserError
        Where the file is cut off or is no `.ctf`.
    """
    source = f"'{path}'"
    lines = read_lines(path)
    if not lines or "Channel Text File" not in lines[0]:
        raise UserError(f"{source} does not begin with 'Channel Text File', so it is no .ctf")
    head = next((place for place, line in enumerate(lines) if line.split()[:3] == ["Phase", "X", "Y"]), None)
    if head is None:
        raise UserError(f"{source} has no line of column names (Phase, X, Y ...); it is cut off, export it again")
    header, names = lines[:head], lines[head].split()
    missing = [name for name in _NEEDED if name not in names]
    if missing:
        raise UserError(f"{source} has no column {missing[0]}; export it with all columns")
    grid_header = _grid_header(header, source)
    phases, doubts = _phases(header, source)
    if head + 1 == len(lines):
        raise UserError(f"{source} holds a header but no points; export it again")
    data = table(lines, head + 1, source)
    column, notes = _columns(data, names, source)
    program = _program(header)
    scores = {name: values for name, values in column.items() if name not in _NEEDED}
    if program == "EMsoft":
        scores = {_EMSOFT.get(name, name): values for name, values in scores.items()}
    made = Columns(
        orientation=from_euler(np.stack([column[name] for name in ("Euler1", "Euler2", "Euler3")], axis=1)),
        phase=_phase_index(column["Phase"], len(phases), source),
        phases=phases,
        scores=scores,
        confidence=_confidence(scores),
        program=program,
        notes=[*doubts, *notes],
    )
    grid = lay(column["X"], column["Y"], grid_header, source)
    in_pixels = any("coordinates in scan pixels" in line for line in header)
    return build(made, grid, "oxford" if frame == AUTO else frame, None if in_pixels else 1000.0)


def _columns(
    data: npt.NDArray[np.float64], names: list[str], source: str
) -> tuple[dict[str, npt.NDArray[np.float64]], list[str]]:
    """Return the columns by name, and a note where the file has fewer or more of them than names."""
    held = min(data.shape[1], len(names))
    absent = [name for name in _NEEDED if name not in names[:held]]
    if absent:
        raise UserError(f"{source} has {data.shape[1]} numbers in a row, but its column {absent[0]} is further on")
    notes = []
    if data.shape[1] != len(names):
        notes.append(f"it names {len(names)} columns but has {data.shape[1]} numbers in a row; the first {held} count")
    return {name: data[:, place] for place, name in enumerate(names[:held])}, notes


def _program(header: list[str]) -> str:
    text = "\n".join(header)
    for mark, name in (
        ("ACOM RES", "ASTAR"),
        ("EMsoft v.", "EMsoft"),
        ("Created from mtex", "MTEX"),
        ("stemtune", "stemtune"),
    ):
        if mark in text:
            return name
    return "Oxford or Bruker"


def _grid_header(header: list[str], source: str) -> Header:
    """Return what the header says of the grid."""
    facts: dict[str, str] = {}
    for line in header:
        if match := re.match(r"(XCells|YCells|XStep|YStep)\s+(\S+)", line):
            facts[match[1]] = match[2]
    try:
        steps = (number(facts["YStep"]), number(facts["XStep"])) if {"XStep", "YStep"} <= set(facts) else None
        cells = (int(facts["YCells"]), int(facts["XCells"])) if {"XCells", "YCells"} <= set(facts) else (None, None)
    except ValueError as problem:
        raise UserError(f"{source} has a header with an unreadable number ({problem}); mend it") from None
    if 0 in cells:
        raise UserError(
            f"{source} says in its header that it has {cells[1]} x {cells[0]} cells; put the true XCells and YCells"
            " there, or export it again"
        )
    rows, columns = cells
    points = rows * columns if rows and columns else None
    return Header(rows, columns, points, steps, ("YStep", "XStep"))


def _phases(header: list[str], source: str) -> tuple[list[ForeignPhase], list[str]]:
    """Return the phases, the first of which has number 1 in the points, and what contradicts itself in them."""
    place = next((place for place, line in enumerate(header) if re.match(r"Phases\s+\d+", line)), None)
    if place is None:
        raise UserError(f"{source} lists no phases in its header (a line 'Phases'); export it again")
    count = int(header[place].split()[1])
    listed = header[place + 1 : place + 1 + count]
    if len(listed) < count:
        raise UserError(f"{source} announces {count} phases but lists {len(listed)}; export it again")
    notes: list[str] = []
    return [_phase(line, source, notes) for line in listed], notes


def _phase(line: str, source: str, notes: list[str]) -> ForeignPhase:
    words = line.split("\t")
    try:
        lattice = on_hexagonal_axes(Lattice(*numbers(words[0]), *numbers(words[1])))
        laue_number = int(words[3])
        space_group = int(words[4]) if len(words) > 4 and words[4].strip() else 0
        laue = LAUE_CLASSES[laue_number - 1] if laue_number >= 1 else ""
    except (ValueError, TypeError, IndexError):
        raise UserError(
            f"{source} describes a phase by '{line.strip()[:80]}', but it must be a;b;c, angles, name, number of the"
            " Laue class (1 to 11) and space group, with tabs between; mend the header"
        ) from None
    known = space_group if 1 <= space_group <= 230 else None
    if not laue and known is None:
        raise UserError(f"{source} does not say the Laue class of its phase '{words[2]}'; mend the header")
    if known and laue and symmetry_of(laue, lattice, known).laue != laue:
        notes.append(
            f"its phase '{words[2].strip()}' has the Laue class {laue} but the space group {known} of another; the Laue"
            " class counts"
        )
        known = None
    return ForeignPhase(words[2].strip(), symmetry_of(laue, lattice, known), lattice, known, laue)


def _phase_index(given: npt.NDArray[np.float64], count: int, source: str) -> npt.NDArray[np.int16]:
    """Return the index (m,) into the phases; -1 for phase 0, which is not indexed."""
    wrong = (given < -1) | (given > count) | (given != np.rint(given))
    if wrong.any():
        raise UserError(
            f"{source} has points of phase {given[wrong][0]:g}, but its header lists {count}; mend the header"
        )
    return np.where(given < 1, NOT_INDEXED, given - 1).astype(np.int16)


def _confidence(scores: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any] | None:
    if "DP" in scores:
        return scores["DP"]
    if "MAD" in scores and scores["MAD"].any():
        return np.asarray(np.exp(-scores["MAD"]))
    return scores.get("BC") if "BC" in scores and scores["BC"].any() else None
