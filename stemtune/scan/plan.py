"""From a sample of a scan's patterns to the corrections that the whole scan needs, with the evidence to show."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stemtune.errors import UserError
from stemtune.scan.bad_pixels import MAX_SHARE, BadPixels, fill_bad_pixels, find_bad_pixels
from stemtune.scan.beam_center import Centre, beam_near, common_pattern, fit_centre
from stemtune.scan.beam_stop import StopShape, centre_by_symmetry, find_stop
from stemtune.scan.corrections import CorrectionOptions, Corrections
from stemtune.scan.descan import MIN_CENTRES, Descan, fit_descan, improves, measure_centres
from stemtune.scan.ring_fit import MIN_SPOTS, RingFit, SpotList, find_spots, fit_rings, rings

TRUSTED_PX = 0.25  # a fit this near to the centre in the file's axes confirms it
Mask = npt.NDArray[np.bool_]
Place = tuple[float, float]

_MIN_ELLIPTICITY = 0.002  # below, patterns are left as they are
_NO_HAND = (
    "patterns of a crystal do not tell mirror and turn of the detector: the mirrored pattern is exactly that of the"
    " crystal turned by 180° about an axis in the picture; give --flip and --scan-rotation where they are known"
)


class Sample(NamedTuple):
    """Patterns (N, H, W) of a scan of `shape` rows and columns, and where they are in it, `position` (N, 2)."""

    patterns: npt.NDArray[Any]
    position: npt.NDArray[np.intp]
    shape: tuple[int, int]


@dataclass
class Plan:
    """The corrections to apply to every pattern, 1/Å per pixel of the file, and what was found on the way.

    `facts` are plain values for the store, `notes` what the user ought to know, one sentence each, and `evidence` the
    arrays that the picture of `stemtune inspect` is drawn from.
    """

    corrections: Corrections
    scale: float
    facts: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    evidence: dict[str, npt.NDArray[Any]] = field(default_factory=dict)


def plan(
    sample: Sample,
    options: CorrectionOptions,
    size: int,
    scale: float | None,
    centre: Place | None,
    centre_by_axes: Place | None,
) -> Plan:
    """Find out from a sample what `options` come to for stored patterns of `size` pixels.

    `scale` is 1/Å per pixel of the file, or None where only `options.calibrate` can tell; `centre` (row, column) of the
    direct beam in the file, where the user gave it; `centre_by_axes` the same by the file's axes, where it has them: a
    fit within `TRUSTED_PX` gives way to it. A `UserError` says that the patterns are empty, that an option is bad, or
    that the scale is unknown and the patterns do not tell it either.
    """
    notes: list[str] = []
    raw, (height, width) = sample.patterns, sample.patterns.shape[1:]
    shape = (height, width)
    # The beam stop comes first: its edge would look like bad pixels, and it may hide the direct beam.
    hidden, behind = _find_stop(raw, options, centre, centre_by_axes)
    # Bad pixels next: a hot one would pull at the centre and pass for a spot.
    bad = _find_bad_pixels(raw, options, hidden, centre, notes)
    clean = fill_bad_pixels(raw, bad.hot | bad.dead, hidden) if bad.any else raw
    if hidden is not None:
        clean = np.where(hidden, np.zeros((), clean.dtype), clean)
    # One centre for the scan, then a surface of centres where the beam drifts over it.
    beam = _find_beam(clean, centre, behind, centre_by_axes)
    measured, descan = _find_descan(clean, sample, options, beam, centre, behind is not None, notes)
    if descan is not None:
        row, column = descan.coefficients[0].tolist()  # in the middle of the scan
        beam = Centre(row, column, beam.spread_px)
    radius = 2.0 if behind is not None else beam_near(common_pattern(clean))[2] / 2
    centred = Corrections(shape, size, beam, bad, hidden, descan)
    # Scale and ellipse from the rings of a known crystal, spots taken from each pattern's own centre.
    spots, fit = None, None
    if options.calibrate:
        places = centred.centres(sample.position)
        if descan is None and measured is not None:
            places = np.where(np.isfinite(measured), measured, places)
        spots = find_spots(clean, places, radius, hidden)
        fit, problems = _fit_rings(spots, options, scale, min(shape))
        notes += problems
    scale = fit.scale_inv_angstrom if fit is not None else scale
    if scale is None:
        raise UserError(f"{notes[-1]}; give --scale, 0.02 for instance")
    ellipse = options.given_ellipse or (fit and fit.ellipse)
    if ellipse is not None and ellipse.ellipticity < _MIN_ELLIPTICITY:
        ellipse = None
    if options.calibrate and options.flip == "none" and not options.scan_rotation:
        notes.append(_NO_HAND)
    background, beam_px = options.background == "on", max(3.0, 2.0 * radius / centred.factor)
    corrections = Corrections(shape, size, beam, bad, hidden, descan, ellipse, background, beam_px, options.flip)
    facts = _facts(corrections, options, fit, behind is not None)
    return Plan(corrections, scale, facts, notes, _evidence(sample, corrections, measured, spots, fit, options))


def _find_stop(
    raw: npt.NDArray[Any], options: CorrectionOptions, centre: Place | None, axes: Place | None
) -> tuple[Mask | None, Place | None]:
    """Return the hidden pixels, and the place of the direct beam where that is among them."""
    if options.beam_stop == "off":
        return None, None
    height, width = raw.shape[1:]
    middle = centre or axes or ((height - 1) / 2, (width - 1) / 2)
    given = None if options.beam_stop == "auto" else StopShape.parse(options.beam_stop)
    hidden = find_stop(raw)
    if hidden is None and given is not None:
        hidden = given.mask((height, width), middle)
    if hidden is None:
        return None, None
    place = centre or centre_by_symmetry(raw, hidden, middle)
    if given is not None:
        hidden = given.mask((height, width), place)
    row, column = (round(value) for value in place)
    return hidden, place if 0 <= row < height and 0 <= column < width and hidden[row, column] else None


def _find_bad_pixels(
    raw: npt.NDArray[Any], options: CorrectionOptions, hidden: Mask | None, centre: Place | None, notes: list[str]
) -> BadPixels:
    none = BadPixels(np.zeros(raw.shape[1:], bool), np.zeros(raw.shape[1:], bool))
    common = common_pattern(raw)
    if options.bad_pixels == "off" or not common.max() > 0:
        return none
    row, column, reach = beam_near(common)
    down, right = np.indices(common.shape)
    places = [(row, column)] if centre is None else [(row, column), centre]
    bad = find_bad_pixels(raw, np.any([np.hypot(down - y, right - x) <= reach for y, x in places], axis=0))
    if hidden is not None:
        bad = BadPixels(bad.hot & ~hidden, bad.dead & ~hidden)
    if bad.count > MAX_SHARE * common.size:
        notes.append(
            f"{bad.count:,} of {common.size:,} pixels look hot or dead, too many to be believed, so none is corrected"
        )
        return none
    return bad


def _find_beam(clean: npt.NDArray[Any], centre: Place | None, behind: Place | None, axes: Place | None) -> Centre:
    """Return the direct beam: as given, behind the stop, or fitted; the file's axes win where the fit confirms them."""
    if centre is not None:
        return Centre(*centre, 0.0)
    found = fit_centre(clean) if behind is None else Centre(*behind, 0.0)
    if axes is not None and max(abs(found.row - axes[0]), abs(found.column - axes[1])) < TRUSTED_PX:
        return Centre(*axes, found.spread_px)
    return found


