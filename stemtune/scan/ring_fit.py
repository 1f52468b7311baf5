"""Scale and ellipse of a scan from the distances of its diffraction spots, when the crystal is known.

A spot of a known phase is at one of the phase's |g| from the direct beam, whatever the orientation (out-of-plane
parts shorten it by a few parts in ten thousand). So scale and ellipse are those with which the spots of many patterns
fall onto the phase's rings: the most likely ones, where every spot may lie on any ring or, in part, anywhere.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage, optimize

from stemtune.scan.ellipse import Ellipse

if TYPE_CHECKING:
    from stemtune.crystal.phase import Phase

FloatArray = npt.NDArray[np.float64]

_MAX_SPOTS = 80  # of one pattern that count, the brightest
_MIN_Z_SCORE = 4.5  # a spot is this many times the noise above its surroundings
_MIN_SHARE = 0.01  # and has at least this share of the brightest spot


class SpotList(NamedTuple):
    """Spots of N patterns as one list (M,): `pattern` they belong to, `x` and `y` from its beam in px (y up)."""

    pattern: npt.NDArray[np.intp]
    x: FloatArray
    y: FloatArray


def find_spots(
    patterns: npt.NDArray[Any], centre_px: FloatArray, radius_px: float, hidden: npt.NDArray[np.bool_] | None = None
) -> SpotList:
    """Return the spots of `patterns` (N, H, W) around their direct beams at `centre_px` (N, 2).

    A spot is a local maximum of the pattern smoothed to about the size of the direct beam (`radius_px`), less the same
    smoothed three times as wide, that is above the noise; its place is the top of a parabola through the
    logarithms of the smoothed counts. What touches the direct beam, an edge or `hidden` (H, W) pixels is left out.
    """
    sigma = max(1.0, 0.6 * radius_px)
    margin = math.ceil(2 * sigma)
    near = 2.5 * radius_px + 2 * sigma
    shut = np.zeros(patterns.shape[1:], dtype=bool) if hidden is None else ndimage.binary_dilation(hidden, None, margin)
    shut[:margin], shut[-margin:], shut[:, :margin], shut[:, -margin:] = True, True, True, True
    row, column = np.indices(patterns.shape[1:])
    lists = []
    for number, (pattern, centre) in enumerate(zip(patterns, centre_px, strict=True)):
        smooth = ndimage.gaussian_filter(pattern.astype(np.float64), sigma, mode="nearest")
        around = ndimage.gaussian_filter(smooth, 2.5 * sigma, mode="nearest")
        above = smooth - around
        open_ = (np.hypot(row - centre[0], column - centre[1]) > near) & ~shut
        noise = np.sqrt(around)  # of counting, up to a factor that the pattern itself tells
        lit = open_ & (around > 1e-3 * around.max())
        if not lit.any():
            continue
        noise *= 1.4826 * float(np.median(np.abs(above[lit] / noise[lit])))
        top = (ndimage.maximum_filter(above, size=2 * math.ceil(sigma) + 1) == above) & open_
        brightest = float(above[top].max(initial=0.0))
        top &= above > np.maximum(_MIN_Z_SCORE * noise, _MIN_SHARE * brightest)
        found = np.argwhere(top)
        found = found[np.argsort(-above[top])[:_MAX_SPOTS]]
        if len(found):
            place = _summit(smooth, found) - centre
            lists.append(np.column_stack((np.full(len(found), number), place[:, 1], -place[:, 0])))
    table = np.concatenate(lists) if lists else np.zeros((0, 3))
    return SpotList(table[:, 0].astype(np.intp), table[:, 1], table[:, 2])


def _summit(smooth: FloatArray, found: npt.NDArray[np.intp]) -> FloatArray:
    """Return the places (M, 2) of the maxima at pixels `found` (M, 2) to a part of a pixel."""
    log = np.log(np.maximum(smooth, 1e-12 * max(float(smooth.max()), 1e-30)))
    moved = found.astype(np.float64)
    for axis, step in enumerate(np.eye(2, dtype=int)):
        before, here, after = (log[tuple((found + shift * step).T)] for shift in (-1, 0, 1))
        bend = 2 * here - before - after
        off = np.where(bend > 1e-9, (after - before) / 2 / np.maximum(bend, 1e-9), 0)
        moved[:, axis] += np.clip(off, -0.75, 0.75)
    return moved


MIN_SPOTS = 60  # spots below which nothing is fitted
TOLERANCE = 0.08  # how far off, relatively, a scale that is known may be
MIN_SHARE, MIN_GAIN, MIN_LEAD = (0.2, 0.5), (0.06, 0.3), 0.025
"""What can be believed: share of the spots on rings and gain, each where a scale was known before and where not; lead.

