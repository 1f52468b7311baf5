"""What version 0.1 wrote opens, and says what it said then. `tests/data/0.1/README.md` tells how it was made.

Only the command line and what `import stemtune` offers are used, so that the tests stay true wherever the code moves.
"""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stemtune
from stemtune.cli import main

WRITTEN = Path(__file__).parent / "data" / "0.1"

MADE_IN = b"stemtune-0.1"
"""The folder of /tmp that the sweep ran in; its files name it, Ray's pickles part by part of the path."""

CLOSE = 2e-3


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of everything but the sweep, as the working folder."""
    for name in ("MLFLOW_TRACKING_URI", "STEMTUNE_SWEEPS"):
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(WRITTEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def moved_sweep(here: Path) -> Path:
    """The finished sweep unpacked in another folder than it ran in, which is the working folder."""
    _unpack(here)
    return here


@pytest.fixture
def sweep_in_place(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The finished sweep as if it had run here: a folder whose name is as long takes the place of the old one."""
    folder = Path(tempfile.mkdtemp(prefix="sto-", dir="/tmp"))
    try:
        name = os.fsencode(folder.name)
        assert len(name) == len(MADE_IN)  # lengths are written in pickles
        _unpack(folder)
        shutil.copy2(here / "store.h5", folder)
        for file in folder.rglob("*"):
            if file.is_file() and "train" not in file.relative_to(folder).parts:  # checkpoints are sealed
                held = file.read_bytes().replace(MADE_IN, name)
                file.write_bytes(held.replace(MADE_IN.hex().encode(), name.hex().encode()))
        monkeypatch.chdir(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unpack(folder: Path) -> None:
    with tarfile.open(WRITTEN / "sweep.tar.gz") as packed:
        packed.extractall(folder, filter="data")


def said(capsys: pytest.CaptureFixture[str], *command: str, code: int = 0) -> str:
    """Run a command and return what it printed."""
    capsys.readouterr()
    assert main(list(command)) == code, capsys.readouterr().err
    out, err = capsys.readouterr()
    return out if code == 0 else err


def summary(folder: str) -> dict[str, Any]:
    held: dict[str, Any] = json.loads((Path(folder) / "summary.json").read_text())
    return held


def either(held: Any, old: str, new: str) -> Any:
    """Return what a mapping holds under the new name of a thing, or its old one."""
    return held[new] if new in held else held[old]


def test_stores_open(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulated = stemtune.load("store.h5")
    assert (simulated.n, simulated.size, simulated.scan_shape, simulated.step_nm) == (64, 48, (8, 8), (10.0, 10.0))
    assert np.bincount(simulated.split).tolist() == [36, 12, 16]
    assert int(simulated.labelled.sum()) == 60
    assert int((simulated.overlap_weight[:, 1] > 0).sum()) == 17
    # Models and MLflow's records name their training store by this hash.
    assert simulated.sha256 == "2140baf3ef743826414d44799aa02af018c3861bf7b056dfff8647bcaca8e63f"
    text = said(capsys, "inspect", "store.h5")
    for part in ("64 patterns", "60 of 64", "LiNiO2", "166", "36", "2140baf3ef743826", "simulate.overlap 0.5"):
        assert part in text


def test_labels_and_scores_of_a_measured_store_open(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled = stemtune.load("labelled.h5")
    assert [phase.name for phase in labelled.phases] == ["LiNiO2", "Ni"]
    assert labelled.sha256 == "500b89f0b58d8060505f4554374760ca2db1809a55ecbdb209c90b3b99cbea8a"
    indexed = labelled.phase >= 0
    assert (labelled.n, int(indexed.sum())) == (30, 27)
    assert float(np.nanmedian(labelled.confidence)) == pytest.approx(0.57883, abs=1e-5)
    middle = {name: float(np.median(values[indexed])) for name, values in labelled.scores.items()}
    assert middle["Q"] == pytest.approx(0.47981, abs=1e-5)
    assert middle["R"] == pytest.approx(1.14006, abs=1e-5)
    assert middle["R_phase"] == pytest.approx(32.2135, abs=1e-4)
    assert either(middle, "fit", "explained_intensity") == pytest.approx(0.44108, abs=1e-5)
    assert either(middle, "goodness", "ncc") == pytest.approx(0.63886, abs=1e-5)
    assert either(middle, "signal", "spot_z_score") == pytest.approx(3.21901, abs=1e-5)
    text = said(capsys, "inspect", "labelled.h5")
    for part in ("27 of 30", "0.579", "template", "Ni", "0 hot and 2 dead", "0.2 px", "0.37 px"):
        assert part in text
    assert said(capsys, "inspect", "labelled.h5", "--png", "sheet.png")
    assert Path("sheet-calibration.png").stat().st_size > 10_000  # from the group `calibration` of the store


def test_labels_of_a_store_are_judged(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "evaluate", "labelled.h5", "--truth", "map2", "--json", "judged.json")
    judged = json.loads(Path("judged.json").read_text())
    assert (judged["pixels"], judged["indexed_of_crystal"]) == (30, 0.9)
    assert judged["disorientation"]["strict"]["median_deg"] == pytest.approx(0.59946, abs=CLOSE)
    assert judged["disorientation"]["beam180"]["within_5deg"] == pytest.approx(21 / 23)


def test_old_scores_choose_what_is_trained_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {
        "model.name": "matched",
        "model.grid_step": "10",
        "data.split": "random",
        "data.guard": "0",
        "train.batch_size": "4",
        "data.score": "goodness",
        "data.keep_fraction": "0.8",
        "data.cut": "fit>0.1 signal>1",
    }
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    said(capsys, "train", "--store", "labelled.h5", *given, "--out", "taught")
    assert json.loads(Path("taught/model.json").read_text())["architecture"] == "matched"
    settings["data.cut"] = "fit>2"  # no score is that large: the name is understood, and nothing is left
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    assert "data.cut" in said(capsys, "train", "--store", "labelled.h5", *given, "--out", "nothing", code=2)


@pytest.mark.parametrize(
    ("name", "architecture", "weights"),
    [("model", "cnn", 19_245), ("polar", "polar", 5_490), ("matched", "matched", 0), ("matched_nickel", "matched", 0)],
)
def test_models_open(
    here: Path, capsys: pytest.CaptureFixture[str], name: str, architecture: str, weights: int
) -> None:
    model = stemtune.load(name)
    assert sum(weight.numel() for weight in model.parameters()) == weights
    text = said(capsys, "inspect", name)
    assert f"{architecture} of {weights:,} weights" in text
    if name != "matched_nickel":
        assert "2140baf3ef743826" in text


def test_a_network_answers_as_it_did(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "predict", "store.h5", "--model", "model", "--out", "out")
    told = summary("out")
    assert (told["patterns"], told["architecture"]) == (64, "cnn")
    assert told["indexed_fraction"] == pytest.approx(2 / 64)
    assert told["disorientation"]["strict"]["median_deg"] == pytest.approx(80.3286, abs=0.02)


def test_several_models_answer_as_they_did(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = ("--model", "matched", "--model", "matched_nickel")
    cleaned = ("--clean", "--clean-agree", "3", "--clean-surrounded", "4", "--grains-least", "2")
    said(capsys, "predict", "labelled.h5", *models, *cleaned, "--out", "out")
    told, then = summary("out"), json.loads((WRITTEN / "map2" / "summary.json").read_text())
    assert told["indexed_fraction"] == 1  # of the map as it is written; 0.1 said 29/30, what it was before the clean-up
    assert [(row["name"], row["pixels"]) for row in told["phases"]] == [("LiNiO2", 19), ("Ni", 11)]
    assert told["cleaned"] == then["cleaned"]
    assert told["grains"]["count"] == then["grains"]["count"] == 5
    made = stemtune.load("out")
    assert told["median_confidence"] == pytest.approx(float(np.median(made.confidence[made.indexed])))


def test_maps_open(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from orix import io

    refined = stemtune.load("map")
    assert (refined.shape, int(refined.indexed.sum()), refined.step_nm) == ((8, 8), 59, (10.0, 10.0))
    assert float(np.median(refined.confidence[refined.indexed])) == pytest.approx(0.53064, abs=1e-5)
    assert int(np.isfinite(refined.layers["weight2"]).sum()) == 23
    assert len(refined.tables["grains"]["pixels"]) == 8
    assert refined.tables["boundaries"]["kind"][0] == "high angle"
    for crystal_map in (io.load("map/map.h5"), refined.to_orix()):
        assert crystal_map.shape == (8, 8)
        assert int(crystal_map.is_indexed.sum()) == 59
        assert crystal_map.phases[0].space_group.number == 166
        explained = either(crystal_map.prop, "fit", "explained_intensity")
        assert float(np.median(explained[crystal_map.is_indexed])) == pytest.approx(0.38877, abs=1e-5)
    cleaned = stemtune.load("map2/map.h5")
    assert [phase.name for phase in cleaned.phases] == ["LiNiO2", "Ni"]
    assert np.bincount(cleaned.layers["changed"]).tolist() == [28, 1, 0, 0, 1]
    text = said(capsys, "inspect", "map")
    for part in ("8 rows x 8 columns", "92.2%", "0.531", "best 5", "0.612"):  # the last is the old `goodness`
        assert part in text
    assert "LiNiO2 63.3%, Ni 36.7%" in said(capsys, "inspect", "map2")


def test_a_map_is_judged_as_it_was(here: Path) -> None:
    figures = stemtune.evaluate("map", "store.h5")
    then = json.loads((WRITTEN / "map" / "summary.json").read_text())
    assert figures["disorientation"]["strict"]["median_deg"] == pytest.approx(0.95297, abs=1e-4)
    assert set(figures) == {
        *("pixels", "crystal", "no_crystal", "indexed_of_crystal", "indexed_of_no_crystal", "other_phase"),
        *("disorientation", "within_5deg_of_best", "pseudo_symmetry", "reliability", "risk_coverage", "boundaries"),
    }
    for name in ("crystal", "indexed_of_crystal"):
        assert figures[name] == then[name]
    for name in ("disorientation", "pseudo_symmetry", "within_5deg_of_best"):
        for key, value in then[name].items():
            assert figures[name][key] == pytest.approx(value, abs=1e-4)


def test_exports_of_a_map(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in ("map/map.ang", "map/map.ctf"):  # as 0.1 wrote them
        figures = stemtune.evaluate("map", file)
        assert figures["indexed_of_crystal"] == 1
        assert figures["disorientation"]["strict"]["mean_deg"] < 0.05
    for form in ("ang", "ctf", "h5", "dream3d", "csv"):
        said(capsys, "export", "map", "--to", form, "--out", f"out.{form}")
    with Path("out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert (len(rows), sum(row["phase"] == "LiNiO2" for row in rows)) == (64, 59)
    values = [float(either(row, "goodness", "ncc")) for row in rows if either(row, "goodness", "ncc")]
    assert float(np.median(values)) == pytest.approx(0.61195, abs=1e-3)


def test_a_clean_up_is_undone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "clean", "map2", "--undo", "--grains-least", "2", "--no-log")
    told, then = summary("map2"), json.loads((WRITTEN / "map2" / "summary.json").read_text())
    assert (told["cleaned"], told["grains"]["count"]) == (None, 5)
    assert told["indexed_fraction"] == pytest.approx(29 / 30)
    assert told["patterns_per_second"] == then["patterns_per_second"]  # what is not new stays
    assert "changed" not in stemtune.load("map2").layers
    names = [name for name, value in told.items() if value == then["median_fit"]]
    assert len(names) <= 1, f"one figure stands there under two names: {names}"


def test_grains_are_found_anew(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "grains", "map", "--grains-least", "1", "--grains-gap", "0", "--no-log")
    told = summary("map")
    assert told["grains"]["count"] == 19
    assert told["grains"]["boundaries"]["length"] == pytest.approx(510)
    assert told["disorientation"]["strict"]["median_deg"] == pytest.approx(0.95297, abs=1e-4)


def test_a_search_space_is_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "check", "space.yaml")
    for part in ("7 trials", "simulate.centre_error", "model.centring", "data.score", "model.start"):
        assert part in text
    assert "optim.lr" in said(capsys, "inspect", "space.yaml")


def test_a_finished_sweep_is_compared(moved_sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The records in MLflow suffice, wherever the sweep has gone."""
    text = said(capsys, "compare", "old", "--json", "now.json")
    assert "58.20°" in text
    now = json.loads(Path("now.json").read_text())
    then = json.loads(Path("sweeps/old/comparison/compare.json").read_text())
    board = [(row["number"], row["architecture"], row["status"], round(row["best"], 2)) for row in now["trials"]]
    assert board == [
        (2, "polar", "finished", 58.2),
        (0, "matched", "finished", 58.33),
        (3, "cnn", "stopped", 60.13),
        (1, "cnn", "finished", 60.51),
        (6, "cnn", "stopped", 64.89),
        (4, "polar", "stopped", 67.77),
        (5, "polar", "stopped", 67.79),
    ]
    del then["importances"]  # of seven trials nothing is said any more
    _same(now, then, "compare.json")
    assert stemtune.compare("old")["champion"] == then["champion"]
    checkpoint = next(Path("sweeps/old/train").glob(f"train-{then['champion']}/checkpoint_*"))
    assert "polar of 5,490 weights" in said(capsys, "inspect", str(checkpoint / "model"))


def _same(now: Any, then: Any, place: str) -> None:
    """See that every figure of `then` is in `now`, which may hold more."""
    if isinstance(then, dict):
        for name, value in then.items():
            assert name in now, f"{place} lacks {name}"
            _same(now[name], value, f"{place}: {name}")
    elif isinstance(then, list):
        assert len(now) == len(then), place
        for count, (one, other) in enumerate(zip(now, then, strict=True)):
            _same(one, other, f"{place} [{count}]")
    elif isinstance(then, float):
        assert math.isclose(now, then, rel_tol=1e-6, abs_tol=1e-9), place
    else:
        assert now == then, place


def test_the_champion_of_a_moved_sweep_answers(moved_sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its model is named by where it was."""
    said(capsys, "predict", "store.h5", "--model", "champion", "--out", "out", "--no-log")
    assert summary("out")["architecture"] == "polar"


def test_a_moved_sweep_is_resumed(moved_sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its training store is named by where it was, and lies in the working folder now."""
    said(capsys, "sweep", "--local", "--resume", "old")


def test_the_champion_of_a_finished_sweep_answers(sweep_in_place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "predict", "store.h5", "--model", "models:/old@champion", "--out", "out", "--no-log")
    assert summary("out")["architecture"] == "polar"
    assert summary("out")["disorientation"]["strict"]["median_deg"] == pytest.approx(57.8337, abs=0.02)
    assert stemtune.load("champion").parameters()


def test_a_finished_sweep_is_finished(sweep_in_place: Path) -> None:
    """To resume it trains nothing; 0.1 read Ray's pickles for that, which name classes of ours by where they stood."""
    command = [sys.executable, "-m", "stemtune.cli", "sweep", "--local", "--resume", "old"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=sweep_in_place, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "58.20°" in done.stdout
    assert json.loads(Path("sweeps/old/sweep.json").read_text())["status"] == "finished"
