"""The tops of scores over a grid of orientations: the different candidates in them, finer than the grid.

`matched` and `polar` both score beam directions x in-plane angles, one with fixed templates and one with learned
filters, and read their candidates out here.

Shape legend: B patterns, F angular frequencies, D beam directions, A in-plane angles, T shortlisted directions,
P peaks per direction, M candidates, K neighbouring directions, J angles around a peak, r rivals, n candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stemtune.crystal.symmetry import reduce_to_fundamental_zone
from stemtune.learning.grid import Grid, closeness
from stemtune.learning.model import DIFFERENT_DEG
from stemtune.learning.models.polar_templates import neighbours, turned

NEIGHBOURS = 7  # directions, the best one included, through whose scores the parabola of the last step goes
PEAKS = 4  # angles of one direction that may each become a candidate
_COMPARED = 6  # maxima that are compared with each other for one candidate
RIVALS = 5  # different candidates among which the confidence is shared out


class Maxima(NamedTuple):
    """The different orientations with the highest scores, best first.

    `orientation` (B, n, 4) are unit quaternions in the fundamental zone, more than 5 degrees apart, NaN where there are
    no more; `score` (B, r) the scores of these and of further rivals, r >= n, -inf where there are no more; `around`
    (B, r, K J) the scores of the cells around each.
    """

    orientation: Tensor
    score: Tensor
    around: Tensor


class Peaks(nn.Module):
    """Finds the maxima of scores over the cells of a grid.

    The scores hold `frequencies` angular frequencies F, counted from 0. Where `refined`, orientations move inside their
    cells, to the top of a parabola through the scores around.
    """

    near_index: Tensor
    near_turn: Tensor
    fit: Tensor
    frequency: Tensor
    share: Tensor
    steps: Tensor

    def __init__(self, grid: Grid, frequencies: int, refined: bool = True) -> None:
        super().__init__()
        self.grid, self.refined = grid, refined
        near, angles = neighbours(grid, NEIGHBOURS), grid.shape[1]
        frequency = torch.arange(frequencies)
        buffers = {
            "near_index": near.direction,
            "near_turn": near.turn,
            "frequency": frequency.float(),
            "share": torch.where((frequency == 0) | (2 * frequency == angles), 1.0, 2.0) / angles,
        }
        # Around the cell (d, 0): the neighbours' tilts and a few in-plane steps, in units of a grid step.
        step = math.radians(grid.step_deg)
        shift_J = torch.arange(-2, 3) * (2 * math.pi / angles / step)
        tilt_DKJ2 = (near.tilt.cpu() / step)[:, :, None].expand(-1, -1, len(shift_J), -1)
        points_DKJ3 = torch.cat((tilt_DKJ2, shift_J.expand(tilt_DKJ2.shape[:-1])[..., None]), dim=-1)
        wave_FJ = torch.outer(frequency, torch.arange(-2, 3)) * (2 * math.pi / angles)
        buffers["steps"] = torch.cat((wave_FJ.cos(), -wave_FJ.sin()))
        buffers["fit"] = parabola_fit(points_DKJ3.flatten(1, 2).double()).float()
        for name, value in buffers.items():
            self.register_buffer(name, value.contiguous(), persistent=False)

    def shortlist(self, peak_BD: Tensor, count: int) -> Tensor:
        """Return the `count` directions (B, T) with the best score (B, D) that no neighbour outdoes."""
        around_BDK = peak_BD[:, self.near_index[:, 1:7]]
        is_top_BD = peak_BD >= around_BDK.amax(-1)
        return peak_BD.where(is_top_BD, peak_BD.amin() - 1).topk(min(count, peak_BD.shape[1]), dim=1).indices

    def tops(self, direction_BT: Tensor, rows_BTA: Tensor, spectrum_of: Callable[[Tensor], Tensor], n: int) -> Maxima:
        """Return the `n` best orientations among shortlisted directions, ranked by their refined scores.

        `rows_BTA` are the directions' scores at all in-plane angles. `spectrum_of` maps directions (B, N) to the
        angular spectra (B, N, F, 2) of their scores: the score at an angle is the sum of
        `share * (real * cos(frequency * angle) - imaginary * sin(frequency * angle))`.
        """
        is_top = (rows_BTA >= rows_BTA.roll(1, -1)) & (rows_BTA > rows_BTA.roll(-1, -1))
        score_BTP, angle_BTP = rows_BTA.where(is_top, -torch.inf).topk(PEAKS, dim=-1)
        cell_BTP = direction_BT[..., None] * rows_BTA.shape[-1] + angle_BTP
        # All pairs of what may become a candidate are compared, so only the best are kept.
        count = max(n, RIVALS)
        score_BM, place_BM = score_BTP.flatten(1).topk(min(score_BTP[0].numel(), _COMPARED * count), dim=1)
        cell_BM = cell_BTP.flatten(1).gather(1, place_BM)
        pick_Br = self._different(score_BM, cell_BM, count)
        cell_Br = cell_BM.gather(1, pick_Br.clamp_min(0))
        moved_Br4, top_Br, around_BrN = self._refine(spectrum_of, cell_Br)
        top_Br, order_Br = top_Br.where(pick_Br >= 0, -torch.inf).sort(dim=1, descending=True)
        rows = torch.arange(order_Br.shape[0], device=order_Br.device)[:, None]
        order_Bn = order_Br[:, :n]
        cell_Bn4 = self.grid.orientation(cell_Br[rows, order_Bn])
        found_Bn4 = self._kept_apart(moved_Br4[rows, order_Bn], cell_Bn4) if self.refined else cell_Bn4
        found_Bn4 = found_Bn4.where(top_Br[:, :n, None] > -torch.inf, torch.nan)
        return Maxima(reduce_to_fundamental_zone(found_Bn4, self.grid.symmetry), top_Br, around_BrN[rows, order_Br])

    def _different(self, score_BM: Tensor, cell_BM: Tensor, count: int) -> Tensor:
        """Return the places (B, count) of the best candidates that differ from each other; -1 where there are no more.

        They are a grid step more than 5 degrees apart, so that moving one of two by a step keeps them 5 apart.
        """
        g_BM4 = self.grid.orientation(cell_BM)
        border = math.cos(math.radians(DIFFERENT_DEG + self.grid.step_deg) / 2)
        same_BMM = closeness(g_BM4, g_BM4, self.grid.operations) >= border
        rows = torch.arange(score_BM.shape[0], device=score_BM.device)
        left_BM, picks = score_BM.clone(), []
        for _ in range(count):
            best_B, pick_B = left_BM.max(1)
            picks.append(pick_B.where(best_B > -torch.inf, -1))
            left_BM = left_BM.masked_fill(same_BMM[rows, pick_B], -torch.inf)
        return torch.stack(picks, 1)

    def _refine(self, spectrum_of: Callable[[Tensor], Tensor], cell_Bn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return orientations (B, n, 4) and scores (B, n) at the top of a parabola through the scores around cells.

        The parabola, in two tilts and the in-plane angle in units of a grid step, is fitted by least squares with a
        Gaussian weight; where it has no top, or one farther than a step, the candidate moves no farther than that.
        The third are the scores (B, n, K J) that it goes through.
        """
        count, step = self.grid.shape[1], math.radians(self.grid.step_deg)
        direction_Bn, angle_Bn = cell_Bn // count, self.grid.angle[cell_Bn % count]
        near_BnK = self.near_index[direction_Bn]
        spectrum = spectrum_of(near_BnK.flatten(1))
        spectrum = spectrum.view(*near_BnK.shape, *spectrum.shape[2:])
        real, imaginary = (spectrum * self.share[:, None]).unbind(-1)
        # Turned to the cells' angles; from there the few in-plane steps are the same for all.
        wave_BnKF = (angle_Bn[..., None] - self.near_turn[direction_Bn])[..., None] * self.frequency
        cosine, sine = wave_BnKF.cos(), wave_BnKF.sin()
        turned_BnKY = torch.cat((real * cosine - imaginary * sine, real * sine + imaginary * cosine), dim=-1)
        score_BnKJ = turned_BnKY @ self.steps
        # In the frame of in-plane angle 0 the points, and with them the fit, are the same for all patterns.
        top_Bn3, score_Bn = top_of_parabola(self.fit[direction_Bn], score_BnKJ.flatten(2, 3))
        top_Bn3 = top_Bn3 * step
        moved_Bn4 = turned(self.grid.base[direction_Bn], top_Bn3[..., :2], angle_Bn + top_Bn3[..., 2])
        return moved_Bn4, score_Bn, score_BnKJ.flatten(2, 3)

    def _kept_apart(self, moved_Bn4: Tensor, cell_Bn4: Tensor) -> Tensor:
        """Return the moved orientations (B, n, 4); one within 5 degrees of a better one goes back to its cell."""
        border = math.cos(math.radians(DIFFERENT_DEG) / 2)
        kept = [moved_Bn4[:, 0]]
        for rank in range(1, moved_Bn4.shape[1]):
            earlier_Bi4 = torch.stack(kept, 1)
            near_Bi = closeness(moved_Bn4[:, rank : rank + 1], earlier_Bi4, self.grid.operations)[:, 0] >= border
            kept.append(moved_Bn4[:, rank].where(~near_Bi.any(1, keepdim=True), cell_Bn4[:, rank]))
        return torch.stack(kept, 1)


