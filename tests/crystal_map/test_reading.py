"""Maps made elsewhere: against orix where orix is right, against geometry where it is not, and what is refused."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from diffpy.structure import Lattice as DiffpyLattice
from diffpy.structure import Structure
from orix import io as orix_io
from orix.crystal_map import CrystalMap, PhaseList, create_coordinate_arrays
from orix.crystal_map import Phase as OrixPhase
from orix.quaternion import Rotation
from orix.vector import Miller, Vector3d
from scipy.spatial.transform import Rotation as ScipyRotation

from stemtune.crystal.lattice import Lattice
from stemtune.crystal.symmetry import Symmetry, disorientation_deg
from stemtune.crystal_map.frames import AUTO, FRAMES, from_frame, to_frame
from stemtune.crystal_map.io import read_map
from stemtune.crystal_map.orientation_map import OrientationMap
from stemtune.errors import UserError

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


# --- .ang ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "step_nm", "score", "orix_name"),
    [("sdss_ferrite_austenite.ang", 1500.0, "DP", "dp"), ("ACOM.ang", 2.0, "index", "ind")],
)
def test_ang_is_what_orix_reads(shared_data: Path, name: str, step_nm: float, score: str, orix_name: str) -> None:
    path = shared_data / "maps" / name
    ours, theirs = read_map(path, "orix"), orix_loads(path)
    assert ours.shape == theirs.shape
    assert ours.step_nm == pytest.approx((step_nm, step_nm))
    assert off_deg(ours.orientation, theirs.rotations.data).max() < 1e-4
    names = [phase.name.split("/")[0] for phase in ours.phases]
    assert [theirs.phases[i].name.split("/")[0].replace("Phase ", "") for i in theirs.phases.ids] == [
        name.replace("Phase ", "") for name in names
    ]
    np.testing.assert_array_equal(np.array(theirs.phases.ids)[ours.phase], theirs.phase_id)
    np.testing.assert_allclose(ours.layers[score], theirs.prop[orix_name], rtol=1e-6)
    for index, phase in enumerate(ours.phases):
        assert phase.symmetry.laue == "m-3m"
        np.testing.assert_allclose(
            phase.lattice, theirs.phases[theirs.phases.ids[index]].structure.lattice.abcABG(), atol=1e-6
        )


def test_auto_takes_the_frame_of_the_program(shared_data: Path) -> None:
    """The turn between EDAX's angles and the map, as MTEX makes it: half a turn about x + y, x - y, x or y."""
    path = shared_data / "maps" / "sdss_ferrite_austenite.ang"
    as_it_stands = Rotation(read_map(path, "orix").orientation)
    settings = {"edax1": (1, 1, 0), "edax2": (1, -1, 0), "edax3": (1, 0, 0), "edax4": (0, 1, 0), "astar": (1, 1, 0)}
    map_to_lab = Rotation.from_axes_angles(Vector3d((1, 0, 0)), np.pi)  # rows run down and z into the map, then
    for frame, axis in settings.items():
        to_map = Rotation.from_axes_angles(Vector3d(axis), np.pi)
        expected = as_it_stands * ~to_map * ~map_to_lab
        assert off_deg(read_map(path, frame).orientation, expected.data).max() < 1e-4, frame
    auto = read_map(path)
    assert auto.attrs["frame"] == "edax2"
    assert any("setting 2" in note for note in auto.attrs["notes"])
    assert read_map(shared_data / "maps" / "ACOM.ang").attrs["frame"] == "astar"


def edax_text(symmetries: tuple[str, ...], points: list[str]) -> str:
    head = ["# TEM_PIXperUM 1.0", "#"]
    for number, code in enumerate(symmetries, start=1):
        head += [f"# Phase {number}", f"# MaterialName  p{number}", f"# Symmetry {code}"]
        head += [f"# LatticeConstants {3 + number}.000 {3 + number}.000 6.000  90.000  90.000 120.000", "#"]
    head += ["# GRID: SqrGrid", "# XSTEP: 0.250000", "# YSTEP: 0.250000"]
    head += ["# NCOLS_ODD: 2", "# NCOLS_EVEN: 2", "# NROWS: 2", "#"]
    return "\n".join([*head, *points]) + "\n"


