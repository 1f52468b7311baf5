"""Patterns that hold two crystals: which two orientations, and how much of the pattern is each one's.

The model proposes answers to the pattern, and once more to what is left of it when the spots of its best answer are
taken out. Of all pairs of these proposals the one is chosen whose two templates together correlate best with the
pattern. A pattern counts as two crystals when the second template adds enough to the correlation and the spots of the
second crystal, those that the first does not explain, are there. The weights are the shares of the scattered counts,
by maximum likelihood: each count belongs to the first crystal, the second, or the background between the spots.

Shape legend: B patterns, H x W pixels, M proposals, P pairs of them, R radii, A in-plane angles, K spots.

References
----------
A. P. Dempster, N. M. Laird and D. B. Rubin, J. R. Stat. Soc. B 39 (1977) 1: the weights of a mixture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stemtune.crystal.symmetry import disorientation_deg
from stemtune.diffraction.kinematic import KinematicSimulator
from stemtune.diffraction.threads import map_chunks
from stemtune.learning.model import DIFFERENT_DEG, Answers, OrientationModel
from stemtune.learning.models.bank import PolarView, centred, template_views
from stemtune.learning.models.evidence import Evidence
from stemtune.maps.indexing import SpotCheck

FIRST, SECOND = 8, 6
"""Proposals from the whole pattern, and from what the best of them leaves."""

LEAST_GAIN = 0.05
"""What the second template must add to the correlation."""

LEAST_SIGNAL = 3.0
"""Evidence (`maps.indexing`) that the second crystal's own spots must have."""

LEAST_WEIGHT = 0.1
"""Smallest share of the counts of a second crystal.

On 200 Bloch-wave mixtures of LiNiO2 (30:70 to 50:50, 20 to 80 nm, 3,000 to 30,000 electrons) answered by `matched`,
both crystals of the best pair are right within 5 degrees in 60 % (66 % modulo beam-180), and 64 % of the patterns count
as two by the three numbers; so do 5 % of 120 single crystals.
"""

_SPOTS = 64  # spots of an answer that are taken out
_SPOT = 0.03  # their width (Gaussian sigma, 1/Å)
_STEPS = 30  # of the maximisation
_BATCH = 32


class Overlapped(NamedTuple):
    """What B patterns hold.

    Attributes
    ----------
    orientation
        The two crystals (B, 2, 4) of the best pair, the stronger first, in the fundamental zone.
    weight
        Their shares (B, 2) of the counts of both.
    gain
        What the second adds to the correlation (B,).
    signal
        Evidence (B,) that the second's own spots are there, in standard deviations.
    two
        Whether the pattern counts as two crystals (B,).
    """

    orientation: Tensor
    weight: Tensor
    gain: Tensor
    signal: Tensor
    two: Tensor


