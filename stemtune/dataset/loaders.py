"""Batches for training and validation, from a store or simulated afresh, resampled or mixed where that is asked for.

What a loader yields depends on the seed, the epoch, the rank and the number of ranks, and on nothing else: a run
that resumes at epoch 7 sees what an uninterrupted one would have seen. The patterns of a store are memory-mapped, so
all processes of a node share the page cache, and a store larger than memory only costs the disk what is missing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stemtune._parallel import memory_bytes, prefetch
from stemtune.config import Config
from stemtune.crystal.phase import Phase, phase_from
from stemtune.dataset.augment import augment
from stemtune.dataset.batches import Batch, Loader, Portion, batch_seed
from stemtune.dataset.beam_store import BeamStore
from stemtune.dataset.fresh_patterns import BeamPatterns, FreshLoader, PatternSource, SimulatedPatterns
from stemtune.dataset.selection import (
    Rows,
    confident_rows,
    held_out_rows,
    phase_of,
    rows_of_crystal,
    same_crystal,
    split_rows,
)
from stemtune.dataset.store import Store
from stemtune.diffraction.bloch import simulator_for
from stemtune.diffraction.detector import Resampling
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError

_TEST_PATTERNS = (1024, 8192)
"""How many patterns a model is tested on: at least as many fresh ones, and no more of a store."""


class ResampledLoader:
    """The batches of another loader as a detector of the calibration `target` shows them.

    A `UserError` says that the patterns reach less than half as far (1/Å) as `target`.
    """

    def __init__(self, loader: Loader, target: Geometry) -> None:
        self.loader, self.geometry, self.phase = loader, target, loader.phase
        self.batches_per_epoch = loader.batches_per_epoch
        self.resampling = Resampling(loader.geometry, target)

    @property
    def source_sha256(self) -> str:
        return self.loader.source_sha256

    def epoch(self, epoch: int) -> Iterator[Batch]:
        with closing(self.loader.epoch(epoch)) as batches:  # type: ignore[type-var]
            for batch in batches:
                yield Batch(self.resampling(batch.patterns), batch.orientation)


def resampled_to(loader: Loader, target: Geometry) -> Loader:
    """Return `loader`, resampled to the calibration `target` where its own differs by more than can be overlooked."""
    return ResampledLoader(loader, target) if Resampling(loader.geometry, target).needed else loader


def mixed_portions(size: int, mix: float, rank: int, world: int) -> tuple[Portion, Portion]:
    """Return this rank's part of the main and of the other patterns of a step.

    All ranks together take `round(mix * size)` other patterns in every step, whatever their number, and each rank
    `size / world` patterns in all. A `UserError` says that a `mix` above 0 rounds to none or to all of the batch.
    """
    other = round(mix * size)
    if mix > 0 and not 0 < other < size:
        raise UserError(
            f"`data.mix` is {mix:g}, which is {other} patterns of a batch of {size}; raise `train.batch_size`, or set"
            " data.mix=0"
        )
    main, each = Portion.of(size - other, rank, world), size // world
    return main, Portion(other, rank * each - main.start, (rank + 1) * each - main.stop)


class MixedLoader:
    """Batches that take so many patterns from the loader `main` and so many from `other`, as their portions say.

    An epoch is an epoch of the main loader, whose patterns come first; the other one has to yield as many batches.
    """

    def __init__(self, main: Loader, other: Loader) -> None:
        self.main, self.other = main, other
        self.batches_per_epoch, self.geometry, self.phase = main.batches_per_epoch, main.geometry, main.phase

    @property
    def source_sha256(self) -> str:
        return self.main.source_sha256

    def epoch(self, epoch: int) -> Iterator[Batch]:
        with closing(self.main.epoch(epoch)) as first, closing(self.other.epoch(epoch)) as second:  # type: ignore[type-var]
            for main, other in zip(first, second, strict=True):
                # float32 where their counts are of different types, on a GPU where one of them is
                dtype = main.patterns.dtype if main.patterns.dtype == other.patterns.dtype else torch.float32
                device = (other if other.patterns.is_cuda and not main.patterns.is_cuda else main).patterns.device
                patterns = [part.patterns.to(dtype).to(device) for part in (main, other)]
                yield Batch(torch.cat(patterns), torch.cat([part.orientation.to(device) for part in (main, other)]))


class StoreLoader:
    """Batches of chosen rows (N,) of a store, with orientations of the crystal `phase`.

    `rows` are in order of use, or `shuffled` anew in each epoch. This is process `rank` of `world` data-parallel ones,
    which together see every row once, `batch_size` patterns each. In `training` there are only whole batches, the same
    number on every rank, augmented (see `dataset.augment`); else every row, in batches of which the last may be
    smaller. Batches for a GPU `device` come in pinned memory, or on it where they are interpolated.

    For training only: `portion`, this rank's part of a step where that is not `batch_size` of `batch_size * world`
    patterns; `steps`, batches of an epoch where rows are gone through round after round, over the ends of epochs.
    """

    def __init__(
        self,
        store: Store,
        rows: Rows,
        batch_size: int,
        phase: Phase,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        training: bool = True,
        shuffled: bool = True,
        augmentation: str = "none",
        device: torch.device | str = "cpu",
        portion: Portion | None = None,
        steps: int | None = None,
    ) -> None:
        self.store, self.rows, self.batch_size, self.phase = store, rows, batch_size, phase
        self.geometry = store.geometry
        self.seed, self.rank, self.world = seed, rank, world
        self.training, self.shuffled, self.augmentation = training, shuffled, augmentation
        self.device = torch.device(device)
        self.portion = portion or Portion.of(batch_size * world, rank, world)
        self.steps = steps
        self.take: Callable[[Rows], npt.NDArray[Any]] = store.take
        self._cold = True

    @property
    def batches_per_epoch(self) -> int:
        if self.training:
            return len(self.rows) // self.portion.step if self.steps is None else self.steps
        return math.ceil(len(self.rows[self.rank :: self.world]) / self.batch_size)

    @property
    def source_sha256(self) -> str:
        return self.store.sha256

    def rows_of(self, epoch: int) -> list[Rows]:
        """Return the rows of every batch of an epoch on this rank.

        The rows that all ranks together use in one training step are the same for every number of ranks.
        """
        if not self.training:
            mine = self._round(epoch)[self.rank :: self.world]
            return [mine[start : start + self.batch_size] for start in range(0, len(mine), self.batch_size)]
        needed = self.batches_per_epoch * self.portion.step
        if self.steps is None:
            rows = self._round(epoch)[:needed]
        else:
            first, skipped = divmod(epoch * needed, len(self.rows))
            last = math.ceil((skipped + needed) / len(self.rows))
            rows = np.concatenate([self._round(first + number) for number in range(last)])[skipped : skipped + needed]
        return list(rows.reshape(-1, self.portion.step)[:, self.portion.start : self.portion.stop])

    def _round(self, number: int) -> Rows:
        """Return all rows in the order of round `number`."""
        return np.random.default_rng([self.seed, number]).permutation(self.rows) if self.shuffled else self.rows

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of epoch `epoch`, fetched ahead of their use by a thread."""
        plan = [np.sort(rows) for rows in self.rows_of(epoch)]
        fits = self.store.path.stat().st_size <= memory_bytes() // 2
        through = self._cold and fits and 2 * len(self.rows) >= self.store.n
        hint = not fits or (self._cold and not through)

        def fetch(number: int) -> Batch:
            if through and number == 0:
                self.store.read_through()
            if hint and number + 1 < len(plan):
                self.store.expect(plan[number + 1])
            rows = plan[number]
            patterns = torch.from_numpy(self.take(rows))
            orientation = torch.from_numpy(self.store.orientation[rows].astype(np.float32))
            if self.augmentation == "rotate":  # interpolating is work for the device
                patterns = patterns.to(self.device)
            seed = batch_seed(self.seed, epoch, number, self.rank)
            batch = Batch(*augment(patterns, orientation, self.augmentation, torch.Generator().manual_seed(seed)))
            if self.device.type != "cuda":
                return batch
            return Batch(*(part if part.is_cuda else part.pin_memory() for part in batch))

        yield from prefetch(map(fetch, range(len(plan))))
        self._cold = False


