"""Networks on the polar view, and the readout in which a turn of the pattern about the beam is a shift of the logits.

Shape legend: B patterns, R radii, A in-plane angles, D beam directions, C channels, s stride along the angle, a = A / s
places, n candidates.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from stemtune._parallel import check_memory
from stemtune.config import Config
from stemtune.crystal.phase import Phase
from stemtune.diffraction.geometry import Geometry
from stemtune.learning.grid import Grid
from stemtune.learning.heads import make_head
from stemtune.learning.model import Backbone, Candidates, Network
from stemtune.learning.models.peaks import Peaks
from stemtune.learning.models.polar_templates import PolarView, polar_grid

GRID_STEP = 4.0  # spacing of beam directions in degrees where `model.grid_step` is 0
RANK = 256  # most numbers per place that the last layer reads
_COPIES = 6  # of the logits, in single precision, that a training step holds at once


def learnable_grid(config: Config, phase: Phase, step_deg: float) -> Grid:
    """Return `polar_grid`; where the scores of one training batch over it do not fit into memory, a `UserError`."""
    grid = polar_grid(config, phase, step_deg)
    directions, angles = grid.shape
    batch = -(-config.train.batch_size // config.train.workers)
    check_memory(
        f"the scores of {batch} patterns over {directions} beam directions x {angles} angles",
        4.0 * _COPIES * batch * directions * angles,
        "raise `model.grid_step` or lower `train.batch_size`",
        torch.device("cuda" if torch.cuda.is_initialized() else "cpu"),  # type: ignore[no-untyped-call]
    )
    return grid


class PolarHead(nn.Module):
    """Logits (B, D, A) over the cells of a `grid`: their loss, and the different orientations at their tops.

    `head.softness` is the width of the labels. Candidates are the tops of parabolas through the logits, unless
    `head.residual` is false; soft labels are Gaussians, whose logarithm is such a parabola around the truth.
    """

    to_frequency: Tensor

    def __init__(self, grid: Grid, config: Config, frequencies: int) -> None:
        super().__init__()
        self.grid, self.softness = grid, config.head.softness
        self.peaks = Peaks(grid, frequencies, refined=config.head.residual)
        wave_AF = torch.outer(grid.angle.double(), torch.arange(frequencies, dtype=torch.float64))
        self.register_buffer("to_frequency", torch.cat((wave_AF.cos(), -wave_AF.sin()), 1).float(), persistent=False)

    def loss(self, output: dict[str, Tensor], orientation: Tensor) -> Tensor:
        """Return the cross-entropy of the logits against soft labels around (B, 4) true orientations."""
        return self.grid.cross_entropy(output["logits"], self.grid.encode(orientation, self.softness))

    @torch.no_grad()
    def candidates(self, output: dict[str, Tensor], n: int = 1) -> Candidates:
        """Return the `n` best different orientations.

        The probability of the cells around the rivals is shared out by the heights of their tops; what is spread
        over all other cells, in a pattern of noise nearly all of it, lowers the confidence.
        """
        logits_BDA = output["logits"].float()
        direction_BT = self.peaks.shortlist(logits_BDA.amax(2), 8 + 2 * n)
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


class MapHead(PolarHead):
    """The logits of a feature map (B, C, R', a), the same weights at all of its places along the angle.

    A place has the channels of all its radii, and from them come the logits of the s angles that it stands for. More
    than 256 numbers, or several angles, go through a layer of 256 first: 400 directions are many.
    """

    def __init__(self, grid: Grid, config: Config, inputs: int, stride: int) -> None:
        super().__init__(grid, config, grid.shape[1] // 2 + 1)
        self.squeeze: nn.Module = nn.Identity()
        if inputs > RANK or stride > 1:
            inputs, before = RANK, inputs
            self.squeeze = nn.Sequential(nn.Linear(before, inputs), nn.LayerNorm(inputs), nn.GELU())
        self.to_logits = nn.Linear(inputs, stride * grid.shape[0])

    def forward(self, x_BCRa: Tensor) -> dict[str, Tensor]:
        """Return `logits` (B, D, A); a shift of the map by one place shifts them by s."""
        x_BaX = self.squeeze(x_BCRa.permute(0, 3, 1, 2).flatten(2))
        logits_BaY = self.to_logits(x_BaX)
        return {"logits": logits_BaY.unflatten(2, (-1, self.grid.shape[0])).flatten(1, 2).transpose(1, 2)}


class PolarNetwork(Network):
    """A backbone on the polar view (B, 1, R, A), of unit variance, and a head.

    With `head.name: grid` the head is a `MapHead` on the backbone's feature map, over the cells that `model.grid_step`
    and `model.angles` make; other heads read the backbone's vector, as on pixels.
    """

    def __init__(self, config: Config, phase: Phase, geometry: Geometry, backbone: Backbone) -> None:
        view = PolarView(config, phase, geometry)
        self.on_map = config.head.name == "grid"
        if self.on_map:
            for part in backbone.vector_parts:
                setattr(backbone, part, nn.Identity())
            grid = learnable_grid(config, phase, GRID_STEP)
            with torch.no_grad():
                seen = backbone.eval().feature_map(torch.zeros(1, 1, *view.shape))
            backbone.train()
            head: nn.Module = MapHead(grid, config, seen.shape[1] * seen.shape[2], view.shape[1] // seen.shape[3])
        else:
            head = make_head(config.head, phase.symmetry, backbone.features)
        super().__init__(config, phase, geometry, backbone, head)
        self.view = view

    def prepare(self, patterns: Tensor) -> Tensor:
        """Return the views (B, 1, R, A) of patterns (B, H, W) of any numeric type."""
        return self.view.unit(patterns).unsqueeze(1)

    def features(self, x: Tensor) -> Tensor:
        return self.backbone.feature_map(x) if self.on_map else super().features(x)
