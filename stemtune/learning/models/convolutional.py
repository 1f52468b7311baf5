"""Convolutional networks: a plain one, read out with positions, and timm's DenseNet-121 (Huang et al., CVPR 2017).

On the polar view they are circular along the angle, the last axis, and filled up with zeros along the radius as pixels
are at the edges: shifting the view by the stride along the angle shifts the feature map by one place. That stride stays
at 4, since in-plane angles are read out of the map.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stemtune.config import ModelConfig
from stemtune.errors import UserError
from stemtune.learning.model import Backbone

FEATURES, WIDTH, DEPTH, READOUT = 256, 24, 4, 4
STRIDE = 4  # along the angle of the polar view


def input_shape(config: ModelConfig, size: int, stride: int) -> tuple[int, int, int]:
    """Return channels, height and width of what a backbone of so much `stride` along the angle sees.

    On the polar view the radius is a second channel, as what a spot looks like depends on it.
    """
    if config.view == "pixels":
        return 1, size, size
    if config.angles % stride:
        raise UserError(
            f"`model.angles` is {config.angles}, but must be a multiple of {stride} for {config.name} on the polar view"
        )
    return 2, config.radii, config.angles


def with_radius(x_B1RA: Tensor) -> Tensor:
    """Return polar views with the radius, from -1 to 1, as a second channel: (B, 2, R, A)."""
    ramp = torch.linspace(-1, 1, x_B1RA.shape[2], dtype=x_B1RA.dtype, device=x_B1RA.device)
    return torch.cat((x_B1RA, ramp[:, None].expand_as(x_B1RA)), dim=1)


def make_circular(module: nn.Module) -> None:
    """Let the convolutions and poolings of a module be circular along the last axis instead of filling it up."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.MaxPool2d):
            padding: Any = part.padding
            down, around = padding if isinstance(padding, tuple) else (padding, padding)
            if around:
                part.padding = (down, 0)
                part.register_forward_pre_hook(partial(_wrap, around))


def _wrap(around: int, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    (x,) = inputs
    return (torch.cat((x[..., -around:], x, x[..., :around]), dim=-1),)


def groups(channels: int) -> int:
    """Return the number of groups for group normalisation: the largest of 8, 4, 2, 1 that divides `channels`."""
    return math.gcd(channels, 8)


class Block(nn.Module):
    """Convolution, normalisation, activation, and a second convolution around which the input is led past.

    Group normalisation, not batch normalisation: it works alike in training and prediction, for any batch size, and
    over any number of workers.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int, stride: tuple[int, int] = (2, 2)) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.down = nn.Conv2d(inputs, outputs, kernel_size, stride=stride, padding=padding, bias=False)
        self.norm = nn.GroupNorm(groups(outputs), outputs)
        self.conv = nn.Conv2d(outputs, outputs, kernel_size, padding=padding, bias=False)
        self.norm_conv = nn.GroupNorm(groups(outputs), outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs, H/2, W/2) where the stride is 2."""
        x = functional.gelu(self.norm(self.down(x)))
        return x + functional.gelu(self.norm_conv(self.conv(x)))


class Cnn(Backbone):
    """The reference convolutional network.

    `model.depth` stages (4), each halving the resolution; `model.width` channels in the first stage (24), doubled
    in each further one up to 8 times; `model.kernel_size` everywhere. The last map is pooled to 4 x 4, not to a
    point: where a spot stands is what it says about the orientation. On the polar view only the first two stages halve
    the angle.
    """

    vector_parts = ("to_features",)

    def __init__(self, config: ModelConfig, size: int) -> None:
        super().__init__()
        width, depth = config.width or WIDTH, config.depth or DEPTH
        self.polar = config.view == "polar"
        halved = [(2, 2 if not self.polar or stage < 2 else 1) for stage in range(depth)]
        stride = math.prod(across for _, across in halved)
        first, height, across = input_shape(config, size, min(stride, STRIDE))
        if height >> depth < 1:
            seen = f"polar view of {height} radii" if self.polar else f"pattern of {size} px"
            raise UserError(f"`model.depth` is {depth}, but a {seen} can be halved less often")
        if self.polar and config.kernel_size // 2 > across // STRIDE:
            raise UserError(f"`model.kernel_size` is {config.kernel_size}, too wide for `model.angles` of {across}")
        channels = [min(width << stage, 8 * width) for stage in range(depth)]
        sizes = zip([first, *channels[:-1]], channels, halved, strict=True)
        self.stages = nn.Sequential(*(Block(a, b, config.kernel_size, stride) for a, b, stride in sizes))
        if self.polar:
            make_circular(self.stages)
        self.pool = nn.AdaptiveAvgPool2d(READOUT)
        self.to_features = nn.Sequential(
            nn.Linear(channels[-1] * READOUT**2, FEATURES), nn.LayerNorm(FEATURES), nn.GELU()
        )
        self.features = FEATURES

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, 256) of prepared patterns (B, 1, S, S) or polar views."""
        features: Tensor = self.to_features(self.pool(self.feature_map(x)).flatten(1))
        return features

    def feature_map(self, x: Tensor) -> Tensor:
        """Return the last stage's map."""
        features: Tensor = self.stages(with_radius(x) if self.polar else x)
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
    layers per block (6-12-24-16), for small variants; published weights fit only the stock sizes. On the polar view
    the transitions halve only the radius.
    """

    stock = "densenet121"
    inner = "net"

    def __init__(self, config: ModelConfig, size: int) -> None:
        import timm

        super().__init__()
        self.polar = config.view == "polar"
        channels, *_ = input_shape(config, size, STRIDE)
        if size < 32 and not self.polar:
            raise UserError(f"densenet halves a pattern five times, so {size} px is too small; set model.input_size")
        if config.width % 2:
            raise UserError(f"`model.width` is {config.width}, but must be even for densenet")
        blocks, growth = block_counts(config.depths, (6, 12, 24, 16), 4), (config.width or 64) // 2
        net: Any = timm.create_model(
            self.stock, in_chans=channels, num_classes=0, growth_rate=growth, block_config=blocks
        )
        if self.polar:
            make_circular(net)
            for number in range(1, len(blocks)):
                net.features.get_submodule(f"transition{number}").pool = nn.AvgPool2d((2, 1), ceil_mode=True)
        self.net = net
        self.features = int(net.num_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, 1024) of prepared patterns (B, 1, S, S) or polar views."""
        features: Tensor = self.net(with_radius(x) if self.polar else x)
        return features

    def feature_map(self, x: Tensor) -> Tensor:
        """Return the map of timm's network before it is averaged."""
        net: Any = self.net
        features: Tensor = net.forward_features(with_radius(x) if self.polar else x)
        return features

    def convert(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum the colours of the first layer and drop the classifier."""
        kept = {key: value for key, value in weights.items() if not key.startswith("classifier.")}
        return one_channel(kept, 2 if self.polar else 1)


def one_channel(weights: dict[str, Tensor], inputs: int = 1) -> dict[str, Tensor]:
    """Sum the colour channels of the first convolution, the only one with three inputs, or one.

    Further `inputs` start at zero.
    """
    return {
        key: functional.pad(value.float().sum(1, keepdim=True), (0, 0, 0, 0, 0, inputs - 1))
        if value.ndim == 4 and value.shape[1] in (1, 3)
        else value
        for key, value in weights.items()
    }
