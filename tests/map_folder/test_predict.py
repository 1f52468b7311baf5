"""The way from a store or a scan file to a map folder, with a stand-in model that knows the truth."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from laue_phases import crystal
from matplotlib.image import imread
from orix import io as orix_io
from sample_maps import MICROSCOPE

from benchmarks.prediction import prediction_throughput
from stemtune.analysis.evaluation.evaluate import compare, evaluate
from stemtune.analysis.evaluation.evaluate import describe as in_words
from stemtune.cli import main
from stemtune.cli.inspect import describe
from stemtune.config import Config
from stemtune.crystal.phase import linio2
from stemtune.crystal.rotations import multiply
from stemtune.crystal.sampling import random_orientations
from stemtune.crystal.symmetry import disorientation_deg
from stemtune.crystal_map.io import read_map_h5
from stemtune.dataset.schema import set_attribute
from stemtune.dataset.simulate import simulate_polycrystal
from stemtune.dataset.store import Store, StoreWriter
from stemtune.diffraction.detector import Resampling
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator
from stemtune.errors import UserError
from stemtune.learning.checkpoint import load_model
from stemtune.learning.grid import from_rotation_vector
from stemtune.learning.model import Candidates, OrientationModel
from stemtune.map_folder import files
from stemtune.map_folder import predict as predict_module
from stemtune.map_folder.predict import predict
from stemtune.plot.evaluation import draw_evaluation
from stemtune.plot.patterns import overlay_positions

SHAPE = (12, 10)


class Remembers(OrientationModel):
    """Returns the orientation of the most alike pattern it has seen; for vacuum some orientation or other."""

    def __init__(self, store: Store) -> None:
        geometry = store.geometry
        super().__init__(Config(), linio2(), geometry)
        seen = torch.from_numpy(np.array(store.patterns, dtype=np.float32)).flatten(1).sqrt()
        self.register_buffer("seen", torch.nn.functional.normalize(seen))
        known = torch.from_numpy(store.orientation).float()
        guess = random_orientations(len(known), 1).float()
        self.register_buffer("known", torch.where(known.isnan(), guess, known))

    def forward(self, patterns: torch.Tensor) -> torch.Tensor:
        looked = torch.nn.functional.normalize(patterns.float().flatten(1).clamp_min(0).sqrt())
        return looked @ self.seen.T

    def candidates(self, output: torch.Tensor, n: int = 1) -> Candidates:
        best = output.topk(n, dim=1)
        return Candidates(self.known[best.indices], best.values.clamp(0, 1))


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scan") / "scan.h5"
    simulate_polycrystal("", path, SHAPE, 3, MICROSCOPE, seed=1)
    return path


@pytest.fixture(scope="module")
def model(scan: Path) -> Iterator[OrientationModel]:
    with Store.open(scan) as store:
        made = Remembers(store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict_module, "load_model", lambda folder: made)
        yield made


@pytest.fixture(scope="module")
def folder(scan: Path, model: OrientationModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The map folder of the scan."""
    out = tmp_path_factory.mktemp("map") / "map"
    predict(scan, "stand-in", out, batch=50)
    return out


def test_map_folder_is_the_truth(scan: Path, folder: Path) -> None:
    out = folder
    summary = json.loads((out / "summary.json").read_text())
    names = {"map.h5", "map.ang", "map.ctf", "ipf_x.png", "ipf_y.png", "ipf_z.png", "confidence.png", "summary.json"}
    names |= {"report.html", "grains.csv", "boundaries.csv", "grains.png", "kam.png", "grod.png"}
    assert {path.name for path in out.iterdir()} == names
    with Store.open(scan) as store:
        truth, crystal = store.orientation, store.phase >= 0
    read = orix_io.load(out / "map.h5")
    assert read.shape == SHAPE
    assert read.scan_unit == "nm"
    kept = read.is_indexed
    assert not kept[~crystal].any()
    assert kept[crystal].mean() > 0.9
    best = torch.from_numpy(np.ascontiguousarray(read.rotations.data[kept, 0]))
    off = disorientation_deg(best, torch.from_numpy(truth[kept]), linio2().symmetry)
    assert float(off.median()) < 0.05
    assert float((off < 5).double().mean()) > 0.97
    assert summary["patterns"] == 120
    assert summary["indexed_of_no_crystal"] == 0
    assert summary["disorientation"]["beam180"]["median_deg"] < 0.05
    assert summary["indexed_fraction"] == pytest.approx(kept.mean())
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count('alt="measured"') == page.count('alt="simulated"') == 6
    assert "They cannot be shown" not in page
    for name in ("ipf_x", "ipf_y", "ipf_z", "confidence"):
        picture = imread(out / f"{name}.png")
        assert min(picture.shape[:2]) > 300


