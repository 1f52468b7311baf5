"""How wrong labels are when only the most confident of them are kept, and what networks trained on those reach."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stemtune.analysis.evaluation.evaluate import RIGHT_DEG, disorientations_deg, in_percent
from stemtune.crystal_map.frame_rotations import scan_rotation_deg, to_scan_frame
from stemtune.crystal_map.orientation_map import NOT_INDEXED, OrientationMap
from stemtune.dataset.selection import CONFIDENCE, score_of
from stemtune.dataset.store import Store
from stemtune.errors import UserError
from stemtune.learning.checkpoint import read_description

SHARES = tuple(round(1 - 0.05 * step, 2) for step in range(20))
"""Shares of the labels that are kept, best first."""


def describe_risk(figures: dict[str, Any]) -> str:
    """Return the figures of `label_risk` and `networks` as a table: shares that are more than 5 degrees off."""
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


def label_risk(store: str | os.PathLike[str], truth: OrientationMap) -> dict[str, Any]:
    """Return the error of a labelled store's labels against the truth of the same scan, by the share that is kept.

    Returns
    -------
    dict
        `labels`, how many there are, and for every score under `scores` (the confidence and the labeller's own) lists
        of the same length: `kept`, the share of the labels with the best scores; `limit`, the score of the last of
        them; `wrong`, the share of these that is more than 5 degrees off, a label where there is no crystal counting
        as wrong; `wrong_beam180`, the same modulo half a turn about the beam; `median_deg`, their median error.

    Raises `UserError` when the store is no labelled one of that scan.
    """
    with Store.open(store) as opened:
        if not opened.labelled.any():
            raise UserError(f"'{store}' has no labels; `stemtune label` makes them")
        if opened.grid_shape != truth.shape:
            raise UserError(f"'{store}' has {opened.grid_shape} patterns, but the truth {truth.shape} pixels")
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
    store: Store, rows: npt.NDArray[np.intp], truth: OrientationMap
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return how many degrees labels are off, strictly and modulo beam-180; 180 where there is no crystal."""
    pixel = store.grid_pixel()[rows]
    laue = np.array([phase.symmetry.laue for phase in store.phases])[store.phase[rows]]
    phase = np.where(laue == truth.laue[pixel], store.phase[rows], NOT_INDEXED)
    label = to_scan_frame(store.orientation[rows], scan_rotation_deg(store.attrs))
    pair = (label, truth.orientation[pixel], phase, store.phases)
    strict, modulo = disorientations_deg(*pair), disorientations_deg(*pair, modulo_beam180=True)
    return np.nan_to_num(strict, nan=180.0), np.nan_to_num(modulo, nan=180.0)


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
