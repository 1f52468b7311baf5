"""From a sample of a scan's patterns to the corrections that the whole scan needs, with what was found to show."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stemtune.errors import UserError
from stemtune.scan.bad_pixels import MOST, BadPixels, find_bad_pixels, mend
from stemtune.scan.beam_center import Centre, beam_near, common_pattern, fit_centre
from stemtune.scan.beam_stop import StopShape, centre_by_symmetry, find_stop
from stemtune.scan.corrections import Corrections, Wanted
from stemtune.scan.descan import LEAST, Descan, fit_descan, measured_centres, pays
from stemtune.scan.peaks import Found, find_spots

if TYPE_CHECKING:
    from stemtune.scan.ring_fit import RingFit

TRUSTED_PX = 0.25
"""A fit this near to the centre in the file's axes confirms it."""

Mask = npt.NDArray[np.bool_]

_TINY = 0.002  # ellipticity below which patterns are left as they are

_NO_HAND = (
    "patterns of a crystal do not tell mirror and turn of the detector: the mirrored pattern is exactly that of the"
    " crystal turned by 180° about an axis in the picture; give --flip and --scan-rotation where they are known"
)


class Sample(NamedTuple):
    """Patterns (N, H, W) of a scan of `shape` rows and columns, and where they stand in it, `position` (N, 2)."""

    patterns: npt.NDArray[Any]
    position: npt.NDArray[np.intp]
    shape: tuple[int, int]


@dataclass
class Plan:
    """What to do, and what was found on the way.

    Attributes
    ----------
    corrections
        To apply to every pattern.
    scale
        1/Å per pixel of the file.
    facts
        What was found and done, plain values for the store.
    notes
        What the user ought to know, one sentence each.
    shown
        Arrays that the picture of `stemtune inspect` is drawn from.
    """

    corrections: Corrections
    scale: float
    facts: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    shown: dict[str, npt.NDArray[Any]] = field(default_factory=dict)


def plan(
    sample: Sample,
    wanted: Wanted,
    size: int,
    scale: float | None,
    centre: tuple[float, float] | None,
    centre_by_axes: tuple[float, float] | None,
) -> Plan:
    """Find out from `sample` what `wanted` comes to.

    Parameters
    ----------
    sample
        Patterns spread over the scan.
    wanted
        The options.
    size
        Width and height of the stored patterns.
    scale
        1/Å per pixel of the file, or None where only `wanted.calibrate` can tell.
    centre
        (row, column) of the direct beam in the file, where the user gave it.
    centre_by_axes
        The same by the file's axes, where it has them; a fit within `TRUSTED_PX` gives way to it.

    Raises
    ------
    UserError
        For empty patterns, a bad option, or an unknown scale that the patterns do not tell either.
    """
    notes: list[str] = []
    raw, shape = sample.patterns, (int(sample.patterns.shape[1]), int(sample.patterns.shape[2]))
    hidden, blocked = _stop(raw, wanted, centre, centre_by_axes)
    bad = _bad(raw, wanted, hidden, centre, notes)
    clean = mend(raw, bad.hot | bad.dead, hidden) if bad.any else raw
    if hidden is not None:
        clean = np.where(hidden, np.zeros((), clean.dtype), clean)
    beam = _beam(clean, centre, blocked, centre_by_axes)
    measured, descan = _descan(clean, sample, wanted, beam, centre, blocked is not None, notes)
    if descan is not None:
        middle = descan.at(np.array([[(n - 1) / 2 for n in sample.shape]]))[0]
        beam = Centre(float(middle[0]), float(middle[1]), beam.spread_px)
    radius = 2.0 if blocked is not None else _radius(clean)
    still = Corrections(shape, size, beam, bad, hidden, descan)
    given, spots, fit = wanted.given_ellipse, None, None
    if wanted.calibrate:
        places = still.centres(sample.position)
        if descan is None and measured is not None:
            places = np.where(np.isfinite(measured), measured, places)
        spots = find_spots(clean, places, radius, hidden)
        fit, told = _rings(spots, wanted, scale, min(shape))
        notes += told
    if fit is not None:
        scale = fit.scale_inv_angstrom
    if scale is None:
        raise UserError(f"{notes[-1]}; give --scale, 0.02 for instance")
    ellipse = given if given is not None else fit.ellipse if fit is not None else None
    if ellipse is not None and ellipse.ellipticity < _TINY:
        ellipse = None
    if wanted.calibrate and wanted.flip == "none" and not wanted.scan_rotation:
        notes.append(_NO_HAND)
    corrections = Corrections(
        shape,
        size,
        beam,
        bad,
        hidden,
        descan,
        ellipse,
        wanted.background == "on",
        max(3.0, 2.0 * radius / still.factor),
        wanted.flip,
    )
    facts = _facts(corrections, wanted, fit, blocked is not None)
    return Plan(corrections, scale, facts, notes, _shown(sample, corrections, measured, spots, fit, scale, wanted))


