"""What ingest found and did to a scan in one picture: before and after, centres, rings, pixels."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stemtune._files import whole_file
from stemtune.dataset.schema import kind_of
from stemtune.dataset.store import Store
from stemtune.scan.corrections import corrections_of, describe_corrections
from stemtune.scan.ellipse import Ellipse

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DARK, _LIGHT, _ACCENT, _COOL = "#11141b", "#ebe7df", "#f2b35d", "#6cc3d5"
_GAMMA, _DPI = 0.25, 150
_RING = 0.62  # radius of the drawn ring, in half widths of the pattern
_KINDS = ((1, "hot", "#ff5c5c", "o"), (2, "dead", "#8fb8ff", "s"))


def draw_calibration(store: Store, png: str | os.PathLike[str]) -> bool:
    """Draw what ingest did to the scan in `store` to the picture `png`; say whether the store tells."""
    shown = store.calibration
    if "mean_before" not in shown or "mean_after" not in shown:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.6, 7.2), dpi=_DPI, facecolor=_DARK)
    panels = figure.subplots(2, 3, gridspec_kw={"width_ratios": (1, 1, 1.12)})
    figure.subplots_adjust(0.02, 0.115, 0.98, 0.885, 0.14, 0.24)
    attrs, facts = store.attrs, corrections_of(store.attrs)
    before, after = shown["mean_before"], shown["mean_after"]
    centre = attrs.get("origin_centre_px") or [(length - 1) / 2 for length in before.shape]
    ellipse = Ellipse(**facts["ellipse"]) if facts.get("ellipse") else None
    _before(panels[0, 0], shown, centre, ellipse)
    middle = ((store.size - 1) / 2,) * 2
    _image(panels[0, 1], after, "after: mean of the stored patterns")
    _ring(panels[0, 1], middle, _RING * store.size / 2, None, None, "o" if ellipse is None else "")
    _shade(panels[0, 1], shown.get("hidden"))
    _pixels(panels[1, 0], shown)
    _closer(panels[1, 1], after, middle)
    _centres(panels[0, 2], shown, facts)
    if "rings" in shown:
        _distances(panels[1, 2], shown)
    else:
        _profiles(panels[1, 2], before, after, centre, middle, store.geometry.scale_inv_angstrom)
    title = f"{store.path.name}: what was found in {attrs.get('origin', 'the scan')}, and what was done"
    figure.text(0.03, 0.965, title, color=_LIGHT, fontsize=10.5, weight="bold", va="top")
    words = describe_corrections(attrs) or "patterns are as they were measured, with the direct beam in the middle"
    figure.text(0.03, 0.03, words, color=_LIGHT, fontsize=7.5, va="center", wrap=True)
    with whole_file(png) as part:
        figure.savefig(part, format="png", facecolor=_DARK)
    return True


def calibration_picture(path: str | os.PathLike[str], png: str | os.PathLike[str]) -> Path | None:
    """Draw, beside the contact sheet `png`, what ingest did to the store at `path`.

    Returns
    -------
    Path
        Of the picture; None where `path` is no store of a measured scan.
    """
    if kind_of(Path(path)) != "store":
        return None
    target = Path(png).with_name(Path(png).stem + "-calibration.png")
    with Store.open(path) as store:
        return target if draw_calibration(store, target) else None


def _before(axes: Axes, shown: Mapping[str, npt.NDArray[Any]], centre: list[float], ellipse: Ellipse | None) -> None:
    before = shown["mean_before"]
    _image(axes, before, "before: mean of the sampled patterns")
    radius = _RING * min(before.shape) / 2
    _ring(axes, centre, radius, None, ":" if ellipse else None, "")
    if ellipse is not None:
        _ring(axes, centre, radius, ellipse, None, f"ellipse {ellipse.ellipticity:.1%}")
    axes.plot([centre[1]], [centre[0]], "+", color=_ACCENT, markersize=9, markeredgewidth=0.9)
    _shade(axes, shown.get("pixels", np.zeros(before.shape)) == 3)


def _image(axes: Axes, counts: npt.NDArray[Any], title: str) -> None:
    bright = np.clip(counts.astype(np.float64), 0, None) ** _GAMMA
    low, high = np.percentile(bright, (3, 99.9))
    axes.imshow(bright, cmap="magma", interpolation="nearest", vmin=low, vmax=max(high, low + 1e-9))
    axes.set_axis_off()
    axes.set_title(title, color=_LIGHT, fontsize=8.5, loc="left", pad=4)
    height, width = counts.shape
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)


def _ring(
    axes: Axes,
    centre: list[float] | tuple[float, ...],
    radius: float,
    ellipse: Ellipse | None,
    style: str | None,
    label: str,
) -> None:
    angle = np.linspace(0, 2 * math.pi, 241)
    points = radius * np.stack((np.cos(angle), np.sin(angle)))
    if ellipse is not None:
        points = ellipse.matrix() @ points
    axes.plot(centre[1] + points[0], centre[0] - points[1], style or "-", color=_COOL, linewidth=0.8, alpha=0.9)
    if len(label) > 1:
        axes.text(0.03, 0.03, label, transform=axes.transAxes, color=_COOL, fontsize=7.5)


def _shade(axes: Axes, hidden: npt.NDArray[Any] | None) -> None:
    if hidden is not None and hidden.any() and not hidden.all():
        axes.contour(hidden.astype(float), levels=[0.5], colors=[_LIGHT], linewidths=0.8)


def _pixels(axes: Axes, shown: Mapping[str, npt.NDArray[Any]]) -> None:
    before, kinds = shown["mean_before"], shown.get("pixels")
    kinds = np.zeros(before.shape, dtype=np.uint8) if kinds is None else kinds
    counted = [f"{int((kinds == number).sum())} {name}" for number, name, _, _ in _KINDS]
    _image(axes, before, f"pixels: {', '.join(counted)}, {int((kinds == 3).sum()):,} behind a stop")
    for number, _, colour, marker in _KINDS:
        row, column = np.nonzero(kinds == number)
        axes.scatter(column, row, s=26, marker=marker, facecolors="none", edgecolors=colour, linewidths=0.9)
    _shade(axes, kinds == 3)


def _closer(axes: Axes, after: npt.NDArray[Any], middle: tuple[float, ...]) -> None:
    """Draw the surroundings of the direct beam after centring, with its place."""
    half = max(8, round(0.09 * len(after)))
    low = max(0, math.ceil(middle[0] - half))
    part = after[low : len(after) - low, low : len(after) - low]
    _image(axes, part, "after, closer: the direct beam in the middle")
    place = middle[0] - low
    for turned in (False, True):
        for sign in (-1, 1):
            ends = [place + sign * 0.35 * half, place + sign * 0.95 * half]
            axes.plot(*((ends, [place, place])[:: -1 if turned else 1]), color=_ACCENT, linewidth=0.8)


def _plain(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_facecolor("#1a1f29")
    axes.set_title(title, color=_LIGHT, fontsize=8.5, loc="left", pad=4)
    axes.set_xlabel(x, color=_LIGHT, fontsize=7.5, labelpad=2)
    axes.set_ylabel(y, color=_LIGHT, fontsize=7.5, labelpad=2)
    axes.tick_params(colors=_LIGHT, labelsize=7, length=2)
    for spine in axes.spines.values():
        spine.set_color("#4a5160")


def _centres(axes: Axes, shown: Mapping[str, npt.NDArray[Any]], facts: Mapping[str, Any]) -> None:
    """Draw where the beam was measured in the file's patterns, coloured along the scan, and the fitted surface."""
    fitted, place = shown["fitted_centre"], shown["position"]
    measured = shown.get("measured_centre")
    surface = "a surface" if facts.get("descan") else "one centre for all"
    _plain(axes, f"direct beam in the file: {surface}", "column / px", "row / px")
    if measured is not None:
        axes.scatter(measured[:, 1], measured[:, 0], c=place[:, 0], cmap="viridis", s=7, linewidths=0, alpha=0.85)
        spread = np.nanpercentile(measured, (3, 97), axis=0)
    else:
        spread = np.stack((fitted.min(axis=0), fitted.max(axis=0)))
    axes.scatter(fitted[:, 1], fitted[:, 0], s=9, marker="+", color=_ACCENT, linewidths=0.7, label="used")
    half = max(0.75, 0.75 * float(np.max(spread[1] - spread[0])), 0.6 * float(np.ptp(fitted, axis=0).max()))
    row, column = (fitted.max(axis=0) + fitted.min(axis=0)) / 2
    axes.set_xlim(column - half, column + half)
    axes.set_ylim(row + half, row - half)
    axes.set_box_aspect(1)
    note = "dots: measured, from the first scan row (dark)\nto the last (light); crosses: used"
    axes.text(0.02, 0.02, note, transform=axes.transAxes, color=_LIGHT, fontsize=5.6)


