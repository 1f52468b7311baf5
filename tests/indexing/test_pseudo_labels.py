"""A model's confident answers become labels, and what it is not sure of does not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from stemtune.cli import main
from stemtune.config import Config, SimulateConfig
from stemtune.crystal.symmetry import disorientation_deg
from stemtune.dataset.loaders import loaders
from stemtune.dataset.simulate import simulate_polycrystal
from stemtune.dataset.store import Store
from stemtune.learning.train import train

SHAPE = (12, 10)


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"simulate.size": 64, "simulate.scale": 0.05, "simulate.dose": 20_000, "simulate.precession": 0.7}
    simulate: SimulateConfig = Config.from_flat(settings).simulate
    return simulate_polycrystal("", tmp_path_factory.mktemp("scan") / "scan.h5", SHAPE, 6, simulate, seed=1)


@pytest.fixture(scope="module")
def model(scan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "matched"
    flat = {
        "data.store": str(scan),
        "model.name": "matched",
        "model.grid_step": 4,
        "train.batch_size": 8,
        "data.split": "random",
    }
    train(Config.from_flat(flat | {"data.validation_store": str(scan)}), folder)
    return folder


def test_confident_answers_become_labels_to_train_on(scan: Path, model: Path, tmp_path: Path) -> None:
    taught = tmp_path / "taught.h5"
    arguments = ["label", str(scan), "--method", "model", "--model", str(model), "--out", str(taught)]
    assert main([*arguments, "--min-confidence", "0.5"]) == 0
    with Store.open(taught) as store, Store.open(scan) as truth:
        kept, said = store.labelled, store.scores["answered"]
        assert 0.3 < kept[truth.labelled].mean() <= 1 and not kept[~truth.labelled].any()
        assert (store.confidence[kept] >= 0.5).all() and np.isnan(store.confidence[~kept]).all()
        assert np.array_equal(store.confidence[kept], said[kept])
        assert np.array_equal(store.group, truth.group) and np.array_equal(store.split, truth.split)
        given, right = (torch.from_numpy(each.orientation[kept]) for each in (store, truth))
        angle = disorientation_deg(given, right, truth.phases[0].symmetry)
        assert (angle < 5).double().mean() > 0.8
        assert json.loads(store.attrs["labelled"])["min_confidence"] == 0.5
    flat = {"data.store": str(taught), "data.split": "random", "data.score": "answered", "train.batch_size": 4}
    assert loaders(Config.from_flat(flat))[0].batches_per_epoch > 0


def test_nothing_is_written_without_a_confident_answer(
    scan: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "none.h5"
    arguments = ["label", str(scan), "--model", str(model), "--out", str(out)]
    assert main([*arguments, "--method", "model", "--min-confidence", "1"]) == 2
    assert "has a confidence of 1; the highest is " in capsys.readouterr().err
    for more, message in (
        (["--method", "model", "--min-confidence", "90"], "--min-confidence is 90, but a confidence lies in [0, 1]"),
        (["--method", "model", "--cif", "linio2"], "--cif goes with --method template"),
        (["--min-confidence", "0.5"], "--min-confidence goes with --method model"),
    ):
        assert main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err
    assert main(["label", str(scan), "--method", "model"]) == 2
    assert "needs --model MODEL" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
