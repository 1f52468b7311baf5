"""Which patterns are trained on, validated with and tested with: whole groups, never single neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def make_splits(
    group: npt.ArrayLike, fractions: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0
) -> npt.NDArray[np.int8]:
    """Deal whole groups to train (0), validation (1) and test (2).

    Parameters
    ----------
    group
        Group number of each pattern (n,).
    fractions
        Wanted share of the patterns in each split.
    seed
        Seed of the order in which groups are dealt.

    Returns
    -------
    split
        Number of the split (n,) of each pattern. Every split with a positive share gets at least one group as long
        as there are enough groups.
    """
    _, index, count = np.unique(np.asarray(group), return_inverse=True, return_counts=True)
    missing = np.asarray(fractions, dtype=float) / sum(fractions) * len(index)
    empty = set(np.flatnonzero(missing > 0).tolist())
    shares = sorted(empty)
    dealt = np.zeros(len(count), dtype=np.int8)
    for dealt_so_far, chosen in enumerate(np.random.default_rng(seed).permutation(len(count))):
        only_empty = len(count) - dealt_so_far <= len(empty)  # the last groups go where nothing is yet
        best = max(empty if only_empty and empty else shares, key=lambda number: missing[number])
        dealt[chosen] = best
        missing[best] -= count[chosen]
        empty.discard(best)
    return dealt[index]
