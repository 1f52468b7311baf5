"""Pictures of py4DSTEM's Bloch-wave patterns, as `python -m benchmarks accuracy` draws them (no simulator of ours)."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import testset

SIZE, SCALE, KV = testset.GEOMETRY.size, testset.GEOMETRY.scale_inv_angstrom, testset.GEOMETRY.kv


class Bloch(NamedTuple):
    """Orientations (n, 4) and the beams (x, y in 1/Å, y up, intensity) of each pattern, n arrays (k, 3)."""

    orientation: torch.Tensor
    beams: list[npt.NDArray[np.float64]]


def load(name: str) -> Bloch:
    """Read the shipped patterns `p0` or `p05`; see `tests/oracles/bloch_py4dstem.py`."""
    stored = testset.py4dstem({"p0": 0.0, "p05": 0.5}[name])
    return Bloch(torch.from_numpy(stored.orientation), stored.beams)


def pictures(bloch: Bloch, electrons: int = 3000, seed: int = 0) -> torch.Tensor:
    """Return counts (n, 128, 128) of Gaussian spots; the electrons include those of the direct beam."""
    beams = testset.Beams(bloch.orientation.numpy(), np.zeros(len(bloch.beams), np.float32), bloch.beams)
    return torch.from_numpy(testset.pictures(beams, testset.Condition(electrons=electrons), seed))