def _stop(
    raw: npt.NDArray[Any], wanted: Wanted, centre: tuple[float, float] | None, axes: tuple[float, float] | None
) -> tuple[Mask | None, tuple[float, float] | None]:
    """Return the hidden pixels, and the place of the direct beam where that is among them."""
    if wanted.beam_stop == "off":
        return None, None
    shape = raw.shape[1:]
    middle = centre or axes or ((shape[0] - 1) / 2, (shape[1] - 1) / 2)
    given = None if wanted.beam_stop == "auto" else StopShape.given(wanted.beam_stop)
    found = find_stop(raw)
    if given is None and found is None:
        return None, None
    hidden = found
    if hidden is None:
        assert given is not None
        hidden = given.mask((shape[0], shape[1]), middle)
    place = centre or centre_by_symmetry(raw, hidden, middle)
    if given is not None:
        hidden = given.mask((shape[0], shape[1]), place)
    row, column = (round(value) for value in place)
    behind = 0 <= row < shape[0] and 0 <= column < shape[1] and bool(hidden[row, column])
    return hidden, place if behind else None


def _bad(
    raw: npt.NDArray[Any],
    wanted: Wanted,
    hidden: Mask | None,
    centre: tuple[float, float] | None,
    notes: list[str],
) -> BadPixels:
    none = BadPixels(np.zeros(raw.shape[1:], bool), np.zeros(raw.shape[1:], bool))
    common = common_pattern(raw)
    if wanted.bad_pixels == "off" or not common.max() > 0:
        return none
    row, column, reach = beam_near(common)
    down, right = np.indices(common.shape)
    beam = np.hypot(down - row, right - column) <= reach
    if centre is not None:
        beam |= np.hypot(down - centre[0], right - centre[1]) <= reach
    bad = find_bad_pixels(raw, beam)
    if hidden is not None:
        bad = BadPixels(bad.hot & ~hidden, bad.dead & ~hidden)
    if bad.count > MOST * common.size:
        notes.append(
            f"{bad.count:,} of {common.size:,} pixels look hot or dead, too many to be believed, so none is mended"
        )
        return none
    return bad


def _beam(
    clean: npt.NDArray[Any],
    centre: tuple[float, float] | None,
    blocked: tuple[float, float] | None,
    axes: tuple[float, float] | None,
) -> Centre:
    if centre is not None:
        return Centre(*centre, 0.0)
    found = fit_centre(clean) if blocked is None else Centre(*blocked, 0.0)
    if axes is not None and max(abs(found.row - axes[0]), abs(found.column - axes[1])) < TRUSTED_PX:
        return Centre(*axes, found.spread_px)
    return found


def _radius(clean: npt.NDArray[Any]) -> float:
    return beam_near(common_pattern(clean))[2] / 2


def _descan(
    clean: npt.NDArray[Any],
    sample: Sample,
    wanted: Wanted,
    beam: Centre,
    centre: tuple[float, float] | None,
    blocked: bool,
    notes: list[str],
) -> tuple[npt.NDArray[np.float64] | None, Descan | None]:
    """Return the measured centres, and the surface through them where it is to be used."""
    if wanted.descan == "off" or blocked:
        if wanted.descan == "on":
            notes.append("the direct beam is behind the beam stop, so its way over the scan cannot be measured")
        return None, None
    measured = measured_centres(clean, sample.position, sample.shape)
    descan = fit_descan(measured, sample.position, sample.shape)
    if descan is None:
        if wanted.descan == "on":
            seen = int(np.isfinite(measured).all(axis=1).sum())
            notes.append(f"the direct beam was found in {seen} patterns; a surface needs {LEAST} all over the scan")
        return measured, None
    if wanted.descan == "auto" and (centre is not None or not pays(descan, measured)):
        return measured, None
    return measured, descan if centre is None else descan.moved((beam.row, beam.column))


