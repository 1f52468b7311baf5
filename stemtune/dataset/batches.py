"""Batches: what a loader yields, what every loader is, and loaders that change or mix the batches of others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stemtune.crystal.phase import Phase
from stemtune.diffraction.geometry import Geometry, Resampling
from stemtune.errors import UserError


class Batch(NamedTuple):
    """Patterns and what they show.

    Attributes
    ----------
    patterns
        Counts (B, H, W), uint8, uint16 or float32.
    orientation
        Unit quaternions (B, 4) float32, lab-to-crystal, scalar first.
    """

    patterns: Tensor
    orientation: Tensor


class Loader(Protocol):
    """A source of batches, the same again for the same epoch."""

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches that `epoch` yields on this rank."""
        ...

    @property
    def geometry(self) -> Geometry:
        """Calibration of the patterns."""
        ...

    @property
    def phase(self) -> Phase:
        """The crystal that the orientations belong to."""
        ...

    @property
    def source_sha256(self) -> str:
        """Hash of the store that the patterns come from; empty for simulated ones."""
        ...

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of epoch `epoch` (counted from 0)."""
        ...


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

    Raises
    ------
    UserError
        When the patterns reach less than half as far (1/Å) as `target`.
    """

    def __init__(self, loader: Loader, target: Geometry) -> None:
        self.loader, self.geometry, self.phase = loader, target, loader.phase
        self.batches_per_epoch = loader.batches_per_epoch
        self.resampling = Resampling(loader.geometry, target)

    @property
    def source_sha256(self) -> str:
        return self.loader.source_sha256

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of epoch `epoch` of the other loader."""
        with closing(self.loader.epoch(epoch)) as batches:  # type: ignore[type-var]
            for batch in batches:
                yield Batch(self.resampling(batch.patterns), batch.orientation)


def resampled_to(loader: Loader, target: Geometry) -> Loader:
    """Return `loader`, resampled to the calibration `target` where its own differs by more than can be overlooked."""
    return ResampledLoader(loader, target) if Resampling(loader.geometry, target).needed else loader


def mixed_portions(size: int, mix: float, rank: int, world: int) -> tuple[Portion, Portion]:
    """Return this rank's part of the main and of the other patterns of a step.

    All ranks together take `round(mix * size)` other patterns in every step, whatever their number, and each rank
    `size / world` patterns in all.

    Raises
    ------
    UserError
        When `mix` is above 0, but rounds to none or to all of the batch.
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

    An epoch is an epoch of the main loader; the other one has to yield as many batches.
    """

    def __init__(self, main: Loader, other: Loader) -> None:
        self.main, self.other = main, other
        self.batches_per_epoch, self.geometry, self.phase = main.batches_per_epoch, main.geometry, main.phase

    @property
    def source_sha256(self) -> str:
        return self.main.source_sha256

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of epoch `epoch`, the main loader's patterns first."""
        with closing(self.main.epoch(epoch)) as first, closing(self.other.epoch(epoch)) as second:  # type: ignore[type-var]
            for main, other in zip(first, second, strict=True):
                yield _concatenated(main, other)


def _concatenated(first: Batch, second: Batch) -> Batch:
    """Return one batch of both; float32 where their counts are of different types, on a GPU where one of them is."""
    patterns = [first.patterns, second.patterns]
    device = next((part.device for part in patterns if part.is_cuda), patterns[0].device)
    if patterns[0].dtype != patterns[1].dtype:
        patterns = [part.to(torch.float32) for part in patterns]
    orientation = [part.to(device) for part in (first.orientation, second.orientation)]
    return Batch(torch.cat([part.to(device) for part in patterns]), torch.cat(orientation))
