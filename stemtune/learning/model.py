"""What every model of an orientation shares: preparation of the pattern, the loss and the candidates.

Shape legend: B patterns, H x W pixels, S x S pixels after resampling, F features, n candidates per pattern.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from stemtune.config import Config
from stemtune.crystal.phase import Phase
from stemtune.diffraction.geometry import Geometry
from stemtune.learning.calibration import Calibration

Output = Tensor | dict[str, Tensor]

DIFFERENT_DEG = 5.0
"""Two candidates count as different when their disorientation is larger than this angle, in degrees."""


class Candidates(NamedTuple):
    """The best orientations of each pattern, best first.

    Attributes
    ----------
    orientation
        (B, n, 4) float32 unit quaternions, lab-to-crystal, scalar first, reduced to the fundamental zone.
        Candidates of one pattern are more than 5 degrees apart modulo the crystal's symmetry; where a model has
        fewer than n different ones to offer, the rest are NaN.
    confidence
        (B, n) float32 in [0, 1]; 0 where the candidate is NaN.
    """

    orientation: Tensor
    confidence: Tensor


class OrientationModel(nn.Module):
    """A model from diffraction patterns to crystal orientations.

    The preparation of the pattern (`prepare`) is part of the model, so that training and prediction cannot differ in
    it. A subclass defines `forward`, `loss` and `candidates`. The model reads the settings `model`, `head` and
    `data.gamma`; `geometry` is that of the patterns it is made for.

    Attributes
    ----------
    trainable
        False for a model that has nothing to learn; the epoch loop then evaluates it once.
    spread_deg
        How far off its right candidates are, in degrees about each axis; refinement looks that far around them.
    input_size
        Width and height of the pattern after preparation, in pixels.
    calibration
        Makes the model's own confidence a probability; `learning.inference` applies it, `candidates` does not.
    """

    trainable: bool = True
    spread_deg: float = 0.5

    def __init__(self, config: Config, phase: Phase, geometry: Geometry) -> None:
        super().__init__()
        self.config = config
        self.phase = phase
        self.geometry = geometry
        self.calibration = Calibration()
        self.input_size = config.model.input_size or geometry.size

    def prepare(self, patterns: Tensor) -> Tensor:
        """Return patterns (B, H, W) of counts as the network sees them: (B, 1, S, S) float32.

        Counts below zero (and NaN) become zero; the pattern is resampled to `model.input_size`, raised to the power
        `data.gamma`, and shifted and scaled to mean 0 and standard deviation 1. A constant pattern, vacuum for
        instance, becomes zero everywhere.
        """
        x_B1HW = patterns.to(torch.float32).nan_to_num(nan=0.0, posinf=0.0).clamp_min(0.0).unsqueeze(1)
        size = self.input_size
        if x_B1HW.shape[-1] > size or x_B1HW.shape[-2] > size:
            x_B1HW = functional.interpolate(x_B1HW, size=(size, size), mode="area")
        elif x_B1HW.shape[-1] != size or x_B1HW.shape[-2] != size:
            x_B1HW = functional.interpolate(x_B1HW, size=(size, size), mode="bilinear", align_corners=False)
        x_B1HW = x_B1HW.pow(self.config.data.gamma)
        spread, centre = torch.std_mean(x_B1HW, dim=(-2, -1), keepdim=True)
        return (x_B1HW - centre) / spread.clamp_min(1e-6)

    def forward(self, patterns: Tensor) -> Output:
        """Return the raw output, a tensor or a dictionary of tensors, for (B, H, W) patterns of any dtype."""
        raise NotImplementedError

    def loss(self, output: Any, orientation: Tensor) -> Tensor:
        """Return the scalar loss of a raw `output` against (B, 4) true orientations."""
        raise NotImplementedError

    def candidates(self, output: Any, n: int = 1) -> Candidates:
        """Return the `n` best different orientations of a raw `output`, best first, with the model's own confidence."""
        raise NotImplementedError


class Backbone(nn.Module):
    """A feature extractor (B, 1, S, S) -> (B, `features`), the base class of all backbones.

    Attributes
    ----------
    features
        Length F of the feature vector.
    stock
        The timm name whose published weights it can start from; empty when there are none.
    inner
        Name of the submodule that those weights belong to; empty when that is the backbone itself.
    """

    features: int
    stock: str = ""
    inner: str = ""

    def convert(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Bring published weights into the shapes of the `inner` module where that can be done without learning."""
        return weights


class Network(OrientationModel):
    """A backbone (B, 1, S, S) -> (B, F) that turns the pattern into features, and a head of `heads` on them."""

    def __init__(self, config: Config, phase: Phase, geometry: Geometry, backbone: Backbone, head: nn.Module) -> None:
        super().__init__(config, phase, geometry)
        self.backbone = backbone
        self.dropout = nn.Dropout(config.model.dropout)
        self.head = head

    def forward(self, patterns: Tensor) -> Output:
        """Return the head's raw output for (B, H, W) patterns."""
        x_B1SS = self.prepare(patterns)
        if self.config.train.channels_last:
            x_B1SS = x_B1SS.contiguous(memory_format=torch.channels_last)
        output: Output = self.head(self.dropout(self.backbone(x_B1SS)))
        return output

    def loss(self, output: Any, orientation: Tensor) -> Tensor:
        """Return the head's loss against (B, 4) true orientations."""
        loss: Tensor = self.head.loss(output, orientation)  # type: ignore[operator]
        return loss

    def candidates(self, output: Any, n: int = 1) -> Candidates:
        """Return the head's `n` best different orientations."""
        candidates: Candidates = self.head.candidates(output, n)  # type: ignore[operator]
        return candidates