def _find_descan(
    clean: npt.NDArray[Any],
    sample: Sample,
    options: CorrectionOptions,
    beam: Centre,
    centre: Place | None,
    behind: bool,
    notes: list[str],
) -> tuple[npt.NDArray[np.float64] | None, Descan | None]:
    """Return the measured centres, and the surface through them where it is to be used."""
    if options.descan == "off" or behind:
        if options.descan == "on":
            notes.append("the direct beam is behind the beam stop, so its drift over the scan cannot be measured")
        return None, None
    measured = measure_centres(clean, sample.position, sample.shape)
    descan = fit_descan(measured, sample.position, sample.shape)
    if descan is None:
        if options.descan == "on":
            seen = int(np.isfinite(measured).all(axis=1).sum())
            notes.append(
                f"the direct beam was found in {seen} patterns; a surface needs {MIN_CENTRES} all over the scan"
            )
        return measured, None
    if options.descan == "auto" and (centre is not None or not improves(descan, measured)):
        return measured, None
    return measured, descan if centre is None else descan.moved((beam.row, beam.column))


def _fit_rings(
    spots: SpotList, options: CorrectionOptions, scale: float | None, size: int
) -> tuple[RingFit | None, list[str]]:
    """Return the fit to the rings of the phase that was named, if it can be believed, and what to say about it."""
    from stemtune.crystal.phase import phase_from  # here, because most scans are calibrated by their file

    phase, given = phase_from(options.calibrate), options.given_ellipse
    if given is not None:
        x, y = (np.column_stack((spots.x, spots.y)) @ np.linalg.inv(given.matrix())).T
        spots = SpotList(spots.pattern, x, y)
    unchanged = "scale and ellipse stay as they were" if scale is not None else "the scale stays unknown"
    fit = fit_rings(spots, phase, scale, size, ellipse=options.ellipse == "auto")
    if fit is None:
        few = f"the sampled patterns show {len(spots.x)} spots, but {MIN_SPOTS} are needed to fit {phase.name}"
        return None, [f"{few}; {unchanged}"]
    if not (doubt := fit.doubt(scale is not None)):
        return fit, []
    if options.ellipse == "auto":
        circle = fit_rings(spots, phase, scale, size, ellipse=False)
        if circle is not None and not circle.doubt(scale is not None):
            best = f"{fit.ellipse.ellipticity:.1%} along {fit.ellipse.azimuth_deg:.0f}°"
            return circle, [f"the ellipse is uncertain ({doubt}; the best was {best}), so rings are taken as circles"]
    return None, [f"{phase.name} does not fit the spots: {doubt}; {unchanged}"]


