"""Mixed batches: the ratio is exact in each of them, for every number of ranks, and again after a resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stemtune.config import Config
from stemtune.crystal.phase import linio2, phase_from
from stemtune.dataset.batches import Batch, Loader
from stemtune.dataset.loaders import MixedLoader, StoreLoader, loaders, mixed_portions
from stemtune.dataset.simulate import simulate_store
from stemtune.dataset.store import Store, StoreWriter
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError

N, OTHERS, SIZE = 200, 70, 32
SCALE = 0.08
FIRST_OTHER = 1000


def make_store(path: Path, n: int, first: int, geometry: Geometry, cif: str = "", dtype: str = "uint16") -> Path:
    """Write a store whose patterns are filled with `first`, `first + 1`, ... and labelled at random."""
    numbers = np.broadcast_to((first + np.arange(n))[:, None, None], (n, geometry.size, geometry.size))
    q = np.random.default_rng(first).normal(size=(n, 4))
    phase = phase_from(cif) if cif else linio2()
    with StoreWriter(path, n, geometry, [phase], dtype=dtype) as writer:
        writer.write(
            0,
            numbers,
            orientation=q / np.linalg.norm(q, axis=1, keepdims=True),
            phase=np.zeros(n),
            confidence=np.ones(n),
            group=np.arange(n) // 10,
        )
    return path


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, geometry = tmp_path_factory.mktemp("mixing"), Geometry(SIZE, SCALE, 200.0)
    return (
        make_store(folder / "main.h5", N, 0, geometry),
        make_store(folder / "other.h5", OTHERS, FIRST_OTHER, geometry),
    )


def config(stores: tuple[Path, Path], **settings: object) -> Config:
    flat: dict[str, object] = {
        "data.store": str(stores[0]),
        "data.mix_store": str(stores[1]),
        "data.mix": 0.25,
        "data.augment": "none",
        "train.batch_size": 16,
    }
    return Config.from_flat(flat | {key.replace("__", "."): value for key, value in settings.items()})


def numbers(loader: Loader, epoch: int) -> list[list[int]]:
    batches = [batch.patterns[:, 0, 0].to(torch.int64).tolist() for batch in loader.epoch(epoch)]
    assert len(batches) == loader.batches_per_epoch
    return batches


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_step_has_the_exact_ratio(stores: tuple[Path, Path], world: int) -> None:
    settings = config(stores, data__mix=0.3125)  # 5 of 16 patterns: no two ranks can have equally many
    ranks = [numbers(loaders(settings, rank, world)[0], 2) for rank in range(world)]
    assert {len(batch) for batches in ranks for batch in batches} == {16 // world}
    alone = numbers(loaders(settings)[0], 2)
    for number, parts in enumerate(zip(*ranks, strict=True)):
        together = [value for part in parts for value in part]
        assert sum(value >= FIRST_OTHER for value in together) == 5
        assert sorted(together) == sorted(alone[number])  # the same patterns for every number of ranks


def test_an_epoch_is_one_of_the_main_store(stores: tuple[Path, Path]) -> None:
    train, validation = loaders(config(stores))
    used = [value for batch in numbers(train, 0) for value in batch if value < FIRST_OTHER]
    split = Store.open(stores[0]).split
    assert len(used) == len(set(used)) == (160 // 12) * 12
    assert set(used) <= set(np.flatnonzero(split == 0))
    assert all(value < FIRST_OTHER for batch in numbers(validation, 0) for value in batch)


def test_the_other_store_is_gone_through_evenly_over_epochs(stores: tuple[Path, Path]) -> None:
    train, _ = loaders(config(stores))
    assert isinstance(train, MixedLoader) and isinstance(train.other, StoreLoader)
    drawn = [row for epoch in range(7) for batch in train.other.rows_of(epoch) for row in batch.tolist()]
    for start in range(0, len(drawn) - OTHERS + 1, OTHERS):
        assert len(set(drawn[start : start + OTHERS])) == OTHERS
    fresh, _ = loaders(config(stores))
    assert numbers(fresh, 5) == numbers(train, 5)  # a run that resumes at epoch 5 never saw those before


@pytest.mark.parametrize("world", [1, 2])
def test_simulated_share_has_the_calibration_of_the_store(tmp_path: Path, world: int) -> None:
    store = make_store(tmp_path / "s.h5", N, 0, Geometry(SIZE, 0.07, 300.0), dtype="uint8")
    settings = {"data__mix_store": "", "data__mix": 0.5, "simulate__scale": 0.01, "simulate__size": 64}
    flat = config((store, store), **settings)
    parts = [loaders(flat, rank, world)[0] for rank in range(world)]
    simulator = parts[0].other.source.simulator  # type: ignore[attr-defined]
    assert simulator.geometry == Geometry(SIZE, 0.07, 300.0)
    assert (simulator.simulate.size, simulator.simulate.scale, simulator.simulate.kv) == (SIZE, 0.07, 300.0)
    seen = set()
    for part in parts:
        first, again = next(part.epoch(3)), next(loaders(flat, parts.index(part), world)[0].epoch(3))
        assert torch.equal(first.patterns, again.patterns) and torch.equal(first.orientation, again.orientation)
        flat_pattern = first.patterns.flatten(1)
        measured = (flat_pattern == flat_pattern[:, :1]).all(dim=1)
        assert measured.sum() == len(measured) / 2 == 8 / world
        seen |= {tuple(q.tolist()) for q in first.orientation[~measured]}
        assert not torch.equal(first.orientation[~measured], next(part.epoch(4)).orientation[~measured])
    assert len(seen) == 8  # ranks simulate different patterns


def test_another_calibration_is_resampled(stores: tuple[Path, Path], tmp_path: Path) -> None:
    fine = make_store(tmp_path / "fine.h5", OTHERS, FIRST_OTHER, Geometry(2 * SIZE, SCALE / 2, 200.0))
    train, _ = loaders(config((stores[0], fine)))
    batch: Batch = next(train.epoch(0))
    assert batch.patterns.shape == (16, SIZE, SIZE) and batch.patterns.dtype == torch.float32
    middle = batch.patterns[:, SIZE // 2, SIZE // 2]
    assert (middle >= FIRST_OTHER).sum() == 4
    judged = loaders(config(stores, data__validation_store=str(fine)))[1]
    shapes = [batch.patterns.shape for batch in judged.epoch(0)]
    assert sum(shape[0] for shape in shapes) == OTHERS and shapes[0][1:] == (SIZE, SIZE)
    short = make_store(tmp_path / "short.h5", OTHERS, 0, Geometry(SIZE, SCALE / 3, 200.0))
    with pytest.raises(UserError, match="the patterns reach 0.43 1/Å"):
        loaders(config((stores[0], short)))


def test_portions_add_up() -> None:
    for size, world in ((16, 1), (16, 4), (24, 8), (64, 2)):
        for other in range(1, size):
            dealt = [mixed_portions(size, other / size, rank, world) for rank in range(world)]
            assert all(main.size + part.size == size // world for main, part in dealt)
            for number, count in ((0, size - other), (1, other)):
                taken = [row for each in dealt for row in range(each[number].start, each[number].stop)]
                assert taken == list(range(count))


def test_without_a_share_nothing_is_mixed(stores: tuple[Path, Path]) -> None:
    plain, mixed = (loaders(config(stores, data__mix=mix))[0] for mix in (0, 0.5))
    assert isinstance(mixed, MixedLoader) and not isinstance(plain, MixedLoader)
    assert plain.source_sha256 == mixed.source_sha256 == Store.open(stores[0]).sha256


def test_mistakes(stores: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`data.mix` is 0.01, which is 0 patterns of a batch of 16"):
        loaders(config(stores, data__mix=0.01))
    with pytest.raises(UserError, match="`data.mix` is 1"):
        config(stores, data__mix=1)
    nickel = tmp_path / "ni.h5"
    cubic = Path(__file__).parents[3] / "shared" / "data" / "cif" / "Ni.cif"
    if not cubic.exists():
        pytest.skip("../shared/data/cif is not here")
    make_store(nickel, 20, 0, Geometry(SIZE, SCALE, 200.0), cif=str(cubic))
    for setting in ("data.mix_store", "data.validation_store"):
        with pytest.raises(UserError, match=f"`{setting}` is '.*ni.h5', whose labels are orientations of"):
            loaders(config(stores).replace({setting: str(nickel)}))


def test_simulated_and_stored_patterns_are_joined_as_counts(tmp_path: Path) -> None:
    simulate = Config.from_flat({"simulate.size": SIZE, "simulate.scale": SCALE, "simulate.dose": 1000}).simulate
    store = simulate_store("", tmp_path / "s.h5", 160, simulate, seed=1)
    settings = config((store, store), data__mix_store="", simulate__dose=1000, simulate__beam_stop=0)
    batch = next(loaders(settings)[0].epoch(0))
    sums = batch.patterns.double().sum(dim=(1, 2))
    assert batch.patterns.shape == (16, SIZE, SIZE)
    assert 0.5 < float(sums[-4:].mean() / sums[:-4].mean()) < 2
