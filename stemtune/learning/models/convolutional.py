"""Convolutional networks: a plain one, read out with positions, and timm's DenseNet-121 (Huang et al., CVPR 2017)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from stemtune.config import ModelConfig
from stemtune.errors import UserError
from stemtune.learning.model import Backbone

FEATURES, WIDTH, DEPTH, READOUT = 256, 24, 4, 4


def groups(channels: int) -> int:
    """Return the number of groups for group normalisation: the largest of 8, 4, 2, 1 that divides `channels`."""
    return math.gcd(channels, 8)


class Block(nn.Module):
    """Convolution, normalisation, activation, and a second convolution around which the input is led past.

    Group normalisation, not batch normalisation: it works alike in training and prediction, for any batch size, and
    over any number of workers.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.down = nn.Conv2d(inputs, outputs, kernel_size, stride=2, padding=padding, bias=False)
        self.norm = nn.GroupNorm(groups(outputs), outputs)
        self.conv = nn.Conv2d(outputs, outputs, kernel_size, padding=padding, bias=False)
        self.norm_conv = nn.GroupNorm(groups(outputs), outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs, H/2, W/2)."""
        x = functional.gelu(self.norm(self.down(x)))
        return x + functional.gelu(self.norm_conv(self.conv(x)))


class Cnn(Backbone):
    """The reference convolutional network.

    `model.depth` stages (4), each halving the resolution; `model.width` channels in the first stage (24), doubled
    in each further one up to 8 times; `model.kernel_size` everywhere. The last map is pooled to 4 x 4, not to a
    point: where a spot stands is what it says about the orientation.
    """

    def __init__(self, config: ModelConfig, size: int) -> None:
        super().__init__()
        width, depth = config.width or WIDTH, config.depth or DEPTH
        if size >> depth < 1:
            raise UserError(f"`model.depth` is {depth}, but a pattern of {size} px can be halved less often")
        channels = [min(width << stage, 8 * width) for stage in range(depth)]
        inputs = [1, *channels[:-1]]
        self.stages = nn.Sequential(*(Block(a, b, config.kernel_size) for a, b in zip(inputs, channels, strict=True)))
        self.pool = nn.AdaptiveAvgPool2d(READOUT)
        self.to_features = nn.Sequential(
            nn.Linear(channels[-1] * READOUT**2, FEATURES), nn.LayerNorm(FEATURES), nn.GELU()
        )
        self.features = FEATURES

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, 256) of prepared patterns (B, 1, S, S)."""
        features: Tensor = self.to_features(self.pool(self.stages(x)).flatten(1))
        return features


def block_counts(text: str, default: tuple[int, ...], stages: int) -> tuple[int, ...]:
    """Read `model.depths`, "2-2-4-2" for instance; an empty text is the default.

    Raises a `UserError` when the text is not that many positive whole numbers.
    """
    if not text:
        return default
    parts = text.split("-")
    if len(parts) != stages or not all(part.isdigit() and int(part) > 0 for part in parts):
        wanted = "-".join(str(count) for count in default)
        raise UserError(f"`model.depths` is '{text}', but must be {stages} numbers of blocks, as {wanted}")
    return tuple(int(part) for part in parts)


class DenseNet(Backbone):
    """timm's `densenet121`, its pooled features as they are.

    `model.width` sets the channels of the first stage (64; the growth rate is half of it) and `model.depths` the
    layers per block (6-12-24-16), for small variants; published weights fit only the stock sizes.
    """

    stock = "densenet121"
    inner = "net"

    def __init__(self, config: ModelConfig, size: int) -> None:
        import timm

        super().__init__()
        if size < 32:
            raise UserError(f"densenet halves a pattern five times, so {size} px is too small; set model.input_size")
        if config.width % 2:
            raise UserError(f"`model.width` is {config.width}, but must be even for densenet")
        blocks, growth = block_counts(config.depths, (6, 12, 24, 16), 4), (config.width or 64) // 2
        net: Any = timm.create_model(self.stock, in_chans=1, num_classes=0, growth_rate=growth, block_config=blocks)
        self.net = net
        self.features = int(net.num_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, 1024) of prepared patterns (B, 1, S, S)."""
        features: Tensor = self.net(x)
        return features

    def convert(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum the colours of the first layer and drop the classifier."""
        return one_channel({key: value for key, value in weights.items() if not key.startswith("classifier.")})


def one_channel(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum the three colour channels of the first convolution, the only one that has three inputs."""
    return {
        key: value.float().sum(1, keepdim=True) if value.ndim == 4 and value.shape[1] == 3 else value
        for key, value in weights.items()
    }