def parabola_fit(x: Tensor) -> Tensor:
    """Return the matrix (..., 10, N) from values at points `x` (..., N, 3) to the parabola through them.

    Least squares; points count with a Gaussian weight of sigma 1 around the origin. The coefficients are those of 1, a,
    b, c, a², b², c², ab, ac, bc.
    """
    a, b, c = x.unbind(-1)
    terms = torch.stack((torch.ones_like(a), a, b, c, a * a, b * b, c * c, a * b, a * c, b * c), dim=-1)
    weighted = (terms * torch.exp(-0.5 * x.square().sum(-1))[..., None]).transpose(-1, -2)
    normal = weighted @ terms + 1e-4 * torch.eye(10, dtype=x.dtype, device=x.device)
    fit: Tensor = torch.linalg.solve(normal, weighted)
    return fit


def top_of_parabola(fit: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the top (..., 3), within 1 of the origin, of the parabola through `y` (..., N), and its height (...).

    `fit` (..., 10, N) is `parabola_fit` of the points.
    """
    level, a, b, c, aa, bb, cc, ab, ac, bc = (fit @ y[..., None])[..., 0].unbind(-1)
    slope = torch.stack((a, b, c), dim=-1)[..., None]
    bend = torch.stack((2 * aa, ab, ac, ab, 2 * bb, bc, ac, bc, 2 * cc), dim=-1).view(*aa.shape, 3, 3)
    values, vectors = torch.linalg.eigh(bend)
    flattest = 1e-2 * y.abs().amax(-1, keepdim=True) + 1e-12
    along = (vectors.transpose(-1, -2) @ slope)[..., 0] / (-values).clamp_min(flattest)
    top = vectors @ along[..., None]
    top = top / torch.linalg.vector_norm(top, dim=-2, keepdim=True).clamp_min(1.0)
    height = level + (slope * top).sum((-2, -1)) + 0.5 * (top * (bend @ top)).sum((-2, -1))
    return top[..., 0], height
