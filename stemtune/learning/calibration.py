"""Whether a confidence can be believed, and a map that makes it so.

A confidence is meant as the probability that the best candidate lies within 5 degrees of the truth. Every model has a
confidence of its own (a share of scores, a likelihood, a second output); what it is worth is found out on validation
patterns, after which it is mapped to that probability. The map is the same kind for all models and goes with them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from torch import Tensor

BINS = 15
_LEAST = 1e-4  # confidences nearer to 0 and 1 than this count as this, so that one pattern cannot decide the fit
_SPREAD = 2.0  # standard deviation of the parameters before a pattern has been seen


@dataclass(frozen=True)
class Calibration:
    """A map from a model's own confidence p to a calibrated one.

    With `logit(p') = low log p - high log(1 - p) + offset`, low and high not negative, the map rises everywhere and
    has enough shapes for over- and underconfidence on either side: beta calibration (M. Kull, T. M. Silva Filho, P.
    Flach, AISTATS 2017). Left alone it changes nothing.
    """

    low: float = 1.0
    high: float = 1.0
    offset: float = 0.0

    def __call__(self, confidence: Tensor) -> Tensor:
        """Return the calibrated confidences of the candidates (..., n) to each pattern, best first.

        Each is mapped alike. Since the candidates exclude each other, those after the first are scaled down together
        where all would come to more than 1. A confidence of 0, no candidate, stays 0.
        """
        if self == Calibration():
            return confidence
        p = confidence.float().clamp(_LEAST, 1.0 - _LEAST)
        mapped = torch.sigmoid(self.low * p.log() - self.high * torch.log1p(-p) + self.offset)
        mapped = mapped.where(confidence > 0, 0.0)
        best, others = mapped[..., :1], mapped[..., 1:]
        room = (1.0 - best) / others.sum(-1, keepdim=True).clamp_min(1e-12)
        return torch.cat((best, others * room.clamp_max(1.0)), dim=-1)

    @classmethod
    def fitted(cls, confidence: npt.ArrayLike, right: npt.ArrayLike) -> Calibration:
        """Return the map that makes these best candidates' confidences (n,) fit whether they are `right` (n,).

        Maximum likelihood, with a weak normal prior around "change nothing" (standard deviation 2) that keeps the
        parameters finite where all candidates are right, or there are few.
        """
        p = np.clip(np.asarray(confidence, dtype=np.float64), _LEAST, 1 - _LEAST)
        terms = np.stack([np.log(p), -np.log1p(-p), np.ones_like(p)], axis=1)
        sign = 1.0 - 2.0 * np.asarray(right, dtype=np.float64)
        start = np.array([1.0, 1.0, 0.0])

        def cost(values: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
            margin = sign * (terms @ values)
            slope = terms.T @ (sign * 0.5 * (1.0 + np.tanh(0.5 * margin)))
            prior = (values - start) / _SPREAD**2
            return float(np.logaddexp(0, margin).sum() + 0.5 * prior @ (values - start)), slope + prior

        found = minimize(cost, start, jac=True, method="L-BFGS-B", bounds=[(0, None), (0, None), (None, None)])
        low, high, offset = (float(value) for value in found.x)
        return cls(low, high, offset)

    def to_dict(self) -> dict[str, float]:
        """Return the parameters, for `model.json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Calibration:
        """Return the map with the parameters `stored`; raises `TypeError` or `ValueError` where they are none."""
        return cls(**{name: float(value) for name, value in stored.items()})


class Reliability(NamedTuple):
    """Patterns binned by confidence, from low to high: number of patterns, mean confidence and share right (b,) of each
    bin.

    `by_chance` is the expected calibration error that confidences which are true probabilities show on average with
    these bins: a share of few patterns is never exactly its probability.
    """

    patterns: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float64]
    right: npt.NDArray[np.float64]
    by_chance: float

    @property
    def error(self) -> float:
        """The expected calibration error: the mean over all patterns of |confidence - share right| of their bin."""
        gaps = np.abs(self.confidence - self.right)
        return float((self.patterns * gaps).sum() / max(1, self.patterns.sum()))


def reliability(confidence: npt.ArrayLike, right: npt.ArrayLike, bins: int = BINS) -> Reliability:
    """Return how often candidates (n,) of about the same confidence are right.

    Bins hold equally many patterns each (as far as equal confidences, which stay together, allow), since bins of equal
    width leave most of them nearly empty and make the error depend on a few patterns; 15 of them as usual.

    Source: M. P. Naeini, G. F. Cooper, M. Hauskrecht, AAAI 2015 (the error); C. Guo et al., ICML 2017 (15 bins); K.
    Nguyen, B. O'Connor, EMNLP 2015, and R. Roelofs et al., AISTATS 2022 (equal numbers in bins).
    """
    stated, hit = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if not len(stated):
        return Reliability(np.zeros(0, dtype=np.int64), np.zeros(0), np.zeros(0), 0.0)
    edges = np.unique(np.sort(stated)[(np.arange(1, bins) * len(stated)) // bins])
    place = np.searchsorted(edges, stated, side="right")
    count = np.bincount(place, minlength=bins)
    kept = count > 0
    means = [np.bincount(place, weights=values, minlength=bins)[kept] / count[kept] for values in (stated, hit)]
    spread = np.sqrt(np.bincount(place, weights=stated * (1 - stated)))  # of the number right in each bin
    by_chance = float(np.sqrt(2 / np.pi) * spread.sum() / len(stated))
    return Reliability(count[kept], means[0], means[1], by_chance)


def cross_validated_error(confidence: npt.ArrayLike, right: npt.ArrayLike) -> float:
    """Return the expected calibration error of a fitted map on patterns that it was not fitted to.

    Every other pattern is mapped by what the rest say, so that the figure is honest although there is one validation
    set only.
    """
    stated, hit = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=bool)
    mapped = np.zeros(len(stated))
    for half in (0, 1):
        own, rest = slice(half, None, 2), slice(1 - half, None, 2)
        made = Calibration.fitted(stated[rest], hit[rest])
        mapped[own] = made(torch.from_numpy(stated[own, None]).float())[:, 0].numpy()
    return reliability(mapped, hit).error