On simulated LiNiO2 patterns the right phase has a share of 0.7 to 0.95 and a gain of 0.5 to 0.8 (0.25 and 0.07 at 300
to 1,000 electrons), silicon and nickel up to 0.15 and 0.05 near the true scale, and up to 0.45 and 0.4 at any other.
"""

MAX_ERROR = 0.004  # standard error of the scale (relative), and half of the ellipticity's, above which a fit is void
_SCALES = (3e-3, 0.1)  # 1/Å per pixel, for 128 pixels on an edge: scales that are tried where none is known
_STAGES = ((0.015, 0.4), (0.008, 0.25), (0.004, 0.15), (0.002, 0.1))  # ring widths: relative, and in pixels
_MAX_Q, _MAX_REFLECTIONS = 2.5, 20_000  # 1/Å; rings beyond lie too densely to tell anything
_OUTLIER = 0.2  # share of spots that lie anywhere: noise, double scattering, another phase
_MIN_STRENGTH = 0.03  # rings with less of the strongest ring's structure factor are left out
_SEARCH_SPOTS = 1500  # that the search looks at
_SECOND_STARTS = 3  # further places that it climbs from
_PARTS = 4  # that the spots are dealt into; the spread of their answers is the error of the whole


class RingFit(NamedTuple):
    """What `fit_rings` found."""

    scale_inv_angstrom: float  # per pixel
    ellipse: Ellipse
    scale_error: float  # standard, relative
    ellipticity_error: float  # standard, absolute
    spots: int  # that were looked at
    share: float  # the most likely share of them that lies on rings of the phase
    gain: float  # how much likelier that is than that all lie anywhere, in nats per spot
    lead: float  # over the best other answer, which differs by 0.5 % in scale or 1 % in ellipticity or more
    distance: FloatArray  # (M,) of the spots in 1/Å with this scale and ellipse

    def doubt(self, known: bool) -> str:
        """Return a reason not to believe the fit, or ""; `known` says whether a scale was known before."""
        share, gain = MIN_SHARE[not known], MIN_GAIN[not known]
        if self.share < share or self.gain < gain:
            return f"only {self.share:.0%} of {self.spots:,} spots lie on its rings, hardly more than by chance"
        if self.lead < MIN_LEAD:
            return "another scale or ellipse fits its rings nearly as well"
        if max(self.scale_error, self.ellipticity_error / 2) > MAX_ERROR:
            return f"{self.spots:,} spots leave the scale uncertain by {self.scale_error:.1%}"
        return ""


def rings(phase: Phase, reach: float) -> tuple[FloatArray, FloatArray]:
    """Return |g| (K,) of the phase's rings up to `reach` (1/Å), and their strengths: sums of |F| over each ring."""
    listed = phase.reflections(reach)
    length = listed.g.norm(dim=1).numpy()
    amplitude = listed.structure_factor.abs().numpy()
    if not len(length):
        return np.zeros(0), np.zeros(0)
    start = np.flatnonzero(np.concatenate(([True], np.diff(length) > 1e-4 * length[1:])))
    strongest = np.maximum.reduceat(amplitude, start)
    kept = strongest > _MIN_STRENGTH * strongest.max()
    return length[start][kept], np.add.reduceat(amplitude, start)[kept]


