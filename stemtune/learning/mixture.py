"""A head whose output is a mixture of orientations: several at once, each with a weight and a width.

Where a pattern fits two orientations alike, a head with one output lands between them; this one can name both. The
density of pattern b is a sum over K components with weights w, centres M and concentrations kappa,

    p(g) = sum_k w_k mean_s f(angle(s g, M_k), kappa_k),  f(a, kappa) = exp(2 kappa cos a) / (I0(2 kappa) - I1(2 kappa))

with s over the proper symmetry operations, so that equal orientations are equally likely. f is the isotropic matrix
Fisher (Langevin) density on SO(3) relative to the uniform one [1, 2]; a mixture of such densities made symmetric by
the sum over the group is that of [3] for grain orientations, and its parameters as the output of a network are [4].

Shape legend: B patterns, F features, K components, S symmetry operations, P nodes of the integral.

References
----------
[1] T. D. Downs, Biometrika 59 (1972) 665.  [2] D. Mohlin, G. Bianchi, J. Sullivan, NeurIPS 2020, arXiv:2006.09740.
[3] Y.-H. Chen et al., IEEE Signal Process. Lett. 22 (2015) 1152, arXiv:1411.2540.  [4] C. M. Bishop, Mixture density
networks, Aston University NCRG/94/004 (1994).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stemtune.crystal.rotations import from_six_d, inverse, multiply, to_six_d
from stemtune.crystal.symmetry import Symmetry
from stemtune.learning.grid import Grid, most_probable
from stemtune.learning.model import DIFFERENT_DEG, Candidates

NARROWEST_DEG, WIDEST_DEG, START_DEG = 0.5, 60.0, 20.0
"""Limits of a component's width (standard deviation of each rotation axis), and where it starts."""

_NODES = 16  # of the integral over the ball of 5 degrees


def log_density(cosine: Tensor, kappa: Tensor) -> Tensor:
    """Return log f of the cosine of the rotation angle: the isotropic matrix Fisher density, 1 on average over SO(3).

    The concentration `kappa` is above 0; the standard deviation of each rotation component is 1 / sqrt(2 kappa)
    radians.
    """
    x = 2.0 * kappa.double()  # I0 and I1 differ by 1 part in 2 x: single precision would lose it
    normaliser: Tensor = (torch.special.i0e(x) - torch.special.i1e(x)).log()
    density: Tensor = 2.0 * kappa * (cosine - 1.0) - normaliser.to(kappa.dtype)
    return density


def mass_within(angle_deg: float, kappa: Tensor) -> Tensor:
    """Return the probability (...) that an orientation of one component lies within `angle_deg` of its centre."""
    step = math.radians(angle_deg) / _NODES
    angle_P = (torch.arange(_NODES, device=kappa.device, dtype=kappa.dtype) + 0.5) * step
    uniform_P = (1.0 - angle_P.cos()) / math.pi  # density of the angle of a random rotation
    return (log_density(angle_P.cos(), kappa.unsqueeze(-1)).exp() * uniform_P).sum(-1) * step


class MixtureHead(nn.Module):
    """A mixture density over orientations from linear maps of F `features`, trained by its likelihood.

    The K `components` start spread over all different orientations, so that some of them are near any truth.
    """

    def __init__(self, features: int, symmetry: Symmetry, components: int) -> None:
        super().__init__()
        self.symmetry = symmetry
        self.to_six_d = nn.Linear(features, 6 * components)
        self.to_weight = nn.Linear(features, components)
        self.to_width = nn.Linear(features, components)
        for layer in (self.to_weight, self.to_width):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.to_six_d.bias.copy_(to_six_d(_spread(symmetry, components)).flatten())

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Return raw centres (B, K, 6), logits of the weights (B, K) and raw widths (B, K)."""
        centres = self.to_six_d(features).unflatten(-1, (-1, 6))
        return {"centres": centres, "weights": self.to_weight(features), "widths": self.to_width(features)}

    def components(self, output: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return centres (B, K, 4), logarithms of the weights (B, K) and concentrations (B, K) of a raw output."""
        low, high = math.log(math.radians(NARROWEST_DEG)), math.log(math.radians(WIDEST_DEG))
        start = math.log(math.radians(START_DEG))
        offset = math.log((start - low) / (high - start))
        width_BK = (low + (high - low) * torch.sigmoid(output["widths"].float() + offset)).exp()
        return from_six_d(output["centres"].float()), output["weights"].float().log_softmax(-1), 0.5 / width_BK.square()

    def loss(self, output: dict[str, Tensor], orientation: Tensor) -> Tensor:
        """Return the mean of the negative logarithm of the density at the true orientations (B, 4); 0 is chance."""
        return -self.log_likelihood(output, orientation).mean()

    def log_likelihood(self, output: dict[str, Tensor], orientation: Tensor) -> Tensor:
        """Return the logarithm (B,) of the density at orientations (B, 4), relative to the uniform density."""
        centre_BK4, log_weight_BK, kappa_BK = self.components(output)
        operations_S4 = self.symmetry.operations_like(centre_BK4)
        equal_BS4 = multiply(operations_S4, orientation.to(centre_BK4).unsqueeze(1))
        with torch.autocast(centre_BK4.device.type, enabled=False):  # half precision would blur a degree
            half_BKS = centre_BK4 @ equal_BS4.transpose(1, 2)
        cosine_BKS = 2.0 * half_BKS.square() - 1.0
        log_BKS = log_density(cosine_BKS, kappa_BK.unsqueeze(-1)) + log_weight_BK.unsqueeze(-1)
        return log_BKS.logsumexp((1, 2)) - math.log(len(operations_S4))

    @torch.no_grad()
    def candidates(self, output: dict[str, Tensor], n: int = 1) -> Candidates:
        """Return the `n` heaviest modes that differ; confidence is the probability within 5 degrees of each."""
        centre_BK4, log_weight_BK, kappa_BK = self.components(output)
        return most_probable(centre_BK4, log_weight_BK.exp() * mass_within(DIFFERENT_DEG, kappa_BK), n, self.symmetry)


def _spread(symmetry: Symmetry, count: int) -> Tensor:
    """Return `count` orientations (count, 4) far from each other: of a grid's cells, each next one the farthest."""
    step = 30.0
    while math.prod(Grid(symmetry, step).shape) < 8 * count:
        step /= 1.5
    grid = Grid(symmetry, step)
    cells_M4 = grid.orientation(torch.arange(math.prod(grid.shape)))
    chosen = [0]
    closest_M = torch.zeros(len(cells_M4))
    for _ in range(count - 1):
        relative_SM4 = multiply(inverse(multiply(grid.operations, cells_M4[chosen[-1]]))[:, None], cells_M4)
        closest_M = torch.maximum(closest_M, relative_SM4[..., 0].abs().amax(0))
        chosen.append(int(closest_M.argmin()))
    return cells_M4[chosen]
