"""`.ang`: the text map of EDAX TSL, which ASTAR, EMsoft, MTEX, orix, DREAM.3D and OIM read or write, each differently.

Angles are in radians. Columns are phi1, Phi, phi2, x, y, image quality, confidence index, phase, detector signal, fit,
and what came later; ASTAR writes index, reliability, phase, 100 times the reliability; EMsoft image quality, dot
product, phase. Lengths are µm, ASTAR's nm.

Read as not indexed are points with a confidence index of -1 or Euler angles of 4 pi (EDAX), of phase -1, and of phase 0
where the header lists several phases; with one phase, 0 is that phase. ASTAR marks nothing as not indexed: points with
a reliability of -1 have angles like all others and keep them.

What `.ang` cannot hold, and what is written instead:

- It knows point groups but no space groups: the symmetry is written as the rotation group of the Laue class (32 for
  -3m; of monoclinic cells EDAX's code for the unique axis, 20 for b), the true space group is in a comment and in
  `map.h5`.
- Coordinates are µm by convention, and readers take them as µm whatever was meant. They are written in µm, with
  enough digits that a step of a fraction of a nanometre survives; without a known step they count scan pixels, and a
  comment says so.
- The crystal frame is e1 along a, e3 along c*, as orix reads it and EDAX uses it too, but for monoclinic cells: there
  MTEX takes EDAX's axes as X || a*, Z || c. A comment says which axes are meant. `.ctf` has no such doubt.
- Pixels that are not indexed get Euler angles of 4 pi, confidence index -1 and fit 180, as orix and EDAX do.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stemtune.crystal.lattice import Lattice
from stemtune.crystal.point_groups import laue_of_point_group
from stemtune.crystal.symmetry import Symmetry
from stemtune.crystal_map.frames import AUTO
from stemtune.crystal_map.grid import GridHeader, Points, grid_of, map_of
from stemtune.crystal_map.io.orix_h5 import check_same, from_orix, read_with_orix
from stemtune.crystal_map.io.text import from_euler, number, numbers, read_lines, table
from stemtune.crystal_map.orientation_map import NOT_INDEXED, OrientationMap, PhaseDescription
from stemtune.errors import UserError

_SCORES = {
    "astar": ("index", "reliability", None, "reliability_x100"),
    "emsoft": ("IQ", "DP", None),
    "edax": ("IQ", "CI", None, "SEM", "fit"),
    "orix": ("IQ", "CI", None, "SEM", "fit"),
}
"""Names of the columns after the coordinates; None is the phase."""
_CONFIDENCE = {"astar": "reliability", "emsoft": "DP", "edax": "CI", "orix": "CI"}
_FRAME_OF_PROGRAM = {"astar": "astar", "emsoft": "edax2", "edax": "edax2", "orix": "orix"}
_MONOCLINIC = {"20": "121", "2": "2", "21": "211"}  # EDAX's codes for the three settings
_PHASE_COLUMN = 7


def read_ang(path: Path, frame: str = AUTO) -> OrientationMap:
    """Read the `.ang` file `path`; `frame` "auto" takes the one of the program that its header names.

    Raises `UserError` where the file is cut off or is no `.ang`.
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
        frame = _FRAME_OF_PROGRAM[program]
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
    grid = grid_of(data[:, 3], data[:, 4], _grid_header(header, source), source)
    made = Points(from_euler(np.rad2deg(data[:, :3])), phase, phases, scores, confidence, program, notes)
    return map_of(made, grid, frame, _nm_per_unit(program, header))


def _program(header: list[str]) -> str:
    """Return which of four dialects the header is: "astar", "emsoft", "orix" (stemtune's too) or "edax"."""
    if any("ACOM" in line for line in header):
        return "astar"
    if any("EMsoft" in line for line in header):
        return "emsoft"
    return "orix" if any(line.startswith("Column names: phi1") for line in header) else "edax"


def _phases(header: list[str], source: str) -> tuple[list[int], list[PhaseDescription]]:
    """Return the numbers and the phases that the header lists."""
    ids: list[int] = []
    found: list[dict[str, str]] = []
    space_groups: list[tuple[str, int]] = []
    announced: int | None = None
    for line in header:
        if match := re.fullmatch(r"Phase\s+(\d+)", line):
            announced = int(match[1])
        elif match := re.fullmatch(r"Cell of (.+) by CIF: space-group number (\d+)", line):  # stemtune's own
            space_groups.append((match[1], int(match[2])))
        elif line.startswith("MaterialName"):
            ids.append(announced if announced is not None else max(ids, default=0) + 1)
            found.append({"MaterialName": line[len("MaterialName") :].strip()})
            announced = None
        elif found and (match := re.match(r"(Formula|Symmetry|LatticeConstants)\b(.*)", line)):
            found[-1].setdefault(match[1], match[2].strip())
    order = sorted(range(len(ids)), key=ids.__getitem__)  # orix and EDAX list the last phase first
    cells = dict(zip(order, space_groups, strict=False))  # stemtune lists them in the order of the numbers
    phases = [_phase(found[place], cells.get(place), source) for place in order]
    if not phases:
        raise UserError(f"{source} lists no phase in its header (a line '# MaterialName'); it is no .ang map")
    return [ids[place] for place in order], phases


