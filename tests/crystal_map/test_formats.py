"""Maps for other programs, in all eleven Laue classes: read back by a program or a formula that is not ours."""

from __future__ import annotations

import csv
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from laue_phases import CELLS, crystal
from orix.io.plugins import ctf as orix_ctf
from orix.quaternion import Rotation
from orix.vector import Vector3d

from stemtune.analysis.evaluation.ground_truth import read_truth
from stemtune.cli import main
from stemtune.cli.maps import EXPORTS
from stemtune.crystal.phase import Phase
from stemtune.crystal.symmetry import disorientation_deg
from stemtune.crystal_map.io import FORMATS, read_map, write_map, write_map_h5
from stemtune.crystal_map.io.ang import write_ang
from stemtune.crystal_map.io.csv import write_csv
from stemtune.crystal_map.io.ctf import write_ctf
from stemtune.crystal_map.io.dream3d import write_dream3d
from stemtune.crystal_map.io.orix_h5 import check_same, from_orix, read_with_orix, write_orix
from stemtune.crystal_map.orientation_map import OrientationMap
from stemtune.errors import UserError

SHAPE = (4, 6)
LAUE = list(CELLS)


def random_map(phases: list[Phase], step: tuple[float, float] | None = (2.5, 1.25)) -> OrientationMap:
    rng = np.random.default_rng(5)
    n = SHAPE[0] * SHAPE[1]
    answers = rng.normal(size=(n, 2, 4))
    answers /= np.linalg.norm(answers, axis=-1, keepdims=True)
    phase = rng.integers(-1, len(phases), n).astype(np.int16)
    phase[:3] = -1, 0, len(phases) - 1
    score = rng.random(n).astype(np.float32)
    return OrientationMap(SHAPE, answers, rng.random((n, 2)).astype(np.float32), phase, phases, 9 * score, score, step)


def off_deg(made: OrientationMap, read: np.ndarray) -> np.ndarray:
    """Disorientation of the indexed pixels, each in the symmetry of its phase."""
    off = np.zeros(len(made.phase))
    for index, phase in enumerate(made.phases):
        own = made.phase == index
        pair = (torch.from_numpy(np.ascontiguousarray(q[own], dtype=np.float64)) for q in (made.orientation, read))
        off[own] = disorientation_deg(*pair, phase.symmetry).numpy()
    return off[made.indexed]


def same_but_frame(made: OrientationMap, path: Path) -> None:
    """Our own reader: shape, step, phases, not-indexed pixels, orientations."""
    read = read_map(path)
    assert read.shape == made.shape
    assert read.step_nm == (None if made.step_nm is None else pytest.approx(made.step_nm, rel=1e-6))
    np.testing.assert_array_equal(read.indexed, made.indexed)
    by_name = {phase.name: place for place, phase in enumerate(read.phases)}
    for index, phase in enumerate(made.phases):
        place = by_name[phase.name]
        said = read.phases[place]
        np.testing.assert_array_equal(read.phase == place, made.phase == index)
        assert said.symmetry is not None and said.lattice is not None
        assert (said.symmetry.proper, said.space_group) == (phase.symmetry.proper, phase.space_group)
        np.testing.assert_allclose(said.lattice, phase.lattice, atol=6e-4)
    assert off_deg(made, read.orientation).max() < 0.05
    assert np.isnan(read.orientation[~made.indexed]).all()


@pytest.mark.parametrize("laue", LAUE)
@pytest.mark.parametrize("step", [(2.5, 1.25), None])
def test_ang(tmp_path: Path, laue: str, step: tuple[float, float] | None) -> None:
    made = random_map([crystal(laue)], step)
    write_ang(made, tmp_path / "a.ang")
    check_same(made, from_orix(read_with_orix(tmp_path / "a.ang")), "a.ang")
    same_but_frame(made, tmp_path / "a.ang")


