"""Maps judged without a truth: by their neighbours, their patterns and another map; labels judged by what is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from orix.quaternion import Orientation
from orix.quaternion.symmetry import D3
from sample_maps import map_of

from stemtune.analysis.evaluation.agreement import against_patterns, agreement, coherence
from stemtune.analysis.evaluation.ground_truth import map_or_labels, read_truth
from stemtune.analysis.evaluation.risk import describe_risk, label_risk, networks
from stemtune.cli import main
from stemtune.config import Config, SimulateConfig
from stemtune.crystal.phase import linio2
from stemtune.crystal.pseudo_symmetry import pseudo_variants
from stemtune.crystal.rotations import from_axis_angle_deg, multiply
from stemtune.crystal.sampling import random_orientations
from stemtune.crystal.symmetry import beam180
from stemtune.crystal_map.orientation_map import OrientationMap
from stemtune.dataset.labels import Labels, write_labels
from stemtune.dataset.simulate import simulate_polycrystal
from stemtune.dataset.store import Store, StoreWriter
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError
from stemtune.learning.fit import fit

SHAPE = (12, 10)


def as_map(g: torch.Tensor, shape: tuple[int, int], indexed: Any = None) -> OrientationMap:
    count = shape[0] * shape[1]
    phase = np.zeros(count, dtype=np.int16) if indexed is None else np.where(indexed, 0, -1).astype(np.int16)
    ones = np.ones(count, dtype=np.float32)
    return OrientationMap(shape, g.numpy()[:, None], ones[:, None], phase, [linio2()], ones, ones)


def judge(path: Path, store: Path) -> dict[str, Any]:
    return against_patterns(map_or_labels(path), store)


def as_truth(g: torch.Tensor, shape: tuple[int, int]) -> OrientationMap:
    return map_of(shape, g.numpy(), [linio2()])


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"simulate.size": 64, "simulate.scale": 0.05, "simulate.dose": 20_000, "simulate.precession": 0.7}
    simulate: SimulateConfig = Config.from_flat(settings).simulate
    return simulate_polycrystal("", tmp_path_factory.mktemp("scan") / "scan.h5", SHAPE, 3, simulate, seed=1)


def test_coherence_of_a_known_map() -> None:
    """Two grains side by side, each turning by 1 degree from column to column, and one pixel that is astray."""
    rows, columns = 5, 8
    axis = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    start = random_orientations(2, 5)
    column = torch.arange(rows * columns) % columns
    g = multiply(start[(column >= 4).long()], from_axis_angle_deg(axis, column.double()))
    found = coherence(as_map(g, (rows, columns)))
    across, down = rows * 7, (rows - 1) * columns
    assert found["pairs"] == across + down
    assert found["within_5deg"] == pytest.approx((rows * 6 + down) / (across + down))
    assert found["mean_inside_deg"] == pytest.approx(rows * 6 * 1.0 / (rows * 6 + down), abs=1e-6)
    assert found["alone"] == 0
    g[2 * columns + 1] = multiply(
        g[2 * columns + 1], from_axis_angle_deg(axis, torch.tensor(25.0, dtype=torch.float64))
    )
    astray = coherence(as_map(g, (rows, columns)))
    assert astray["alone"] == pytest.approx(1 / (rows * columns))
    assert astray["within_5deg"] == pytest.approx((rows * 6 + down - 4) / (across + down))
    indexed = np.arange(rows * columns) != 2 * columns + 1
    assert coherence(as_map(g, (rows, columns), indexed))["pairs"] == across + down - 4


def test_coherence_and_agreement_are_those_of_orix() -> None:
    rows, columns = 6, 7
    g, other = random_orientations(rows * columns, 8), random_orientations(rows * columns, 9)
    other[::2] = multiply(
        g[::2], from_axis_angle_deg(random_orientations(21, 3)[:, 1:], torch.linspace(1, 9, 21, dtype=torch.float64))
    )
    ours, theirs = Orientation(g.numpy(), D3), Orientation(other.numpy(), D3)
    angle = np.rad2deg(ours.angle_with(theirs))
    found = agreement(as_map(g, (rows, columns)), as_truth(other, (rows, columns)))
    assert found["median_deg"] == pytest.approx(float(np.median(angle)), abs=1e-4)
    assert found["within_5deg"] == pytest.approx(float((angle < 5).mean()))
    grid = np.arange(rows * columns).reshape(rows, columns)
    pairs = [(grid[:, :-1].ravel(), grid[:, 1:].ravel()), (grid[:-1].ravel(), grid[1:].ravel())]
    beside = np.concatenate([np.rad2deg(ours[first].angle_with(ours[second])) for first, second in pairs])
    assert coherence(as_map(g, (rows, columns)))["within_5deg"] == pytest.approx(float((beside < 5).mean()))


def test_agreement_modulo_twins_and_variants() -> None:
    g = random_orientations(40, 2)
    here = as_map(g, (5, 8))
    twin = agreement(here, as_truth(beam180(g), (5, 8)))
    assert twin["within_5deg"] == 0 and twin["beam180"] == twin["pseudo"] == 1
    name, variant = pseudo_variants(linio2())[0]
    taken = agreement(here, as_truth(multiply(variant, g), (5, 8)))
    assert taken["beam180"] == 0 and taken["pseudo"] == 1
    assert taken["families"][name] == 1 and taken["families"]["other"] == 0


def test_the_right_map_explains_the_patterns_best(scan: Path, tmp_path: Path) -> None:
    with Store.open(scan) as store:
        right, inside = torch.from_numpy(store.orientation), store.labelled
    turned = multiply(right, from_axis_angle_deg(torch.tensor([1.0, 0, 0], dtype=torch.float64), torch.tensor(20.0)))
    good = against_patterns(as_map(right, SHAPE, inside), scan)
    bad = against_patterns(as_map(turned, SHAPE, inside), scan, read_truth(scan))
    assert good["indexed"] == inside.mean()
    assert (
        good["spots"]["explained_intensity"] > 2 * bad["spots"]["explained_intensity"]
        and good["spots"]["spot_z_score"] > bad["spots"]["spot_z_score"] + 2
    )
    assert bad["agreement"]["both"] == inside.mean() and bad["agreement"]["within_5deg"] == 0
    assert bad["agreement"]["explained_by_other"] == pytest.approx(good["spots"]["explained_intensity"])
    assert bad["agreement"]["explained_here"] == pytest.approx(bad["spots"]["explained_intensity"])
    assert bad["coherence"]["within_5deg"] == pytest.approx(good["coherence"]["within_5deg"])  # coherent, and wrong
    labels = judge(scan, scan)  # the labels of a store are a map as well
    written = tmp_path / "f.json"
    assert main(["evaluate", str(scan), "--against-patterns", str(scan), "--json", str(written)]) == 0
    assert labels == json.loads(written.read_text()) == good
    assert map_or_labels(scan).confidence[inside].min() == 1


def test_a_turned_scan_is_judged_in_the_frame_of_its_patterns(scan: Path, tmp_path: Path) -> None:
    turned = tmp_path / "turned.h5"
    shutil.copyfile(scan, turned)
    with h5py.File(turned, "r+") as file:
        file.attrs["scan_rotation_deg"] = 30.0
    assert judge(turned, turned)["spots"] == pytest.approx(judge(scan, scan)["spots"])
    with Store.open(turned) as store:
        sure = np.linspace(0, 1, store.n, dtype=np.float32)
        labels = Labels(store.orientation, sure, store.phase, store.phases)
    path = write_labels(turned, labels, tmp_path / "labels.h5")
    assert label_risk(path, read_truth(turned))["scores"]["confidence"]["wrong"][0] == 0
    assert label_risk(path, read_truth(scan))["scores"]["confidence"]["wrong"][0] == 1


def test_maps_that_do_not_fit_are_refused(scan: Path) -> None:
    g = random_orientations(20, 1)
    with pytest.raises(UserError, match="the map has 4 x 5 pixels, but '.*' 12 x 10 patterns"):
        against_patterns(as_map(g, (4, 5)), scan)
    with pytest.raises(UserError, match="the map has 4 x 5 pixels, but the other map 2 x 10"):
        agreement(as_map(g, (4, 5)), as_truth(g, (2, 10)))
    nothing = as_map(random_orientations(120, 1), SHAPE, np.zeros(120, dtype=bool))
    with pytest.raises(UserError, match="the map indexes no pixel"):
        against_patterns(nothing, scan)


def labelled(path: Path, tmp_path: Path) -> tuple[Path, OrientationMap]:
    """Write a labelled row of 100 patterns: Q falls with the number, every fourth label is wrong up to number 40 and
    every second one behind; the last ten patterns show no crystal.
    """
    g = random_orientations(100, 4)
    number = np.arange(100)
    wrong = np.where(number < 40, number % 4 == 3, number % 2 == 1)
    with StoreWriter(tmp_path / "plain.h5", 100, Geometry(8, 0.05, 200.0), [linio2()]) as writer:
        writer.write(0, np.zeros((100, 8, 8), dtype=np.uint16))
    away = multiply(g, from_axis_angle_deg(torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64), torch.tensor(30.0)))
    given = torch.where(torch.from_numpy(wrong)[:, None], away, g).numpy()
    scores = {"Q": np.linspace(1, 0, 100), "same": np.ones(100)}
    labels = Labels(given, np.linspace(0, 1, 100, dtype=np.float32), np.zeros(100, np.int16), [linio2()], scores)
    write_labels(tmp_path / "plain.h5", labels, path)
    phase = np.where(number < 90, 0, -1).astype(np.int16)
    return path, map_of((1, 100), np.where((phase >= 0)[:, None], g.numpy(), np.nan), [linio2()])


def test_risk_is_the_share_of_wrong_labels_among_those_kept(tmp_path: Path) -> None:
    path, truth = labelled(tmp_path / "labels.h5", tmp_path)
    found = label_risk(path, truth)
    assert found["labels"] == 100 and set(found["scores"]) == {"confidence", "Q"}  # `same` says nothing
    by_quality = dict(zip(found["scores"]["Q"]["kept"], found["scores"]["Q"]["wrong"], strict=True))
    assert by_quality[0.4] == pytest.approx(10 / 40)
    assert by_quality[0.9] == pytest.approx((10 + 25) / 90)
    assert by_quality[1.0] == pytest.approx((10 + 25 + 10) / 100)  # ten labels where there is no crystal
    confident = found["scores"]["confidence"]
    assert confident["wrong"][confident["kept"].index(0.1)] == pytest.approx(1)
    assert found["scores"]["Q"]["limit"][0] == 0 and found["scores"]["Q"]["limit"][-1] > 0.9


def test_risk_figure_with_networks(scan: Path, tmp_path: Path) -> None:
    with Store.open(scan) as store:
        noisy = store.orientation[::-1]
        labels = Labels(
            np.where(store.labelled[:, None], np.where(np.isfinite(noisy), noisy, store.orientation), np.nan),
            np.linspace(0, 1, store.n, dtype=np.float32),
            store.phase,
            store.phases,
            {"Q": np.random.default_rng(0).random(store.n)},
        )
    path = write_labels(scan, labels, tmp_path / "labels.h5")
    flat = {
        "data.store": str(path), "data.keep_fraction": 0.5, "data.score": "Q", "data.guard": 0, "train.epochs": 1,
        "model.name": "cnn", "model.width": 4, "model.depth": 2, "head.step": 45, "train.batch_size": 8,
        "data.split": "random",
    }  # fmt: skip
    device = torch.device("cpu")
    for name, more in (("blind", {}), ("judged", {"data.validation_store": str(scan)})):
        fit(Config.from_flat(flat | more), lambda *_: None, tmp_path / name, device=device)
    blind, judged = (tmp_path / name / "checkpoint" / "model" for name in ("blind", "judged"))
    with pytest.raises(UserError, match="was not validated on a truth"):
        networks([blind])
    assert not (tmp_path / "risk.png").exists()
    arguments = ["evaluate", str(path), "--truth", str(scan), "--risk", str(tmp_path / "risk.png")]
    assert main([*arguments, "--models", str(judged), "--json", str(tmp_path / "risk.json")]) == 0
    figures = json.loads((tmp_path / "risk.json").read_text())
    (network,) = figures["networks"]
    assert (network["score"], network["kept"], network["truth"]) == ("Q", 0.5, "scan.h5")
    assert 0 <= network["wrong"] <= 1 and "by Q, seed 0" in describe_risk(figures)
    picture = imread(tmp_path / "risk.png")
    assert picture.shape[1] > 1000 and (picture[..., :3] < 0.9).any(axis=-1).mean() > 0.005


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --truth, or where there is none --against-patterns STORE"),
        (["--against-patterns", "s.h5", "--risk", "r.png"], "--risk draws what is known of the truth"),
        (["--truth", "s.h5", "--other", "m.h5"], "--other is another map to agree with"),
        (["--truth", "s.h5", "--models", "m"], "give --risk FILE"),
    ],
)
def test_options_that_do_not_go_together(
    scan: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(scan), *arguments]) == 2
    assert message in capsys.readouterr().err