def test_ipf_colours_are_those_of_orix(folder: Path) -> None:
    from orix.plot import IPFColorKeyTSL
    from orix.vector import Vector3d

    from stemtune.plot.ipf import DIRECTIONS, ipf_colours

    read = orix_io.load(folder / "map.h5")
    made = read_map_h5(folder)
    for axis, direction in DIRECTIONS.items():
        key = IPFColorKeyTSL(read.phases[0].point_group, direction=Vector3d(direction))
        expected = key.orientation2color(read["indexed"].orientations)
        ours = ipf_colours(made.orientation[made.indexed], linio2(), direction)
        np.testing.assert_allclose(ours, expected, atol=1e-6, err_msg=axis)
        assert (ipf_colours(made.orientation[~made.indexed], linio2(), direction).std(axis=1) == 0).all()


def test_evaluate_reads_every_kind_of_truth(scan: Path, folder: Path, tmp_path: Path) -> None:
    out = folder
    against_store = evaluate(out / "map.h5", scan)
    draw_evaluation(against_store, tmp_path / "trust.png")
    assert imread(tmp_path / "trust.png").shape[0] > 500
    written = tmp_path / "figures.json"
    assert main(["evaluate", str(out), "--truth", str(scan), "--json", str(written)]) == 0
    assert json.loads(written.read_text()) == against_store
    for truth in (out, out / "map.h5", out / "map.ang"):
        same = evaluate(out, truth)
        assert same["disorientation"]["strict"]["mean_deg"] < 0.05
        assert same["pseudo_symmetry"]["right"] == 1.0
        assert same["indexed_of_crystal"] == 1.0


def test_evaluate_finds_planted_errors(scan: Path, folder: Path) -> None:
    from stemtune.analysis.evaluation.ground_truth import read_truth
    from stemtune.crystal.rotations import from_axis_angle_deg
    from stemtune.crystal.symmetry import beam180

    made, truth = read_map_h5(folder), read_truth(scan)
    chosen = np.flatnonzero((truth.phase >= 0) & made.indexed)
    made.answers[:, 0] = np.where(np.isfinite(truth.orientation), truth.orientation, made.answers[:, 0])
    quarter = len(chosen) // 4
    right = torch.from_numpy(truth.orientation)
    twin, about_c = chosen[:quarter], chosen[quarter : 2 * quarter]
    made.answers[twin, 0] = beam180(right[twin]).numpy()
    turn = from_axis_angle_deg(torch.tensor([0.0, 0, 1], dtype=torch.float64), 60.0)
    made.answers[about_c, 0] = multiply(turn, right[about_c]).numpy()
    made.phase[chosen[-5:]] = -1
    figures = compare(made, truth)
    total = len(chosen) - 5
    assert figures["pseudo_symmetry"]["60 about c"] == pytest.approx(quarter / total)
    assert figures["pseudo_symmetry"]["beam180"] == pytest.approx(quarter / total)
    assert figures["disorientation"]["beam180"]["within_5deg"] == pytest.approx(1 - quarter / total)
    assert figures["disorientation"]["strict"]["within_5deg"] == pytest.approx(1 - 2 * quarter / total)
    crystal = int((truth.phase >= 0).sum())
    assert figures["indexed_of_crystal"] == pytest.approx(total / crystal)
    trust = figures["reliability"]
    assert sum(entry["pixels"] for entry in trust["bins"]) == total
    assert sum(trust["histogram"]) == total and len(trust["histogram"]) == 20
    right = sum(entry["pixels"] * entry["within_5deg"] for entry in trust["bins"])
    assert right / total == pytest.approx(figures["disorientation"]["strict"]["within_5deg"])
    assert f"calibration error {trust['calibration_error']:.3f}" in in_words(figures)
    words = in_words(figures)
    assert f"60 about c {quarter / total:.1%}" in words
    assert f"{crystal:,} of them crystal" in words
    made.phase[:] = -1
    assert "no pixel is indexed as the phase that the truth has there" in in_words(compare(made, truth))


