"""Batches of two sources, a fixed number of each: measured patterns beside simulated ones, for instance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import torch

from stemtune.crystal.phase import Phase
from stemtune.dataset.batches import Batch, Loader, Portion
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError


def portions(size: int, mix: float, rank: int, world: int) -> tuple[Portion, Portion]:
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
    """Batches that take so many patterns from one loader and so many from another, as their portions say.

    An epoch is an epoch of the main loader; the other one has to yield as many batches.

    Parameters
    ----------
    main, other
        The loaders.
    """

    def __init__(self, main: Loader, other: Loader) -> None:
        self.main, self.other = main, other

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches that `epoch` yields on this rank."""
        return self.main.batches_per_epoch

    @property
    def geometry(self) -> Geometry:
        """Calibration of the patterns."""
        return self.main.geometry

    @property
    def phase(self) -> Phase:
        """The crystal that the orientations belong to."""
        return self.main.phase

    @property
    def source_sha256(self) -> str:
        """Hash of the main loader's store."""
        return self.main.source_sha256

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of epoch `epoch`, the main loader's patterns first."""
        with closing(self.main.epoch(epoch)) as first, closing(self.other.epoch(epoch)) as second:  # type: ignore[type-var]
            for main, other in zip(first, second, strict=True):
                yield joined(main, other)


def joined(first: Batch, second: Batch) -> Batch:
    """Return one batch of both; float32 where their counts are of different types, on a GPU where one of them is."""
    patterns, orientation = [first.patterns, second.patterns], [first.orientation, second.orientation]
    device = next((part.device for part in patterns if part.is_cuda), patterns[0].device)
    if patterns[0].dtype != patterns[1].dtype:
        patterns = [part.to(torch.float32) for part in patterns]
    return Batch(
        torch.cat([part.to(device) for part in patterns]), torch.cat([part.to(device) for part in orientation])
    )
