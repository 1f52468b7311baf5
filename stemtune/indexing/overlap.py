"""Patterns that hold two crystals: which two orientations, and how much of the pattern is each one's.

The spots of the model's best candidate are taken out and what is left is indexed; with the spots of that candidate
taken out the pattern is indexed once more: each crystal is read without the other. A pattern counts as two crystals
when the second template adds enough to the correlation and the spots of the second crystal, those that the first does
not explain, are there. The weights are the shares of the scattered counts, by maximum likelihood: each count belongs to
the first crystal, the second, or the background between the spots.

Shape legend: B patterns, H x W pixels, R radii, A in-plane angles, K spots.

References
----------
A. P. Dempster, N. M. Laird and D. B. Rubin, J. R. Stat. Soc. B 39 (1977) 1: the weights of a mixture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stemtune._parallel import map_over_threads
from stemtune.crystal.symmetry import disorientation_deg
from stemtune.crystal_map.frame_rotations import scan_rotation_deg, to_scan_frame
from stemtune.crystal_map.orientation_map import OrientationMap
from stemtune.diffraction.kinematic import KinematicSimulator
from stemtune.indexing.phase_choice import PhaseChoice
from stemtune.indexing.predictor import Predictor
from stemtune.indexing.spot_check import SpotCheck
from stemtune.learning.model import DIFFERENT_DEG, Candidates, OrientationModel
from stemtune.learning.models.polar_templates import PolarView, centred, template_views
from stemtune.learning.models.spot_features import SpotReader

SECOND_LAYER, WEIGHT_LAYER = "orientation2", "weight2"
"""Layers: orientation (n, 4) of the weaker crystal, and its share (n,) of the counts of both; NaN where single."""

MIN_GAIN = 0.03  # what the second template must add to the correlation
MIN_Z_SCORE = 2.5  # evidence (`indexing.spot_check`) that the second crystal's own spots must have
MIN_WEIGHT = 0.1
"""Smallest share of the counts of a second crystal.

