"""Swin transformer (Liu et al., ICCV 2021) from timm, as it is (`Swin`) and adjusted to diffraction patterns."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stemtune.config import ModelConfig
from stemtune.errors import UserError
from stemtune.learning.model import Backbone
from stemtune.learning.models.convolutional import block_counts, input_shape, one_channel, with_radius

STOCK_WINDOW, ADJUSTED_WINDOW, READOUT = 7, 8, 4
POLAR_STAGES, POLAR_ANGLES = 3, 2  # on the polar view: stages, and angles in one token


def fitted_window(tokens: int, wanted: int) -> int:
    """Return the window nearest to `wanted` that divides a map of `tokens` x `tokens`; the larger of two as near.

    A window that does not divide the map would be filled up with empty tokens. Where only tiny or huge windows
    divide it, the wanted one is kept and filled up all the same.
    """
    if tokens <= wanted:
        return tokens
    divisors = [w for w in range(max(2, wanted // 2), 2 * wanted + 1) if tokens % w == 0]
    return min(divisors, key=lambda w: (abs(w - wanted), -w)) if divisors else wanted


def window_around(tokens: int, wanted: int) -> int:
    """Return the largest window of at most `wanted`, and at most half of the circle of `tokens`, that divides it.

    Where there is none, the window is the circle.
    """
    divisors = [w for w in range(2, min(wanted, tokens // 2) + 1) if tokens % w == 0]
    return max(divisors, default=tokens)


def attend_around(net: Any) -> None:
    """Let shifted windows look across the seam of the angle, the last axis, but not across that of the radius."""
    for layer in net.layers:
        for block in layer.blocks:
            (rows, columns), (high, wide), shift = block.input_resolution, block.window_size, block.shift_size[0]
            part = torch.zeros(-(-rows // high) * high)
            if shift:
                part[-high:], part[-shift:] = 1, 2
            part_WN = part.view(-1, high).repeat_interleave(wide, 1).repeat_interleave(columns // wide, 0)
            apart = part_WN[:, None, :] != part_WN[:, :, None]
            block.attn_mask = torch.zeros(apart.shape).masked_fill(apart, -100.0) if shift else None


class Swin(Backbone):
    """Swin-tiny on one channel, stock or adjusted.

    **Stock** (`model.adjusted: false`): timm's `swin_tiny_patch4_window7_224`, patch 4, width 96, 2-2-6-2 blocks,
    features averaged over the map. Only the window is fitted, stage by stage, to a divisor of the token map (8 for
    128 px patterns).

    **Adjusted** (`model.adjusted: true`) to 128 px patterns of sparse spots:

    - *patch 2 instead of 4*: a spot is 2 to 4 px wide and its place to a fraction of a pixel is the information; a
      4 px patch puts whole spots, and what lies between two, into one token;
    - *window 8*: on the token maps of 64, 32, 16 and 8 it divides every stage, and the last stage sees the whole
      pattern at once;
    - *2-2-4-2 blocks*: four times the tokens cost four times the work, and a pattern has spots and their lattice but
      no deeper hierarchy of parts, so two blocks of the third stage go;
    - *a learned position is added to every token, and the last map is read out as 4 x 4 places*: Swin knows only
      relative places and averages them away at the end, but the pattern's centre is fixed and the orientation is in
      where the spots stand.

    Pretrained weights on the adjusted network: the patch embedding is resampled to 2 x 2, blocks and mergings of
    equal place are taken over with their tables of relative positions resampled to the window; the position and the
    readout start fresh. The log says what was taken.

    `model.width`, `model.depths`, `model.patch_size` and `model.window` override these and make small variants; a
    pattern that is no multiple of the coarsest token is filled up with zeros at the right and lower edge.

    **On the polar view** there are 3 stages (or as many as `model.depths` has), tokens of `model.patch_size` radii x 2
    angles, and windows that wrap around: along the angle they are of one width in all stages, so that shifting the view
    by a window of the last stage shifts the map by as many places. The position of the adjusted network is that along
    the radius.
    """

    stock = "swin_tiny_patch4_window7_224"
    inner = "net"
    position: Tensor | None

    def __init__(self, config: ModelConfig, size: int) -> None:
        import timm

        super().__init__()
        self.polar = config.view == "polar"
        stages = config.depths.count("-") + 1 if self.polar and config.depths else POLAR_STAGES if self.polar else 4
        default = ((2, 2, 4, 2) if config.adjusted else (2, 2, 6, 2))[:stages]
        depths = block_counts(config.depths, default, stages)
        patch = config.patch_size or (2 if config.adjusted else 4)
        patches = (patch, POLAR_ANGLES if self.polar else patch)
        channels, *edges = input_shape(config, size, POLAR_ANGLES * 2 ** (stages - 1))
        width = config.width or 96
        if width % 12 and width % 8:
            raise UserError(f"`model.width` is {width}, but must be a multiple of 8 or 12 for swin (attention heads)")
        multiples = patches if self.polar else (patch * 2 ** (stages - 1),) * 2
        self.padded = tuple(-(-edge // multiple) * multiple for edge, multiple in zip(edges, multiples, strict=True))
        tokens = [tuple(-(-e // (p << n)) for e, p in zip(self.padded, patches, strict=True)) for n in range(stages)]
        wanted = config.window or (ADJUSTED_WINDOW if config.adjusted else STOCK_WINDOW)
        around = window_around(tokens[-1][1], wanted) if self.polar else 0
        net: Any = timm.create_model(
            self.stock,
            in_chans=channels,
            num_classes=0,
            img_size=self.padded,
            patch_size=patches,
            embed_dim=width,
            depths=depths,
            num_heads=tuple(max(1, width // 32) * 2**stage for stage in range(stages)),
            window_size=tuple((w, around or w) for w in (fitted_window(rows, wanted) for rows, _ in tokens)),
            drop_path_rate=config.drop_path,
        )
        if self.polar:
            attend_around(net)
        self.net = net
        self.features = int(net.num_features)
        self.position = None
        if config.adjusted:
            rows, columns = tokens[0]
            self.position = nn.Parameter(0.02 * torch.randn(1, rows, 1 if self.polar else columns, width))
            places, squeezed = [min(READOUT, edge) for edge in tokens[-1]], max(8, self.features // 8)
            self.pool = nn.AdaptiveAvgPool2d(tuple(places))
            self.squeeze = nn.Conv2d(self.features, squeezed, 1)
            to_features = nn.Linear(math.prod(places) * squeezed, self.features)
            self.to_features = nn.Sequential(to_features, nn.LayerNorm(self.features), nn.GELU())
            self.vector_parts = ("squeeze", "to_features")

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, 8 * width) of prepared patterns (B, 1, S, S) or polar views."""
        x_BCTT = self.feature_map(x)
        if self.position is None:
            return x_BCTT.mean((2, 3))
        features: Tensor = self.to_features(self.pool(self.squeeze(x_BCTT)).flatten(1))
        return features

    def feature_map(self, x: Tensor) -> Tensor:
        """Return the tokens of the last stage as a map."""
        if self.polar:
            x = with_radius(x)
        height, width = self.padded
        if x.shape[2:] != (height, width):
            x = functional.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))
        net: Any = self.net
        x_BTTC = net.patch_embed(x)
        if self.position is not None:
            x_BTTC = x_BTTC + self.position
        x_BCTT: Tensor = net.norm(net.layers(x_BTTC)).permute(0, 3, 1, 2)
        return x_BCTT

    def convert(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resample the patch embedding and the tables of relative positions, and drop the classifier."""
        from timm.models.swin_transformer import checkpoint_filter_fn

        here = self.net.state_dict()
        known = {key: value for key, value in weights.items() if key in here and "relative_position_index" not in key}
        # Only tables of square windows are resampled; one that fits is this network's own.
        fitting = {key: value for key, value in known.items() if value.shape == here[key].shape}
        others = {
            key: value
            for key, value in known.items()
            if key not in fitting and ("bias_table" not in key or math.isqrt(len(value)) ** 2 == len(value))
        }
        converted: dict[str, Tensor] = checkpoint_filter_fn(one_channel(others, 2 if self.polar else 1), self.net)
        return {key: value for key, value in converted.items() if key in here} | fitting