@pytest.mark.parametrize("laue", LAUE)
@pytest.mark.parametrize("step", [(2.5, 1.25), None])
def test_h5(tmp_path: Path, laue: str, step: tuple[float, float] | None) -> None:
    made = random_map([crystal(laue)], step)
    write_orix(made, tmp_path / "a.h5")
    read = read_with_orix(tmp_path / "a.h5")
    check_same(made, from_orix(read), "a.h5")
    assert read.phases[0].space_group.number == CELLS[laue][0]
    assert read.scan_unit == ("px" if step is None else "nm")
    same_but_frame(made, tmp_path / "a.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]


@pytest.mark.parametrize("laue", LAUE)
@pytest.mark.parametrize("step", [(2.5, 1.25), None])
def test_ctf_with_our_reader(tmp_path: Path, laue: str, step: tuple[float, float] | None) -> None:
    made = random_map([crystal(laue)], step)
    write_ctf(made, tmp_path / "a.ctf")
    same_but_frame(made, tmp_path / "a.ctf")


@pytest.mark.parametrize("laue", LAUE)
def test_ctf_with_orix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, laue: str) -> None:
    """orix takes Oxford's axes (X || a*, Z || c) for its own (X || a, Z || c*): its answers are off by just that turn.

    Where a* stands along a and c along c* (orthorhombic, tetragonal, cubic) there is no turn.
    """
    phase = crystal(laue)
    made = random_map([phase])
    write_ctf(made, tmp_path / "a.ctf")
    if laue == "m-3":  # orix 0.15 calls Laue class 10 "m3", which its own Phase does not know
        with pytest.raises(UserError, match="m3"):
            read_with_orix(tmp_path / "a.ctf")
        read_phases = orix_ctf._get_phases_from_header
        monkeypatch.setattr(
            orix_ctf, "_get_phases_from_header", lambda header: read_phases(header) | {"point_groups": ["m-3"]}
        )
    read = read_with_orix(tmp_path / "a.ctf")
    np.testing.assert_array_equal(read.is_indexed, made.indexed)
    assert read.shape == SHAPE
    assert (read.scan_unit, read.dy, read.dx) == ("um", pytest.approx(2.5e-3), pytest.approx(1.25e-3))
    assert read.phases[1].space_group.number == CELLS[laue][0]
    lattice = read.phases[1].structure.lattice
    np.testing.assert_allclose(lattice.abcABG(), CELLS[laue][1], atol=1e-4)
    first, third = Vector3d(lattice.recbase.T[0]).unit, Vector3d(lattice.base[2]).unit  # a* and c where orix has them
    columns = np.stack([first.data[0], third.cross(first).data[0], third.data[0]], axis=1)
    turned = (Rotation.from_matrix(columns) * read.rotations).data
    assert off_deg(made, turned).max() < 0.05
    turn_deg = np.rad2deg(Rotation.from_matrix(columns).angle[0])
    expected = {"2/m": 13.67, "-3": 30, "-3m": 30, "6/m": 30, "6/mmm": 30}
    if laue == "-1":
        assert turn_deg > 5
    else:
        assert turn_deg == pytest.approx(expected.get(laue, 0), abs=1e-3)
    raw = off_deg(made, np.asarray(read.rotations.data))
    assert raw.max() < 0.05 or laue in ("-1", *expected)


@pytest.mark.parametrize("laue", LAUE)
def test_dream3d(tmp_path: Path, laue: str) -> None:
    """Read with plain h5py and orix's own arithmetic; the first row stands at the bottom."""
    made = random_map([crystal(laue)])
    write_dream3d(made, tmp_path / "a.dream3d")
    codes = {"6/mmm": 0, "m-3m": 1, "6/m": 2, "m-3": 3, "-1": 4, "2/m": 5, "mmm": 6, "4/m": 7, "4/mmm": 8, "-3": 9}
    with h5py.File(tmp_path / "a.dream3d") as file:
        assert file.attrs["FileVersion"] == b"7.0"
        assert {"DataContainerBundles", "DataContainers", "Pipeline"} <= set(file)
        container = file["DataContainers/ImageDataContainer"]
        np.testing.assert_array_equal(container["_SIMPL_GEOMETRY/DIMENSIONS"], (6, 4, 1))
        np.testing.assert_allclose(container["_SIMPL_GEOMETRY/SPACING"], (1.25e-3, 2.5e-3, 1), rtol=1e-6)
        cells, ensemble = container["CellData"], container["CellEnsembleData"]
        for data in (*cells.values(), *ensemble.values()):
            tuples = tuple(int(count) for count in data.attrs["TupleDimensions"])
            components = int(data.attrs["ComponentDimensions"][0])
            held = data.shape if data.dtype.kind != "O" else (*data.shape, 1)
            assert held == (*tuples[::-1], components)
        assert cells["Phases"].dtype == np.int32
        assert cells["EulerAngles"].dtype == cells["Quats"].dtype == np.float32
        phase, mask, euler, quats = (cells[name][()][0, ::-1] for name in ("Phases", "Mask", "EulerAngles", "Quats"))
        np.testing.assert_array_equal(phase.ravel(), made.phase + 1)
        np.testing.assert_array_equal(mask.ravel() > 0, made.indexed)
        np.testing.assert_array_equal(ensemble["CrystalStructures"][:, 0], [999, codes.get(laue, 10)])
        assert ensemble["PhaseName"][1].decode() == made.phases[0].name
        np.testing.assert_allclose(ensemble["LatticeConstants"][1], CELLS[laue][1], rtol=1e-5)
    assert off_deg(made, Rotation.from_euler(euler.reshape(-1, 3)).data).max() < 0.05
    assert off_deg(made, quats.reshape(-1, 4)[:, [3, 0, 1, 2]]).max() < 0.05