def fit_rings(
    found: SpotList, phase: Phase, scale: float | None, size: int, ellipse: bool = True, tolerance: float = TOLERANCE
) -> RingFit | None:
    """Return the scale and ellipse with which spots lie best on the rings of `phase`; None for too few spots.

    A `scale` (1/Å per pixel) is believed within `tolerance` (relative); None searches over all that a microscope has
    for patterns of `size` pixels along the shorter edge. Without `ellipse` rings are taken as circles.
    """
    if len(found.x) < MIN_SPOTS:
        return None
    # The best scales on a grid for some of the spots, with several ellipses.
    low, high = (
        (scale * (1 - tolerance), scale * (1 + tolerance)) if scale else (bound * 128 / size for bound in _SCALES)
    )
    offset = np.column_stack((found.x, found.y))
    some = offset[:: math.ceil(len(offset) / _SEARCH_SPOTS)]
    starts = _search(some, phase, np.exp(np.arange(math.log(low), math.log(high), 0.003)), ellipse)
    # Climb from all of them on ever narrower rings.
    circle = min(starts, key=lambda start: abs(start[1]) + abs(start[2]))
    for stage in _STAGES:
        contrast = _Contrast(offset, phase, math.exp(starts[0][0]), *stage)
        circle = _climbed(some, contrast, circle, False)  # a coarse view may lead all others to one wrong ellipse
        starts = _different([_climbed(some, contrast, start, ellipse) for start in (*starts, circle)])
    # The best by its gain, climbed once more with all spots; its lead over the others; its error from parts.
    gains = [contrast.share(np.log(_distance(some, start)))[1] for start in starts]
    start = _climbed(offset, contrast, starts[int(np.argmax(gains))], ellipse)
    lead = float(np.subtract(*np.sort(gains)[:-3:-1])) if len(gains) > 1 else math.inf
    dealt = [offset[found.pattern % _PARTS == part] for part in range(_PARTS)]
    parts = [_climbed(part, contrast, start, ellipse) for part in dealt if len(part) > MIN_SPOTS / (2 * _PARTS)]
    error = np.std(parts, axis=0, ddof=1) / math.sqrt(len(parts)) if len(parts) > 1 else np.full(3, np.inf)
    distance = _distance(offset, start)
    share, gain = contrast.share(np.log(distance))
    fitted = math.exp(start[0]), Ellipse.of(start[1], start[2]), float(error[0]), float(np.hypot(*error[1:]))
    return RingFit(*fitted, len(offset), share, gain, lead, distance)


def _distance(offset: FloatArray, parameters: FloatArray) -> FloatArray:
    """Return the distances (M,) in 1/Å of spots at `offset` (M, 2) px under (log scale, e cos 2a, e sin 2a)."""
    inverse = np.linalg.inv(Ellipse.of(parameters[1], parameters[2]).matrix())
    return np.asarray(math.exp(parameters[0]) * np.hypot(*(offset @ inverse).T))


