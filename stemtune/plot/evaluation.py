"""What is known of a map and its truth as one picture of four panels."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from stemtune.plot.figures import save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "0.6"  # Okabe and Ito's


def draw_evaluation(figures: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw the figures of `analysis.evaluation.evaluate.compare` as a PNG.

    Panels: the reliability diagram, with the standard deviation that chance gives each bin, over the number of pixels
    of each confidence; the risk-coverage curve; what the answers are; and precision and recall of the boundaries.

    Parameters
    ----------
    figures
        What `compare` returns where some pixel is indexed as the phase of the truth.
    path
        The PNG.
    """
    from matplotlib.figure import Figure

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
    save(figure, path)


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


def _boundaries(axes: Axes, told: list[dict[str, Any]] | None) -> None:
    axes.set_title("boundaries, to within a pixel", loc="left")
    axes.set_xlabel("least disorientation across the boundary (degrees)", fontsize=9)
    axes.set_ylabel("share", fontsize=9)
    axes.set_ylim(0, 1.04)
    if not told or all(entry["edges_of_truth"] == 0 for entry in told):
        axes.text(0.5, 0.5, "the truth has no boundaries", transform=axes.transAxes, ha="center", fontsize=9)
        return
    for name, colour, marker in (("precision", _BLUE, "o"), ("recall", _ORANGE, "s")):
        shares = [np.nan if entry[name] is None else entry[name] for entry in told]
        axes.plot([entry["threshold_deg"] for entry in told], shares, f"{marker}-", color=colour, label=name)
    axes.set_xlim(0, None)
    axes.legend(frameon=False, fontsize=8, loc="lower left")


__all__ = ["draw_evaluation"]