def _facts(corrections: Corrections, options: CorrectionOptions, fit: RingFit | None, behind: bool) -> dict[str, Any]:
    descan, ellipse, hidden = corrections.descan, corrections.ellipse, corrections.hidden
    return {
        "bad_pixels": {"hot": int(corrections.bad.hot.sum()), "dead": int(corrections.bad.dead.sum())},
        "beam_stop": None if hidden is None else {"pixels": int(hidden.sum()), "hides_beam": behind},
        "descan": descan and {"order": descan.order, "drift_px": descan.drift_px, "residual_px": descan.residual_px},
        "ellipse": ellipse and ellipse._asdict(),
        "background": corrections.background,
        "flip": corrections.flip,
        "calibrated": fit
        and {
            "cif": options.calibrate,
            "scale_inv_angstrom": fit.scale_inv_angstrom,
            "scale_error": fit.scale_error,
            **fit.ellipse._asdict(),
            "ellipticity_error": fit.ellipticity_error,
            "spots": fit.spots,
            "share_on_rings": fit.share,
        },
    }


def _evidence(
    sample: Sample,
    corrections: Corrections,
    measured: npt.NDArray[np.float64] | None,
    spots: SpotList | None,
    fit: RingFit | None,
    options: CorrectionOptions,
) -> dict[str, npt.NDArray[Any]]:
    """Return what `plot.calibration` draws."""
    after = corrections(sample.patterns, sample.position)
    pixels = corrections.bad.hot.astype(np.uint8) + 2 * corrections.bad.dead.astype(np.uint8)
    if corrections.hidden is not None:
        pixels[corrections.hidden] = 3
    hidden = corrections.hidden_stored
    evidence = {
        "mean_before": sample.patterns.mean(axis=0, dtype=np.float64).astype(np.float32),
        "mean_after": after.mean(axis=0, dtype=np.float64).astype(np.float32),
        "pixels": pixels,
        "position": sample.position.astype(np.int32),
        "fitted_centre": corrections.centres(sample.position),
        "hidden": None if hidden is None else hidden.astype(np.uint8),
        "measured_centre": measured,
    }
    if spots is not None and fit is not None:
        from stemtune.crystal.phase import phase_from

        evidence["spot_before"] = fit.scale_inv_angstrom * np.hypot(spots.x, spots.y)
        evidence["spot_after"] = fit.distance
        evidence["rings"] = rings(phase_from(options.calibrate), 1.05 * float(fit.distance.max()))[0]
    return {name: array for name, array in evidence.items() if array is not None}
