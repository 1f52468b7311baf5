"""A grid over all different orientations: beam directions x in-plane angles, its labels and its candidates.

A cell (d, a) stands for the orientation `base[d] * Rz(-angle[a])`: the crystal direction `directions[d]` lies
along the beam, and the pattern is turned by `angle[a]`. The directions cover the fundamental sector of the
proper point group, the angles the full turn, so that every orientation has an equal one near some cell.

Shape legend: B patterns, D directions, A in-plane angles, S symmetry operations, K label cells per pattern,
M candidate cells per pattern, n candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stemtune.crystal.rotations import inverse, multiply, normalise, rotate
from stemtune.crystal.sampling import beam_directions, orientation_from_beam
from stemtune.crystal.symmetry import Symmetry, reduce_to_fundamental_zone
from stemtune.learning.model import DIFFERENT_DEG, Candidates


class Labels(NamedTuple):
    """Soft labels of B orientations on a grid.

    `cell` (B, K) int64 are flat indices d * A + a of the cells around the truth, `weight` (B, K) their shares, which
    sum to 1, `offset` (B, K, 3) the rotation vectors from cell to truth in radians, in the lab frame: truth ~ cell *
    exp(offset).
    """

    cell: Tensor
    weight: Tensor
    offset: Tensor


_LEADERS = 8  # cells that may become the next candidate


def rotation_vector(q: Tensor) -> Tensor:
    """Return the rotation vectors (..., 3) in radians, at most pi long, of unit quaternions (..., 4)."""
    q = torch.where(q[..., :1] < 0, -q, q)
    sine = q[..., 1:].norm(dim=-1, keepdim=True)
    angle = 2.0 * torch.atan2(sine, q[..., :1])
    return q[..., 1:] * torch.where(sine > 1e-7, angle / sine.clamp_min(1e-7), torch.full_like(sine, 2.0))


def from_rotation_vector(r: Tensor) -> Tensor:
    """Return the unit quaternions (..., 4) of rotation vectors (..., 3) in radians; smooth at zero."""
    half = 0.5 * (r.square().sum(dim=-1, keepdim=True) + 1e-20).sqrt()
    return torch.cat([half.cos(), 0.5 * r * torch.sinc(half / math.pi)], dim=-1)


def about_beam(angle: Tensor) -> Tensor:
    """Return the quaternions (..., 4) of turns by `angle` radians about the beam, lab z."""
    zero = torch.zeros_like(angle)
    return torch.stack([(0.5 * angle).cos(), zero, zero, (0.5 * angle).sin()], dim=-1)


def closeness(p_BM4: Tensor, q_BN4: Tensor, operations_S4: Tensor) -> Tensor:
    """Return the cosine of half the disorientation angle between every p and every q of a pattern, (B, M, N)."""
    q_BNS4 = multiply(operations_S4, q_BN4.unsqueeze(-2))
    cosine_BMNS = torch.einsum("bmi,bnsi->bmns", p_BM4, q_BNS4)
    return cosine_BMNS.abs().amax(dim=-1)


def most_probable(
    g_BM4: Tensor,
    probability_BM: Tensor,
    n: int,
    symmetry: Symmetry,
    radius_deg: float = DIFFERENT_DEG,
    leaders: int = 128,
) -> Candidates:
    """Return the `n` most probable different orientations of weighted candidates.

    The likeliest candidates gather the probability of those around them; the one that gathers most is taken (the
    weighted mean of what it gathered), what it gathered is struck off, and so on.

    The probabilities (B, M) come to at most 1; a candidate of probability 0 is never taken. Candidates within
    `radius_deg`, at least the 5 degrees between two that are taken, belong together. So many `leaders`, the likeliest
    candidates left, may be taken next: time and memory grow with it.
    """
    operations = symmetry.operations_like(g_BM4)
    border = math.cos(math.radians(radius_deg) / 2.0)
    free_BM = torch.ones_like(probability_BM)
    orientation, confidence = list[Tensor](), list[Tensor]()
    for _ in range(n):
        share_BM = probability_BM * free_BM
        lead_BL = share_BM.topk(min(leaders, share_BM.shape[1]), dim=1).indices
        lead_BL4 = g_BM4.gather(1, lead_BL.unsqueeze(-1).expand(-1, -1, 4))
        near_BLM = (closeness(lead_BL4, g_BM4, operations) >= border).float()
        mass_BL = (near_BLM @ share_BM.unsqueeze(-1)).squeeze(-1) * free_BM.gather(1, lead_BL)
        pick_B = (mass_BL + 1e-3 * share_BM.gather(1, lead_BL)).argmax(1)
        rows = torch.arange(pick_B.shape[0], device=pick_B.device)
        pick_B4, mass_B, near_BM = lead_BL4[rows, pick_B], mass_BL[rows, pick_B], near_BLM[rows, pick_B]
        answer_B4 = _mean(pick_B4, g_BM4, share_BM * near_BM, operations)
        if orientation:
            earlier_Bi4 = torch.stack(orientation, 1)
            close_Bi = closeness(answer_B4.unsqueeze(1), earlier_Bi4, operations)[:, 0] >= border
            answer_B4 = torch.where(close_Bi.any(1, keepdim=True), pick_B4, answer_B4)
        around_B1M = closeness(answer_B4.unsqueeze(1), g_BM4, operations) >= border
        free_BM = free_BM * (1.0 - near_BM) * (1.0 - around_B1M[:, 0].float())
        answer_B4 = torch.where(mass_B.unsqueeze(1) > 0, answer_B4, torch.full_like(answer_B4, torch.nan))
        orientation.append(answer_B4)
        confidence.append(mass_B.clamp(0.0, 1.0))
    confidence_Bn, order_Bn = torch.stack(confidence, 1).sort(dim=1, descending=True, stable=True)
    found_Bn4 = torch.stack(orientation, 1).gather(1, order_Bn.unsqueeze(-1).expand(-1, -1, 4))
    return Candidates(reduce_to_fundamental_zone(found_Bn4, symmetry).float(), confidence_Bn)


def _mean(pick_B4: Tensor, g_BM4: Tensor, weight_BM: Tensor, operations_S4: Tensor) -> Tensor:
    """Return the weighted mean (B, 4) of nearby orientations, each in the symmetry copy nearest to `pick`."""
    copies_BMS4 = multiply(operations_S4, g_BM4.unsqueeze(-2))
    cosine_BMS = torch.einsum("bi,bmsi->bms", pick_B4, copies_BMS4)
    best_BM11 = cosine_BMS.abs().argmax(-1)[..., None, None]
    nearest_BM4 = copies_BMS4.gather(2, best_BM11.expand(-1, -1, 1, 4)).squeeze(2)
    sign_BM = cosine_BMS.gather(2, best_BM11[..., 0]).squeeze(2).sign()
    total_B4 = ((weight_BM * sign_BM).unsqueeze(-1) * nearest_BM4).sum(1) + 1e-6 * pick_B4
    return normalise(total_B4)


class Grid(nn.Module):
    """Cells over all orientations that differ under a symmetry, with labels for training and orientations from scores.

    The beam directions are `step_deg` apart, and so, by default, the in-plane `angles`. `directions` (D, 3) are crystal
    directions along the beam, `base` (D, 4) orientations at in-plane angle zero, `angle` (A,) radians.
    """

    directions: Tensor
    base: Tensor
    angle: Tensor
    operations: Tensor

    def __init__(self, symmetry: Symmetry, step_deg: float, angles: int | None = None) -> None:
        super().__init__()
        self.symmetry = symmetry
        self.step_deg = float(step_deg)
        count = angles or max(1, round(360.0 / step_deg))
        directions = beam_directions(step_deg, symmetry)
        base = orientation_from_beam(directions, torch.zeros(1, dtype=directions.dtype))[:, 0]
        angle = torch.arange(count, dtype=torch.float64) * (2.0 * math.pi / count)
        for name, value in (("directions", directions), ("base", base), ("angle", angle)):
            self.register_buffer(name, value.to(torch.float32), persistent=False)
        self.register_buffer("operations", symmetry.operations.to(torch.float32), persistent=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of directions and of in-plane angles, (D, A)."""
        return self.base.shape[0], self.angle.shape[0]

    def orientation(self, cell: Tensor) -> Tensor:
        """Return the orientations (..., 4) of flat cell indices (...)."""
        count = self.angle.shape[0]
        return multiply(self.base[cell // count], about_beam(-self.angle[cell % count]))

    def encode(self, orientation: Tensor, softness: float = 0.5) -> Labels:
        """Spread each true orientation (B, 4) over the cells around it.

        The distance of a cell is the true disorientation angle, found through every symmetry operation, so the cells
        beyond a sector border or the end of the turn, and the several equal cells on a symmetry axis, share in the
        label as they should. `softness` is the standard deviation of the Gaussian weights in grid steps; 0 keeps the
        nearest cell only.
        """
        reach = max(1, math.ceil(2.0 * softness))
        directions, angles = self.shape
        g_BS4 = multiply(self.operations, orientation.to(self.base.dtype).unsqueeze(1))
        beam_BS3 = rotate(g_BS4, self.base.new_tensor([0.0, 0.0, 1.0]))
        cosine_BSD = beam_BS3 @ self.directions.T
        count = min(cosine_BSD[0].numel(), 12 * reach * reach)
        near_BP = cosine_BSD.flatten(1).topk(count, dim=1).indices
        direction_BP = near_BP % directions
        g_BP4 = g_BS4.gather(1, (near_BP // directions).unsqueeze(-1).expand(-1, -1, 4))
        relative_BP4 = multiply(inverse(self.base[direction_BP]), g_BP4)
        turn_BP = -2.0 * torch.atan2(relative_BP4[..., 3], relative_BP4[..., 0])
        nearest_BP = (turn_BP * (angles / (2.0 * math.pi))).round().long()
        around = torch.arange(-reach, reach + 1, device=nearest_BP.device)
        around = around[: min(len(around), angles)]
        angle_BPR = (nearest_BP.unsqueeze(-1) + around) % angles
        cell_BK = (direction_BP.unsqueeze(-1) * angles + angle_BPR).flatten(1)
        g_BK4 = g_BP4.unsqueeze(2).expand(-1, -1, len(around), -1).flatten(1, 2)
        offset_BK3 = rotation_vector(multiply(inverse(self.orientation(cell_BK)), g_BK4))
        square_BK = offset_BK3.square().sum(-1)
        width = math.radians(max(softness, 0.01) * self.step_deg)
        weight_BK = (-0.5 * (square_BK - square_BK.amin(1, keepdim=True)) / width**2).exp()
        return Labels(cell_BK, weight_BK / weight_BK.sum(1, keepdim=True), offset_BK3)

    def cross_entropy(self, logits_BDA: Tensor, labels: Labels) -> Tensor:
        """Return the mean cross-entropy of (B, D, A) logits against soft labels."""
        directions, count = self.shape
        if logits_BDA.transpose(1, 2).is_contiguous():  # half the time of what follows
            log_share_BN = logits_BDA.transpose(1, 2).flatten(1).float().log_softmax(1)
            place_BK = labels.cell % count * directions + labels.cell // count
            return -(labels.weight * log_share_BN.gather(1, place_BK)).sum(1).mean()
        logits_BDA = logits_BDA.float()
        rows = torch.arange(len(logits_BDA), device=logits_BDA.device)[:, None]
        chosen_BK = logits_BDA[rows, labels.cell // count, labels.cell % count]  # spares a copy if A does not lie last
        return (logits_BDA.logsumexp((1, 2)) - (labels.weight * chosen_BK).sum(1)).mean()

    def decode(self, logits_BDA: Tensor, n: int = 1, offset: Callable[[Tensor], Tensor] | None = None) -> Candidates:
        """Return the `n` best orientations that are more than 5 degrees apart: `most_probable` of the best cells.

        The softmax of the logits (B, D, A) is taken as probability; 64 cells are looked at per orientation.
        `offset` maps cells (B, M) to rotation vectors (B, M, 3) in radians, in the lab frame.
        """
        probability_BM, cell_BM = self._best_cells(logits_BDA, n)
        g_BM4 = self.orientation(cell_BM)
        if offset is not None:
            g_BM4 = multiply(g_BM4, from_rotation_vector(offset(cell_BM).float()))
        radius_deg = DIFFERENT_DEG if offset is not None else max(DIFFERENT_DEG, 1.25 * self.step_deg)
        return most_probable(g_BM4, probability_BM, n, self.symmetry, radius_deg, _LEADERS)

    def _best_cells(self, logits_BDA: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Return probability and flat index, both (B, M), of the best cells; directions are shortlisted first."""
        directions, angles = self.shape
        logits_BDA = logits_BDA.float()
        peak_BD = logits_BDA.amax(dim=2)
        total_B1 = logits_BDA.flatten(1).logsumexp(1, keepdim=True)
        direction_BP = peak_BD.topk(min(directions, 16 + 16 * n), dim=1).indices
        short_BPA = logits_BDA.gather(1, direction_BP.unsqueeze(-1).expand(-1, -1, angles))
        count = min(short_BPA[0].numel(), 64 * (n + 1))
        value_BM, place_BM = short_BPA.flatten(1).topk(count, dim=1)
        direction_BM = direction_BP.gather(1, place_BM // angles)
        return (value_BM - total_B1).exp(), direction_BM * angles + place_BM % angles
