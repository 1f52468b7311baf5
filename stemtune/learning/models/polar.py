"""A network on polar patterns whose last layer starts as a bank of templates.

The pattern is taken to polar coordinates, a few convolutions (circular along the angle) clean it, and one layer
correlates it with a filter per beam direction over all in-plane angles. A turn of the pattern about the beam is a
shift of everything up to the logits, so that no in-plane angle has to be learned twice. With `model.start: matched`
the filters start as kinematic templates and the convolutions as the identity: before its first step the network is
the polar matched filter, and what it learns is the difference.

Shape legend: B patterns, R radii, A in-plane angles, F angular frequencies, D beam directions, C channels.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from stemtune.config import Config
from stemtune.crystal.phase import Phase
from stemtune.diffraction.geometry import Geometry
from stemtune.learning.model import Candidates, OrientationModel
from stemtune.learning.models.peaks import Peaks
from stemtune.learning.models.polar_templates import PolarView, polar_grid, template_views

GRID_STEP = 3.0  # spacing of beam directions in degrees where `model.grid_step` is 0
WIDTH, DEPTH = 8, 3  # channels and convolutions of the cleaning layers where `model.width` and `model.depth` are 0
SHARPNESS = 0.02  # difference of correlation that starts as one unit of logit; `matched` shares confidence likewise
TEMPLATE_SIZE = 10.0  # root mean square of filters that start as templates: the larger, the less AdamW changes them
FREQUENCIES = 0.35  # angular frequencies kept, as a part of the number of in-plane angles; 0.5 would be all of them


class PolarConvolutions(nn.Module):
    """Convolutions over radius and angle, circular along the angle, added to what they are given.

    They see the radius as a channel of its own, since what is noise and what is signal depends on it. The last one
    starts at zero. There are `depth` of them (1 or fewer leaves the pattern as it is), of `width` channels and
    `kernel_size` along the angle, 3 along the radius; `dropout` is the share of channels dropped before the last.
    """

    def __init__(self, width: int, depth: int, kernel_size: int, dropout: float) -> None:
        super().__init__()
        sizes = [2, *[width] * (depth - 1), 1] if depth > 1 else []
        self.layers = nn.ModuleList(nn.Conv2d(before, after, (3, kernel_size)) for before, after in pairwise(sizes))
        self.around = kernel_size // 2
        self.dropout = nn.Dropout2d(dropout)
        if depth > 1:
            last = self.layers[-1]
            assert isinstance(last, nn.Conv2d) and last.bias is not None
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x_BRA: Tensor) -> Tensor:
        """Return views (B, R, A) with what the convolutions make of them added."""
        if not len(self.layers):
            return x_BRA
        ramp = torch.linspace(-1, 1, x_BRA.shape[1], dtype=x_BRA.dtype, device=x_BRA.device)
        y_BCRA = torch.stack((x_BRA, ramp[:, None].expand_as(x_BRA)), dim=1)
        for number, layer in enumerate(self.layers):
            if number:
                y_BCRA = functional.gelu(y_BCRA)
            if number == len(self.layers) - 1:
                y_BCRA = self.dropout(y_BCRA)
            padded = functional.pad(y_BCRA, (self.around, self.around, 0, 0), mode="circular")
            y_BCRA = layer(functional.pad(padded, (0, 0, 1, 1)))
        return x_BRA + y_BCRA[:, 0].to(x_BRA.dtype)


class Polar(OrientationModel):
    """Polar network with a grid of beam directions x in-plane angles as output.

    Settings: `model.grid_step`, `angles`, `radii`, `reach`, `start`, `width`, `depth`, `kernel_size`, `dropout`;
    the template settings shape the start; `head.softness` is the width of the labels. Convolutions and filters are
    learned, the filters as angular spectra. Candidates are the tops of parabolas through the logits, as in `matched`,
    unless `head.residual` is false; soft labels are Gaussians, whose logarithm is such a parabola around the truth.

    `view` is the polar view, `grid` the cells that have a logit.
    """

    to_frequency: Tensor
    to_angle: Tensor

    def __init__(self, config: Config, phase: Phase, geometry: Geometry) -> None:
        super().__init__(config, phase, geometry)
        settings = config.model
        self.view = PolarView(config, phase, geometry)
        self.grid = polar_grid(config, phase, GRID_STEP)
        radii, angles = self.view.shape
        self.convolutions = PolarConvolutions(
            settings.width or WIDTH, settings.depth or DEPTH, settings.kernel_size, settings.dropout
        )
        frequency = torch.arange(max(2, min(round(FREQUENCIES * angles), (angles + 1) // 2)), dtype=torch.float64)
        shape = (len(frequency), self.grid.shape[0], 2 * radii)
        if settings.start == "matched":
            views_DRA = template_views(config, phase, geometry, self.view, self.grid.base)
            spectrum_DRF = torch.fft.rfft(views_DRA, dim=-1)[..., : len(frequency)]
            bank_FDQ = torch.cat((spectrum_DRF.real, spectrum_DRF.imag), dim=1).permute(2, 0, 1)
            size = float(bank_FDQ.square().mean().sqrt()) / TEMPLATE_SIZE
            bank_FDQ = bank_FDQ / size
        else:
            bank_FDQ = torch.randn(shape)
            size = math.sqrt(angles / (4 * len(frequency) * radii))  # filters of length about one, as templates have
        self.peaks = Peaks(self.grid, len(frequency), refined=config.head.residual)
        self.bank = nn.Parameter(bank_FDQ.contiguous())
        self.log_scale = nn.Parameter(torch.tensor(0.0))
        wave_FA = torch.outer(frequency, self.view.angle.double())
        share_F1 = torch.where(frequency == 0, 1.0, 2.0)[:, None] / angles
        to_angle = torch.cat((wave_FA.cos() * share_F1, -wave_FA.sin() * share_F1)).T
        to_angle = to_angle * (size / (SHARPNESS * math.sqrt(radii * angles)))
        self.register_buffer("to_frequency", torch.cat((wave_FA.cos(), -wave_FA.sin())).T.float(), persistent=False)
        self.register_buffer("to_angle", to_angle.float().contiguous(), persistent=False)

    def forward(self, patterns: Tensor) -> dict[str, Tensor]:
        """Return `logits` (B, D, A) over the grid's cells for (B, H, W) patterns of any numeric type."""
        with torch.no_grad(), torch.autocast(patterns.device.type, enabled=False):
            x_BRA = self.view(patterns) * math.sqrt(math.prod(self.view.shape))
        return self.from_view(x_BRA)

    def from_view(self, x_BRA: Tensor) -> dict[str, Tensor]:
        """Return `logits` (B, D, A) for polar views of unit variance; a shift along A shifts the logits by as much."""
        spectrum_BRF = (self.convolutions(x_BRA) @ self.to_frequency) * self.log_scale.exp()
        real_BRF, imaginary_BRF = spectrum_BRF.chunk(2, dim=-1)
        real_FBR, imaginary_FBR = real_BRF.permute(2, 0, 1), imaginary_BRF.permute(2, 0, 1)
        # Real and imaginary part of pattern * conj(filter), one product per frequency.
        along_FQB = torch.cat((real_FBR, imaginary_FBR), dim=-1).transpose(1, 2)
        across_FQB = torch.cat((imaginary_FBR, -real_FBR), dim=-1).transpose(1, 2)
        product_FDB = torch.cat((self.bank @ along_FQB, self.bank @ across_FQB))
        with torch.autocast(x_BRA.device.type, enabled=False):  # half precision would blur neighbouring cells
            logits_ADB = (self.to_angle @ product_FDB.float().flatten(1)).view(-1, *product_FDB.shape[1:])
        return {"logits": logits_ADB.permute(2, 1, 0)}

    def loss(self, output: dict[str, Tensor], orientation: Tensor) -> Tensor:
        """Return the cross-entropy of the logits against soft labels around (B, 4) true orientations."""
        return self.grid.cross_entropy(output["logits"], self.grid.encode(orientation, self.config.head.softness))

    @torch.no_grad()
    def candidates(self, output: dict[str, Tensor], n: int = 1) -> Candidates:
        """Return the `n` best different orientations.

        The probability of the cells around the rivals is shared out by the heights of their tops; what is spread
        over all other cells, in a pattern of noise nearly all of it, lowers the confidence.
        """
        logits_BDA = output["logits"].float()
        direction_BT = self.peaks.shortlist(logits_BDA.amax(2), 8 + 4 * n)
        tops = self.peaks.tops(direction_BT, rows(logits_BDA, direction_BT), partial(self._spectra, logits_BDA), n)
        everything_B11 = logits_BDA.logsumexp((1, 2))[:, None, None]
        around_BrN = (tops.around - everything_B11).exp().where(tops.score[..., None] > -torch.inf, 0.0)
        sure_B1 = around_BrN.sum((1, 2)).clamp_max(1.0)[:, None]
        return Candidates(tops.orientation, (tops.score.softmax(1).nan_to_num(0.0) * sure_B1)[:, :n])

    def _spectra(self, logits_BDA: Tensor, direction_BN: Tensor) -> Tensor:
        """Return the angular spectra (B, N, F, 2) of some directions' logits."""
        flat = rows(logits_BDA, direction_BN) @ self.to_frequency
        return torch.stack(flat.chunk(2, dim=-1), dim=-1)


def rows(logits_BDA: Tensor, direction_BN: Tensor) -> Tensor:
    """Return the logits (B, N, A) of some directions (B, N)."""
    return logits_BDA[torch.arange(logits_BDA.shape[0], device=logits_BDA.device)[:, None], direction_BN]