def test_edax_marks_what_is_not_indexed(tmp_path: Path) -> None:
    lost = "12.56637 12.56637 12.56637"
    points = [
        "1.0 0.5 0.2  0.00 0.00 100.0  0.900  {}  1  0.5",
        f"{lost}  0.25 0.00   0.0 -1.000  {{}}  1  180",
        "1.0 0.5 0.2  0.00 0.25 100.0 -1.000  {}  1  0.5",
        "1.0 0.5 0.2  0.25 0.25 100.0  0.300  {}  1  0.5",
    ]
    path = tmp_path / "a.ang"
    path.write_text(edax_text(("62",), [line.format(0) for line in points]))
    np.testing.assert_array_equal(read_map(path).phase, [0, -1, -1, 0])  # 0 is the only phase
    path.write_text(
        edax_text(("62", "32"), [line.format(number) for line, number in zip(points, (2, 1, 1, 0), strict=True)])
    )
    read = read_map(path)
    np.testing.assert_array_equal(read.phase, [1, -1, -1, -1])  # 0 is none of several phases
    assert [phase.symmetry.laue for phase in read.phases] == ["6/mmm", "-3m"]
    assert np.isnan(read.orientation[1:]).all()
    np.testing.assert_allclose(read.layers["CI"], [0.9, -1, -1, 0.3])
    path.write_text(edax_text(("62",), [line.format(7) for line in points]))
    with pytest.raises(UserError, match="phase 7"):
        read_map(path)


@pytest.mark.parametrize(("code", "laue", "proper"), [("20", "2/m", "121"), ("2", "2/m", "2"), ("23", "m-3", "23")])
def test_edax_codes_of_symmetry(tmp_path: Path, code: str, laue: str, proper: str) -> None:
    points = [
        f"1.0 0.5 0.2 {x} {y} 1 1 0 1 1"
        for x, y in (
            (0, 0),
            (0.25, 0),
            (0, 0.25),
            (0.25, 0.25),
        )
    ]
    (tmp_path / "a.ang").write_text(edax_text((code,), points))
    symmetry = read_map(tmp_path / "a.ang").phases[0].symmetry
    assert symmetry is not None
    assert (symmetry.laue, symmetry.proper) == (laue, proper)


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


def test_ang_that_orix_wrote(tmp_path: Path) -> None:
    made = orix_map((5, 7))
    orix_io.save(tmp_path / "a.ang", made)
    read = read_map(tmp_path / "a.ang")
    assert (read.attrs["frame"], read.shape, read.step_nm) == ("orix", (5, 7), pytest.approx((1500, 1500)))
    by_name = {phase.name: index for index, phase in enumerate(read.phases)}
    ours = np.array([-1, by_name["quartz"], by_name["nickel"]])[made.phase_id + 1]
    np.testing.assert_array_equal(read.phase, ours)
    assert off_deg(read.orientation[read.indexed], made.rotations.data[read.indexed]).max() < 0.002
    assert not read.attrs["notes"]


# --- orix HDF5 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unit", "factor"), [("nm", 1), ("um", 1000), ("px", None)])
def test_h5_of_orix(tmp_path: Path, unit: str, factor: float | None) -> None:
    made = orix_map((5, 7), unit=unit)
    orix_io.save(tmp_path / "a.h5", made)
    read = read_map(tmp_path / "a.h5")
    assert read.shape == (5, 7)
    assert read.step_nm == (None if factor is None else pytest.approx((1.5 * factor, 1.5 * factor)))
    np.testing.assert_array_equal(read.phase, made.phase_id)
    assert off_deg(read.orientation[read.indexed], made.rotations.data[read.indexed]).max() < 1e-6
    np.testing.assert_allclose(read.layers["ci"], made.prop["ci"], rtol=1e-6)
    np.testing.assert_allclose(read.answer_confidence[:, 0], made.prop["ci"], rtol=1e-6)
    assert [phase.space_group for phase in read.phases] == [152, 225]


