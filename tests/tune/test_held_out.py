"""The test split: patterns that nobody has seen, what chance reads of them, and how sure a figure is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stemtune.config import Config
from stemtune.crystal.phase import linio2
from stemtune.crystal.symmetry import Symmetry
from stemtune.dataset.loaders import StoreLoader, loaders
from stemtune.dataset.loaders import held_out_loader as loader_of_test
from stemtune.dataset.simulate import simulate_store
from stemtune.dataset.store import Store
from stemtune.errors import UserError
from stemtune.learning.held_out import chance_deg, interval, resamples, score_held_out
from stemtune.learning.train import train

CPU = torch.device("cpu")
FRESH = {
    "data.source": "simulate",
    "data.patterns_per_epoch": 32,
    "data.validation_patterns": 32,
    "simulate.size": 16,
    "simulate.scale": 0.2,
    "train.batch_size": 16,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("held_out") / "small.h5"
    simulate_store("linio2", file, 600, Config.from_flat({"simulate.size": 16, "simulate.scale": 0.2}).simulate, 0)
    return file


@pytest.mark.parametrize("split", ["groups", "random"])
def test_the_test_split_is_neither_trained_nor_validated_on(store: Path, split: str) -> None:
    config = Config.from_flat({"data.store": str(store), "data.split": split})
    seen, (test, groups) = loaders(config, device=CPU), loader_of_test(config, CPU)
    assert isinstance(test, StoreLoader)
    parts = [set(each.rows.tolist()) for each in (*seen, test) if isinstance(each, StoreLoader)]
    assert len(parts) == 3 and all(parts)
    assert len(set.union(*parts)) == sum(map(len, parts))
    with Store.open(store) as opened:
        assert (groups == opened.group[test.rows]).all()
        assert split == "random" or (opened.split[test.rows] == 2).all()


def test_a_store_without_a_test_split_says_so(store: Path, tmp_path: Path) -> None:
    import h5py

    copy = tmp_path / "two.h5"
    copy.write_bytes(store.read_bytes())
    with h5py.File(copy, "r+") as file:
        file["split"][:] = np.minimum(file["split"][:], 1)
    with pytest.raises(UserError, match=r"the test split of .*two\.h5' has no labelled patterns"):
        loader_of_test(Config.from_flat({"data.store": str(copy)}), CPU)


def first_orientations(config: Config) -> list[torch.Tensor]:
    train, validation = loaders(config, device=CPU)
    return [next(iter(each.epoch(0))).orientation for each in (train, validation, loader_of_test(config, CPU)[0])]


def test_fresh_patterns_of_the_three_kinds_differ() -> None:
    """The seed of training changes what is trained on alone; `data.seed` what is validated and tested on."""
    plain = first_orientations(Config.from_flat(FRESH))
    assert len({each[0].numpy().tobytes() for each in plain}) == 3
    other = first_orientations(Config.from_flat({**FRESH, "train.seed": 1}))
    assert [torch.equal(*pair) for pair in zip(plain, other, strict=True)] == [False, True, True]
    third = first_orientations(Config.from_flat({**FRESH, "data.seed": 1}))
    assert [torch.equal(*pair) for pair in zip(plain, third, strict=True)] == [True, False, False]


def test_chance() -> None:
    """Without symmetry the mean is 126.5° (pi/2 + 2/pi); the cubic one has a mean of 40.7° (Mackenzie, 1958)."""
    alone = chance_deg(Symmetry.of_proper("1"))
    assert alone["disorientation_mean_deg"] == pytest.approx(np.degrees(np.pi / 2 + 2 / np.pi), abs=0.7)
    cubic = chance_deg(Symmetry.of_laue("m-3m"))
    assert cubic["disorientation_mean_deg"] == pytest.approx(40.74, abs=0.3)
    assert chance_deg(linio2().symmetry)["disorientation_median_deg"] == pytest.approx(69.0, abs=0.5)


def test_the_interval_is_that_of_a_mean() -> None:
    values = np.random.default_rng(1).standard_normal(400)
    low, high = interval(np.array([values[rows].mean() for rows in resamples(np.arange(400))]))
    error = values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.25 * error)


def test_patterns_of_a_grain_count_once() -> None:
    """A hundred grains of fifty equal patterns are as uncertain as a hundred patterns, not as five thousand."""
    grains = np.random.default_rng(2).standard_normal(100)
    values, groups = np.repeat(grains, 50), np.repeat(np.arange(100) + 7, 50)
    low, high = interval(np.array([values[rows].mean() for rows in resamples(groups)]))
    assert high - low == pytest.approx(2 * 1.96 * grains.std() / 10, rel=0.2)
    few = next(resamples(np.repeat(np.arange(3), 100)))  # three grains say nothing of a fourth: patterns are drawn
    assert len(np.unique(few)) > 150


def test_models_read_the_test_split(tmp_path: Path) -> None:
    clear = {"size": 32, "scale": 0.1, "dose": 0, "background": 0, "centre_error": 0, "thickness": 20}
    tiny = {**FRESH, **{f"simulate.{key}": value for key, value in clear.items()}, "model.name": "cnn"}
    tiny |= {"model.width": 4, "train.epochs": 1}
    train(Config.from_flat(tiny), tmp_path / "weak")
    train(Config.from_flat({**tiny, "simulate.scale": 0.3}), tmp_path / "far")
    weak, matched, far = score_held_out([tmp_path / "weak", None], tmp_path / "far", "disorientation_median_deg")
    assert weak is not None and matched is not None and far is None
    assert not weak.learned and matched.learned
    assert weak.patterns == 1024 == weak.figures["test/patterns"]
    assert weak.value == weak.figures["test/disorientation_median_deg"] > matched.value
    low, high = weak.interval
    assert low <= weak.value <= high
    assert (low, high) == tuple(weak.figures[f"test/disorientation_median_deg_{end}"] for end in ("low", "high"))
    assert weak.figures["model/ms_per_pattern"] > 0
    assert not any(key.startswith("val/") for key in weak.figures)