The numbers were set, as were those below, on 400 Bloch-wave mixtures of LiNiO2 (30:70 to 50:50, 20 to 80 nm, 3,000 to
30,000 electrons, precession up to 0.5 degrees, and the errors of calibration of `SimulateConfig`) and 400 single
crystals. On 600 others of either kind both crystals are right within 5 degrees in 82 % with `linio2` (69 % with
`matched`), 88 % (76 %) modulo beam-180; 78 % (73 %) count as two, and 1.3 % (1.7 %) of the single crystals. Dose
counts: at 3,000 electrons without precession both are right in 42 % (23 %). So do pixels: in a scan of 64 px at
0.05 1/Å `matched` took a quarter of the single crystals for two, half of these in one grain. Shares are those of the
scattered counts, to 0.06 on average (kinematic mixtures, true orientations); the share of the beam that passes each
crystal they do not tell, for the direct beam is not taken apart.
"""

_SPOTS = 20  # spots of a candidate that are taken out
_SPOT = 0.06  # their width (Gaussian sigma, 1/Å): disks, and a scale and an ellipse that are a little off
_APART = 0.28  # their largest width, in lengths of the shortest reciprocal vector: something must be left
_STEPS = 30  # of the maximisation
_BATCH = 32


class CrystalPairs(NamedTuple):
    """What B patterns hold.

    `orientation` (B, 2, 4) of the two crystals, the stronger first, in the fundamental zone, and their shares `weight`
    (B, 2) of the counts of both; what the second adds to the correlation, `gain` (B,). Where the evidence is too small
    to look further, the shares are 1 and 0 and the gain 0. `spot_z_score` (B,) is the evidence that the second's own
    spots are there, in standard deviations; `two` (B,) whether the pattern counts as two crystals.
    """

    orientation: Tensor
    weight: Tensor
    gain: Tensor
    spot_z_score: Tensor
    two: Tensor


class OverlapFinder:
    """Looks for two crystals in patterns of the model's geometry.

    `propose` returns a number of candidates for centred patterns (B, H, W); the work is done on `device`.
    """

    def __init__(
        self, model: OrientationModel, propose: Callable[[Tensor, int], Candidates], device: torch.device | str = "cpu"
    ) -> None:
        self.config, self.phase, self.geometry, self.propose = model.config, model.phase, model.geometry, propose
        self.view = PolarView(self.config, self.phase, self.geometry).to(device)
        self.reader = SpotReader(self.phase, self.geometry, _SPOTS, self.config.model.reach).to(device)
        shortest = float(torch.linalg.vector_norm(self.reader.g, dim=1).min())
        self.spot_inv_angstrom = min(_SPOT, _APART * shortest)
        self.check = SpotCheck(self.phase, self.geometry, device)
        self.simulator = KinematicSimulator(self.phase, self.geometry, self.config.simulate, device)

    @torch.no_grad()
    def find(self, patterns: Tensor, alone: Tensor | None = None) -> CrystalPairs:
        """Return what patterns (B, H, W) of counts hold; `alone` (B, 4) are the best candidates, where known."""
        # The second crystal is the best candidate once the spots of the first are taken out.
        counts = centred(patterns, self.geometry, self.view.beam_px)
        alone = self._best(counts) if alone is None else alone.to(counts)
        left = self.without(counts, alone)
        second = self._best(left)
        found = CrystalPairs(
            torch.stack((alone, second), dim=1),
            counts.new_tensor([1.0, 0.0]).repeat(len(counts), 1),
            counts.new_zeros(len(counts)),
            self.check(left, second).spot_z_score,
            torch.zeros(len(counts), dtype=torch.bool, device=counts.device),
        )
        # Where its spots may be there, the first is read again without the second, and the pair is weighed up.
        some = torch.nonzero(found.spot_z_score >= MIN_Z_SCORE)[:, 0]
        if len(some):
            first = self._best(self.without(counts[some], second[some]))

            def work(part: slice) -> CrystalPairs:
                rows = some[part]
                return self._compare(counts[rows], first[part], second[rows], alone[rows])

            parts = [slice(start, start + _BATCH) for start in range(0, len(some), _BATCH)]
            done = map_over_threads(work, parts, counts.device)
            for values, judged in zip(found, zip(*done, strict=True), strict=True):
                values[some] = torch.cat(judged)
        return found

    def _best(self, counts: Tensor) -> Tensor:
        return self.propose(counts, 1).orientation[:, 0].float()

    def without(self, counts: Tensor, orientation: Tensor) -> Tensor:
        """Return patterns (B, H, W) without the spots of orientations (B, 4)."""
        place_BK2 = self.reader.predicted(orientation.nan_to_num(0.5)[:, None].float())[0][:, 0]
        scale, (row, column) = self.geometry.scale_inv_angstrom, self.geometry.centre_px
        line = torch.arange(self.geometry.size, device=counts.device)
        down_BKH = (line - row) * -scale - place_BK2[..., 1:]
        right_BKW = (line - column) * scale - place_BK2[..., :1]
        sharp = 0.5 / self.spot_inv_angstrom**2
        down_BKH, right_BKW = (torch.exp(-sharp * off.square()) for off in (down_BKH, right_BKW))
        return counts * (1 - 1.5 * down_BKH.transpose(1, 2) @ right_BKW).clamp_min(0)

    def _compare(self, counts: Tensor, first: Tensor, second: Tensor, alone: Tensor) -> CrystalPairs:
        """Return what speaks for two crystals (B, 4) in patterns whose best candidate by itself is `alone` (B, 4)."""
        pair_B24, rows = torch.stack((first, second), dim=1), torch.arange(len(counts), device=counts.device)[:, None]
        weight_B2 = self.weights(counts, pair_B24)
        order_B2 = weight_B2.argsort(dim=1, descending=True)
        pair_B24, weight_B2 = pair_B24[rows, order_B2], weight_B2.gather(1, order_B2)
        signal_B = self.check(self.without(counts, pair_B24[:, 0]), pair_B24[:, 1]).spot_z_score
        gain_B = self._gain(counts, pair_B24, alone)
        apart_B = disorientation_deg(first, second, self.phase.symmetry) > DIFFERENT_DEG  # false of NaN
        two_B = (gain_B >= MIN_GAIN) & (signal_B >= MIN_Z_SCORE) & (weight_B2[:, 1] >= MIN_WEIGHT) & apart_B
        return CrystalPairs(pair_B24, weight_B2, gain_B, signal_B, two_B)

    def _gain(self, counts: Tensor, pair_B24: Tensor, alone: Tensor) -> Tensor:
        """Return by how much two templates together correlate better with patterns than `alone` or one of them (B,)."""
        asked = torch.cat((pair_B24, alone[:, None]), dim=1).nan_to_num(0.5).flatten(0, 1)
        template_B3N = template_views(self.config, self.phase, self.geometry, self.view, asked).view(len(alone), 3, -1)
        seen_B3 = (template_B3N @ self.view(counts).flatten(1)[..., None])[..., 0]
        a, b = seen_B3[:, 0], seen_B3[:, 1]
        c = (template_B3N[:, 0] * template_B3N[:, 1]).sum(-1).clamp(max=0.95)
        both_B = ((a * a + b * b - 2 * c * a * b) / (1 - c * c)).clamp_min(0).sqrt()
        together = (a > c * b) & (b > c * a)  # both with a positive share
        return torch.where(together, both_B - seen_B3.amax(1), 0.0)

    def weights(self, counts: Tensor, orientation_B24: Tensor) -> Tensor:
        """Return the shares (B, 2) of two crystals in the scattered counts."""
        # Expected shape of each part, two crystals and a background without angles, in cells weighted by their area.
        area_R1 = self.view.weight.square()[:, None]
        counts_BRA = self.view.cells(counts) * area_R1
        drawn_B2RA = self._drawn(orientation_B24.nan_to_num(0.5)) * area_R1
        ring_B1RA = counts_BRA.mean(-1, keepdim=True).expand_as(counts_BRA)[:, None]  # the background has no angles
        part = torch.cat((drawn_B2RA, ring_B1RA), dim=1).flatten(2)
        part = part / part.sum(-1, keepdim=True).clamp_min(1e-20)
        # Expectation maximisation of the shares.
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
            orientation_B24.flatten(0, 1).float(), settings.template_width, float(radius[-1]) + 3 * _WIDE, 1e-4
        )
        rho, phi = torch.hypot(spots.x, spots.y), torch.atan2(spots.y, spots.x)
        height = (spots.intensity / simulator.strength.max().float()).pow(_EVENED)
        sharp = 1 / (2 * _WIDE**2)
        along = torch.exp(-sharp * (radius[:, None] - rho[:, None]).square()) * height[:, None]
        chord = 2 * rho.square()[..., None] * (1 - torch.cos(angle - phi[..., None]))
        drawn = along @ torch.exp(-sharp * chord)
        return drawn.view(-1, 2, *drawn.shape[1:])


_EVENED, _WIDE = 0.4, 0.04  # power of the intensities, and width of the spots (1/Å), of the mixture


def find_overlaps(predictor: Predictor, rows: npt.NDArray[np.intp], best: npt.NDArray[np.float64]) -> CrystalPairs:
    """Return what the patterns `rows` of the predictor's store hold, whose best candidates are `best` (n, 4); at least
    one row.
    """
    finder = OverlapFinder(predictor.model, predictor.forward_only, predictor.device)
    known = torch.from_numpy(best).split(predictor.batch)  # type: ignore[no-untyped-call]
    parts = [finder.find(*each) for each in zip(predictor.resampled(rows, "overlaps"), known, strict=True)]
    return CrystalPairs(*(torch.cat([column.cpu() for column in columns]) for columns in zip(*parts, strict=True)))


def with_overlaps(
    orientation_map: OrientationMap, predictors: Sequence[Predictor], choice: PhaseChoice, pixel: npt.NDArray[np.intp]
) -> OrientationMap:
    """Return a copy of the map that says where patterns hold two crystals of one phase; there the stronger one is the
    best.

    There is a predictor for each phase, the `choice` among their predictions for the patterns (m), and the `pixel` (m,)
    of each pattern.
    """
    n = len(orientation_map.phase)
    second, weight = np.full((n, 4), np.nan), np.full(n, np.nan, dtype=np.float32)
    answers, confidence = orientation_map.answers.copy(), orientation_map.answer_confidence.copy()
    ncc = None if orientation_map.ncc is None else orientation_map.ncc.copy()
    for index, predictor in enumerate(predictors):
        rows = np.flatnonzero(choice.model == index)
        if not len(rows):
            continue
        found = find_overlaps(predictor, rows, choice.predictions.candidates[rows, 0])
        two = found.two.numpy()
        place = pixel[rows[two]]
        pair = torch.nn.functional.normalize(found.orientation[two].double(), dim=-1)
        pair = torch.from_numpy(to_scan_frame(pair.numpy(), scan_rotation_deg(orientation_map.attrs)))
        second[place], weight[place] = pair[:, 1].numpy(), found.weight[two, 1].numpy()
        # The stronger crystal becomes the best candidate: one of the model's where it named it, else a new one.
        off = disorientation_deg(pair[:, :1], torch.from_numpy(answers[place]), predictor.model.phase.symmetry).numpy()
        off = np.nan_to_num(off, nan=np.inf)
        known = off.min(axis=1) < DIFFERENT_DEG
        _first(place[known], off.argmin(axis=1)[known], answers, confidence, ncc)
        new = place[~known]  # one that the model has not named: it says nothing of its confidence
        answers[new, 0], confidence[new, 0] = pair[~known, 0].numpy(), 0
        if ncc is not None:
            ncc[new, 0] = np.nan
    return dataclasses.replace(
        orientation_map,
        answers=answers,
        answer_confidence=confidence,
        ncc=ncc,
        layers={**orientation_map.layers, SECOND_LAYER: second, WEIGHT_LAYER: weight},
    )


def _first(rows: npt.NDArray[np.intp], place: npt.NDArray[np.intp], *columns: npt.NDArray[Any] | None) -> None:
    """Swap the candidate at `place` of `rows` with the best one."""
    for values in columns:
        if values is not None:
            values[rows, 0], values[rows, place] = values[rows, place].copy(), values[rows, 0].copy()


def overlap_figures(orientation_map: OrientationMap) -> dict[str, Any]:
    """Return how many pixels hold two crystals, their share of the indexed ones, and the median weight of the second
    (None without any)."""
    weight = orientation_map.layers[WEIGHT_LAYER]
    two = np.isfinite(weight)
    return {
        "pixels": int(two.sum()),
        "share_of_indexed": float(two.sum() / max(int(orientation_map.indexed.sum()), 1)),
        "median_weight": float(np.median(weight[two])) if two.any() else None,
    }
