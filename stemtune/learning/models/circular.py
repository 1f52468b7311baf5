"""A network on the polar view that has its radii as channels and sees only turns: one-dimensional, and small.

The blocks are those of ConvNeXt (Liu et al., CVPR 2022) along the angle.

Shape legend: B patterns, R radii, A in-plane angles, C channels, k kernel size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from stemtune.config import ModelConfig
from stemtune.learning.model import Backbone

WIDTH, DEPTH, STEM, SECTORS = 160, 4, 5, 8
KERNELS = (9, 13)  # in turn, where `model.kernel_size` is its default
_DEFAULT_KERNEL = ModelConfig().kernel_size


def wrapped(x_BAC: Tensor, kernel_size: int) -> Tensor:
    """Return `x` with the angles on either side that a kernel over all places needs: (B, A + k - 1, C)."""
    around = kernel_size // 2
    return torch.cat((x_BAC[:, -around:], x_BAC, x_BAC[:, :around]), dim=1) if around else x_BAC


def standardised(x_BAC: Tensor) -> Tensor:
    """Return `x`, every pattern with mean 0 and variance 1; the layer behind brings scale and shift."""
    return functional.layer_norm(x_BAC, x_BAC.shape[1:])


class CircularBlock(nn.Module):
    """A convolution along the angle in every channel, then two layers across channels, added to what came in.

    The last layer starts at zero. `drop_path` is the share of patterns for which a training step leaves the block out.
    """

    def __init__(self, width: int, kernel_size: int, drop_path: float) -> None:
        super().__init__()
        self.kernel_size, self.drop_path = kernel_size, drop_path
        self.along = nn.Conv2d(width, width, (1, kernel_size), groups=width)
        self.expand = nn.Linear(width, 2 * width)
        self.reduce = nn.Linear(2 * width, width)
        nn.init.zeros_(self.reduce.weight)
        nn.init.zeros_(self.reduce.bias)

    def forward(self, x_BAC: Tensor) -> Tensor:
        # Channels lie last in memory all the way: as matrix products the layers are twice as fast as convolutions.
        around_BC1A = wrapped(x_BAC, self.kernel_size).unsqueeze(1).permute(0, 3, 1, 2)
        device = x_BAC.device.type
        full = self.training and device == "cpu"  # where the gradient takes twice as long in half precision
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device) and not full):
            seen_BC1A = self.along(around_BC1A.float() if full else around_BC1A)
        inner_BAX = functional.gelu(self.expand(standardised(seen_BC1A.squeeze(2).transpose(1, 2))))
        y_BAC: Tensor = self.reduce(inner_BAX)
        if self.training and self.drop_path:
            kept_B11 = torch.rand(len(y_BAC), 1, 1, device=y_BAC.device) >= self.drop_path
            y_BAC = y_BAC * (kept_B11 / (1 - self.drop_path)).to(y_BAC.dtype)
        return x_BAC + y_BAC


class Circular(Backbone):
    """Circular convolutions along the angle of the polar view, radii as channels.

    A stem of kernel 5; `model.depth` blocks (4) of `model.width` channels (160), with kernels of 9 and 13 in turn or
    `model.kernel_size` everywhere; a global branch, through which every angle sees the whole pattern. It never strides,
    so that the map has a place for every angle. A vector has the means over 8 sectors.
    """

    vector_parts = ("to_features",)

    def __init__(self, config: ModelConfig, size: int) -> None:
        super().__init__()
        width, depth = config.width or WIDTH, config.depth or DEPTH
        kernels = KERNELS if config.kernel_size == _DEFAULT_KERNEL else (config.kernel_size,)
        self.stem = nn.Linear(STEM * config.radii, width)
        self.blocks = nn.Sequential(
            *(
                CircularBlock(width, kernels[number % len(kernels)], config.drop_path * number / max(1, depth - 1))
                for number in range(depth)
            )
        )
        self.whole = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))
        self.to_features = nn.Sequential(nn.Linear(SECTORS * width, width), nn.LayerNorm(width), nn.GELU())
        self.features = width

    def feature_map(self, x: Tensor) -> Tensor:
        """Return the map (B, width, 1, A) of polar views (B, 1, R, A)."""
        x_BAC = self.stem(wrapped(x.squeeze(1).transpose(1, 2), STEM).unfold(1, STEM, 1).flatten(2))
        x_BAC = self.blocks(x_BAC)
        x_BAC = x_BAC + self.whole(x_BAC.mean(1, keepdim=True))
        scale, shift = self.scale.to(x_BAC.dtype), self.shift.to(x_BAC.dtype)  # half precision stays what it is
        x_BAC = functional.gelu(torch.addcmul(shift, standardised(x_BAC), scale))
        return x_BAC.transpose(1, 2).unsqueeze(2)

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, width) of polar views (B, 1, R, A)."""
        features: Tensor = self.to_features(
            functional.adaptive_avg_pool1d(self.feature_map(x).squeeze(2), SECTORS).flatten(1)
        )
        return features
