"""Propose, choose, correct: the matched filter's best candidates, scored by a network over their predicted spots.

The polar matched filter almost always has the truth among its ten best candidates, but picks another in one pattern of
ten: intensities of thick crystals are not those of its templates. Here a small network, trained on dynamical patterns,
reads the pattern at the spots that each candidate predicts, says which candidate it is and how far it is off; the
best are corrected and scored once more. It sees nothing of the crystal but couplings, excitation errors and lengths of
reciprocal vectors, so what it learned on one phase is a start for another.

Shape legend: B patterns, M candidates, T candidates that are corrected, n candidates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import ModuleList, functional

from stemtune.config import Config
from stemtune.crystal.phase import Phase
from stemtune.crystal.rotations import inverse, multiply
from stemtune.crystal.symmetry import reduce_to_fundamental_zone
from stemtune.diffraction.geometry import Geometry
from stemtune.learning.grid import closeness, from_rotation_vector, rotation_vector
from stemtune.learning.model import DIFFERENT_DEG, Candidates, OrientationModel
from stemtune.learning.models.matched import Matched, Proposals
from stemtune.learning.models.polar_templates import centred
from stemtune.learning.models.reranker_net import RerankerNet
from stemtune.learning.models.spot_features import Pairs, SpotFeatures, SpotReader, WindowCounts

CANDIDATES = 10  # candidates of the matched filter that are scored
RESCORED = 4  # candidates that are corrected and scored a second time
SPOTS = 64  # predicted spots of each candidate that are looked at
WIDTH = 96  # features per spot where `model.width` is 0
_EXTRA = 3
_IN_DOUBT, _IN_DOUBT_AGAIN = 0.06, 5.0
"""Correlation, and score of the first pass, that a candidate may lie behind the best and still be scored. Of 4,000
simulated patterns the answer lay more than 0.05 behind in 7, more than 0.075 in 1; in the second pass never beyond 3.
"""
_UNLIKELY = -6.0  # score of those that are not, besides how far they lie behind
_CPU_BATCH = 32  # patterns worked on at once on a CPU: what the networks make of them stays in its cache
_SHARPNESS = 0.05  # difference of correlation that counts as 1
_TOLERANCE_DEG = 0.3  # errors below this count with their square, larger ones with their size


class Rerank(OrientationModel):
    """The matched filter's candidates, chosen and corrected by a trained network.

    Settings: those of `matched`, and `model.width`, the features per spot. `matched` proposes, `reader` reads the spots
    of each proposal, `rerankers` are the networks of the first and the second pass.
    """

    fixed = ("propose",)
    measures_spread = False
    spread_deg = 0.07  # wider ones make refinement worse where the beam precesses by more than 0.7 degrees

    def __init__(self, config: Config, phase: Phase, geometry: Geometry) -> None:
        super().__init__(config, phase, geometry)
        self.matched = Matched(config, phase, geometry)
        self.matched.view.centring = False  # once is enough
        self.reader = SpotReader(phase, geometry, SPOTS, config.model.reach)
        width = config.model.width or WIDTH
        self.rerankers = ModuleList(RerankerNet(width, _EXTRA) for _ in range(2))

    def forward(self, patterns: Tensor) -> dict[str, Tensor]:
        """Score the candidates of patterns (B, H, W) of any numeric type.

        Returns `first` (B, M, 4), `first_score` (B, M) and `first_correction` (B, M, 3): the candidates, their scores
        and corrections (rotation vectors in radians: truth ~ g * exp(correction)); `orientation` (B, T, 4), `score` and
        `correction`: the best of them, corrected and scored again; `clear` (B,) as in `Proposals`.
        """
        if torch.is_grad_enabled() or patterns.device.type != "cpu" or torch.compiler.is_compiling():
            return self.decide(*self.propose(patterns))
        parts = [self.decide(*self.propose(part)) for part in patterns.split(_CPU_BATCH)]  # type: ignore[no-untyped-call]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @torch.no_grad()
    def propose(self, patterns: Tensor) -> tuple[Proposals, WindowCounts]:
        """Return the matched filter's candidates for patterns (B, H, W), and the counts around their spots."""
        counts = centred(patterns, self.geometry, self.reader.beam_px)
        seen = counts if self.config.model.centring else patterns
        return self.matched.proposals(seen, CANDIDATES), self.reader.collect(counts)

    def decide(self, proposals: Proposals, windows: WindowCounts) -> dict[str, Tensor]:
        """Score candidates by the counts in their patterns; see `forward`."""
        missing_BM = proposals.score == -torch.inf
        first_BM4 = proposals.orientation.nan_to_num(0.5)
        behind_BM = (proposals.score - proposals.score[:, :1]) / _SHARPNESS
        prior_BM = behind_BM.masked_fill(missing_BM, -math.inf).clamp_min(-4.0)  # where all are missing, inf - inf
        doubt_BM = proposals.score >= proposals.score[:, :1] - _IN_DOUBT
        score_BM, correction_BM3 = self._score(0, windows, first_BM4, prior_BM, doubt_BM)
        score_BM = score_BM.masked_fill(missing_BM, -1e4)
        output = {"first": first_BM4, "first_score": score_BM, "first_correction": correction_BM3}
        chosen_BT = score_BM.detach().topk(min(RESCORED, score_BM.shape[1]), dim=1).indices
        rows = torch.arange(chosen_BT.shape[0], device=chosen_BT.device)[:, None]
        prior_BT = score_BM.detach()[rows, chosen_BT]
        step_BT4 = from_rotation_vector(correction_BM3.detach()[rows, chosen_BT])
        corrected_BT4 = multiply(first_BM4[rows, chosen_BT], step_BT4)
        behind_BT = prior_BT - prior_BT[:, :1]
        doubt_BT, prior_BT = behind_BT >= -_IN_DOUBT_AGAIN, (0.3 * behind_BT).clamp_min(-4.0)
        score_BT, correction_BT3 = self._score(1, windows, corrected_BT4, prior_BT, doubt_BT)
        score_BT = score_BT.masked_fill(missing_BM[rows, chosen_BT], -1e4)
        output |= {"orientation": corrected_BT4, "score": score_BT, "correction": correction_BT3}
        return {**output, "clear": proposals.clear}

    def _score(
        self, turn: int, windows: WindowCounts, orientation: Tensor, prior: Tensor, doubt: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return scores (B, M) and corrections (B, M, 3); outside of training, of those not in `doubt` guesses."""
        everything = self.training or torch.compiler.is_compiling()  # where shapes must not depend on values
        pair = None if everything else doubt.nonzero(as_tuple=True)
        # In half precision predicted spots would stand a third of a pixel off.
        with torch.no_grad(), torch.autocast(orientation.device.type, enabled=False):
            spots = self.reader(windows, orientation, pair)
            extra = _extra_features(windows, spots, prior, pair)
        judged, correction = self.rerankers[turn](spots, extra)
        if pair is None:
            return judged, correction
        known_BM = torch.full_like(prior, -torch.inf).index_put(pair, judged[:, 0])
        guess_BM = known_BM.amax(1, keepdim=True) + prior + _UNLIKELY
        return known_BM.where(doubt, guess_BM), torch.zeros_like(orientation[..., :3]).index_put(pair, correction[:, 0])

    def loss(self, output: dict[str, Tensor], orientation: Tensor) -> Tensor:
        """Return the cross-entropy of the choice and the error of the right candidate, in degrees, of both passes.

        Patterns without the truth (B, 4) among their candidates, within 5 degrees, do not count.
        """
        truth_B4 = orientation.to(output["score"])
        parts = ("first_score", "first_correction", "score", "correction")
        total = torch.stack([output[part].sum() for part in parts]).sum() * 0  # every weight has a gradient
        passes = (("first", "first_score", "first_correction", 1.0), ("orientation", "score", "correction", 2.0))
        for candidate, score, correction, weight in passes:
            missing_BM3 = self._error(output[candidate], truth_B4)
            off_BM = missing_BM3.norm(dim=-1)
            off_B, right_B = off_BM.masked_fill(output[score] < -9e3, math.pi).min(1)
            known = off_B < math.radians(DIFFERENT_DEG)
            if not bool(known.any()):
                continue
            rows = torch.arange(len(right_B), device=right_B.device)
            error = (output[correction] - missing_BM3)[rows, right_B][known].rad2deg().norm(dim=-1)
            total = total + functional.cross_entropy(output[score][known], right_B[known])
            total = total + weight * functional.smooth_l1_loss(error, torch.zeros_like(error), beta=_TOLERANCE_DEG)
        return total

    def _error(self, candidate_BM4: Tensor, truth_B4: Tensor) -> Tensor:
        """Return the rotation vectors (B, M, 3) from each candidate to the nearest orientation equal to the truth."""
        equal_BS4 = multiply(self.phase.symmetry.operations_like(truth_B4), truth_B4[:, None])
        between_BMS4 = multiply(inverse(candidate_BM4)[:, :, None], equal_BS4[:, None])
        nearest_BM = between_BMS4[..., 0].abs().argmax(-1)
        index = nearest_BM[..., None, None].expand(*nearest_BM.shape, 1, 4)
        return rotation_vector(between_BMS4.gather(2, index)[:, :, 0])

    @torch.no_grad()
    def candidates(self, output: dict[str, Tensor], n: int = 1) -> Candidates:
        """Return the `n` best different orientations; see `OrientationModel.candidates`."""
        corrected_BT4 = multiply(output["orientation"], from_rotation_vector(output["correction"]))
        order_BT = output["score"].argsort(dim=1, descending=True)
        rows = torch.arange(order_BT.shape[0], device=order_BT.device)[:, None]
        found_BT4, score_BT = corrected_BT4[rows, order_BT], output["score"][rows, order_BT]
        share_BT = score_BT.softmax(1) * output["clear"][:, None]
        kept_BT = self._different(found_BT4) & (score_BT > -9e3)
        place_BT = (~kept_BT).to(torch.int8).argsort(dim=1, stable=True)
        kept_BT = kept_BT[rows, place_BT]
        orientation = reduce_to_fundamental_zone(found_BT4[rows, place_BT], self.phase.symmetry)
        orientation = orientation.masked_fill(~kept_BT[..., None], torch.nan)[:, :n]
        confidence = share_BT[rows, place_BT].masked_fill(~kept_BT, 0.0)[:, :n]
        short = n - orientation.shape[1]  # not negative
        orientation = functional.pad(orientation, (0, 0, 0, short), value=torch.nan)
        return Candidates(orientation, functional.pad(confidence, (0, short)))

    def _different(self, found_BT4: Tensor) -> Tensor:
        """Return which candidates (B, T) are more than 5 degrees from every better one that is kept."""
        border = math.cos(math.radians(DIFFERENT_DEG) / 2)
        near_BTT = closeness(found_BT4, found_BT4, self.phase.symmetry.operations_like(found_BT4)) >= border
        kept = [torch.ones_like(near_BTT[:, 0, 0])]
        for rank in range(1, found_BT4.shape[1]):
            kept.append(~(near_BTT[:, rank, :rank] & torch.stack(kept, dim=1)).any(1))
        return torch.stack(kept, dim=1)


def _extra_features(windows: WindowCounts, spots: SpotFeatures, prior_BM: Tensor, pair: Pairs | None) -> Tensor:
    """Return the features (B, M, 3) of each candidate besides its spots.

    The score of the matched filter or of the first pass; the logarithm of the share of the counts that its spots
    explain; the logarithm of the direct beam's ratio to the rest.
    """
    direct_B, rest_B = windows.direct, windows.rest
    if pair is not None:
        prior_BM, direct_B, rest_B = prior_BM[pair][:, None], direct_B[pair[0]], rest_B[pair[0]]
    explained_BM = ((spots.feature[..., 0] + 1).exp() - 1).sum(-1) / (rest_B[:, None] + 1)
    direct_B = direct_B.clamp_min(0).log1p() - rest_B.clamp_min(0).log1p()
    return torch.stack((prior_BM, (explained_BM + 1e-3).log(), direct_B[:, None].expand_as(prior_BM)), dim=-1)
