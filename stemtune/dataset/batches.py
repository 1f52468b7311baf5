"""Batches: what a loader yields, what every loader is, and how batches are fetched ahead or brought to another size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple, Protocol

from torch import Tensor

from stemtune.crystal.phase import Phase
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.resampling import Resampling


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
    """This rank's part of the patterns that all ranks together use in one training step.

    Attributes
    ----------
    step
        Patterns of a step over all ranks.
    start, stop
        Which of them are this rank's.
    """

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


class Resampled:
    """The batches of another loader as a detector of the calibration `target` shows them.

    Raises
    ------
    UserError
        When the patterns reach less than half as far (1/Å) as `target`.
    """

    def __init__(self, loader: Loader, target: Geometry) -> None:
        self.loader, self._target = loader, target
        self.resampling = Resampling(loader.geometry, target)

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches that `epoch` yields on this rank."""
        return self.loader.batches_per_epoch

    @property
    def geometry(self) -> Geometry:
        """The calibration that patterns are brought to."""
        return self._target

    @property
    def phase(self) -> Phase:
        """The crystal that the orientations belong to."""
        return self.loader.phase

    @property
    def source_sha256(self) -> str:
        """Hash of the store that the patterns come from; empty for simulated ones."""
        return self.loader.source_sha256

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of epoch `epoch` of the other loader."""
        with closing(self.loader.epoch(epoch)) as batches:  # type: ignore[type-var]
            for batch in batches:
                yield Batch(self.resampling(batch.patterns), batch.orientation)


def fitted(loader: Loader, target: Geometry) -> Loader:
    """Return `loader`, resampled to the calibration `target` where its own differs by more than can be overlooked."""
    return Resampled(loader, target) if Resampling(loader.geometry, target).needed else loader
