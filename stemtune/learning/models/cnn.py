"""A plain convolutional network: stages of convolutions at falling resolution, read out with their positions."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from stemtune.config import ModelConfig
from stemtune.errors import UserError
from stemtune.learning.model import Backbone

FEATURES = 256
WIDTH = 24
DEPTH = 4
READOUT = 4


def groups(channels: int) -> int:
    """Return the number of groups for group normalisation: the largest of 8, 4, 2, 1 that divides `channels`."""
    return next(count for count in (8, 4, 2, 1) if channels % count == 0)


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