def test_h5_with_points_masked_out(tmp_path: Path) -> None:
    made = orix_map((5, 7))
    kept = np.ones(35, dtype=bool)
    kept[[3, 10, 20]] = False
    orix_io.save(tmp_path / "a.h5", made[kept])
    read = read_map(tmp_path / "a.h5")
    assert read.shape == (5, 7)
    np.testing.assert_array_equal(read.phase, np.where(kept, made.phase_id, -1))
    assert any("3 of its 5 x 7" in note for note in read.attrs["notes"])


# --- .ctf and crystal axes ----------------------------------------------------------------------------------------


LATTICES = {
    "cubic": (4.0, 4.0, 4.0, 90, 90, 90),
    "trigonal": (4.9, 4.9, 5.4, 90, 90, 120),
    "monoclinic": (9.541, 17.74, 5.295, 90, 103.67, 90),
    "triclinic": (4.1, 5.3, 6.7, 78, 99, 112),
}


@pytest.mark.parametrize("name", LATTICES)
def test_oxford_axes_hold_a_star_and_c(name: str) -> None:
    """With X || a* and Z || c, a* and c point where X and Z do; orix says where they are in our axes."""
    lattice = Lattice(*map(float, LATTICES[name]))
    phase = OrixPhase(point_group="1", structure=Structure(lattice=DiffpyLattice(*lattice)))
    in_file = random_rotations(20)
    ours = Rotation(from_frame(in_file, "oxford", lattice, None))
    for axis, miller in (
        ((1, 0, 0), Miller(hkl=(1, 0, 0), phase=phase)),
        ((0, 0, 1), Miller(uvw=(0, 0, 1), phase=phase)),
    ):
        expected = (~Rotation(in_file) * Vector3d(axis)).data
        found = (~ours * miller.unit).data
        np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("name", LATTICES)
@pytest.mark.parametrize("frame", FRAMES)
def test_frames_are_undone(name: str, frame: str) -> None:
    lattice = Lattice(*map(float, LATTICES[name]))
    made = random_rotations(20)
    laue = "2/m" if name == "monoclinic" else None
    back = from_frame(to_frame(made, frame, lattice, laue), frame, lattice, laue)
    assert off_deg(made, back).max() < 1e-6


def test_trigonal_is_30_degrees_from_what_orix_reads(tmp_path: Path) -> None:
    (tmp_path / "a.ctf").write_text(ctf_text(phases=(QUARTZ,)))
    read, theirs = read_map(tmp_path / "a.ctf"), orix_loads(tmp_path / "a.ctf")
    keep = read.indexed
    turn = Rotation.from_axes_angles(Vector3d((0, 0, 1)), np.deg2rad(30))
    assert off_deg(read.orientation[keep], (turn * theirs.rotations[keep]).data).max() < 1e-4
    np.testing.assert_allclose(off_deg(read.orientation[keep], theirs.rotations.data[keep], "-3m"), 30, atol=1e-4)
    np.testing.assert_array_equal(keep, theirs.is_indexed)
    assert read.phases[0].space_group == 152


def test_cubic_ctf_is_what_orix_reads(tmp_path: Path) -> None:
    second = "2.87;2.87;2.87\t90;90;90\tFerrite\t11\t229"
    (tmp_path / "a.ctf").write_text(ctf_text((6, 5), (GOLD, second)))
    read, theirs = read_map(tmp_path / "a.ctf"), orix_loads(tmp_path / "a.ctf")
    assert read.shape == theirs.shape == (6, 5)
    assert read.step_nm == pytest.approx((500, 500))
    assert off_deg(read.orientation[read.indexed], theirs.rotations.data[read.indexed]).max() < 1e-4
    np.testing.assert_array_equal(np.where(read.phase < 0, -1, read.phase + 1), theirs.phase_id)
    for name in ("MAD", "BC", "BS"):
        np.testing.assert_allclose(read.layers[name], theirs.prop[name])
    assert [(phase.name, phase.space_group) for phase in read.phases] == [("Gold", 225), ("Ferrite", 229)]
    np.testing.assert_allclose(read.answer_confidence[:, 0][read.indexed], np.exp(-0.5), rtol=1e-6)


