"""Heads: features to orientation.

`grid` classifies the cell of a grid over all orientations and predicts the offset inside it; it is the default,
because it learns from the first epoch and can say "either this or that" where a pattern is ambiguous, as can `mixture`
(`stemtune.learning.mixture`). `sixd`, `quaternion` and `euler` give one orientation; they exist to be compared with.

Every head has `forward` (B, F) -> raw output, `loss` and `candidates`, as `stemtune.learning.model` describes.
The losses of single-output heads do not care which of the equal orientations a label happens to name.
Shape legend: B patterns, F features, S symmetry operations, D x A grid cells, K label cells, M candidate cells, E width
of an embedding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from stemtune.config import HeadConfig
from stemtune.crystal.rotations import from_euler_deg, from_six_d, multiply, normalise, to_euler_deg
from stemtune.crystal.symmetry import Symmetry, disorientation_deg, reduce_to_fundamental_zone
from stemtune.learning.grid import Grid
from stemtune.learning.mixture import MixtureHead
from stemtune.learning.model import DIFFERENT_DEG, Candidates


def symmetric_angle(prediction: Tensor, truth: Tensor, symmetry: Symmetry) -> Tensor:
    """Return the angle (B,) in radians from `prediction` (B, 4) to the nearest orientation equal to `truth` (B, 4).

    Every equal orientation is as good as another, so the minimum over them is the loss; its gradient has length one
    wherever the two differ, which a squared angle does not have near the end nor a squared sine at 180 degrees.
    """
    return torch.deg2rad(disorientation_deg(prediction, truth, symmetry))


def euler_ranges_deg(symmetry: Symmetry) -> tuple[float, float, float]:
    """Return the largest phi1, Phi and phi2 in degrees that orientations need under a proper point group.

    phi2 needs 360/n for an n-fold axis along crystal z, Phi 90 where an operation turns z over and 180 otherwise
    (Bunge z-x-z angles, lab-to-crystal, so that symmetry acts on phi2).
    """
    operations_S4 = symmetry.operations
    about_z = int((operations_S4[:, 1:3].abs().amax(1) < 1e-6).sum())
    turns_over = bool((operations_S4[:, [0, 3]].abs().amax(1) < 1e-6).any())
    return 360.0, 90.0 if turns_over else 180.0, 360.0 / max(1, about_z)


def canonical_euler_deg(orientation: Tensor, symmetry: Symmetry) -> Tensor:
    """Return Bunge angles (B, 3) in degrees of the equal orientation that lies within `euler_ranges_deg`.

    Where several do (cubic groups), the one of smallest Phi is taken.
    """
    _, tilt, turn = euler_ranges_deg(symmetry)
    equal_BS4 = multiply(symmetry.operations.to(orientation), orientation.unsqueeze(1))
    euler_BS3 = to_euler_deg(equal_BS4)
    outside_BS = (euler_BS3[..., 1] > tilt + 1e-3) | (euler_BS3[..., 2] > turn - 1e-3)
    key_BS = 1e6 * outside_BS.to(euler_BS3.dtype) + euler_BS3[..., 1] + 1e-3 * euler_BS3[..., 2]
    best_B = key_BS.argmin(1)
    return euler_BS3[torch.arange(len(best_B), device=best_B.device), best_B]


EMBEDDING, RANK = 64, 64


class GridReadout(nn.Module):
    """Loss and candidates of logits on a grid of orientations, with an optional learned offset inside a cell.

    A model whose own output is already (B, D, A) uses this without `GridHead`. `softness` is the width of the soft
    labels in grid steps; `features` the length F of what the offset is predicted from, 0 for no offset.
    """

    def __init__(self, grid: Grid, softness: float = 0.5, features: int = 0) -> None:
        super().__init__()
        self.grid = grid
        self.softness = softness
        self.features = features
        if features:
            directions, angles = grid.shape
            self.from_features = nn.Linear(features, EMBEDDING)
            self.from_direction = nn.Embedding(directions, EMBEDDING)
            self.from_angle = nn.Embedding(angles, EMBEDDING)
            self.mix = nn.Linear(EMBEDDING, EMBEDDING)
            self.to_offset = nn.Linear(EMBEDDING, 3)
            nn.init.zeros_(self.to_offset.weight)
            nn.init.zeros_(self.to_offset.bias)

    def forward(self, logits: Tensor, features: Tensor | None = None) -> dict[str, Tensor]:
        """Return the raw output of (B, D, A) logits and (B, F) features."""
        output = {"logits": logits}
        if self.features and features is not None:
            output["features"] = features
        return output

    def offset(self, features: Tensor, cell_BM: Tensor) -> Tensor:
        """Return rotation vectors (B, M, 3) in radians, no component longer than one grid step."""
        count = self.grid.shape[1]
        place_BME = self.from_direction(cell_BM // count) + self.from_angle(cell_BM % count)
        seen_B1E = self.from_features(features.float()).unsqueeze(1)
        x_BME = functional.gelu(seen_B1E + place_BME) + seen_B1E * place_BME
        x_BME = functional.gelu(self.mix(x_BME))
        return math.radians(self.grid.step_deg) * torch.tanh(self.to_offset(x_BME).float())

    def loss(self, output: dict[str, Tensor], orientation: Tensor) -> Tensor:
        """Return cross-entropy on the soft labels plus the offset's error in grid steps."""
        labels = self.grid.encode(orientation, self.softness)
        loss = self.grid.cross_entropy(output["logits"], labels)
        if "features" in output:
            weight_BK, order_BK = labels.weight.topk(min(8, labels.weight.shape[1]), dim=1)
            truth_BK3 = labels.offset.gather(1, order_BK.unsqueeze(-1).expand(-1, -1, 3))
            guess_BK3 = self.offset(output["features"], labels.cell.gather(1, order_BK))
            error_BK = (guess_BK3 - truth_BK3).square().sum(-1).add(1e-8).sqrt() / math.radians(self.grid.step_deg)
            loss = loss + (weight_BK * error_BK).sum(1).mean()
        return loss

    def candidates(self, output: dict[str, Tensor], n: int = 1) -> Candidates:
        """Return the `n` best different orientations; confidence is the probability within 5 degrees of each."""
        features = output.get("features")
        if features is None:
            return self.grid.decode(output["logits"], n)
        return self.grid.decode(output["logits"], n, offset=lambda cell_BM: self.offset(features, cell_BM))