def _rings(spots: Found, wanted: Wanted, scale: float | None, size: int) -> tuple[RingFit | None, list[str]]:
    """Return the fit to the rings of the phase that was named, if it can be believed, and what to say about it."""
    from stemtune.crystal.phase import phase_from  # here, because most scans are calibrated by their file
    from stemtune.scan.ring_fit import LEAST_SPOTS, fit_rings

    phase, given = phase_from(wanted.calibrate), wanted.given_ellipse
    if given is not None:
        x, y = (np.column_stack((spots.x, spots.y)) @ np.linalg.inv(given.matrix())).T
        spots = Found(spots.pattern, x, y)
    left = "scale and ellipse stay as they were" if scale is not None else "the scale stays unknown"
    fit = fit_rings(spots, phase, scale, size, ellipse=wanted.ellipse == "auto")
    if fit is None:
        few = f"the sampled patterns show {len(spots.x)} spots, but {LEAST_SPOTS} are needed to fit {phase.name}"
        return None, [f"{few}; {left}"]
    doubt = fit.doubt(scale is not None)
    if not doubt:
        return fit, []
    if wanted.ellipse == "auto":
        round_ = fit_rings(spots, phase, scale, size, ellipse=False)
        if round_ is not None and not round_.doubt(scale is not None):
            seen = f"{fit.ellipse.ellipticity:.1%} along {fit.ellipse.azimuth_deg:.0f}°"
            return round_, [f"the ellipse cannot be told ({doubt}; the best was {seen}), so rings are taken as round"]
    return None, [f"{phase.name} does not fit the spots: {doubt}; {left}"]


def _facts(corrections: Corrections, wanted: Wanted, fit: RingFit | None, blocked: bool) -> dict[str, Any]:
    descan, ellipse, hidden = corrections.descan, corrections.ellipse, corrections.hidden
    facts: dict[str, Any] = {
        "bad_pixels": {"hot": int(corrections.bad.hot.sum()), "dead": int(corrections.bad.dead.sum())},
        "beam_stop": None if hidden is None else {"pixels": int(hidden.sum()), "hides_beam": blocked},
        "descan": None
        if descan is None
        else {"order": descan.order, "wander_px": descan.wander_px, "left_px": descan.left_px},
        "ellipse": None if ellipse is None else ellipse._asdict(),
        "background": corrections.background,
        "flip": corrections.flip,
        "calibrated": None,
    }
    if fit is not None:
        facts["calibrated"] = {
            "cif": wanted.calibrate,
            "scale_inv_angstrom": fit.scale_inv_angstrom,
            "scale_error": fit.scale_error,
            **fit.ellipse._asdict(),
            "ellipticity_error": fit.ellipticity_error,
            "spots": fit.spots,
            "share_on_rings": fit.share,
        }
    return facts


def _shown(
    sample: Sample,
    corrections: Corrections,
    measured: npt.NDArray[np.float64] | None,
    spots: Found | None,
    fit: RingFit | None,
    scale: float,
    wanted: Wanted,
) -> dict[str, npt.NDArray[Any]]:
    """Return what `plot.calibration` draws."""
    after = corrections(sample.patterns, sample.position)
    pixels = corrections.bad.hot.astype(np.uint8) + 2 * corrections.bad.dead.astype(np.uint8)
    if corrections.hidden is not None:
        pixels[corrections.hidden] = 3
    shown = {
        "mean_before": sample.patterns.mean(axis=0, dtype=np.float64).astype(np.float32),
        "mean_after": after.mean(axis=0, dtype=np.float64).astype(np.float32),
        "pixels": pixels,
        "position": sample.position.astype(np.int32),
        "fitted_centre": corrections.centres(sample.position),
    }
    hidden = corrections.hidden_stored
    if hidden is not None:
        shown["hidden"] = hidden.astype(np.uint8)
    if measured is not None:
        shown["measured_centre"] = measured
    if spots is not None and fit is not None:
        from stemtune.crystal.phase import phase_from
        from stemtune.scan.ring_fit import shells

        shown["spot_before"] = scale * np.hypot(spots.x, spots.y)
        shown["spot_after"] = fit.distance
        shown["rings"] = shells(phase_from(wanted.calibrate), 1.05 * float(fit.distance.max()))[0]
    return shown
