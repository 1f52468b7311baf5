"""A network over the predicted spots of candidate orientations: how likely each is, and how far it is off.

It sees a set of spots, in no order. What it learns of a spot does not change when pattern and candidates are turned
together: scores are invariant, corrections turn along.

Shape legend: B patterns, M candidates, K spots, F features, W width, V vectors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stemtune.learning.models.spot_features import FEATURES, PEAK_FEATURES, SpotFeatures

_VECTORS = 16


class RerankerNet(nn.Module):
    """Scores candidates by their spot features, and says how far they are from the truth.

    It has `width` features per spot, and is given `extra` numbers on each candidate besides its spots.
    """

    def __init__(self, width: int, extra: int) -> None:
        super().__init__()
        self.spot = nn.Sequential(nn.Linear(FEATURES, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.pool = nn.Linear(width, width)
        self.peak = nn.Sequential(nn.Linear(PEAK_FEATURES, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.vector = nn.Linear(width, _VECTORS)
        self.whole = nn.Sequential(
            nn.Linear(4 * width + _VECTORS + extra, 2 * width), nn.GELU(), nn.Linear(2 * width, 2 * width), nn.GELU()
        )
        self.score = nn.Linear(2 * width, 1)
        self.correction = nn.Linear(2 * width, _VECTORS + 1)
        nn.init.zeros_(self.correction.weight)
        nn.init.zeros_(self.correction.bias)

    def forward(self, spots: SpotFeatures, extra_BMX: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores (B, M) and corrections (B, M, 3): rotation vectors in radians, truth ~ g * exp(correction)."""
        spot_BMKW = self.spot(spots.feature)
        pooled_BMKW = self.pool(spot_BMKW)
        vector_BMKV = self.vector(spot_BMKW).float()
        vector_BMV2 = torch.einsum("bmkv,bmkd->bmvd", vector_BMKV, spots.place) / spots.place.shape[2]
        length_BMV = (vector_BMV2.square().sum(-1) + 1e-6).sqrt()
        peak_BMPW = self.peak(spots.peak)
        pooled = (pooled_BMKW.mean(2), pooled_BMKW.amax(2), peak_BMPW.mean(2), peak_BMPW.amax(2))
        whole_BMX = torch.cat((*pooled, length_BMV.to(spot_BMKW), extra_BMX.to(spot_BMKW)), dim=-1)
        whole_BMX = self.whole(whole_BMX)
        correction = self.correction(whole_BMX).float()
        x, y = torch.einsum("bmv,bmvd->bmd", correction[..., :-1], vector_BMV2).unbind(-1)
        # A spot at (x, y) comes nearer to the Ewald sphere by a turn about the axis across it.
        vector_BM3 = torch.stack((y, -x, correction[..., -1] * math.radians(1)), dim=-1)
        return self.score(whole_BMX)[..., 0].float(), vector_BM3