class GridHead(nn.Module):
    """Map from features to the logits of a grid, read out by `GridReadout`; settings `head.softness` and
    `head.residual`.

    A logit is the sum of three linear parts: one for the beam direction, one for the in-plane angle, and a product:
    the features give a vector of length 64 per in-plane angle, and each direction scores it. The first two learn
    quickly from few patterns what they can; the product shares what belongs to a direction among all angles, and it
    stays small on fine grids, where a dense layer would not (300,000 cells at 2 degrees).
    """

    def __init__(self, grid: Grid, features: int, softness: float = 0.5, residual: bool = True) -> None:
        super().__init__()
        self.directions, self.angles = grid.shape
        self.to_direction = nn.Linear(features, self.directions)
        self.to_angle = nn.Linear(features, self.angles)
        self.to_product = nn.Linear(features, self.angles * RANK)
        self.from_product = nn.Linear(RANK, self.directions, bias=False)
        self.readout = GridReadout(grid, softness, features if residual else 0)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Return logits (B, D, A), and the features for the offset."""
        product_BAD = self.from_product(self.to_product(features).unflatten(1, (self.angles, RANK)))
        marginal_BDA = self.to_direction(features).unsqueeze(2) + self.to_angle(features).unsqueeze(1)
        output: dict[str, Tensor] = self.readout(product_BAD.transpose(1, 2) + marginal_BDA, features)
        return output

    def loss(self, output: dict[str, Tensor], orientation: Tensor) -> Tensor:
        return self.readout.loss(output, orientation)

    def candidates(self, output: dict[str, Tensor], n: int = 1) -> Candidates:
        return self.readout.candidates(output, n)


class SingleHead(nn.Module):
    """One orientation from a linear map to `numbers` numbers: the base of the regression heads.

    A second output, trained on the head's own hits and misses, gives the confidence: the probability that the
    orientation is within 5 degrees. It learns from detached features and so does not change the regression.
    """

    numbers: int

    def __init__(self, features: int, symmetry: Symmetry) -> None:
        super().__init__()
        self.symmetry = symmetry
        self.to_numbers = nn.Linear(features, self.numbers)
        self.to_hit = nn.Linear(features, 1)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Return the raw numbers (B, N) and the logit (B,) of being right."""
        return {"numbers": self.to_numbers(features), "hit": self.to_hit(features.detach()).squeeze(-1)}

    def orientation(self, numbers: Tensor) -> Tensor:
        """Return the unit quaternions (B, 4) of raw numbers (B, N)."""
        raise NotImplementedError

    def error(self, numbers: Tensor, truth: Tensor) -> Tensor:
        """Return the loss (B,) of raw numbers; the angle in radians unless a head says otherwise."""
        return symmetric_angle(self.orientation(numbers), truth, self.symmetry)

    def loss(self, output: dict[str, Tensor], orientation: Tensor) -> Tensor:
        """Return the mean error plus the loss of the confidence."""
        numbers = output["numbers"].float()
        truth = orientation.float()
        with torch.no_grad():
            angle = symmetric_angle(self.orientation(numbers), truth, self.symmetry)
            hit = (angle <= math.radians(DIFFERENT_DEG)).float()
        confidence = functional.binary_cross_entropy_with_logits(output["hit"].float(), hit)
        return self.error(numbers, truth).mean() + 0.1 * confidence

    def candidates(self, output: dict[str, Tensor], n: int = 1) -> Candidates:
        """Return the one orientation this head has; further candidates are NaN with confidence 0."""
        best_B4 = reduce_to_fundamental_zone(self.orientation(output["numbers"].float()), self.symmetry)
        confidence_B1 = output["hit"].float().sigmoid()[:, None]
        orientation = functional.pad(best_B4[:, None], (0, 0, 0, n - 1), value=math.nan)
        return Candidates(orientation, functional.pad(confidence_B1, (0, n - 1)))


