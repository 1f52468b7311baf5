"""How wrong labels are when only the most confident of them are kept, and what networks trained on those reach."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stemtune._files import whole_file
from stemtune.analysis.evaluation.evaluate import RIGHT_DEG, in_percent, write_figures
from stemtune.analysis.evaluation.ground_truth import Truth, grid_pixel, grid_shape, read_truth
from stemtune.crystal.symmetry import disorientation_beam180_deg, disorientation_deg
from stemtune.crystal_map.scan_rotation import scan_rotation_deg, to_scan_frame
from stemtune.dataset.selection import CONFIDENCE, score_of
from stemtune.dataset.store import Store
from stemtune.errors import UserError
from stemtune.learning.checkpoint import read_description
from stemtune.plot.figures import save

SHARES = tuple(round(1 - 0.05 * step, 2) for step in range(20))
"""Shares of the labels that are kept, best first."""

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which colour-blind readers can tell apart."""

_MARKERS = "osD^vP*"

UNTRAINED = "matched"
"""The architecture that learns nothing from the labels, and is drawn as a line to compare with."""


def judge_labels(
    store: str | os.PathLike[str],
    truth: str | os.PathLike[str],
    png: str | os.PathLike[str],
    models: Sequence[str | os.PathLike[str]] = (),
    json: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Return and draw the error of labels, and of models trained on them, against the share of labels that is kept.

    Parameters
    ----------
    store
        The labelled store.
    truth
        What is right, as `analysis.evaluation.ground_truth.read_truth` takes it.
    png
        The picture.
    models
        Model folders; see `networks`.
    json
        File for the figures.
    """
    result = label_risk(store, read_truth(truth)) | {"networks": networks(models)}
    write_figures(result, json)
    with whole_file(png) as part:
        draw_risk(result, part)
    return result


def risk_in_words(figures: dict[str, Any]) -> str:
    """Return the figures of `judge_labels` as a table: shares that are more than 5 degrees off."""
    lines = [
        f"{figures['labels']:,} labels; more than 5° from the truth of the best",
        "kept         100%    75%    50%    25%",
    ]
    for name, curve in figures["scores"].items():
        wrong = dict(zip(curve["kept"], curve["wrong"], strict=True))
        lines.append(f"{name:10s} " + " ".join(f"{in_percent(wrong[share]):>6s}" for share in (1.0, 0.75, 0.5, 0.25)))
    lines += [
        f"{entry['model']}: {entry['architecture']} on {in_percent(entry['kept'])} by {entry['score']}, seed"
        f" {entry['seed']}: {in_percent(entry['wrong'])} ({in_percent(entry['wrong_beam180'])} modulo beam-180),"
        f" median {entry['median_deg']:.2f}°"
        for entry in figures["networks"]
    ]
    return "\n".join(lines)


def label_risk(store: str | os.PathLike[str], truth: Truth) -> dict[str, Any]:
    """Return the error of a store's labels against the truth as a function of the share that is kept.

    Parameters
    ----------
    store
        The labelled store.
    truth
        What is right, on the same scan.

    Returns
    -------
    dict
        `labels`, how many there are, and for every score under `scores` (the confidence and the labeller's own) lists
        of the same length: `kept`, the share of the labels with the best scores; `limit`, the score of the last of
        them; `wrong`, the share of these that is more than 5 degrees off, a label where there is no crystal counting
        as wrong; `wrong_beam180`, the same modulo half a turn about the beam; `median_deg`, their median error.

    Raises
    ------
    UserError
        When the store is no labelled one of that scan.
    """
    with Store.open(store) as opened:
        if not opened.labelled.any():
            raise UserError(f"'{store}' has no labels; `stemtune label` makes them")
        if grid_shape(opened) != truth.shape:
            raise UserError(f"'{store}' has {grid_shape(opened)} patterns, but the truth {truth.shape} pixels")
        rows = np.flatnonzero(opened.labelled)
        strict, modulo = _errors(opened, rows, truth)
        scores = {name: score_of(opened, name, "score")[rows] for name in (CONFIDENCE, *opened.scores)}
    result = {}
    for name, score in scores.items():
        if score.min() == score.max():
            continue  # says nothing about any label
        best = np.argsort(-score, kind="stable")
        count = [max(1, round(share * len(rows))) for share in SHARES]
        result[name] = {
            "kept": list(SHARES),
            "limit": [float(score[best[n - 1]]) for n in count],
            "wrong": [float((strict[best[:n]] >= RIGHT_DEG).mean()) for n in count],
            "wrong_beam180": [float((modulo[best[:n]] >= RIGHT_DEG).mean()) for n in count],
            "median_deg": [float(np.median(strict[best[:n]])) for n in count],
        }
    return {"labels": len(rows), "scores": result}


def _errors(
    store: Store, rows: npt.NDArray[np.intp], truth: Truth
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return how many degrees labels are off, strictly and modulo beam-180; 180 where there is no crystal."""
    pixel = grid_pixel(store)[rows]
    strict, modulo = np.full(len(rows), 180.0), np.full(len(rows), 180.0)
    laue = np.array([*truth.laue, ""])[truth.phase[pixel]]
    label = to_scan_frame(store.orientation[rows], scan_rotation_deg(store.attrs))
    for number, phase in enumerate(store.phases):
        own = (store.phase[rows] == number) & (laue == phase.symmetry.laue)
        given, right = torch.from_numpy(label[own]), torch.from_numpy(truth.orientation[pixel[own]])
        strict[own] = disorientation_deg(given, right, phase.symmetry).nan_to_num(nan=180.0).numpy()
        modulo[own] = disorientation_beam180_deg(given, right, phase.symmetry).nan_to_num(nan=180.0).numpy()
    return strict, modulo


def networks(models: Sequence[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """Return, for each model folder, on which labels it was trained and how far it then was from its validation labels.

    A model says nothing about the truth unless it was validated on it (`data.validation_store`), so others are refused.
    """
    found = []
    for folder in models:
        described = read_description(folder)
        settings, metrics = described["config"], described.get("metrics", {})
        if not settings.get("data.validation_store"):
            raise UserError(f"the model '{folder}' was not validated on a truth (`data.validation_store`)")
        found.append(
            {
                "model": Path(folder).name,
                "architecture": described.get("architecture"),
                "score": settings["data.score"],
                "kept": settings["data.keep_fraction"],
                "cut": settings["data.cut"],
                "seed": settings["train.seed"],
                "truth": Path(settings["data.validation_store"]).name,
                "wrong": 1 - metrics["val/within_5deg"],
                "wrong_beam180": 1 - metrics["val/within_5deg_beam180"],
                "median_deg": metrics["val/disorientation_median_deg"],
            }
        )
    return sorted(found, key=lambda entry: (entry["score"], entry["kept"], entry["seed"]))


def draw_risk(figures: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw the error of the labels, and beside it that of networks where there are any, against the share kept."""
    from matplotlib.figure import Figure

    trained = figures.get("networks") or []
    figure = Figure(figsize=(8.6 if trained else 4.6, 3.8), dpi=150, facecolor="white", layout="constrained")
    panels = figure.subplots(1, 2 if trained else 1, sharex=True, squeeze=False)[0]
    style = {name: (_COLOURS[k % 7], _MARKERS[k % 7]) for k, name in enumerate(figures["scores"])}
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
    save(figure, path)


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
