"""Swin transformer (Liu et al., ICCV 2021) from timm, as it is (`Swin`) and adjusted to diffraction patterns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stemtune.config import ModelConfig
from stemtune.errors import UserError
from stemtune.learning.model import Backbone
from stemtune.learning.models.convolutional import block_counts, one_channel

STOCK_WINDOW, ADJUSTED_WINDOW, READOUT = 7, 8, 4


def fitted_window(tokens: int, wanted: int) -> int:
    """Return the window nearest to `wanted` that divides a map of `tokens` x `tokens`; the larger of two as near.

    A window that does not divide the map would be filled up with empty tokens. Where only tiny or huge windows
    divide it, the wanted one is kept and filled up all the same.
    """
    if tokens <= wanted:
        return tokens
    divisors = [w for w in range(max(2, wanted // 2), 2 * wanted + 1) if tokens % w == 0]
    return min(divisors, key=lambda w: (abs(w - wanted), -w)) if divisors else wanted


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
    """

    stock = "swin_tiny_patch4_window7_224"
    inner = "net"
    position: Tensor | None

    def __init__(self, config: ModelConfig, size: int) -> None:
        import timm

        super().__init__()
        depths = block_counts(config.depths, (2, 2, 4, 2) if config.adjusted else (2, 2, 6, 2), 4)
        patch = config.patch_size or (2 if config.adjusted else 4)
        width = config.width or 96
        if width % 12 and width % 8:
            raise UserError(f"`model.width` is {width}, but must be a multiple of 8 or 12 for swin (attention heads)")
        self.multiple = patch * 2 ** (len(depths) - 1)
        self.padded = -(-size // self.multiple) * self.multiple
        wanted = config.window or (ADJUSTED_WINDOW if config.adjusted else STOCK_WINDOW)
        tokens = [self.padded // patch >> stage for stage in range(len(depths))]
        net: Any = timm.create_model(
            self.stock,
            in_chans=1,
            num_classes=0,
            img_size=self.padded,
            patch_size=patch,
            embed_dim=width,
            depths=depths,
            num_heads=tuple(max(1, width // 32) * 2**stage for stage in range(len(depths))),
            window_size=tuple((w, w) for w in (fitted_window(count, wanted) for count in tokens)),
            drop_path_rate=config.drop_path,
        )
        self.net = net
        self.features = int(net.num_features)
        self.position = None
        if config.adjusted:
            self.position = nn.Parameter(0.02 * torch.randn(1, tokens[0], tokens[0], width))
            edge, channels = min(READOUT, tokens[-1]), max(8, self.features // 8)
            self.pool = nn.AdaptiveAvgPool2d(edge)
            self.squeeze = nn.Conv2d(self.features, channels, 1)
            to_features = nn.Linear(edge**2 * channels, self.features)
            self.to_features = nn.Sequential(to_features, nn.LayerNorm(self.features), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, 8 * width) of prepared patterns (B, 1, S, S)."""
        missing = self.padded - x.shape[-1]
        if missing:
            x = functional.pad(x, (0, missing, 0, missing))
        net: Any = self.net
        features: Tensor
        if self.position is None:
            features = net(x)
        else:
            x_BTTC = net.norm(net.layers(net.patch_embed(x) + self.position))
            features = self.to_features(self.pool(self.squeeze(x_BTTC.permute(0, 3, 1, 2))).flatten(1))
        return features

    def convert(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resample the patch embedding and the tables of relative positions, and drop the classifier."""
        from timm.models.swin_transformer import checkpoint_filter_fn

        here = self.net.state_dict()
        known = {key: value for key, value in weights.items() if key in here and "relative_position_index" not in key}
        converted: dict[str, Tensor] = checkpoint_filter_fn(one_channel(known), self.net)
        return {key: value for key, value in converted.items() if key in here}
