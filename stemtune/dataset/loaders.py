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
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stemtune._parallel import memory_bytes, prefetch
from stemtune.config import Config
from stemtune.crystal.phase import Phase, phase_from
from stemtune.crystal.sampling import random_orientations
from stemtune.dataset.augment import augment
from stemtune.dataset.selection import Rows, confident_rows, phase_of, rows_of_crystal, split_rows
from stemtune.dataset.store import Store
from stemtune.diffraction import overlap
from stemtune.diffraction.bloch import simulator_for
from stemtune.diffraction.detector import Resampling
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator
from stemtune.errors import UserError

_TRAINING, _VALIDATION = 1, 2  # keep the random numbers of simulated training and validation apart


class Batch(NamedTuple):
    """Patterns and what they show."""

    patterns: Tensor  # counts (B, H, W), uint8, uint16 or float32
    orientation: Tensor  # unit quaternions (B, 4) float32, lab-to-crystal, scalar first


class Loader(Protocol):
    """A source of batches, the same again for the same epoch."""

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches that `epoch` yields on this rank."""

    @property
    def geometry(self) -> Geometry:
        """Calibration of the patterns."""

    @property
    def phase(self) -> Phase:
        """The crystal that the orientations belong to."""

    @property
    def source_sha256(self) -> str:
        """Hash of the store that the patterns come from; empty for simulated ones."""

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of epoch `epoch` (counted from 0)."""


class Portion(NamedTuple):
    """This rank's part, from `start` to before `stop`, of the `step` patterns that all ranks use in a training step."""

    step: int
    start: int
    stop: int

    @classmethod
    def of(cls, step: int, rank: int, world: int) -> Portion:
        """Deal `step` patterns to `world` ranks as evenly as whole patterns allow."""
        return cls(step, rank * step // world, (rank + 1) * step // world)

    @property
    def size(self) -> int:
        """Patterns of this rank in one step."""
        return self.stop - self.start


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
            seed = _seed(self.seed, epoch, number, self.rank)
            batch = Batch(*augment(patterns, orientation, self.augmentation, torch.Generator().manual_seed(seed)))
            if self.device.type != "cuda":
                return batch
            return Batch(*(part if part.is_cuda else part.pin_memory() for part in batch))

        yield from prefetch(map(fetch, range(len(plan))))
        self._cold = False


class SimulatedLoader:
    """Batches of patterns that are simulated when they are asked for, of uniformly random orientations.

    Where `simulate.overlap` is above 0, some show further grains; the orientation is that of the strongest. An epoch
    has `patterns` over all ranks: in `training` fresh ones every time, else the same, made once and kept. The rest is
    as in `StoreLoader`; the device is the simulator's.
    """

    def __init__(
        self,
        simulator: KinematicSimulator,
        patterns: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        training: bool = True,
        portion: Portion | None = None,
    ) -> None:
        self.simulator, self.patterns, self.batch_size = simulator, patterns, batch_size
        self.geometry, self.phase = simulator.geometry, simulator.phase
        self.seed, self.rank, self.world, self.training = seed, rank, world, training
        self.portion = portion or Portion.of(batch_size * world, rank, world)
        self._kept: list[Batch] = []

    source_sha256 = ""

    @property
    def batches_per_epoch(self) -> int:
        if self.training:
            return self.patterns // self.portion.step
        return len(range(self.rank, math.ceil(self.patterns / self.batch_size), self.world))

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of epoch `epoch`, simulated ahead of their use by a thread."""
        if self._kept:
            yield from self._kept
            return
        kept = []
        for batch in prefetch(self._simulate(epoch, number) for number in range(self.batches_per_epoch)):
            if not self.training:
                kept.append(batch)
            yield batch
        self._kept = kept

    def _simulate(self, epoch: int, number: int) -> Batch:
        block = number * self.world + self.rank
        count = self.portion.size if self.training else min(self.batch_size, self.patterns - block * self.batch_size)
        if not count:
            return Batch(torch.zeros(0, self.geometry.size, self.geometry.size), torch.zeros(0, 4))
        seed = _seed(self.seed, _TRAINING if self.training else _VALIDATION, epoch * self.training, block)
        generator = torch.Generator(self.simulator.device).manual_seed(seed)
        orientation = random_orientations(count, generator)
        simulate = self.simulator.simulate
        several = overlap.draw_overlap(simulate, count, generator) if simulate.overlap > 0 else None
        patterns = overlap.patterns(self.simulator, orientation, several, generator)
        return Batch(patterns, orientation.to(torch.float32))


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
        return _simulated(config, rank, world, device)
    if not config.data.store:
        raise UserError("`data.store` is not set; give a store with --store, or set data.source=simulate")
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
    return (
        MixedLoader(main, _further(config, main, other, augmented)) if other.step else main,
        _validating(config, store, validation, phase, size // world, judged),
    )


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
    wanted = steps * portion.step
    return SimulatedLoader(simulator, wanted, each, seed=main.seed, rank=main.rank, world=main.world, portion=portion)


def _validating(
    config: Config, store: Store, rows: Rows, phase: Phase, batch_size: int, judged: dict[str, Any]
) -> Loader:
    """Return the loader of validation batches: `rows` of the store, or all of `data.validation_store`."""
    if not config.data.validation_store:
        return StoreLoader(store, rows, batch_size, phase, **judged)
    other = Store.open(config.data.validation_store)
    rows = rows_of_crystal(other, phase, "data.validation_store")
    return resampled_to(StoreLoader(other, rows, batch_size, phase, **judged), store.geometry)


def _simulated(config: Config, rank: int, world: int, device: torch.device) -> tuple[Loader, Loader]:
    size, wanted, simulate = config.train.batch_size, config.data.patterns_per_epoch, config.simulate
    if size > wanted:
        raise UserError(f"`train.batch_size` is {size}, but `data.patterns_per_epoch` is {wanted}")
    geometry = Geometry(simulate.size, simulate.scale, simulate.kv)
    simulator = simulator_for(phase_from(config.data.cif), geometry, simulate, device)
    own: dict[str, Any] = {"seed": config.train.seed, "rank": rank, "world": world}
    each = size // world
    judged = SimulatedLoader(simulator, config.data.validation_patterns, each, training=False, **own)
    return SimulatedLoader(simulator, wanted, each, **own), judged


def _check_middle(store: Store, augmentation: str) -> None:
    """Refuse to turn or mirror patterns about a middle where the direct beam is not."""
    middle = (store.size - 1) / 2
    row, column = store.geometry.centre_px
    if augmentation != "none" and max(abs(row - middle), abs(column - middle)) > 0.01:
        raise UserError(
            f"`data.augment` is '{augmentation}', but the direct beam of '{store.path}' is at ({row:g}, {column:g}), "
            f"not in the middle ({middle:g}, {middle:g}); ingest it again, or set data.augment=none"
        )


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
