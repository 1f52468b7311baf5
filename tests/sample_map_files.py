"""Map files of other programs, written small, and what tests compare them with."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from diffpy.structure import Lattice as DiffpyLattice
from diffpy.structure import Structure
from orix import io as orix_io
from orix.crystal_map import CrystalMap, PhaseList, create_coordinate_arrays
from orix.crystal_map import Phase as OrixPhase
from orix.quaternion import Rotation
from scipy.spatial.transform import Rotation as ScipyRotation

from stemtune.crystal.symmetry import Symmetry, disorientation_deg
from stemtune.crystal_map.orientation_map import OrientationMap

CTF = """Channel Text File
Prj\tmade for a test
Author\t{author}
JobMode\tGrid
XCells\t{columns}
YCells\t{rows}
XStep\t{step}
YStep\t{step}
AcqE1\t0
AcqE2\t0
AcqE3\t0
Euler angles refer to Sample Coordinate system (CS0)!\tMag\t200\tCoverage\t100\tDevice\t0\tKV\t20
Phases\t{count}
{phases}
Phase\tX\tY\tBands\tError\tEuler1\tEuler2\tEuler3\tMAD\tBC\tBS
"""


GOLD = "4.0780;4.0780;4.0780\t90;90;90\tGold\t11\t225"


QUARTZ = "4.913;4.913;5.405\t90;90;120\tQuartz\t7\t152"


def orix_loads(path: Path) -> CrystalMap:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return orix_io.load(path)


def off_deg(first: np.ndarray, second: np.ndarray, laue: str = "-1") -> np.ndarray:
    symmetry = Symmetry.of_laue(laue)
    return disorientation_deg(torch.from_numpy(first), torch.from_numpy(np.array(second)), symmetry).numpy()


def random_rotations(n: int, seed: int = 1) -> np.ndarray:
    q = np.random.default_rng(seed).normal(size=(n, 4))
    return q / np.linalg.norm(q, axis=1, keepdims=True)


def ctf_text(
    shape: tuple[int, int] = (4, 5),
    phases: tuple[str, ...] = (GOLD,),
    step: str = "0.5",
    author: str = "[Unknown]",
    digits: int = 4,
) -> str:
    rows, columns = shape
    rng = np.random.default_rng(2)
    head = CTF.format(author=author, columns=columns, rows=rows, step=step, count=len(phases), phases="\n".join(phases))
    lines = []
    for pixel in range(rows * columns):
        row, column = divmod(pixel, columns)
        distance = float(step.replace(",", "."))
        euler = rng.uniform((0, 0, 0), (360, 180, 360))
        phase = pixel % (len(phases) + 1)
        angles = "\t".join(f"{angle:.4f}" for angle in (euler if phase else np.zeros(3)))
        lines.append(
            f"{phase}\t{column * distance:.{digits}f}\t{row * distance:.{digits}f}\t8\t{0 if phase else 3}\t{angles}"
            f"\t{0.5 if phase else 0:.4f}\t{80 + pixel}\t255"
        )
    return head + "\n".join(lines) + "\n"


def edax_text(symmetries: tuple[str, ...], points: list[str]) -> str:
    head = ["# TEM_PIXperUM 1.0", "#"]
    for number, code in enumerate(symmetries, start=1):
        head += [f"# Phase {number}", f"# MaterialName  p{number}", f"# Symmetry {code}"]
        head += [f"# LatticeConstants {3 + number}.000 {3 + number}.000 6.000  90.000  90.000 120.000", "#"]
    head += ["# GRID: SqrGrid", "# XSTEP: 0.250000", "# YSTEP: 0.250000"]
    head += ["# NCOLS_ODD: 2", "# NCOLS_EVEN: 2", "# NROWS: 2", "#"]
    return "\n".join([*head, *points]) + "\n"


def orix_map(shape: tuple[int, int], step: float = 1.5, unit: str = "um") -> CrystalMap:
    n = shape[0] * shape[1]
    coordinates, _ = create_coordinate_arrays(shape, (step, step))
    phases = PhaseList(
        [
            OrixPhase(
                "quartz", space_group=152, structure=Structure(lattice=DiffpyLattice(4.9, 4.9, 5.4, 90, 90, 120))
            ),
            OrixPhase(
                "nickel", space_group=225, structure=Structure(lattice=DiffpyLattice(3.52, 3.52, 3.52, 90, 90, 90))
            ),
        ]
    )
    phases.add_not_indexed()
    phase_id = np.random.default_rng(4).integers(-1, 2, n)
    return CrystalMap(
        rotations=Rotation(random_rotations(n)),
        phase_id=phase_id,
        phase_list=phases,
        scan_unit=unit,
        prop={"iq": np.arange(n, dtype=float), "ci": np.linspace(0, 1, n)},
        **coordinates,
    )


LATTICES = {
    "cubic": (4.0, 4.0, 4.0, 90, 90, 90),
    "trigonal": (4.9, 4.9, 5.4, 90, 90, 120),
    "monoclinic": (9.541, 17.74, 5.295, 90, 103.67, 90),
    "triclinic": (4.1, 5.3, 6.7, 78, 99, 112),
}


def same_map(first: OrientationMap, second: OrientationMap) -> None:
    assert first.shape == second.shape
    assert first.step_nm == second.step_nm
    np.testing.assert_array_equal(first.phase, second.phase)
    np.testing.assert_array_equal(first.orientation, second.orientation)


def matrices(shape: tuple[int, int], matches: int = 2) -> tuple[np.ndarray, np.ndarray]:
    n = shape[0] * shape[1] * matches
    matrix = ScipyRotation.from_quat(random_rotations(n, 7)).as_matrix().reshape(*shape, matches, 3, 3)
    corr = np.random.default_rng(8).uniform(0.1, 1, (*shape, matches))
    matrix[0, 1], corr[0, 1] = 0, 0
    return matrix, corr
