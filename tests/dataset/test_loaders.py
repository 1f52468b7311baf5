"""Loading: every pattern once, the same again for the same epoch, shared between ranks, and what is refused."""

import threading
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stemtune.config import Config
from stemtune.crystal.phase import linio2
from stemtune.dataset.batches import Batch, Loader
from stemtune.dataset.loaders import StoreLoader, loaders
from stemtune.dataset.store import Store, StoreWriter
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError

N, SIZE = 200, 8
GEOMETRY = Geometry(SIZE, 0.05, 200.0)


def make_store(path: Path, geometry: Geometry = GEOMETRY, **columns: Any) -> Path:
    """Write a store whose pattern number i is filled with i, with 20 groups of 10."""
    patterns = np.broadcast_to(np.arange(N, dtype=np.uint16)[:, None, None], (N, SIZE, SIZE))
    q = np.random.default_rng(0).normal(size=(N, 4))
    labels = {
        "orientation": q / np.linalg.norm(q, axis=1, keepdims=True),
        "phase": np.zeros(N),
        "confidence": np.linspace(0, 1, N),
        "group": np.arange(N) // 10,
    }
    with StoreWriter(path, N, geometry, [linio2()]) as writer:
        writer.write(0, patterns, **{**labels, **columns})
    return path


def config(path: Path, **settings: object) -> Config:
    flat = {"data.store": str(path), "train.batch_size": 16, "data.augment": "none"}
    return Config.from_flat({**flat, **{key.replace("__", "."): value for key, value in settings.items()}})


def rows(batches: list[Batch]) -> list[list[int]]:
    return [batch.patterns[:, 0, 0].tolist() for batch in batches]


def flat(batches: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(batches))


def epoch_rows(loader: Loader, epoch: int = 0) -> list[list[int]]:
    batches = rows(list(loader.epoch(epoch)))
    assert len(batches) == loader.batches_per_epoch
    return batches


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("loading") / "s.h5")


def test_epoch_uses_every_training_row_at_most_once(path: Path) -> None:
    train, validation = loaders(config(path))
    split = Store.open(path).split
    used = flat(epoch_rows(train))
    assert len(used) == len(set(used)) == 160
    assert set(used) == set(np.flatnonzero(split == 0))
    assert flat(epoch_rows(validation)) == np.flatnonzero(split == 1).tolist()


def test_last_incomplete_batch_is_dropped_in_training_only(path: Path) -> None:
    train, validation = loaders(config(path, train__batch_size=48))
    assert [len(batch) for batch in epoch_rows(train)] == [48, 48, 48]
    train, validation = loaders(config(path, train__batch_size=12))
    assert [len(batch) for batch in epoch_rows(validation)] == [12, 8]


def test_patterns_and_orientations_belong_together(path: Path) -> None:
    store = Store.open(path)
    for batch in loaders(config(path))[0].epoch(3):
        number = batch.patterns[:, 0, 0].long().numpy()
        assert batch.patterns.dtype == torch.uint16
        assert batch.orientation.dtype == torch.float32
        np.testing.assert_allclose(batch.orientation.numpy(), store.orientation[number], atol=1e-7)
        assert (batch.patterns.numpy() == number[:, None, None]).all()


def test_epoch_repeats_and_depends_on_seed_and_number(path: Path) -> None:
    loader, again = loaders(config(path))[0], loaders(config(path))[0]
    first = epoch_rows(loader, 0)
    assert epoch_rows(loader, 7) == epoch_rows(again, 7)  # `again` never saw the epochs before: exact resume
    assert epoch_rows(loader, 0) == first
    assert epoch_rows(loader, 1) != first
    assert epoch_rows(loaders(config(path, train__seed=1))[0], 0) != first