def test_csv(tmp_path: Path) -> None:
    made = random_map([crystal("-3m", "the, oxide"), crystal("m-3m")])
    write_csv(made, tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    assert [row["phase"] for row in rows] == [["the, oxide", "class m-3m", ""][index] for index in made.phase]
    kept = [row for row in rows if row["phase"]]
    euler = np.array([[float(row[name]) for name in ("phi1_deg", "Phi_deg", "phi2_deg")] for row in kept])
    q = np.array([[float(row[f"q{place}"]) for place in range(4)] for row in kept])
    full = np.full((24, 4), np.nan)
    for values in (q, Rotation.from_euler(euler, degrees=True).data):
        full[made.indexed] = values
        assert off_deg(made, full).max() < 0.05
    assert (rows[7]["row"], rows[7]["column"], rows[7]["y_nm"], rows[7]["x_nm"]) == ("1", "1", "2.5", "1.25")
    assert all(row["q0"] == row["confidence"] == "" for row in rows if not row["phase"])


@pytest.mark.parametrize("to", FORMATS)
def test_several_phases_through_the_command(tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = random_map([crystal("-3m"), crystal("m-3m"), crystal("2/m")])
    write_map_h5(made, tmp_path / "map.h5")
    assert main(["export", str(tmp_path), "--to", to]) == 0
    written = Path(capsys.readouterr().out.strip())
    assert written == tmp_path / f"map{FORMATS[to][0]}"
    if to in ("ang", "ctf", "h5"):
        same_but_frame(made, written)
        truth = read_truth(written)
        assert sorted(phase.symmetry.laue for phase in truth.phases) == ["-3m", "2/m", "m-3m"]
    assert {path.name for path in tmp_path.iterdir()} == {"map.h5", written.name}


def test_exports_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = random_map([crystal("mmm")])
    write_map_h5(made, tmp_path / "map.h5")
    assert tuple(FORMATS) == ("ang", "ctf", "h5", "dream3d", "csv") and set(EXPORTS) == {*FORMATS, "pt2"}
    with pytest.raises(UserError, match="the map itself"):
        write_map(tmp_path / "map.h5", "h5", tmp_path / "map.h5")
    with pytest.raises(UserError, match="is a folder"):
        write_map(tmp_path / "map.h5", "csv", tmp_path)
    with pytest.raises(UserError, match="no format"):
        write_map(tmp_path / "map.h5", "xls")

    def breaks(made: OrientationMap, path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("stopped")

    monkeypatch.setitem(FORMATS, "csv", (".csv", breaks))
    (tmp_path / "map.csv").write_text("old")
    with pytest.raises(RuntimeError):
        write_map(tmp_path / "map.h5", "csv")
    assert (tmp_path / "map.csv").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"map.h5", "map.csv"}


def test_a_changed_ctf_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stemtune.crystal_map.io import ctf

    monkeypatch.setattr(ctf, "to_frame", lambda orientation, *_: orientation)
    with pytest.raises(RuntimeError, match="deg away"):
        write_ctf(random_map([crystal("-3m")]), tmp_path / "a.ctf")
