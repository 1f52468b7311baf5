"""`.ang`: the text map of EDAX TSL, which ASTAR, EMsoft, orix and stemtune write too, each a little differently.

Angles are in radians. Columns are phi1, Phi, phi2, x, y, image quality, confidence index, phase, detector signal, fit,
and what came later; ASTAR writes index, reliability, phase, 100 times the reliability; EMsoft image quality, dot
product, phase. Lengths are µm, ASTAR's nm.

Not indexed are points with a confidence index of -1 or Euler angles of 4 pi (EDAX), of phase -1, and of phase 0 where
the header lists several phases; with one phase, 0 is that phase. ASTAR marks nothing as not indexed: points with a
reliability of -1 have angles like all others and keep them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stemtune.crystal.lattice import Lattice
from stemtune.crystal.symmetry import Symmetry
from stemtune.crystal_map.foreign import (
    NOT_INDEXED,
    ForeignMap,
    ForeignPhase,
    laue_of,
    on_hexagonal_axes,
    symmetry_of,
)
from stemtune.crystal_map.frames import AUTO
from stemtune.crystal_map.grid import Header, lay
from stemtune.crystal_map.io.building import Columns, build, from_euler
from stemtune.crystal_map.io.text import number, numbers, read_lines, table
from stemtune.errors import UserError

_SCORES = {
    "astar": ("index", "reliability", None, "reliability_x100"),
    "emsoft": ("IQ", "DP", None),
    "edax": ("IQ", "CI", None, "SEM", "fit"),
    "orix": ("IQ", "CI", None, "SEM", "fit"),
}
"""Names of the columns after the coordinates; None is the phase."""
_CONFIDENCE = {"astar": "reliability", "emsoft": "DP", "edax": "CI", "orix": "CI"}
_FRAMES = {"astar": "astar", "emsoft": "edax2", "edax": "edax2", "orix": "orix"}
_MONOCLINIC = {"20": "121", "2": "2", "21": "211"}  # EDAX's codes for the three settings
_PHASE_COLUMN = 7


def read_ang(path: Path, frame: str = AUTO) -> ForeignMap:
    """Read the `.ang` file `path`; `frame` "auto" takes the one of the program that its header names.

    Raises
    ------
    UserError
        Where the file is cut off or is no `.ang`.
    """
    source = f"'{path}'"
    lines = read_lines(path)
    head = next((place for place, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    header = [line[1:].strip() for line in lines[:head]]
    if head == len(lines):
        raise UserError(f"{source} holds no points{'' if header else ', it is empty'}; export it again")
    program = _program(header)
    data = table(lines, head, source)
    if data.shape[1] <= _PHASE_COLUMN:
        raise UserError(
            f"{source} has {data.shape[1]} columns, but an .ang has at least 8 (angles, x, y, quality, confidence,"
            " phase); export it with all of them"
        )
    ids, phases = _phases(header, source)
    scores = _scores(program, header, data)
    notes = []
    phase = _phase_index(data, ids, program, scores, source)
    confidence = scores.get(_CONFIDENCE[program])
    if frame == AUTO:
        frame = _FRAMES[program]
        if frame == "edax2":
            notes.append(
                "an .ang does not say which of EDAX's settings its angles refer to; taken as setting 2, EDAX's default"
                " (--frame edax1, edax3, edax4 or orix for others)"
            )
        if program == "orix" and _looks_like_py4dstem(header, scores):
            notes.append(
                "its quality and confidence are the same, as in a file of py4DSTEM's save_ang_file, whose angles are"
                " turned; if it is one, give --frame py4dstem-ang"
            )
    if program == "astar" and (unsure := int((data[:, 6] == -1).sum())):
        notes.append(f"{unsure:,} of its points have the reliability -1; they keep their angles")
    grid = lay(data[:, 3], data[:, 4], _grid_header(header, source), source)
    made = Columns(from_euler(np.rad2deg(data[:, :3])), phase, phases, scores, confidence, program, notes)
    return build(made, grid, frame, _nm_per_unit(program, header))


def _program(header: list[str]) -> str:
    """Return which of four dialects the header is: "astar", "emsoft", "orix" (stemtune's too) or "edax"."""
    if any("ACOM" in line for line in header):
        return "astar"
    if any("EMsoft" in line for line in header):
        return "emsoft"
    return "orix" if any(line.startswith("Column names: phi1") for line in header) else "edax"


def _phases(header: list[str], source: str) -> tuple[list[int], list[ForeignPhase]]:
    """Return the numbers and the phases that the header lists."""
    ids: list[int] = []
    found: list[dict[str, str]] = []
    space_groups: dict[str, int] = {}
    announced: int | None = None
    for line in header:
        if match := re.fullmatch(r"Phase\s+(\d+)", line):
            announced = int(match[1])
        elif match := re.fullmatch(r"Cell of (.+) by CIF: space-group number (\d+)", line):  # stemtune's own
            space_groups[match[1]] = int(match[2])
        elif line.startswith("MaterialName"):
            ids.append(announced if announced is not None else max(ids, default=0) + 1)
            found.append({"MaterialName": line[len("MaterialName") :].strip()})
            announced = None
        elif found and (match := re.match(r"(Formula|Symmetry|LatticeConstants)\b(.*)", line)):
            found[-1].setdefault(match[1], match[2].strip())
    phases = [_phase(facts, space_groups, source) for facts in found]
    if not phases:
        raise UserError(f"{source} lists no phase in its header (a line '# MaterialName'); it is no .ang map")
    return ids, phases


def _phase(facts: dict[str, str], space_groups: dict[str, int], source: str) -> ForeignPhase:
    name = facts.get("MaterialName") or facts.get("Formula") or "unnamed"
    lattice = None
    if facts.get("LatticeConstants"):
        try:
            constants = numbers(facts["LatticeConstants"])
            lattice = on_hexagonal_axes(Lattice(*constants[:6]))
        except (ValueError, TypeError):
            raise UserError(
                f"{source} gives phase '{name}' the lattice constants '{facts['LatticeConstants']}', which are not six"
                " numbers; mend the header"
            ) from None
    code = facts.get("Symmetry", "")
    laue = laue_of(code) or laue_of({"20": "2/m", "21": "2/m"}.get(code, ""))
    space_group = space_groups.get(name)
    symmetry = None
    if code in _MONOCLINIC:
        symmetry = Symmetry.of_proper(_MONOCLINIC[code])
    elif laue is not None:
        symmetry = symmetry_of(laue, lattice, space_group)
    return ForeignPhase(name, symmetry, lattice, space_group, code)


def _scores(program: str, header: list[str], data: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[Any]]:
    """Return the columns after the coordinates by name, without the phase."""
    names = list(_SCORES[program])
    listed = next((line for line in header if line.startswith("Column names: phi1")), None)
    if listed is not None:
        extra = [name.strip().replace(" ", "_") for name in listed.split(":", 1)[1].split(",")][10:]
        names += extra
    width = data.shape[1] - 5
    names += [f"column{place + 6}" for place in range(len(names), width)]
    return {name: data[:, 5 + place] for place, name in enumerate(names[:width]) if name is not None}


def _phase_index(
    data: npt.NDArray[np.float64], ids: list[int], program: str, scores: dict[str, npt.NDArray[Any]], source: str
) -> npt.NDArray[np.int16]:
    """Return the index (m,) into the header's phases, -1 where not indexed."""
    given = data[:, _PHASE_COLUMN]
    index = np.full(len(data), NOT_INDEXED, dtype=np.int16)
    for place, number_in_file in enumerate(ids):
        index[given == number_in_file] = place
    if len(ids) == 1:
        index[given == 0] = 0
    known = (index >= 0) | np.isin(given, (0, -1))
    lost = np.abs(data[:, :3] - 4 * np.pi).max(axis=1) < 1e-3
    if program != "astar":
        lost |= scores.get("CI", np.zeros(len(data))) == -1
    if not (known | lost).all():
        foreign = given[~(known | lost)][0]
        raise UserError(
            f"{source} has points of phase {foreign:g}, but its header lists {', '.join(map(str, ids))}; mend it"
        )
    index[lost] = NOT_INDEXED
    return index


def _looks_like_py4dstem(header: list[str], scores: dict[str, npt.NDArray[Any]]) -> bool:
    if any("stemtune" in line for line in header):
        return False
    quality, confidence = scores["IQ"], scores["CI"]
    kept = confidence != -1
    return bool(kept.any() and quality[kept].any() and np.array_equal(quality[kept], confidence[kept]))


def _grid_header(header: list[str], source: str) -> Header:
    """Return what the header says of the grid."""
    facts: dict[str, str] = {}
    for line in header:
        if match := re.match(r"(GRID|XSTEP|YSTEP|NCOLS_ODD|NCOLS_EVEN|NROWS)\s*:\s*(.*)", line):
            facts[match[1]] = match[2].strip(" #")
    try:
        steps = (number(facts["YSTEP"]), number(facts["XSTEP"])) if {"XSTEP", "YSTEP"} <= set(facts) else None
        counts = [int(facts[name]) for name in ("NROWS", "NCOLS_ODD", "NCOLS_EVEN") if name in facts]
    except ValueError as problem:
        raise UserError(f"{source} has a header with an unreadable number ({problem}); mend it") from None
    hexagonal = facts.get("GRID", "").lower().startswith("hex")
    names = ("YSTEP", "XSTEP")
    if len(counts) < 3:
        return Header(steps=steps, names=names, hexagonal=hexagonal)
    rows, odd, even = counts
    points = (rows + 1) // 2 * odd + rows // 2 * even
    return Header(rows, max(odd, even), points, steps, names, hexagonal)


def _nm_per_unit(program: str, header: list[str]) -> float | None:
    """Return how many nm the file's unit of length has: 1 for ASTAR, else 1000; None where it counts scan pixels."""
    if program == "astar":
        return 1.0
    return None if any("coordinates in scan pixels" in line for line in header) else 1000.0
