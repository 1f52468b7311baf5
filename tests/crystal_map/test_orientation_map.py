"""Map files: what orix reads back from map.h5 and map.ang is the map that was written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from orix import io as orix_io
from sample_maps import NICKEL, orix_angle_deg, random_map

from stemtune.crystal.phase import Phase, linio2
from stemtune.crystal_map.io import read_map, read_map_h5, write_map_h5
from stemtune.crystal_map.io.ang import write_ang
from stemtune.crystal_map.io.csv import write_csv
from stemtune.crystal_map.io.ctf import write_ctf
from stemtune.crystal_map.io.orix_h5 import check_same, from_orix, read_with_orix
from stemtune.crystal_map.orientation_map import OrientationMap
from stemtune.errors import UserError


def best_of(crystal_map: object) -> np.ndarray:
    data = np.asarray(crystal_map.rotations.data)  # type: ignore[attr-defined]
    return data[:, 0] if data.ndim == 3 else data


@pytest.mark.parametrize("answers", [1, 3])
@pytest.mark.parametrize(("shape", "step"), [((6, 5), (2.5, 1.25)), ((1, 7), None), ((7, 1), (3.0, 3.0))])
def test_orix_opens_map_h5(
    tmp_path: Path, shape: tuple[int, int], step: tuple[float, float] | None, answers: int
) -> None:
    made = random_map(shape, [linio2()], answers, step)
    write_map_h5(made, tmp_path / "map.h5")
    read = orix_io.load(tmp_path / "map.h5")
    assert read.scan_unit == ("px" if step is None else "nm")
    np.testing.assert_array_equal(read.is_indexed, made.indexed)
    angles = orix_angle_deg(made.orientation[made.indexed], best_of(read)[made.indexed], linio2())
    assert angles.max() < 0.05
    phase = read.phases[0]
    assert phase.space_group.number == 166
    assert phase.point_group.name == "-3m"
    np.testing.assert_allclose(phase.structure.lattice.abcABG(), (2.878, 2.878, 14.19, 90, 90, 120), atol=1e-6)
    assert len(phase.structure) == 12
    np.testing.assert_allclose(read.prop["confidence"], made.confidence)
    if shape[0] > 1 and shape[1] > 1:
        assert read.shape == shape
        assert (read.dy, read.dx) == pytest.approx(step)


@pytest.mark.parametrize("step", [(2.5, 2.5), (0.123, 0.377), None, (1234.5, 1000.0)])
@pytest.mark.parametrize("shape", [(6, 5), (1, 7), (7, 1)])
def test_orix_opens_map_ang(tmp_path: Path, shape: tuple[int, int], step: tuple[float, float] | None) -> None:
    made = random_map(shape, [linio2()], step=step)
    write_ang(made, tmp_path / "map.ang")
    read = orix_io.load(tmp_path / "map.ang")
    np.testing.assert_array_equal(read.is_indexed, made.indexed)
    assert orix_angle_deg(made.orientation[made.indexed], best_of(read)[made.indexed], linio2()).max() < 0.05
    dy, dx = (value / 1000 for value in step) if step else (1, 1)
    rows, columns = shape
    np.testing.assert_allclose(read._y.reshape(shape), np.arange(rows)[:, None] * dy + np.zeros(columns), atol=1e-9)
    np.testing.assert_allclose(read._x.reshape(shape), np.arange(columns) * dx + np.zeros((rows, 1)), atol=1e-9)
    assert f"NROWS: {rows}" in (tmp_path / "map.ang").read_text()
    assert "space-group number 166" in (tmp_path / "map.ang").read_text()


def test_two_phases_keep_their_own(tmp_path: Path) -> None:
    made = random_map((8, 9), [linio2(), Phase.from_cif_text(NICKEL)])
    write_map_h5(made, tmp_path / "map.h5")
    write_ang(made, tmp_path / "map.ang")
    for name in ("map.h5", "map.ang"):
        read = read_with_orix(tmp_path / name)
        check_same(made, from_orix(read), name)
        laue = {1: "m-3m", 0: "-3m"}
        for index, expected in laue.items():
            own = made.phase == index
            found = {read.phases[i].point_group.laue.name for i in np.unique(read.phase_id[own])}
            assert found == {expected}


def test_nothing_indexed_still_reads_back(tmp_path: Path) -> None:
    made = random_map((4, 5), [linio2()], indexed=0.0)
    write_map_h5(made, tmp_path / "map.h5")
    write_ang(made, tmp_path / "map.ang")
    assert not orix_io.load(tmp_path / "map.h5").is_indexed.any()
    assert not read_with_orix(tmp_path / "map.ang").is_indexed.any()
    assert read_map_h5(tmp_path / "map.h5").phases == [linio2()]


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    made = random_map((4, 5), [linio2()])
    write_ang(made, tmp_path / "map.ang")
    other = random_map((4, 5), [linio2()])
    other.answers[:, 0] = np.roll(other.answers[:, 0], 1, axis=0)
    with pytest.raises(RuntimeError, match="deg away"):
        check_same(other, from_orix(read_with_orix(tmp_path / "map.ang")), "map.ang")


def test_own_reader_returns_everything(tmp_path: Path) -> None:
    made = random_map((6, 5), [linio2()])
    write_map_h5(made, tmp_path / "map.h5")
    read = read_map_h5(tmp_path)
    assert read.shape == made.shape
    assert read.step_nm == made.step_nm
    assert read.phases == made.phases
    assert read.attrs == made.attrs
    for name in ("answers", "answer_confidence", "phase", "spot_z_score", "explained_intensity"):
        np.testing.assert_array_equal(getattr(read, name), getattr(made, name))
    assert np.isnan(read.orientation[~read.indexed]).all()


def test_bad_map_files_are_one_line(tmp_path: Path) -> None:
    import h5py

    with pytest.raises(UserError, match="does not exist"):
        read_map_h5(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(UserError, match="cannot be read as HDF5"):
        read_map_h5(tmp_path / "text.h5")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["a"] = [1, 2]
    with pytest.raises(UserError, match="no map of stemtune"):
        read_map_h5(tmp_path / "foreign.h5")
    made = random_map((30, 30), [linio2()])
    write_map_h5(made, tmp_path / "map.h5")
    whole = (tmp_path / "map.h5").read_bytes()
    (tmp_path / "short.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="truncated") as caught:
        read_map_h5(tmp_path / "short.h5")
    assert "\n" not in str(caught.value)


def test_wrong_lengths_are_refused() -> None:
    made = random_map((4, 5), [linio2()])
    with pytest.raises(ValueError, match="pixels"):
        OrientationMap(
            (4, 6),
            made.answers,
            made.answer_confidence,
            made.phase,
            made.phases,
        )


def two_irons() -> OrientationMap:
    fcc = NICKEL.replace("data_Ni", "data_Fe").replace("Ni1 Ni", "Fe1 Fe")
    bcc = fcc.replace("3.52", "2.87").replace("F m -3 m", "I m -3 m").replace("225", "229")
    return random_map((6, 7), [Phase.from_cif_text(fcc), Phase.from_cif_text(bcc)], answers=1)


def test_two_phases_of_one_name_stay_apart(tmp_path: Path) -> None:
    made = two_irons()
    assert [phase.name for phase in made.phases] == ["Fe", "Fe"]
    assert made.phase_names == ["Fe (225)", "Fe (229)"]
    assert "Fe (229)" in str(made)
    for name, write in (("a.ang", write_ang), ("a.ctf", write_ctf)):
        write(made, tmp_path / name)
        read = read_map(tmp_path / name)
        assert [phase.space_group for phase in read.phases] == [225, 229]
        np.testing.assert_array_equal(read.phase, made.phase)
    write_csv(made, tmp_path / "a.csv")
    assert '"Fe (225)"' in (tmp_path / "a.csv").read_text()


def test_three_equal_phases_are_numbered() -> None:
    made = two_irons()
    same = dataclasses.replace(made, phases=[made.phases[0]] * 2)
    assert same.phase_names == ["Fe (225) #1", "Fe (225) #2"]
    unknown = dataclasses.replace(made.phases[0], space_group=0)
    assert dataclasses.replace(made, phases=[unknown] * 2).phase_names == ["Fe #1", "Fe #2"]


def test_a_map_is_cut_and_prints_itself() -> None:
    made = random_map((6, 8), [linio2()])
    made = dataclasses.replace(made, layers={"row": np.repeat(np.arange(6), 8)})
    part = made[1:5, ::2]
    assert part.shape == (4, 4) and part.step_nm == (2.5, 5.0)
    np.testing.assert_array_equal(part.layers["row"].reshape(4, 4)[:, 0], [1, 2, 3, 4])
    np.testing.assert_array_equal(part.answers, made.answers.reshape(6, 8, 3, 4)[1:5, ::2].reshape(16, 3, 4))
    assert part.to_orix().shape == (4, 4)
    assert "an orientation map of 4 x 4 pixels" in repr(part) and "LiNiO2" in str(part)
    with pytest.raises(ValueError, match="leave a pixel"):
        made[6:, :]