class OverlapFinder:
    """Looks for two crystals in patterns.

    Parameters
    ----------
    model
        The model that proposes; patterns are of its geometry.
    propose
        Returns a number of answers to patterns (B, H, W).
    device
        Where the work is done.
    """

    def __init__(
        self, model: OrientationModel, propose: Callable[[Tensor, int], Answers], device: torch.device | str = "cpu"
    ) -> None:
        self.config, self.phase, self.geometry, self.propose = model.config, model.phase, model.geometry, propose
        self.view = PolarView(self.config, self.phase, self.geometry).to(device)
        self.evidence = Evidence(self.phase, self.geometry, _SPOTS, self.config.model.reach).to(device)
        self.check = SpotCheck(self.phase, self.geometry, device)
        self.simulator = KinematicSimulator(self.phase, self.geometry, self.config.simulate, device)

    @torch.no_grad()
    def find(self, patterns: Tensor) -> Overlapped:
        """Return what patterns (B, H, W) of counts hold."""
        counts = centred(patterns, self.geometry, self.view.beam_px)
        first = self.propose(counts, FIRST)
        left = self.without(counts, first.orientation[:, 0])
        second = self.propose(left, SECOND)
        proposed = torch.cat((first.orientation, second.orientation), dim=1).float()
        parts = [slice(start, start + _BATCH) for start in range(0, len(counts), _BATCH)]

        def work(rows: slice) -> Overlapped:
            return self._best(counts[rows], proposed[rows])

        done = map_chunks(work, parts) if counts.device.type == "cpu" else [work(rows) for rows in parts]
        return Overlapped(*(torch.cat(column) for column in zip(*done, strict=True)))

    def without(self, counts: Tensor, orientation: Tensor) -> Tensor:
        """Return patterns (B, H, W) without the spots of orientations (B, 4)."""
        place_BK2 = self.evidence.predicted(orientation.nan_to_num(0.5)[:, None].float())[0][:, 0]
        scale, (row, column) = self.geometry.scale_inv_angstrom, self.geometry.centre_px
        line = torch.arange(self.geometry.size, device=counts.device)
        down_BKH = (line - row) * -scale - place_BK2[..., 1:]
        right_BKW = (line - column) * scale - place_BK2[..., :1]
        down_BKH, right_BKW = (torch.exp(-0.5 * (off / _SPOT).square()) for off in (down_BKH, right_BKW))
        return counts * (1 - 1.5 * down_BKH.transpose(1, 2) @ right_BKW).clamp_min(0)

    def _best(self, counts: Tensor, proposed_BM4: Tensor) -> Overlapped:
        batch, many = proposed_BM4.shape[:2]
        known_BM = proposed_BM4.isfinite().all(-1)
        asked = proposed_BM4.nan_to_num(0.5).flatten(0, 1)
        template_BMN = template_views(self.config, self.phase, self.geometry, self.view, asked).view(batch, many, -1)
        seen_BM = (template_BMN @ self.view(counts).flatten(1)[..., None])[..., 0].masked_fill(~known_BM, -1.0)
        alike_BMM = template_BMN @ template_BMN.transpose(1, 2)
        one, other = torch.triu_indices(many, many, 1, device=counts.device).unbind()
        a, b, c = seen_BM[:, one], seen_BM[:, other], alike_BMM[:, one, other].clamp(max=0.95)
        both_BP = ((a * a + b * b - 2 * c * a * b) / (1 - c * c)).clamp_min(0).sqrt()
        together = (a > c * b) & (b > c * a)  # both with a positive share
        apart = disorientation_deg(proposed_BM4[:, one], proposed_BM4[:, other], self.phase.symmetry) > DIFFERENT_DEG
        both_BP = both_BP.masked_fill(~(together & apart & known_BM[:, one] & known_BM[:, other]), 0.0)
        height_B, pair_B = both_BP.max(1)
        rows = torch.arange(batch, device=counts.device)[:, None]
        chosen_B2 = torch.stack((one[pair_B], other[pair_B]), dim=1)
        orientation_B24 = proposed_BM4[rows, chosen_B2]
        weight_B2 = self.weights(counts, orientation_B24)
        order_B2 = weight_B2.argsort(dim=1, descending=True)
        orientation_B24, weight_B2 = orientation_B24[rows, order_B2], weight_B2.gather(1, order_B2)
        left = self.without(counts, orientation_B24[:, 0])
        signal_B = self.check(left, orientation_B24[:, 1]).signal
        gain_B = height_B - seen_BM.amax(1)
        two_B = (gain_B >= LEAST_GAIN) & (signal_B >= LEAST_SIGNAL) & (weight_B2[:, 1] >= LEAST_WEIGHT)
        return Overlapped(orientation_B24, weight_B2, gain_B, signal_B, two_B & (height_B > 0))

    def weights(self, counts: Tensor, orientation_B24: Tensor) -> Tensor:
        """Return the shares (B, 2) of two crystals in the scattered counts."""
        area_R1 = self.view.weight.square()[:, None]
        counts_BRA = self.view.cells(counts) * area_R1
        drawn_B2RA = self._drawn(orientation_B24.nan_to_num(0.5)) * area_R1
        ring_B1RA = counts_BRA.mean(-1, keepdim=True).expand_as(counts_BRA)[:, None]  # the background has no angles
        part = torch.cat((drawn_B2RA, ring_B1RA), dim=1).flatten(2)
        part = part / part.sum(-1, keepdim=True).clamp_min(1e-20)
        share, given = torch.full_like(part[..., 0], 1 / 3), counts_BRA.flatten(1)
        for _ in range(_STEPS):
            mixed = (share[..., None] * part).sum(1).clamp_min(1e-20)
            share = share * (part @ (given / mixed)[..., None])[..., 0]
            share = share / share.sum(1, keepdim=True).clamp_min(1e-20)
        crystal = share[:, :2].clamp_min(1e-12)
        return crystal / crystal.sum(1, keepdim=True)

    def _drawn(self, orientation_B24: Tensor) -> Tensor:
        """Return the expected spots (B, 2, R, A) of two crystals in polar coordinates, evened out in intensity."""
        settings = self.config.model
        simulator, radius, angle = self.simulator, self.view.radius, self.view.angle
        spots = simulator.template_spots(
            orientation_B24.flatten(0, 1).float(), settings.template_width, float(radius[-1]) + 3 * _SPOT, 1e-4
        )
        rho, phi = torch.hypot(spots.x, spots.y), torch.atan2(spots.y, spots.x)
        height = (spots.intensity / simulator.strength.max().float()).pow(_EVENED)
        sharp = 1 / (2 * _WIDE**2)
        along = torch.exp(-sharp * (radius[:, None] - rho[:, None]).square()) * height[:, None]
        chord = 2 * rho.square()[..., None] * (1 - torch.cos(angle - phi[..., None]))
        drawn = along @ torch.exp(-sharp * chord)
        return drawn.view(-1, 2, *drawn.shape[1:])


_EVENED, _WIDE = 0.4, 0.04  # power of the intensities, and width of the spots (1/Å), of the mixture


__all__ = ["OverlapFinder", "Overlapped"]