def test_a_store_that_is_no_scan_becomes_one_row(model: OrientationModel, tmp_path: Path) -> None:
    geometry = Geometry(64, 0.05, 200)
    truth = random_orientations(7, 3)
    patterns = KinematicSimulator(linio2(), geometry, MICROSCOPE).patterns(truth.float(), torch.Generator())
    with StoreWriter(tmp_path / "loose.h5", 7, geometry, [linio2()]) as writer:
        writer.write(0, patterns.numpy().astype(np.uint16), orientation=truth.numpy(), phase=np.zeros(7))
    summary = predict(tmp_path / "loose.h5", "stand-in", tmp_path / "map")
    assert summary["scan_shape"] == [1, 7]
    assert orix_io.load(tmp_path / "map" / "map.h5").size == 7
    assert summary["step_nm"] is None


def test_other_calibration_is_resampled(scan: Path, model: OrientationModel, tmp_path: Path) -> None:
    """Patterns of the same scan on a finer, shifted grid give the same map, and the user is told."""
    with Store.open(scan) as store:
        patterns, truth, place = np.array(store.patterns), store.orientation, store.position
        group, phase = store.group, store.phase
    fine = Geometry(160, 0.025, 300, centre_px=(81.0, 78.5))
    towards = Resampling(Geometry(64, 0.05, 200), fine)
    moved = towards(torch.from_numpy(patterns.astype(np.float32))).numpy()
    with StoreWriter(tmp_path / "fine.h5", len(moved), fine, [linio2()], np.float32, {"scan_shape": SHAPE}) as writer:
        writer.write(0, moved, orientation=truth, position=place, group=group, phase=phase)
    summary = predict(tmp_path / "fine.h5", "stand-in", tmp_path / "map")
    assert summary["disorientation"]["beam180"]["within_5deg"] > 0.9
    assert any("resampled" in note for note in summary["notes"])
    assert any("300 kV" in note for note in summary["notes"])


def test_resampling_keeps_places_in_reciprocal_space() -> None:
    source = Geometry(200, 0.011, 200, centre_px=(95.0, 104.0))
    target = Geometry(64, 0.03, 200)
    x, y = 0.31, -0.47
    row, column = source.pixel_of(x, y)
    line = torch.arange(200.0)
    spot = torch.exp(-((line[:, None] - float(row)) ** 2 + (line - float(column)) ** 2) / (2 * 3.0**2))
    moved = Resampling(source, target)(spot[None])[0]
    weight = moved / moved.sum()
    here = torch.arange(64.0)
    found = float((weight.sum(1) * here).sum()), float((weight.sum(0) * here).sum())
    expected = target.pixel_of(x, y)
    assert found == pytest.approx((float(expected[0]), float(expected[1])), abs=0.05)
    same = torch.rand(2, 64, 64)
    assert Resampling(target, target)(same) is same


def test_patterns_that_hardly_reach_are_refused() -> None:
    with pytest.raises(UserError, match="camera length"):
        Resampling(Geometry(128, 0.005, 200), Geometry(128, 0.025, 200))


def test_what_only_one_of_pattern_and_model_reaches_is_noted() -> None:
    near, far = Geometry(128, 0.02, 200), Geometry(128, 0.025, 200)
    assert "80 % as far as the model looks; the rest is empty" in Resampling(near, far).notes[-1]
    assert "reach 1.60 1/Å, but the model looks only at 1.28 1/Å" in Resampling(far, near).notes[-1]
    assert not Resampling(far, far).notes


def test_overlay_of_a_store(folder: Path, tmp_path: Path) -> None:
    picture = overlay_positions(folder, [(5, 5), (6, 3)], tmp_path / "overlay.png")
    assert imread(picture).shape[0] > 500
    with pytest.raises(UserError, match="outside of the map"):
        overlay_positions(folder, [(50, 5)])


def test_a_scan_file_goes_the_whole_way(shared_data: Path, model: OrientationModel, tmp_path: Path) -> None:
    """Four rows of the real scan, with a model that guesses: no crystal answer is right, but every file is there."""
    real = shared_data / "cathode" / "cathode_scan.hspy"
    with pytest.raises(UserError, match="--kv"):
        predict(real, "stand-in", tmp_path / "map", keep="30:34,20:30")
    assert list(tmp_path.iterdir()) == []
    summary = predict(real, "stand-in", tmp_path / "map", kv=300.0, keep="30:34,20:30")
    assert summary["scan_shape"] == [4, 10]
    assert [path.name for path in tmp_path.iterdir()] == ["map"]
    assert overlay_positions(tmp_path / "map", [(1, 3)]).exists()