def same_map(first: OrientationMap, second: OrientationMap) -> None:
    assert first.shape == second.shape
    assert first.step_nm == second.step_nm
    np.testing.assert_array_equal(first.phase, second.phase)
    np.testing.assert_array_equal(first.orientation, second.orientation)


def test_decimal_commas(shared_data: Path, tmp_path: Path) -> None:
    european = shared_data / "maps" / "malformed" / "Test_European_1.ctf"
    read = read_map(european)
    assert read.shape == (5, 40)
    assert read.step_nm == pytest.approx((500, 500))
    (tmp_path / "points.ctf").write_text(european.read_text().replace(",", "."))
    same_map(read, read_map(tmp_path / "points.ctf"))
    np.testing.assert_array_equal(read.phase[:2], [-1, 0])
    as_written = Rotation.from_euler((103.85, 40.207, 29.394), degrees=True)
    assert off_deg(read_map(european, "orix").orientation[1:2], as_written.data).max() < 1e-5
    assert read.phases[0].lattice == pytest.approx((3.231, 3.231, 5.148, 90, 90, 120))
    assert read.layers["MAD"][1] == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("step", "author", "digits", "phase"),
    [
        ("0,001998", "[Unknown]", 4, "4,079000;4,079000;4,079000\t90,000000;90,000000;90,000000\tGold\t11\t225"),
        ("0.00191999995708466", "File created from ACOM RES results", 4, "4.078;4.078;4.078\t90;90;90\t_Au\t11\t225"),
        ("0.00004", "File created from ACOM RES results", 4, GOLD),  # every coordinate reads 0.0000 or 0.0001
        ("2.0000", "me", 4, "4.079;4.079;4.079\t90.000;90.000;90.000\tGold\t11\t0\t\t\tCreated from mtex"),
    ],
    ids=["bruker", "astar", "coarse", "mtex"],
)  # fmt: skip
def test_dialects_of_ctf(tmp_path: Path, step: str, author: str, digits: int, phase: str) -> None:
    (tmp_path / "a.ctf").write_text(ctf_text((6, 5), (phase,), step, author, digits))
    read = read_map(tmp_path / "a.ctf")
    assert read.shape == (6, 5)
    assert read.step_nm == pytest.approx((1000 * float(step.replace(",", ".")),) * 2)
    np.testing.assert_array_equal(read.phase, np.arange(30) % 2 - 1)
    symmetry = read.phases[0].symmetry
    assert symmetry is not None and symmetry.laue == "m-3m"
    (tmp_path / "b.ctf").write_text(ctf_text((6, 5), (GOLD,), "1"))
    np.testing.assert_array_equal(read.orientation, read_map(tmp_path / "b.ctf").orientation)


def test_header_contradictions_are_said(tmp_path: Path) -> None:
    text = ctf_text((6, 5)).replace("XStep\t0.5", "XStep\t2").replace("XCells\t5", "XCells\t4")
    (tmp_path / "a.ctf").write_text(text)
    read = read_map(tmp_path / "a.ctf")
    assert (read.shape, read.step_nm) == ((6, 5), pytest.approx((500, 500)))
    assert any("XStep 2" in note for note in read.attrs["notes"])
    assert any("6 rows of 4" in note for note in read.attrs["notes"])
    (tmp_path / "b.ctf").write_text(ctf_text(phases=("4;4;4\t90;90;90\tx\t11\t194",)))
    read = read_map(tmp_path / "b.ctf")
    assert read.phases[0].space_group is None
    assert any("space group 194" in note for note in read.attrs["notes"])