class QuaternionHead(SingleHead):
    """A quaternion, made unit length, under the symmetric-minimum loss."""

    numbers = 4

    def orientation(self, numbers: Tensor) -> Tensor:
        return normalise(numbers)


class SixDHead(SingleHead):
    """Two columns of a rotation matrix, made orthonormal (Zhou et al., CVPR 2019), under the symmetric minimum.

    Unlike quaternions and Euler angles, this representation has no jump anywhere on the rotation group.
    """

    numbers = 6

    def orientation(self, numbers: Tensor) -> Tensor:
        return from_six_d(numbers)


class EulerHead(SingleHead):
    """Bunge angles as fractions of their ranges under a squared error: the reference study's choice.

    The label is the equal orientation inside the ranges the symmetry leaves (`euler_ranges_deg`); the jumps at their
    ends stay, which is why this head is no default. `clamp` (`head.clamp`) cuts the output to the ranges, so that an
    output outside gets no gradient.
    """

    numbers = 3
    ranges: Tensor

    def __init__(self, features: int, symmetry: Symmetry, clamp: bool = False) -> None:
        super().__init__(features, symmetry)
        self.clamp = clamp
        self.register_buffer("ranges", torch.tensor(euler_ranges_deg(symmetry)), persistent=False)
        nn.init.constant_(self.to_numbers.bias, 0.5)

    def fractions(self, numbers: Tensor) -> Tensor:
        """Return the angles as fractions of their ranges."""
        return numbers.clamp(0.0, 1.0) if self.clamp else numbers

    def orientation(self, numbers: Tensor) -> Tensor:
        return from_euler_deg(self.fractions(numbers) * self.ranges)

    def error(self, numbers: Tensor, truth: Tensor) -> Tensor:
        """Return the mean squared error (B,) of the fractions."""
        wanted = canonical_euler_deg(truth, self.symmetry) / self.ranges
        return (self.fractions(numbers) - wanted).square().mean(-1)


def make_head(config: HeadConfig, symmetry: Symmetry, features: int) -> nn.Module:
    """Return the head that `head.name` asks for, on `features` inputs."""
    if config.name == "grid":
        return GridHead(Grid(symmetry, config.step), features, config.softness, config.residual)
    if config.name == "mixture":
        return MixtureHead(features, symmetry, config.components)
    if config.name == "euler":
        return EulerHead(features, symmetry, config.clamp)
    return {"sixd": SixDHead, "quaternion": QuaternionHead}[config.name](features, symmetry)