def test_rate_compares_the_whole_with_the_bare_model(scan: Path, model: OrientationModel) -> None:
    with Store.open(scan) as store:
        rates = prediction_throughput(store, model, batch=40, rounds=2)
    assert rates["patterns"] == 120
    assert 0 < rates["ratio"] < 3
    assert rates["patterns_per_second"] > 0


def test_refined_map(scan: Path, model: OrientationModel, folder: Path, tmp_path: Path) -> None:
    """Candidates 0.6 degrees off come out better, the map says how well they fit, and maps without that still read."""
    kept = model.known.clone()
    turn = torch.randn(len(kept), 3, generator=torch.Generator().manual_seed(8))
    model.known.copy_(multiply(kept, from_rotation_vector(turn / turn.norm(dim=1, keepdim=True) * 0.0105)))
    try:
        plain = predict(scan, "stand-in", tmp_path / "plain")
        summary = predict(scan, "stand-in", tmp_path / "map", refine=True)
    finally:
        model.known.copy_(kept)
    assert plain["disorientation"]["strict"]["median_deg"] == pytest.approx(0.6, abs=0.05)
    assert summary["disorientation"]["strict"]["median_deg"] < 0.4
    made, before = read_map_h5(tmp_path / "map"), read_map_h5(folder)
    assert made.ncc is not None and made.ncc.shape == made.answers.shape[:2]
    assert summary["median_ncc"] == pytest.approx(np.median(made.ncc[made.indexed, 0]))
    assert summary["fitted"]["scale_inv_angstrom"] == pytest.approx(0.05, rel=0.01)
    assert summary["fitted"]["centre_px"] == pytest.approx([31.5, 31.5], abs=0.3)
    read = orix_io.load(tmp_path / "map" / "map.h5")
    np.testing.assert_allclose(read.prop["ncc"], np.nan_to_num(made.ncc[:, 0]), rtol=1e-6)
    assert before.ncc is None and "median_ncc" not in plain
    assert "ncc" in describe(tmp_path / "map") and "ncc" not in describe(folder)
    assert evaluate(tmp_path / "map", scan)["disorientation"]["strict"] == summary["disorientation"]["strict"]


def test_ctrl_c_leaves_nothing(
    scan: Path, model: OrientationModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted while the pictures are drawn, no folder is left, not even a hidden one."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "write_ang", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(scan, "stand-in", tmp_path / "map")
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_line(scan: Path, model: OrientationModel, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["a"] = [1, 2]
    (tmp_path / "short.h5").write_bytes(scan.read_bytes()[:5000])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    cases = [
        ((tmp_path / "none.h5", tmp_path / "map"), {}, "does not exist"),
        ((tmp_path / "foreign.h5", tmp_path / "map"), {}, "foreign"),
        ((tmp_path / "short.h5", tmp_path / "map"), {}, "truncated"),
        ((scan, tmp_path / "map"), {"kv": 300.0}, "leave out --kv"),
        ((scan, tmp_path / "mine"), {}, "choose another --out"),
        ((scan, "/proc/nowhere/map"), {}, "cannot write"),
    ]
    for (source, out), options, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            predict(source, "stand-in", out, **options)
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign.h5", "mine", "short.h5"]
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_a_model_folder_with_a_missing_file(
    scan: Path, model: OrientationModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_module, "load_model", load_model)
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"model\.json"):
        predict(scan, tmp_path / "model", tmp_path / "map")
    assert not (tmp_path / "map").exists()


def test_the_champion_of_another_crystal_is_refused(scan: Path, model: OrientationModel, tmp_path: Path) -> None:
    other = tmp_path / "other.h5"
    other.write_bytes(scan.read_bytes())
    with h5py.File(other, "r+") as file:
        set_attribute(file, "phases_cif", [crystal("m-3m", "FeNi").cif])
    with pytest.raises(
        UserError, match=r"the champion reads .*LiNiO2.*, but '.*other\.h5' holds FeNi; give a model of"
    ):
        predict(other, tmp_path, tmp_path / "out", addresses=["champion"])
    assert not (tmp_path / "out").exists()
    predict(scan, tmp_path, tmp_path / "out", addresses=["champion"])