class _Contrast:
    """How much denser the rings of a phase lie at a distance than on the average around it.

    Rings are Gaussians on a logarithmic axis, as wide as `width` (relative) and `spot_px` together. Where they lie too
    densely to be resolved, as beyond the last of them, spots say nothing: the gain is 0.
    """

    def __init__(self, offset: FloatArray, phase: Phase, scale: float, width: float, spot_px: float) -> None:
        farthest = min(_MAX_Q, (_MAX_REFLECTIONS / (4 / 3 * math.pi * phase.volume)) ** (1 / 3))
        length, strength = rings(phase, min(farthest, 1.3 * scale * float(np.hypot(*offset.T).max())))
        self._gain, self._denser = np.zeros(2), np.ones(2)
        self._low, self.step = 0.0, width / 4
        if not len(length):
            return
        self._low = math.log(length[0]) - 0.5
        grid = np.arange(self._low, math.log(length[-1]), self.step)
        near, far = np.zeros(len(grid)), np.zeros(len(grid))
        for ring, weight in zip(np.log(length), strength / length, strict=True):
            sigma = math.hypot(width, spot_px * scale / math.exp(ring))
            for into, spread in ((near, sigma), (far, max(5 * sigma, 0.1))):
                first, last = np.searchsorted(grid, (ring - 4 * spread, ring + 4 * spread))
                away = (grid[first:last] - ring) / spread
                into[first:last] += weight / spread * np.exp(-(away**2) / 2)
        self._denser = near / np.maximum(far, 1e-3 * far.max())
        self._gain = np.log(_OUTLIER + (1 - _OUTLIER) * self._denser)

    def __call__(self, log_distance: FloatArray) -> float:
        """Return the mean log-likelihood of spots at distances (M,) over that of spots anywhere."""
        place = (log_distance - self._low) / self.step
        return float(np.interp(place, np.arange(len(self._gain)), self._gain, left=self._gain[0], right=0.0).mean())

    def share(self, log_distance: FloatArray) -> tuple[float, float]:
        """Return the most likely share of spots on rings, and the mean log-likelihood with it, which is 0 or more."""
        place = (log_distance - self._low) / self.step
        denser = np.interp(place, np.arange(len(self._gain)), self._denser, left=0.0, right=1.0)
        shares = np.linspace(0, 0.95, 20)
        gain = np.log(1 + shares[:, None] * (denser - 1)).mean(axis=1)
        return float(shares[gain.argmax()]), float(gain.max())


def _search(offset: FloatArray, phase: Phase, scales: FloatArray, ellipse: bool) -> list[FloatArray]:
    """Return parameters to start from: for ellipses on a grid the best scale, and the best others of all."""
    middle = math.sqrt(scales[0] * scales[-1])
    contrast = _Contrast(offset, phase, middle if scales[-1] < 1.5 * scales[0] else scales[-1], *_STAGES[0])
    logarithm = np.log(scales)
    choices: tuple[list[tuple[float, FloatArray]], ...] = ([], [])  # the best scale of each ellipse, the second best
    for first, second in itertools.product((-0.03, 0.0, 0.03), repeat=2) if ellipse else [(0.0, 0.0)]:
        distance = np.log(_distance(offset, np.array([0.0, first, second])))
        score = np.array([contrast(distance + scale) for scale in logarithm])
        for choice in choices:
            best = int(score.argmax())
            if np.isfinite(score[best]):
                choice.append((float(score[best]), np.array([logarithm[best], first, second])))
            score[np.abs(logarithm - logarithm[best]) < 0.03] = -np.inf
    firsts, seconds = (sorted(choice, key=lambda pair: -pair[0]) for choice in choices)
    return [start for _, start in firsts + seconds[:_SECOND_STARTS]]


def _different(parameters: list[FloatArray]) -> list[FloatArray]:
    """Return those that differ from the ones before by 0.5 % in scale or 1 % in ellipticity."""
    kept: list[FloatArray] = []
    for values in parameters:
        if all((np.abs(values - other) > (0.005, 0.01, 0.01)).any() for other in kept):
            kept.append(values)
    return kept


def _climbed(offset: FloatArray, contrast: _Contrast, start: FloatArray, ellipse: bool) -> FloatArray:
    """Return the parameters (3,) of the highest contrast near `start`."""
    free = 3 if ellipse else 1

    def cost(values: FloatArray) -> float:
        return -contrast(np.log(_distance(offset, np.concatenate((values, start[free:])))))

    simplex = np.vstack((start[:free], start[:free] + 4 * contrast.step * np.eye(free)))
    found = optimize.fmin(cost, start[:free], xtol=1e-5, ftol=1e-7, initial_simplex=simplex, disp=False)
    return np.concatenate((found, start[free:]))
