"""The reliability diagram: how often answers of a stated confidence are right."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from stemtune.maps.figures import save


def draw_reliability(figures: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw the `reliability` of `maps.evaluate.compare` as a PNG.

    Above, the share of right answers against the stated confidence, one point per bin with the standard deviation that
    chance gives it; on the diagonal the confidence is a probability. Below, how many pixels each confidence has.

    Parameters
    ----------
    figures
        What `compare` returns under `reliability`.
    path
        The PNG.
    """
    from matplotlib.figure import Figure

    bins = figures["bins"]
    stated = np.array([entry["mean_confidence"] for entry in bins])
    found = np.array([entry["within_5deg"] for entry in bins])
    pixels = np.array([entry["pixels"] for entry in bins])
    chance = np.sqrt(np.clip(found * (1 - found), 0.25 / (pixels + 1), None) / pixels)
    figure = Figure(figsize=(4.6, 5.4), dpi=200, facecolor="white")
    upper = figure.add_axes((0.14, 0.36, 0.82, 0.55))
    lower = figure.add_axes((0.14, 0.10, 0.82, 0.19))
    upper.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="a true probability")
    upper.errorbar(stated, found, yerr=chance, fmt="o-", markersize=4, linewidth=1, capsize=2, label="this map")
    upper.set_xlim(-0.02, 1.02)
    upper.set_ylim(-0.02, 1.02)
    upper.set_ylabel("share within 5° of the truth")
    upper.legend(loc="upper left", frameon=False, fontsize=8)
    error, by_chance = figures["calibration_error"], figures["calibration_error_by_chance"]
    title = f"Expected calibration error {error:.3f} ({by_chance:.3f} by chance alone)"
    figure.text(0.02, 0.965, title, fontsize=9.5, va="top")
    counts = np.array(figures["histogram"])
    lower.bar((np.arange(len(counts)) + 0.5) / len(counts), counts, width=1 / len(counts), color="tab:blue")
    lower.set_xlim(-0.02, 1.02)
    lower.set_xlabel("stated confidence")
    lower.set_ylabel("pixels")
    for axes in (upper, lower):
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)