def _distances(axes: Axes, shown: Mapping[str, npt.NDArray[Any]]) -> None:
    """Draw how far spots are from the beam, before and after, over the rings of the phase."""
    before, after, rings = shown["spot_before"], shown["spot_after"], shown["rings"]
    reach = min(float(np.percentile(after, 98)), rings[0] * 4 if len(rings) else np.inf)
    edges = np.linspace(0, reach, 200).tolist()
    _plain(axes, "distance of spots from the beam", "1/Å", "spots")
    axes.hist(before[before < reach], edges, color="#7b8494", alpha=0.7, label="before")
    axes.hist(after[after < reach], edges, color=_ACCENT, alpha=0.75, label="after")
    for ring in rings[rings < reach]:
        axes.axvline(ring, color=_COOL, linewidth=0.7, alpha=0.8, zorder=0)
    axes.set_xlim(0.7 * rings[0] if len(rings) else 0, reach)
    legend = axes.legend(fontsize=7, frameon=False, labelcolor=_LIGHT, title="lines: the phase", title_fontsize=6.5)
    legend.get_title().set_color(_COOL)


def _profiles(
    axes: Axes,
    before: npt.NDArray[Any],
    after: npt.NDArray[Any],
    centre: list[float],
    middle: tuple[float, ...],
    scale: float,
) -> None:
    _plain(axes, "mean count at a distance from the beam", "1/Å", "counts")
    factor = min(before.shape) / len(after)
    for counts, place, step, colour, label in (
        (before, centre, scale / factor, "#9aa3b2", "before"),
        (after, middle, scale, _ACCENT, "after"),
    ):
        row, column = np.indices(counts.shape)
        ring = np.rint(np.hypot(row - place[0], column - place[1])).astype(int).ravel()
        total, number = np.bincount(ring, counts.ravel()), np.bincount(ring)
        reach = min(counts.shape) // 2
        mean = (total / np.maximum(number, 1))[:reach] * (1 if label == "before" else 1 / factor**2)
        seen = (number[:reach] > 0) & (mean > 0)
        axes.semilogy(np.arange(reach)[seen] * step, mean[seen], color=colour, linewidth=1.1, label=label)
    axes.legend(fontsize=7, frameon=False, labelcolor=_LIGHT)
