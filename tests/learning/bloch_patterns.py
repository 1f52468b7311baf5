"""Pictures of py4DSTEM's Bloch-wave patterns, drawn here with numpy so that no code under test takes part."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

ORACLES = Path(__file__).resolve().parents[1] / "oracles"
SIZE, SCALE, KV = 128, 0.025, 200.0


class Bloch(NamedTuple):
    """Orientations (n, 4) and the beams (x, y in 1/Å, y up, intensity) of each pattern, n arrays (k, 3)."""

    orientation: torch.Tensor
    beams: list[npt.NDArray[np.float64]]


def load(name: str) -> Bloch:
    """Read `tests/oracles/bloch_linio2_{name}.npz`; see `bloch_py4dstem.py` there."""
    with np.load(ORACLES / f"bloch_linio2_{name}.npz") as stored:
        columns = np.stack([stored["x"], stored["y"], stored["intensity"]], axis=1).astype(np.float64)
        beams = np.split(columns, np.cumsum(stored["count"])[:-1])
        return Bloch(torch.tensor(stored["orientation"]), beams)


def pictures(bloch: Bloch, electrons: float = 3000.0, sigma_px: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Return counts (n, 128, 128) of Gaussian spots; the electrons include those of the direct beam."""
    axis = np.arange(SIZE) - (SIZE - 1) / 2
    drawn = np.empty((len(bloch.beams), SIZE, SIZE))
    for picture, beams in zip(drawn, bloch.beams, strict=True):
        across = np.exp(-0.5 * ((axis - beams[:, :1] / SCALE) / sigma_px) ** 2)
        down = np.exp(-0.5 * ((-axis - beams[:, 1:2] / SCALE) / sigma_px) ** 2)
        picture[:] = np.einsum("k,ki,kj->ij", beams[:, 2], down, across)
    drawn *= electrons / drawn.sum(axis=(1, 2), keepdims=True)
    return torch.from_numpy(np.random.default_rng(seed).poisson(drawn).astype(np.uint16))
