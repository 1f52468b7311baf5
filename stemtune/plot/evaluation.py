"""Pictures of what `analysis.evaluation` finds: a map beside its truth, labels kept by a score, two maps."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from stemtune._files import whole_file
from stemtune.analysis.evaluation.agreement import difference_deg
from stemtune.crystal_map.orientation_map import OrientationMap
from stemtune.errors import UserError
from stemtune.plot.figures import draw_scalar, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which colour-blind readers can tell apart."""

_BLUE, _ORANGE, _GREEN, _GREY = *COLOURS[:3], "0.6"
_MARKERS = "osD^vP*"

UNTRAINED = "matched"
"""The architecture that learns nothing from labels, drawn as a line to compare with."""

HIGHEST_DIFFERENCE_DEG = 15.0
"""Disorientations of two maps from here on have one colour."""


def draw_evaluation(figures: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw the figures of `analysis.evaluation.evaluate.compare` as a PNG of four panels.

    The reliability diagram, with the standard deviation that chance gives each bin, over the number of pixels of each
    confidence; the risk-coverage curve; what the answers are; and precision and recall of the boundaries. A `UserError`
    where no pixel is indexed as the phase of the truth.
    """
    from matplotlib.figure import Figure

    if "reliability" not in figures:
        raise UserError("there is nothing to draw: no pixel is indexed as the phase that the truth has there")
    figure = Figure(figsize=(9.6, 8.4), dpi=200, facecolor="white")
    upper = figure.add_axes((0.08, 0.66, 0.38, 0.28))
    lower = figure.add_axes((0.08, 0.56, 0.38, 0.08), sharex=upper)
    panels = [figure.add_axes(box) for box in ((0.58, 0.56, 0.38, 0.38), (0.16, 0.07, 0.30, 0.38))]
    last = figure.add_axes((0.58, 0.07, 0.38, 0.38))
    _reliability(upper, lower, figures["reliability"])
    _coverage(panels[0], figures["risk_coverage"])
    _confusion(panels[1], figures["pseudo_symmetry"])
    _boundaries(last, figures.get("boundaries"))
    for letter, axes in zip("abcd", (upper, panels[0], panels[1], last), strict=True):
        axes.set_title(f"({letter}) {axes.get_title(loc='left')}", loc="left", fontsize=9.5)
    for axes in (upper, lower, *panels, last):
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    with whole_file(path) as part:
        save(figure, part)


def _reliability(upper: Axes, lower: Axes, figures: dict[str, Any]) -> None:
    bins = figures["bins"]
    stated = np.array([entry["mean_confidence"] for entry in bins])
    found = np.array([entry["within_5deg"] for entry in bins])
    pixels = np.array([entry["pixels"] for entry in bins])
    chance = np.sqrt(np.clip(found * (1 - found), 0.25 / (pixels + 1), None) / pixels)
    upper.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle="--", label="a true probability")
    upper.errorbar(
        stated, found, yerr=chance, fmt="o-", color=_BLUE, markersize=4, linewidth=1, capsize=2, label="this map"
    )
    upper.set_xlim(-0.02, 1.02)
    upper.set_ylim(-0.02, 1.02)
    upper.set_ylabel("share within 5° of the truth", fontsize=9)
    upper.legend(loc="upper left", frameon=False, fontsize=8)
    upper.tick_params(labelbottom=False)
    error, by_chance = figures["calibration_error"], figures["calibration_error_by_chance"]
    upper.set_title(f"calibration error {error:.3f} ({by_chance:.3f} by chance)", loc="left")
    counts = np.array(figures["histogram"])
    lower.bar((np.arange(len(counts)) + 0.5) / len(counts), counts, width=0.92 / len(counts), color=_BLUE)
    lower.set_xlabel("stated confidence", fontsize=9)
    lower.set_ylabel("pixels", fontsize=9)


def _coverage(axes: Axes, figures: dict[str, Any]) -> None:
    kept, wrong = np.array(figures["kept"]), np.array(figures["wrong"])
    axes.axhline(figures["area_of_chance"], color=_GREY, linewidth=1, linestyle="--", label="kept at random")
    axes.plot(kept, wrong, "o-", color=_BLUE, markersize=3.5, linewidth=1, label="kept by confidence")
    bad = figures["area_of_chance"]
    share = np.linspace(0.01, 1, 200)
    perfect = np.clip(share - (1 - bad), 0, None) / share
    axes.plot(share, perfect, color=_GREEN, linewidth=1, linestyle=":", label="if it were perfect")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, max(1.15 * float(max(wrong.max(), bad)), 0.01))
    axes.set_xlabel("share of the pixels kept, most confident first", fontsize=9)
    axes.set_ylabel("share of those more than 5° off", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(f"risk and coverage, area {figures['area']:.4f}", loc="left")


def _confusion(axes: Axes, shares: dict[str, float]) -> None:
    names = list(shares)
    place = np.arange(len(names))[::-1]
    values = np.array([shares[name] for name in names])
    colours = [_GREEN if name == "right" else _ORANGE if name == "other" else _BLUE for name in names]
    axes.barh(place, values, color=colours, height=0.7)
    for height, value in zip(place, values, strict=True):
        axes.text(value + 0.015, height, f"{value:.1%}", va="center", fontsize=8)
    axes.set_yticks(place, names)
    axes.set_xlim(0, 1.15)
    axes.set_xlabel("share of the answers", fontsize=9)
    axes.set_title("what the answers are", loc="left")


def _boundaries(axes: Axes, rows: list[dict[str, Any]] | None) -> None:
    axes.set_title("boundaries, to within a pixel", loc="left")
    axes.set_xlabel("least disorientation across the boundary (degrees)", fontsize=9)
    axes.set_ylabel("share", fontsize=9)
    axes.set_ylim(0, 1.04)
    if not rows or all(entry["edges_of_truth"] == 0 for entry in rows):
        axes.text(0.5, 0.5, "the truth has no boundaries", transform=axes.transAxes, ha="center", fontsize=9)
        return
    for name, colour, marker in (("precision", _BLUE, "o"), ("recall", _ORANGE, "s")):
        shares = [np.nan if entry[name] is None else entry[name] for entry in rows]
        axes.plot([entry["threshold_deg"] for entry in rows], shares, f"{marker}-", color=colour, label=name)
    axes.set_xlim(0, None)
    axes.legend(frameon=False, fontsize=8, loc="lower left")


def draw_risk(figures: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw the error of the labels, and beside it that of networks where there are any, against the share kept."""
    from matplotlib.figure import Figure

    trained = figures.get("networks") or []
    figure = Figure(figsize=(8.6 if trained else 4.6, 3.8), dpi=150, facecolor="white", layout="constrained")
    panels = figure.subplots(1, 2 if trained else 1, sharex=True, squeeze=False)[0]
    style = {name: (COLOURS[k % 7], _MARKERS[k % 7]) for k, name in enumerate(figures["scores"])}
    for name, curve in figures["scores"].items():
        colour, marker = style[name]
        kept, wrong = 100 * np.array(curve["kept"]), 100 * np.array(curve["wrong"])
        panels[0].plot(kept, wrong, color=colour, marker=marker, markersize=3.5, linewidth=1.2, label=f"by {name}")
    panels[0].set_title(f"Labels ({figures['labels']:,})", loc="left", fontsize=10)
    panels[0].set_ylabel("more than 5° from the truth, %")
    if trained:
        _draw_networks(panels[1], trained, style)
    for axes in panels:
        axes.set_xlim(105, 0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("labels kept, best first, %")
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    with whole_file(path) as part:
        save(figure, part)


def _draw_networks(axes: Any, trained: list[dict[str, Any]], style: dict[str, tuple[str, str]]) -> None:
    truth = ", ".join(dict.fromkeys(entry["truth"] for entry in trained))
    axes.set_title(f"Networks trained on them, judged on {truth}", loc="left", fontsize=10)
    for entry in trained:
        if entry["architecture"] == UNTRAINED:
            axes.axhline(
                100 * entry["wrong"], color="0.4", linestyle="--", linewidth=1, label=f"{UNTRAINED}, untrained"
            )
    trained = [entry for entry in trained if entry["architecture"] != UNTRAINED]
    for name in dict.fromkeys(entry["score"] for entry in trained):
        colour, marker = style.get(name, ("0.4", "o"))
        own = [entry for entry in trained if entry["score"] == name]
        kept = sorted({entry["kept"] for entry in own}, reverse=True)
        mean = [100 * np.mean([entry["wrong"] for entry in own if entry["kept"] == share]) for share in kept]
        axes.plot([100 * share for share in kept], mean, color=colour, linewidth=1.2, label=f"by {name} (mean)")
        places, wrong = [100 * entry["kept"] for entry in own], [100 * entry["wrong"] for entry in own]
        axes.plot(places, wrong, linestyle="", color=colour, marker=marker, markersize=4, alpha=0.6)


def draw_difference(orientation_map: OrientationMap, other: OrientationMap, path: str | os.PathLike[str]) -> None:
    """Draw the disorientation of two maps as a PNG."""
    angles = difference_deg(orientation_map, other)
    known = angles[np.isfinite(angles)]
    share = float((known < 5).mean()) if len(known) else 0.0
    with whole_file(path) as part:
        draw_scalar(
            angles.reshape(orientation_map.shape),
            part,
            step=orientation_map.step_nm,
            title=f"Disorientation of the two maps: {share:.1%} within 5°",
            label="degrees",
            note=f"{HIGHEST_DIFFERENCE_DEG:g}° and more in one colour. Grey: not both indexed, as the same Laue class.",
            limits=(0.0, HIGHEST_DIFFERENCE_DEG),
            beyond=True,
        )
