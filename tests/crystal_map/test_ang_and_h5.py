"""Maps that EDAX, orix and py4DSTEM wrote: against orix where orix is right, else against geometry."""

from __future__ import annotations

import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from diffpy.structure import Lattice as DiffpyLattice
from diffpy.structure import Structure
from orix import io as orix_io
from orix.crystal_map import CrystalMap, PhaseList, create_coordinate_arrays
from orix.crystal_map import Phase as OrixPhase
from orix.quaternion import Rotation
from orix.vector import Vector3d
from sample_map_files import (
    edax_text,
    matrices,
    off_deg,
    orix_loads,
    orix_map,
)
from scipy.spatial.transform import Rotation as ScipyRotation

from stemtune.crystal_map.io import read_map
from stemtune.errors import UserError


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
