"""`.ctf`, the Channel Text File of Oxford Instruments (HKL), which Bruker, ASTAR, EMsoft, MTEX and DREAM.3D use too.

Angles are in degrees, lengths in µm; a phase is a line of the header with its lattice, name, number of the Laue class
(1 to 11, as in the International Tables) and space group (0: not stated, as MTEX writes it). Phase 0 is not indexed.
Numbers may have decimal commas. The confidence read is the dot product, else exp(-MAD / 1 degree) of the mean angular
deviation, else, where MAD is 0 throughout, the band contrast.

- The crystal axes are Oxford's, X || a*, Z || c, for every phase, and the header written says so. They differ from ours
  (e1 along a, e3 along c*) by 30 degrees about c in trigonal and hexagonal cells, by beta - 90 degrees about b in
  monoclinic ones, by something of both in triclinic ones, and not at all in the others. orix's reader takes them for
  its own axes, so its orientations of those cells are off by just that; MTEX's and ours do not.
- The lab axes are ours: x to the right, y up, as Oxford has them.
- Written are the true space group, the number of the Laue class, and the lattice with enough digits; without a known
  step coordinates count scan pixels, and the header says so. Not indexed is phase 0 with the error 3 (no solution). BC
  is 255 times the confidence, BS 255 times the explained intensity; Bands and MAD, which are of Kikuchi bands, are 0.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stemtune._version import __version__
from stemtune.crystal.lattice import Lattice
from stemtune.crystal.point_groups import LAUE_CLASSES
from stemtune.crystal.rotations import to_euler_deg
from stemtune.crystal.symmetry import Symmetry
from stemtune.crystal_map.frame_rotations import to_frame
from stemtune.crystal_map.frames import AUTO
from stemtune.crystal_map.grid import GridHeader, Points, grid_of, map_of
from stemtune.crystal_map.io.orix_h5 import check_same
from stemtune.crystal_map.io.text import from_euler, number, numbers, read_lines, table
from stemtune.crystal_map.orientation_map import NOT_INDEXED, OrientationMap, PhaseDescription
from stemtune.errors import UserError

_NEEDED = ("Phase", "X", "Y", "Euler1", "Euler2", "Euler3")
_EMSOFT = {"MAD": "DP", "BC": "OSM", "BS": "IQ"}


def read_ctf(path: Path, frame: str = AUTO) -> OrientationMap:
    """Read the `.ctf` file `path`; `frame` "auto" is "oxford", whoever wrote it.

    Raises `UserError` where the file is cut off or is no `.ctf`.
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
    column, notes = _named_columns(data, names, source)
    program = _program(header)
    scores = {name: values for name, values in column.items() if name not in _NEEDED}
    if program == "EMsoft":
        scores = {_EMSOFT.get(name, name): values for name, values in scores.items()}
    made = Points(
        orientation=from_euler(np.stack([column[name] for name in ("Euler1", "Euler2", "Euler3")], axis=1)),
        phase=_phase_index(column["Phase"], len(phases), source),
        phases=phases,
        scores=scores,
        confidence=_confidence(scores),
        program=program,
        notes=[*doubts, *notes],
    )
    grid = grid_of(column["X"], column["Y"], grid_header, source)
    in_pixels = any("coordinates in scan pixels" in line for line in header)
    return map_of(made, grid, "oxford" if frame == AUTO else frame, None if in_pixels else 1000.0)