def _phase(facts: dict[str, str], cell: tuple[str, int] | None, source: str) -> PhaseDescription:
    name = facts.get("MaterialName") or facts.get("Formula") or "unnamed"
    lattice = None
    if facts.get("LatticeConstants"):
        try:
            constants = numbers(facts["LatticeConstants"])
            lattice = Lattice(*constants[:6]).on_hexagonal_axes()
        except (ValueError, TypeError):
            raise UserError(
                f"{source} gives phase '{name}' the lattice constants '{facts['LatticeConstants']}', which are not six"
                " numbers; correct the header"
            ) from None
    code = facts.get("Symmetry", "")
    laue = laue_of_point_group(code) or laue_of_point_group({"20": "2/m", "21": "2/m"}.get(code, ""))
    space_group = cell[1] if cell is not None and cell[0] == name else None
    symmetry = None
    if code in _MONOCLINIC:
        symmetry = Symmetry.of_proper(_MONOCLINIC[code])
    elif laue is not None:
        symmetry = Symmetry.of_map_phase(laue, lattice, space_group)
    return PhaseDescription(name, symmetry, lattice, space_group, code)


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
            f"{source} has points of phase {foreign:g}, but its header lists {', '.join(map(str, ids))}; correct it"
        )
    index[lost] = NOT_INDEXED
    return index


def _looks_like_py4dstem(header: list[str], scores: dict[str, npt.NDArray[Any]]) -> bool:
    if any("stemtune" in line for line in header):
        return False
    quality, confidence = scores["IQ"], scores["CI"]
    kept = confidence != -1
    return bool(kept.any() and quality[kept].any() and np.array_equal(quality[kept], confidence[kept]))


def _grid_header(header: list[str], source: str) -> GridHeader:
    """Return what the header says of the grid."""
    facts: dict[str, str] = {}
    for line in header:
        if match := re.match(r"(GRID|XSTEP|YSTEP|NCOLS_ODD|NCOLS_EVEN|NROWS)\s*:\s*(.*)", line):
            facts[match[1]] = match[2].strip(" #")
    try:
        steps = (number(facts["YSTEP"]), number(facts["XSTEP"])) if {"XSTEP", "YSTEP"} <= set(facts) else None
        counts = [int(facts[name]) for name in ("NROWS", "NCOLS_ODD", "NCOLS_EVEN") if name in facts]
    except ValueError as problem:
        raise UserError(f"{source} has a header with an unreadable number ({problem}); correct it") from None
    hexagonal = facts.get("GRID", "").lower().startswith("hex")
    names = ("YSTEP", "XSTEP")
    if len(counts) < 3:
        return GridHeader(steps=steps, names=names, hexagonal=hexagonal)
    rows, odd, even = counts
    points = (rows + 1) // 2 * odd + rows // 2 * even
    return GridHeader(rows, max(odd, even), points, steps, names, hexagonal)


def _nm_per_unit(program: str, header: list[str]) -> float | None:
    """Return how many nm the file's unit of length has: 1 for ASTAR, else 1000; None where it counts scan pixels."""
    if program == "astar":
        return 1.0
    return None if any("coordinates in scan pixels" in line for line in header) else 1000.0


_UNIQUE_AXIS = {"2": "2", "121": "20", "211": "211"}  # EDAX's codes; orix does not know its 21, but 211
_DATA_LINE = re.compile(r"^\s*(\S+\s+\S+\s+\S+)\s+\S+\s+\S+(\s+.*)$")


def write_ang(orientation_map: OrientationMap, path: str | os.PathLike[str]) -> None:
    """Write the best orientation of every pixel as `.ang` and check what orix reads back from it.

    Columns: Euler angles (rad), x, y, image quality = spot_z_score, confidence index = confidence, phase,
    detector signal = 0, fit = 0, as orix lays them out.

    Raises
    ------
    RuntimeError
        When the file does not read back as the same map.
    """
    from orix import io as orix_io

    target = Path(path)
    orix_io.save(
        str(target),
        orientation_map.to_orix(),
        overwrite=True,
        image_quality_prop="spot_z_score",
        confidence_index_prop="confidence",
    )
    _rewrite_coordinates(orientation_map, target)
    check_same(orientation_map, from_orix(read_with_orix(target)), str(target))


def _rewrite_coordinates(orientation_map: OrientationMap, path: Path) -> None:
    """Rewrite steps, shape and coordinates: orix keeps five decimals and turns a single column into a row."""
    rows, columns = orientation_map.shape
    dy, dx = (value / 1000 for value in orientation_map.step_nm) if orientation_map.step_nm else (1.0, 1.0)
    unit = "µm" if orientation_map.step_nm else "scan pixels (the step is not known)"
    header = {"XSTEP": f"{dx:.9g}", "YSTEP": f"{dy:.9g}", "NROWS": rows, "NCOLS_ODD": columns, "NCOLS_EVEN": columns}
    codes = [_UNIQUE_AXIS.get(phase.symmetry.proper) for phase in reversed(orientation_map.phases)]
    lines = path.read_text(encoding="utf-8").splitlines()
    rewritten = [f"# Written by stemtune; coordinates in {unit}; Euler angles turn the lab into the crystal frame"]
    rewritten += ["# Crystal axes: X along a, Z along c*; lab axes: x to the right on the detector, y up"]
    rewritten += [f"# Cell of {p.name} by CIF: space-group number {p.space_group}" for p in orientation_map.crystals]
    pixel = 0
    for line in lines:
        if line.startswith("#"):
            name = line[1:].strip().split(":")[0]
            if name.startswith("Symmetry") and (code := codes.pop(0)):
                line = f"# Symmetry    {code}"
            rewritten.append(f"# {name}: {header[name]}" if name in header else line.rstrip())
            continue
        match = _DATA_LINE.match(line)
        assert match is not None
        row, column = divmod(pixel, columns)
        rewritten.append(f" {match[1]}  {column * dx:.9g}  {row * dy:.9g}{match[2]}")
        pixel += 1
    path.write_text("\n".join(rewritten) + "\n", encoding="utf-8")
