"""How wrong the pixels of a map are when only the most confident of them are kept: the risk-coverage curve."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

SHARES = tuple(round(0.05 * step, 2) for step in range(1, 21))
"""Shares of the pixels at which the curve is given."""


def risk_coverage(confidence: npt.NDArray[Any], angle_deg: npt.NDArray[np.float64], right_deg: float) -> dict[str, Any]:
    """Return the error of the most confident pixels against the share of pixels that is kept.

    Pixels of equal confidence are in no order; each of them counts with the mean of all of them.

    Parameters
    ----------
    confidence
        Of each pixel (n,), n at least 1.
    angle_deg
        Disorientation (n,) from the truth.
    right_deg
        From here on an orientation is wrong.

    Returns
    -------
    dict
        Lists `kept`, shares of the pixels (rounded up to whole ones); `wrong`, the share of those that is wrong; and
        `mean_deg`, their mean disorientation. `area` is the mean of `wrong` over keeping 1, 2, ... n pixels (the area
        under the curve, AURC; Geifman and El-Yaniv, NIPS 2017), `area_of_perfect` what it would be if every wrong
        pixel were less confident than every right one, `area_of_chance` if the confidence were of no use.
    """
    n = len(confidence)
    wrong = (angle_deg >= right_deg).astype(np.float64)
    risk = running_mean(confidence, wrong)
    angle = running_mean(confidence, angle_deg)
    last = np.ceil(np.array(SHARES) * n - 1e-9).astype(int) - 1
    return {
        "kept": list(SHARES),
        "wrong": risk[last].tolist(),
        "mean_deg": angle[last].tolist(),
        "area": float(risk.mean()),
        "area_of_perfect": float(running_mean(-wrong, wrong).mean()),
        "area_of_chance": float(wrong.mean()),
    }


def running_mean(score: npt.NDArray[Any], values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the mean (n,) of `values` over the 1, 2, ... n entries of the best score; ties share their mean."""
    order = np.argsort(-score.astype(np.float64), kind="stable")
    ranked = values[order]
    _, group, size = np.unique(-score[order].astype(np.float64), return_inverse=True, return_counts=True)
    shared = (np.bincount(group, ranked) / size)[group]
    mean: npt.NDArray[np.float64] = np.cumsum(shared) / np.arange(1, len(values) + 1)
    return mean