def loaders(config: Config, rank: int = 0, world: int = 1, device: torch.device | None = None) -> tuple[Loader, Loader]:
    """Return the loaders of training and validation batches.

    `data`, `train.batch_size` (over all ranks together) and `train.seed` of `config` are read, and `simulate` where
    `data.source` is "simulate". This is process `rank` of `world` data-parallel ones. `device` is where the batches are
    going, and where patterns are simulated; left out, the current GPU, else the CPU. A `UserError` says that the store
    has nothing to learn from, a split is empty, or the batch does not fit.
    """
    size = config.train.batch_size
    if size % world:
        raise UserError(f"`train.batch_size` is {size}, but must be a multiple of the {world} workers that share it")
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if config.data.source == "simulate":
        return _fresh(config, _simulated(config, device), rank, world, device)
    if not config.data.store:
        raise UserError("`data.store` is not set; give a store with --store, or set data.source=simulate")
    if config.data.source == "beams":
        return _fresh(config, _from_beams(config, device), rank, world, device)
    store = Store.open(config.data.store)
    _check_middle(store, config.data.augment)
    number, phase = phase_of(store)
    learnable = store.labelled & (store.phase == number)
    train, validation = split_rows(store, learnable, config.data, verbose=rank == 0)
    train = confident_rows(store, train, config.data)
    common: dict[str, Any] = {"seed": config.train.seed, "rank": rank, "world": world, "device": device}
    shuffled = config.data.order == "shuffled"
    own, other = mixed_portions(size, config.data.mix, rank, world)
    if own.step > len(train):
        raise UserError(f"`train.batch_size` is {size}, but '{store.path}' has {len(train)} patterns to train on")
    augmented = {"augmentation": config.data.augment, **common}
    main = StoreLoader(store, train, size // world, phase, shuffled=shuffled, portion=own, **augmented)
    judged = {"training": False, "shuffled": False, **common}
    if config.data.validation_store:
        validating = _validation_store(config, main, size // world, judged)
    else:
        validating = StoreLoader(store, validation, size // world, phase, **judged)
    return MixedLoader(main, _further(config, main, other, augmented)) if other.step else main, validating


def held_out_loader(config: Config, device: torch.device) -> tuple[Loader, npt.NDArray[np.integer[Any]]]:
    """Return the loader of patterns that neither training nor validation has seen, and the group (n,) of each pattern.

    They are the test split of `data.store`, of a large one a part; fresh patterns where the source makes them: of a
    store of beams those of orientations that are neither trained nor validated on. Patterns of one group (a grain) are
    much alike. A `UserError` says that there are none.
    """
    size = config.train.batch_size
    if config.data.source != "store":
        source = _simulated(config, device) if config.data.source == "simulate" else _from_beams(config, device)
        count = max(_TEST_PATTERNS[0], config.data.validation_patterns)
        fresh = FreshLoader(source, count, size, seed=config.data.seed, part="test")
        return fresh, np.arange(count)
    store = Store.open(config.data.store)
    number, phase = phase_of(store)
    rows = held_out_rows(store, store.labelled & (store.phase == number), config.data)
    if len(rows) > _TEST_PATTERNS[1]:
        rows = np.sort(np.random.default_rng(0).choice(rows, _TEST_PATTERNS[1], replace=False))
    loader = StoreLoader(store, rows, size, phase, training=False, shuffled=False, device=device)
    return loader, store.group[rows]


def _further(config: Config, main: StoreLoader, portion: Portion, augmented: dict[str, Any]) -> Loader:
    """Return the loader of the share `data.mix`: another store, or patterns simulated at the store's calibration."""
    steps, each = main.batches_per_epoch, main.batch_size
    if config.data.mix_store:
        store = Store.open(config.data.mix_store)
        _check_middle(store, config.data.augment)
        rows = rows_of_crystal(store, main.phase, "data.mix_store")
        other = StoreLoader(store, rows, each, main.phase, portion=portion, steps=steps, **augmented)
        return resampled_to(other, main.geometry)
    geometry = main.geometry
    simulate = dataclasses.replace(
        config.simulate, kv=geometry.kv, size=geometry.size, scale=geometry.scale_inv_angstrom
    )
    simulator = simulator_for(main.phase, geometry, simulate, main.device)
    own: dict[str, Any] = {"seed": main.seed, "rank": main.rank, "world": main.world, "portion": portion}
    return FreshLoader(SimulatedPatterns(simulator), steps * portion.step, each, **own)


def _validation_store(config: Config, main: Loader, batch_size: int, judged: dict[str, Any]) -> Loader:
    """Return the loader of all labels of `data.validation_store`, as the detector of `main` shows the patterns."""
    other = Store.open(config.data.validation_store)
    rows = rows_of_crystal(other, main.phase, "data.validation_store")
    return resampled_to(StoreLoader(other, rows, batch_size, main.phase, **judged), main.geometry)


def _simulated(config: Config, device: torch.device) -> PatternSource:
    geometry = Geometry.of(config.simulate)
    return SimulatedPatterns(simulator_for(phase_from(config.data.cif), geometry, config.simulate, device))


def _from_beams(config: Config, device: torch.device) -> PatternSource:
    store = BeamStore.open(config.data.store)
    if config.data.cif and not same_crystal(store.phase, phase := phase_from(config.data.cif)):
        raise UserError(f"`data.cif` is {phase.name}, but the beams in '{store.path}' are those of {store.phase.name}")
    return BeamPatterns(store, config.simulate, device)


def _fresh(config: Config, source: PatternSource, rank: int, world: int, device: torch.device) -> tuple[Loader, Loader]:
    """Return the loaders of training and validation patterns that are made when they are asked for."""
    size, wanted = config.train.batch_size, config.data.patterns_per_epoch
    if size > wanted:
        raise UserError(f"`train.batch_size` is {size}, but `data.patterns_per_epoch` is {wanted}")
    own: dict[str, Any] = {"seed": config.train.seed, "rank": rank, "world": world}
    each = size // world
    main = FreshLoader(source, wanted, each, **own)
    if config.data.validation_store:
        judged = {"training": False, "shuffled": False, "device": device, **own}
        return main, _validation_store(config, main, each, judged)
    own["seed"] = config.data.seed
    return main, FreshLoader(source, config.data.validation_patterns, each, part="validation", **own)


def _check_middle(store: Store, augmentation: str) -> None:
    """Refuse to turn or mirror patterns about a middle where the direct beam is not."""
    middle = (store.size - 1) / 2
    row, column = store.geometry.centre_px
    if augmentation != "none" and max(abs(row - middle), abs(column - middle)) > 0.01:
        raise UserError(
            f"`data.augment` is '{augmentation}', but the direct beam of '{store.path}' is at ({row:g}, {column:g}), "
            f"not in the middle ({middle:g}, {middle:g}); ingest it again, or set data.augment=none"
        )