def test_hexagonal_grid_keeps_rows_and_places(shared_data: Path) -> None:
    path = shared_data / "maps" / "testdata_hex.ctf"
    read = read_map(path)
    lines = path.read_text().splitlines()
    points = np.array([line.split() for line in lines[15:] if line.strip()], dtype=float)
    assert len(points) == 900
    assert read.shape == (30, 30)
    assert read.step_nm == pytest.approx((866.02, 1000), rel=1e-4)
    np.testing.assert_allclose(read.layers["MAD"], points[:, 8])
    text = " ".join(read.attrs["notes"])
    for said in ("hexagonal", "YStep 1", "11 columns"):
        assert said in text
    plain = Rotation.from_euler(points[:, 5:8], degrees=True)
    assert off_deg(read_map(path, "orix").orientation, plain.data).max() < 1e-5
    # Glaucophane is monoclinic: X || a*, Z || c is 13.67 degrees about b from ours
    turn = Rotation.from_axes_angles(Vector3d((0, 1, 0)), np.deg2rad(13.67))
    assert min(off_deg(read.orientation, (t * plain).data).max() for t in (turn, ~turn)) < 1e-4


# --- py4DSTEM -----------------------------------------------------------------------------------------------------


def matrices(shape: tuple[int, int], matches: int = 2) -> tuple[np.ndarray, np.ndarray]:
    n = shape[0] * shape[1] * matches
    matrix = ScipyRotation.from_quat(random_rotations(n, 7)).as_matrix().reshape(*shape, matches, 3, 3)
    corr = np.random.default_rng(8).uniform(0.1, 1, (*shape, matches))
    matrix[0, 1], corr[0, 1] = 0, 0
    return matrix, corr


@pytest.mark.parametrize("layout", ["plain", "emdfile", "one match"])
def test_py4dstem_map_predicts_its_spots(tmp_path: Path, layout: str) -> None:
    """py4DSTEM puts g at row `(M.T g)[0]` and column `(M.T g)[1]` from the direct beam; so must our orientation."""
    shape = (3, 4)
    matrix, corr = matrices(shape)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        if layout == "emdfile":
            file["root/orientation_map/matrix/data"] = matrix
            file["root/orientation_map/corr/data"] = corr
        elif layout == "plain":
            file["matrix"], file["corr"] = matrix, corr
        else:
            file["acom/matrix"], file["acom/corr"] = matrix[:, :, 0], corr[:, :, 0]
    read = read_map(tmp_path / "a.h5")
    assert (read.shape, read.attrs["frame"], read.step_nm) == (shape, "py4dstem", None)
    np.testing.assert_array_equal(np.flatnonzero(~read.indexed), [1])
    np.testing.assert_allclose(read.answer_confidence[:, 0], corr[:, :, 0].ravel(), rtol=1e-6)
    g = np.array([0.2, -0.5, 0.3])
    keep = read.indexed
    lab = (~Rotation(read.orientation[keep]) * Vector3d(g)).data
    down, right = (matrix[:, :, 0].reshape(-1, 3, 3)[keep].transpose(0, 2, 1) @ g)[:, :2].T
    np.testing.assert_allclose(lab[:, 0], right, atol=1e-9)
    np.testing.assert_allclose(lab[:, 1], -down, atol=1e-9)


