"""Descan: the direct beam drifts over the detector as the scan goes, and a smooth surface says where it is.

The beam is measured in patterns spread over the scan. Single measurements are noisy, and Bragg spots pull at them; a
plane, or a quadratic where that is clearly better, fitted to all of them robustly is not. It gives the centre of
every pattern, also of those that were not looked at.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from stemtune.errors import UserError
from stemtune.scan.beam_center import beam_near, centroids, common_pattern

FloatArray = npt.NDArray[np.float64]

MIN_CENTRES = 16  # measured centres below which no surface is fitted
MIN_DRIFT_PX = 0.5  # drift over the scan from which on each pattern has its own centre without being asked for
_TILES = 4  # the scan is cut into as many tiles along either edge: in each the beam hardly moves
_ROUNDS = 20  # of reweighting
_MAX_RATIO = 0.8  # a quadratic must leave less than this share of the residual that a plane leaves


@dataclass(frozen=True)
class Descan:
    """A surface of the direct beam's place over a scan of `shape` rows and columns.

    `coefficients` (3 or 6, 2) are of 1, r, c (and r², rc, c²), with r and c from -1 to 1 over the scan, for row and
    column in pixels; `residual_px` is the robust standard deviation of the measured centres about the surface, along
    the worse axis.
    """

    shape: tuple[int, int]
    coefficients: FloatArray
    residual_px: float

    @property
    def order(self) -> int:
        """1 for a plane, 2 for a quadratic."""
        return len(self.coefficients) // 3

    @property
    def drift_px(self) -> float:
        """Largest distance between two corners or middles of the scan's edges, in pixels."""
        ends = [np.linspace(0, length - 1, 3) for length in self.shape]
        places = self.at(np.stack(np.meshgrid(*ends), axis=-1).reshape(-1, 2))
        return float(np.hypot(*(places[:, None] - places).T).max())

    def at(self, position: npt.NDArray[Any]) -> FloatArray:
        """Return the beam's (row, column) (n, 2) at scan positions (n, 2)."""
        return np.asarray(_terms(position, self.shape, self.order) @ self.coefficients)

    def moved(self, centre: tuple[float, float]) -> Descan:
        """Return the same surface, lifted so that the beam in the middle of the scan is at `centre`."""
        lifted = self.coefficients.copy()
        lifted[0] = centre  # r and c are 0 there
        return replace(self, coefficients=lifted)


def measure_centres(counts: npt.NDArray[Any], position: npt.NDArray[Any], shape: tuple[int, int]) -> FloatArray:
    """Return the direct beam's (row, column) (N, 2) in each pattern (N, H, W) at scan `position` (N, 2); NaN: none.

    Each is looked for near the beam of its tile of the scan: what the tile's patterns have in common.
    """
    found = np.full((len(counts), 2), np.nan)
    reach = beam_near(common_pattern(counts))[2]
    tile = (position * _TILES // np.maximum(shape, 1)).clip(0, _TILES - 1) @ np.array([_TILES, 1])
    for number in np.unique(tile):
        chosen = np.flatnonzero(tile == number)
        part = np.asarray(counts[chosen], dtype=np.float64)
        with suppress(UserError):  # nothing there
            *start, own = beam_near(common_pattern(part))
            found[chosen] = centroids(part, start, min(own, 1.5 * reach))
    return found


def fit_descan(centre: FloatArray, position: npt.NDArray[Any], shape: tuple[int, int]) -> Descan | None:
    """Return the surface through measured `centre` (N, 2) at scan `position` (N, 2); None for too few of them.

    A plane, or a quadratic where there are enough centres and it leaves clearly less.
    """
    finite = np.isfinite(centre).all(axis=1)
    centre, position = centre[finite], position[finite]
    if len(centre) < MIN_CENTRES or min(np.ptp(position, axis=0)) < 1:
        return None
    plane = _robust(centre, position, shape, 1)
    if len(centre) < 3 * MIN_CENTRES or min(shape) < 4:
        return plane
    quadratic = _robust(centre, position, shape, 2)
    return quadratic if quadratic.residual_px < _MAX_RATIO * plane.residual_px else plane


def improves(descan: Descan, centre: FloatArray) -> bool:
    """Say whether the surface is better than one centre for all: the beam drifts, and the surface says how."""
    finite = centre[np.isfinite(centre).all(axis=1)]
    still = 1.4826 * float(np.median(np.abs(finite - np.median(finite, axis=0)), axis=0).max())
    error = descan.residual_px * 4 / math.sqrt(len(finite))
    return descan.drift_px > max(MIN_DRIFT_PX, 5 * error) and descan.residual_px < _MAX_RATIO * still


def _robust(centre: FloatArray, position: npt.NDArray[Any], shape: tuple[int, int], order: int) -> Descan:
    """Fit a surface by reweighted least squares (Tukey's biweight)."""
    terms = _terms(position, shape, order)
    weight = np.ones(len(centre))
    for _ in range(_ROUNDS):
        # Solve with the weights, then weigh each centre by how far it is off in units of the robust spread.
        root = np.sqrt(weight)[:, None]
        coefficients = np.linalg.lstsq(terms * root, centre * root, rcond=None)[0]
        off = np.hypot(*(centre - terms @ coefficients).T)
        spread = 1.4826 * float(np.median(off)) + 1e-6
        weight = np.clip(1 - (off / (4 * spread)) ** 2, 0, None) ** 2
    residual = 1.4826 * float(np.median(np.abs(centre - terms @ coefficients), axis=0).max())
    return Descan(shape, np.asarray(coefficients, dtype=np.float64), residual)


def _terms(position: npt.NDArray[Any], shape: tuple[int, int], order: int) -> FloatArray:
    middle = (np.asarray(shape, dtype=np.float64) - 1) / 2
    r, c = ((np.asarray(position, dtype=np.float64) - middle) / np.maximum(middle, 0.5)).T
    further = [r * r, r * c, c * c] if order == 2 else []
    return np.stack([np.ones_like(r), r, c, *further], axis=1)