def _named_columns(
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


def _grid_header(header: list[str], source: str) -> GridHeader:
    """Return what the header says of the grid."""
    facts: dict[str, str] = {}
    for line in header:
        if match := re.match(r"(XCells|YCells|XStep|YStep)\s+(\S+)", line):
            facts[match[1]] = match[2]
    try:
        steps = (number(facts["YStep"]), number(facts["XStep"])) if {"XStep", "YStep"} <= set(facts) else None
        cells = (int(facts["YCells"]), int(facts["XCells"])) if {"XCells", "YCells"} <= set(facts) else (None, None)
    except ValueError as problem:
        raise UserError(f"{source} has a header with an unreadable number ({problem}); correct it") from None
    if 0 in cells:
        raise UserError(
            f"{source} says in its header that it has {cells[1]} x {cells[0]} cells; put the true XCells and YCells"
            " there, or export it again"
        )
    rows, columns = cells
    points = rows * columns if rows and columns else None
    return GridHeader(rows, columns, points, steps, ("YStep", "XStep"))


def _phases(header: list[str], source: str) -> tuple[list[PhaseDescription], list[str]]:
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


def _phase(line: str, source: str, notes: list[str]) -> PhaseDescription:
    words = line.split("\t")
    try:
        lattice = Lattice(*numbers(words[0]), *numbers(words[1])).on_hexagonal_axes()
        laue_number = int(words[3])
        space_group = int(words[4]) if len(words) > 4 and words[4].strip() else 0
        laue = LAUE_CLASSES[laue_number - 1] if laue_number >= 1 else ""
    except (ValueError, TypeError, IndexError):
        raise UserError(
            f"{source} describes a phase by '{line.strip()[:80]}', but it must be a;b;c, angles, name, number of the"
            " Laue class (1 to 11) and space group, with tabs between; correct the header"
        ) from None
    known = space_group if 1 <= space_group <= 230 else None
    if not laue and known is None:
        raise UserError(f"{source} does not say the Laue class of its phase '{words[2]}'; correct the header")
    if known and laue and Symmetry.of_map_phase(laue, lattice, known).laue != laue:
        notes.append(
            f"its phase '{words[2].strip()}' has the Laue class {laue} but the space group {known} of another; the Laue"
            " class counts"
        )
        known = None
    return PhaseDescription(words[2].strip(), Symmetry.of_map_phase(laue, lattice, known), lattice, known, laue)


def _phase_index(given: npt.NDArray[np.float64], count: int, source: str) -> npt.NDArray[np.int16]:
    """Return the index (m,) into the phases; -1 for phase 0, which is not indexed."""
    wrong = (given < -1) | (given > count) | (given != np.rint(given))
    if wrong.any():
        raise UserError(
            f"{source} has points of phase {given[wrong][0]:g}, but its header lists {count}; correct the header"
        )
    return np.where(given < 1, NOT_INDEXED, given - 1).astype(np.int16)


def _confidence(scores: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any] | None:
    if "DP" in scores:
        return scores["DP"]
    if "MAD" in scores and scores["MAD"].any():
        return np.asarray(np.exp(-scores["MAD"]))
    return scores.get("BC") if "BC" in scores and scores["BC"].any() else None


_NO_SOLUTION = 3
_WRITTEN = ("Phase", "X", "Y", "Bands", "Error", "Euler1", "Euler2", "Euler3", "MAD", "BC", "BS")
_WRITTEN_AS = ("%d", "%.9g", "%.9g", "%d", "%d", "%.4f", "%.4f", "%.4f", "%.4f", "%d", "%d")


def write_ctf(orientation_map: OrientationMap, path: str | os.PathLike[str]) -> None:
    """Write the best orientation of every pixel as `.ctf` and check what our own reader reads back.

    Raises
    ------
    RuntimeError
        When the file does not read back as the same map.
    """
    target = Path(path)
    rows, columns = orientation_map.shape
    dy, dx = (value / 1000 for value in orientation_map.step_nm) if orientation_map.step_nm else (1.0, 1.0)
    row, column = np.divmod(np.arange(rows * columns), columns)
    indexed = orientation_map.indexed
    points = np.zeros((rows * columns, len(_WRITTEN)))
    points[:, 0] = orientation_map.phase + 1
    points[:, 1], points[:, 2] = column * dx, row * dy
    points[:, 4] = np.where(indexed, 0, _NO_SOLUTION)
    points[:, 5:8] = _euler(orientation_map)
    points[:, 9] = np.rint(255 * np.clip(np.nan_to_num(orientation_map.confidence), 0, 1))
    explained = 0 if orientation_map.explained_intensity is None else np.nan_to_num(orientation_map.explained_intensity)
    points[:, 10] = np.where(indexed, np.rint(255 * np.clip(explained, 0, 1)), 0)
    header = [*_written_header(orientation_map, dx, dy), "\t".join(_WRITTEN)]
    with target.open("w", encoding="utf-8", newline="\n") as file:
        file.write("\n".join(header) + "\n")
        np.savetxt(file, points, fmt="\t".join(_WRITTEN_AS))
    check_same(orientation_map, read_ctf(target), str(target))


def _written_header(orientation_map: OrientationMap, dx: float, dy: float) -> list[str]:
    unit = "um" if orientation_map.step_nm else "scan pixels (the step is not known)"
    rows, columns = orientation_map.shape
    kv = orientation_map.attrs.get("geometry", {}).get("kv", 0)
    microscope = {"Mag": 0, "Coverage": 100, "Device": 0, "KV": f"{kv:g}", "TiltAngle": 0, "TiltAxis": 0}
    facts = "\t".join(f"{name}\t{value}" for name, value in microscope.items())
    lines = [
        "Channel Text File",
        f"Prj\tmap of stemtune; crystal axes X||a*, Z||c (Oxford's), lab x right, y up; coordinates in {unit}",
        f"Author\tstemtune {__version__}",
        "JobMode\tGrid",
        f"XCells\t{columns}",
        f"YCells\t{rows}",
        f"XStep\t{dx:.9g}",
        f"YStep\t{dy:.9g}",
        *(f"AcqE{place}\t0" for place in (1, 2, 3)),
        f"Euler angles refer to Sample Coordinate system (CS0)!\t{facts}",
        f"Phases\t{len(orientation_map.phases)}",
    ]
    for phase in orientation_map.crystals:
        edges = ";".join(f"{value:.6g}" for value in phase.lattice[:3])
        angles = ";".join(f"{value:.6g}" for value in phase.lattice[3:])
        laue = LAUE_CLASSES.index(phase.symmetry.laue) + 1
        name = " ".join(phase.name.split()) or "unnamed"
        lines.append(f"{edges}\t{angles}\t{name}\t{laue}\t{phase.space_group}\t\t\tby stemtune")
    return lines


def _euler(orientation_map: OrientationMap) -> np.ndarray:
    """Return Bunge's angles (n, 3) in degrees in Oxford's axes; 0 where not indexed."""
    euler = np.zeros((len(orientation_map.phase), 3))
    for index, phase in enumerate(orientation_map.crystals):
        own = orientation_map.phase == index
        turned = to_frame(orientation_map.orientation[own], "oxford", phase.lattice, phase.symmetry.laue)
        euler[own] = to_euler_deg(torch.from_numpy(turned)).numpy()
    return euler
