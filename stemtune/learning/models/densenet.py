"""DenseNet-121 (Huang et al., CVPR 2017) from timm, for one channel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stemtune.config import ModelConfig
from stemtune.errors import UserError
from stemtune.learning.model import Backbone


def block_counts(text: str, default: tuple[int, ...], stages: int) -> tuple[int, ...]:
    """Read `model.depths`, "2-2-4-2" for instance; an empty text is the default.

    Raises
    ------
    UserError
        When the text is not that many positive whole numbers.
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
        net: Any = timm.create_model(
            self.stock,
            in_chans=1,
            num_classes=0,
            growth_rate=(config.width or 64) // 2,
            block_config=block_counts(config.depths, (6, 12, 24, 16), 4),
        )
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
