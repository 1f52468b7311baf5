"""What a loader is, and what it yields: batches of patterns and their orientations, dealt to data-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from stemtune.crystal.phase import Phase
from stemtune.diffraction.geometry import Geometry


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


def batch_seed(*parts: int) -> int:
    """Return the seed of one batch, from the run's and whatever tells the batch from others."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