def test_augmentation_repeats_with_the_epoch(path: Path) -> None:
    def once(epoch: int) -> list[Batch]:
        return list(loaders(config(path, data__augment="flips"))[0].epoch(epoch))

    first, second, other = once(2), once(2), once(3)
    assert all(torch.equal(p.orientation, q.orientation) for p, q in zip(first, second, strict=True))
    assert not all(torch.equal(p.orientation, q.orientation) for p, q in zip(first, other, strict=True))
    exact = {tuple(np.abs(q).round(5)) for q in Store.open(path).orientation}
    turned = [tuple(np.abs(q.numpy()).round(5)) not in exact for batch in first for q in batch.orientation]
    assert np.mean(turned) > 0.5


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_each_global_batch(path: Path, world: int) -> None:
    alone = [set(batch) for batch in epoch_rows(loaders(config(path))[0], 5)]
    ranks = [epoch_rows(loaders(config(path), rank, world)[0], 5) for rank in range(world)]
    assert all(len(batch) == 16 // world for batches in ranks for batch in batches)
    assert [set(flat(parts)) for parts in zip(*ranks, strict=True)] == alone
    validation = [flat(epoch_rows(loaders(config(path), rank, world)[1])) for rank in range(world)]
    assert sorted(flat(validation)) == flat(epoch_rows(loaders(config(path))[1]))


def test_unlabelled_rows_are_never_trained_on(tmp_path: Path) -> None:
    phase, orientation = np.zeros(N), np.tile([1.0, 0, 0, 0], (N, 1))
    phase[::3], orientation[1::3] = -1, np.nan
    path = make_store(tmp_path / "s.h5", phase=phase, orientation=orientation)
    for loader in loaders(config(path)):
        used = flat(epoch_rows(loader))
        assert used
        assert all(number % 3 == 2 for number in used)


def test_confidence_knobs(path: Path) -> None:
    store = Store.open(path)
    train = np.flatnonzero(store.split == 0)
    cut = flat(epoch_rows(loaders(config(path, data__min_confidence=0.5, train__batch_size=1))[0]))
    assert set(cut) == {row for row in train if store.confidence[row] >= 0.5}
    half = flat(epoch_rows(loaders(config(path, data__keep_fraction=0.5, train__batch_size=1))[0]))
    assert set(half) == set(train[-80:])  # confidence grows with the row
    ordered = flat(epoch_rows(loaders(config(path, data__order="confidence", train__batch_size=1))[0], 3))
    assert ordered == train[::-1].tolist()
    validation = flat(epoch_rows(loaders(config(path, data__min_confidence=0.5))[1]))
    assert len(validation) == (store.split == 1).sum()  # validation is the same for every trial


def test_labels_without_confidence_are_the_least_confident(tmp_path: Path) -> None:
    confidence = np.linspace(0, 1, N)
    confidence[::2] = np.nan
    path = make_store(tmp_path / "s.h5", confidence=confidence)
    kept = flat(epoch_rows(loaders(config(path, data__keep_fraction=0.5, train__batch_size=1))[0]))
    assert all(row % 2 for row in kept)


def test_larger_than_memory_path_reads_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = epoch_rows(loaders(config(path))[0], 1)
    asked: list[int] = []
    monkeypatch.setattr("stemtune.dataset.loaders.memory_bytes", lambda: 1)
    loader = loaders(config(path))[0]
    monkeypatch.setattr(Store, "expect", lambda self, rows: asked.extend(rows))
    assert epoch_rows(loader, 1) == expected
    assert epoch_rows(loader, 1) == expected
    assert len(asked) == 2 * (160 - 16)  # every batch but the first of each epoch is asked for ahead of its use


def test_a_store_that_fits_is_read_through_once_before_its_first_batch(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = epoch_rows(loaders(config(path))[0], 1)
    read: list[int] = []
    monkeypatch.setattr(Store, "read_through", lambda self: read.append(self.n))
    monkeypatch.setattr(Store, "expect", lambda self, rows: pytest.fail("asked for single patterns"))
    loader = loaders(config(path))[0]
    assert epoch_rows(loader, 1) == expected
    assert epoch_rows(loader, 1) == expected
    assert read == [N]
    monkeypatch.undo()
    few, asked = loaders(config(path, data__keep_fraction=0.2))[0], []
    monkeypatch.setattr(Store, "read_through", lambda self: pytest.fail("read more than is needed"))
    monkeypatch.setattr(Store, "expect", lambda self, rows: asked.extend(rows))
    assert epoch_rows(few, 1)
    assert asked


def test_leaving_an_epoch_early_ends_its_thread(path: Path) -> None:
    before = threading.active_count()
    batches = loaders(config(path))[0].epoch(0)
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("settings", "world", "message"),
    [
        ({"train__batch_size": 15}, 2, "`train.batch_size` is 15, but must be a multiple of the 2 workers"),
        ({"train__batch_size": 161}, 1, "`train.batch_size` is 161, but .* has 160 patterns to train on"),
        ({"data__min_confidence": 2}, 1, "`data.min_confidence` is 2, but no training label"),
        ({"data__store": ""}, 1, "`data.store` is not set"),
        ({"data__store": "gone.h5"}, 1, "the store 'gone.h5' does not exist"),
    ],
)
def test_mistakes_in_settings(path: Path, settings: dict[str, object], world: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        loaders(config(path, **settings), 0, world)


def test_mistakes_in_stores(tmp_path: Path) -> None:
    unlabelled = make_store(tmp_path / "u.h5", phase=np.full(N, -1))
    with pytest.raises(UserError, match="has no labelled patterns"):
        loaders(config(unlabelled))
    one_group = make_store(tmp_path / "g.h5", group=np.zeros(N))
    with pytest.raises(UserError, match=r"the validation split of .* has no labelled patterns \(it has 1 group"):
        loaders(config(one_group))
    aside = make_store(tmp_path / "c.h5", geometry=Geometry(SIZE, 0.05, 200.0, (4.5, 3.5)))
    with pytest.raises(UserError, match=r"at \(4\.5, 3\.5\), not in the middle"):
        loaders(config(aside, data__augment="flips"))
    assert loaders(config(aside))[0].batches_per_epoch == 10
    other_phase = make_store(tmp_path / "p.h5", phase=np.full(N, 3))
    with pytest.raises(UserError, match="labels patterns as phase 3, but holds 1"):
        loaders(config(other_phase))


SIMULATE = {
    "data.source": "simulate", "data.patterns_per_epoch": 40, "data.validation_patterns": 20, "train.batch_size": 8,
    "simulate.size": 32, "simulate.scale": 0.08,
}  # fmt: skip


DYNAMICAL = {"simulate.physics": "bloch", "simulate.beams": 10, "simulate.absorption": "none", "simulate.tilts": 1}


def test_simulated_epochs_are_fresh_and_repeat() -> None:
    train, validation = loaders(Config.from_flat(SIMULATE))
    first, second = list(train.epoch(0)), list(train.epoch(1))
    assert [len(batch.patterns) for batch in first] == [8] * 5
    assert not any(torch.equal(p.orientation, q.orientation) for p, q in zip(first, second, strict=True))
    again = list(loaders(Config.from_flat(SIMULATE))[0].epoch(1))
    assert all(torch.equal(p.patterns, q.patterns) for p, q in zip(second, again, strict=True))
    kept, later = list(validation.epoch(0)), list(validation.epoch(4))
    assert [len(batch.patterns) for batch in kept] == [8, 8, 4]
    assert all(torch.equal(p.patterns, q.patterns) for p, q in zip(kept, later, strict=True))
    seen = {tuple(q.tolist()) for batch in first + kept for q in batch.orientation}
    assert len(seen) == 60  # no orientation comes twice, and none of validation in training
    assert validation.geometry == Geometry(32, 0.08, 200.0)


@pytest.mark.parametrize("changed", [{"simulate.overlap": 1}, DYNAMICAL])
def test_simulated_epochs_honour_overlap_and_physics(changed: dict[str, object]) -> None:
    plain, other = (next(loaders(Config.from_flat(SIMULATE | more))[0].epoch(2)) for more in ({}, changed))
    again = next(loaders(Config.from_flat(SIMULATE | changed))[0].epoch(2))
    assert torch.equal(plain.orientation, other.orientation)
    assert not torch.equal(plain.patterns, other.patterns) and torch.equal(again.patterns, other.patterns)


def test_simulated_ranks_differ() -> None:
    parts = [loaders(Config.from_flat(SIMULATE), rank, 2) for rank in (0, 1)]
    seen = [{tuple(q.tolist()) for batch in part[0].epoch(0) for q in batch.orientation} for part in parts]
    assert len(seen[0]) == len(seen[1]) == 20
    assert not seen[0] & seen[1]
    validation = [sum(len(batch.patterns) for batch in part[1].epoch(0)) for part in parts]
    assert sum(validation) == 20
    with pytest.raises(UserError, match="`data.patterns_per_epoch` is 40"):
        loaders(Config.from_flat({**SIMULATE, "train.batch_size": 64}))


def test_loader_over_chosen_rows_needs_no_labels(tmp_path: Path) -> None:
    store = Store.open(make_store(tmp_path / "u.h5", phase=np.full(N, -1)))
    loader = StoreLoader(store, np.arange(N), 30, linio2(), training=False, shuffled=False)
    assert flat(epoch_rows(loader)) == list(range(N))
