"""Maps that Oxford wrote, the frames of all programs, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from diffpy.structure import Lattice as DiffpyLattice
from diffpy.structure import Structure
from orix.crystal_map import Phase as OrixPhase
from orix.quaternion import Rotation
from orix.vector import Miller, Vector3d
from sample_map_files import (
    GOLD,
    LATTICES,
    QUARTZ,
    ctf_text,
    off_deg,
    orix_loads,
    random_rotations,
    same_map,
)

from stemtune.crystal.lattice import Lattice
from stemtune.crystal_map.frame_rotations import from_frame, to_frame
from stemtune.crystal_map.frames import AUTO, FRAMES
from stemtune.crystal_map.io import read_map
from stemtune.errors import UserError


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