def test_ang_of_py4dstem_is_mended(tmp_path: Path) -> None:
    """What `save_ang_file` does: scipy's extrinsic angles given to orix as Bunge's, rows and columns swapped."""
    shape = (3, 4)
    matrix, _ = matrices(shape, 1)
    matrix[0, 1] = np.eye(3)
    swapped = matrix[:, :, 0].transpose(1, 0, 2, 3).reshape(-1, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        angles = np.vstack([ScipyRotation.from_matrix(m.T).as_euler("zxz") for m in swapped])
    coordinates, n = create_coordinate_arrays((4, 3), (1.0, 1.0))
    score = np.linspace(0.2, 0.9, n)
    crystal = OrixPhase(
        "LiNiO2", point_group="-3m", structure=Structure(lattice=DiffpyLattice(2.88, 2.88, 14.2, 90, 90, 120))
    )
    made = CrystalMap(
        rotations=Rotation.from_euler(angles, direction="crystal2lab"),
        phase_list=PhaseList(crystal),
        prop={"iq": score, "ci": score},
        **coordinates,
    )
    orix_io.save(tmp_path / "a.ang", made)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["matrix"] = matrix
    right = read_map(tmp_path / "a.h5")
    mended = read_map(tmp_path / "a.ang", "py4dstem-ang")
    assert mended.shape == right.shape == shape
    assert off_deg(mended.orientation, right.orientation).max() < 0.002
    as_orix = read_map(tmp_path / "a.ang")
    assert any("py4dstem-ang" in note for note in as_orix.attrs["notes"])


def test_matrices_that_are_no_rotations(tmp_path: Path) -> None:
    matrix, corr = matrices((3, 4))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["matrix"], file["corr"] = 2 * matrix, corr
    with pytest.raises(UserError, match="no rotations"):
        read_map(tmp_path / "a.h5")


# --- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ShortFile.ang", "cut off.*160.*88"),
        ("ShortFile.ctf", "cut off.*500.*2"),
        ("ZeroXYCells.ctf", "0 x 0 cells"),
    ],
)
def test_malformed_files_say_what_is_wrong(shared_data: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_map(shared_data / "maps" / "malformed" / name)
    assert "\n" not in str(caught.value)


def test_hex_header_over_square_points(shared_data: Path) -> None:
    read = read_map(shared_data / "maps" / "malformed" / "HexHeader.ang")
    assert read.shape == (4, 40)
    assert not read.indexed.any()
    assert any("square" in note for note in read.attrs["notes"])


def test_what_is_no_map(tmp_path: Path) -> None:
    def refuses(path: Path, message: str, frame: str = AUTO) -> None:
        with pytest.raises(UserError, match=message) as caught:
            read_map(path, frame)
        assert "\n" not in str(caught.value)

    (tmp_path / "a.ctf").write_text("no map\n")
    refuses(tmp_path / "a.ctf", "Channel Text File")
    (tmp_path / "a.ang").write_text("# header only\n")
    refuses(tmp_path / "a.ang", "no points")
    (tmp_path / "a.ang").write_text("1 2 3\n4 5 6\n")
    refuses(tmp_path / "a.ang", "3 columns")
    (tmp_path / "a.ang").write_bytes(b"\0\1\2" * 100)
    refuses(tmp_path / "a.ang", "no text file")
    (tmp_path / "a.txt").write_text("x")
    refuses(tmp_path / "a.txt", "no map")
    (tmp_path / "a.h5").write_text("x")
    refuses(tmp_path / "a.h5", "no HDF5")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["patterns"] = [1]
    refuses(tmp_path / "b.h5", "holds patterns")
    refuses(tmp_path / "none.ang", "does not exist")
    good = ctf_text()
    (tmp_path / "c.ctf").write_text(good)
    refuses(tmp_path / "c.ctf", "there are auto, orix", "edax")
    (tmp_path / "c.ctf").write_text(good.replace("\t11\t225", "\t12\t225"))
    refuses(tmp_path / "c.ctf", "number of the Laue class")
    (tmp_path / "c.ctf").write_text(good.rstrip().rsplit("\n", 2)[0] + "\n1\t0.5\n")
    refuses(tmp_path / "c.ctf", "in line 34, which is no row of 11 numbers")
    (tmp_path / "c.ctf").write_text(good.replace("\n1\t", "\n3\t"))
    refuses(tmp_path / "c.ctf", "phase 3")
    (tmp_path / "c.ctf").write_text("\n".join(good.splitlines()[:8]))
    refuses(tmp_path / "c.ctf", "no line of column names")
    lines = good.splitlines()
    (tmp_path / "c.ctf").write_text("\n".join([*lines, lines[-1]]))
    refuses(tmp_path / "c.ctf", "several at one place")
    shutil.rmtree(tmp_path)
