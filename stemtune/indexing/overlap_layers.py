"""Overlapping grains in a map: the second crystal of every pattern that holds two, as layers of the map."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stemtune.crystal.symmetry import disorientation_deg
from stemtune.crystal_map.frame_rotations import scan_rotation_deg, to_scan_frame
from stemtune.crystal_map.orientation_map import OrientationMap
from stemtune.indexing.overlap import CrystalPairs, OverlapFinder
from stemtune.indexing.phase_choice import PhaseChoice
from stemtune.indexing.predictor import Predictor
from stemtune.learning.model import DIFFERENT_DEG

SECOND_LAYER, WEIGHT_LAYER = "orientation2", "weight2"
"""Layers: orientation (n, 4) of the weaker crystal, and its share (n,) of the counts of both; NaN where single."""


def find_overlaps(predictor: Predictor, rows: npt.NDArray[np.intp], best: npt.NDArray[np.float64]) -> CrystalPairs:
    """Return what the patterns `rows` of the predictor's store hold, whose best answers are `best` (n, 4); at least one
    row."""
    finder = OverlapFinder(predictor.model, predictor.proposals, predictor.device)
    parts: list[CrystalPairs] = []
    done = 0
    for patterns in predictor.resampled(rows, "overlaps"):
        parts.append(finder.find(patterns, torch.from_numpy(best[done : done + len(patterns)])))
        done += len(patterns)
    return CrystalPairs(*(torch.cat([column.cpu() for column in columns]) for columns in zip(*parts, strict=True)))


def with_overlaps(
    orientation_map: OrientationMap,
    predictors: Sequence[Predictor],
    choice: PhaseChoice,
    pixel: npt.NDArray[np.intp],
) -> OrientationMap:
    """Return a copy of the map that tells where patterns hold two crystals of one phase.

    Where they do, the stronger crystal is the pixel's best answer.

    Parameters
    ----------
    orientation_map
        The map.
    predictors
        One for each phase.
    choice
        The predictions for the patterns (m), and which predictor made them.
    pixel
        Where each pattern stands (m,).
    """
    n = len(orientation_map.phase)
    second, weight = np.full((n, 4), np.nan), np.full(n, np.nan, dtype=np.float32)
    answers, confidence = orientation_map.answers.copy(), orientation_map.answer_confidence.copy()
    ncc = None if orientation_map.ncc is None else orientation_map.ncc.copy()
    for index, predictor in enumerate(predictors):
        rows = np.flatnonzero(choice.model == index)
        if not len(rows):
            continue
        found = find_overlaps(predictor, rows, choice.predictions.candidates[rows, 0])
        two = found.two.numpy()
        place = pixel[rows[two]]
        pair = torch.nn.functional.normalize(found.orientation[two].double(), dim=-1)
        pair = torch.from_numpy(to_scan_frame(pair.numpy(), scan_rotation_deg(orientation_map.attrs)))
        second[place], weight[place] = pair[:, 1].numpy(), found.weight[two, 1].numpy()
        off = disorientation_deg(pair[:, :1], torch.from_numpy(answers[place]), predictor.model.phase.symmetry).numpy()
        off = np.nan_to_num(off, nan=np.inf)
        known = off.min(axis=1) < DIFFERENT_DEG
        _first(place[known], off.argmin(axis=1)[known], answers, confidence, ncc)
        new = place[~known]  # one that the model has not named: it says nothing of its confidence
        answers[new, 0], confidence[new, 0] = pair[~known, 0].numpy(), 0
        if ncc is not None:
            ncc[new, 0] = np.nan
    return dataclasses.replace(
        orientation_map,
        answers=answers,
        answer_confidence=confidence,
        ncc=ncc,
        layers={**orientation_map.layers, SECOND_LAYER: second, WEIGHT_LAYER: weight},
    )


def _first(rows: npt.NDArray[np.intp], place: npt.NDArray[np.intp], *columns: npt.NDArray[Any] | None) -> None:
    """Let the answer at `place` of `rows` and the best one change places."""
    for values in columns:
        if values is not None:
            values[rows, 0], values[rows, place] = values[rows, place].copy(), values[rows, 0].copy()


def overlap_figures(orientation_map: OrientationMap) -> dict[str, Any]:
    """Return how many pixels hold two crystals, their share of the indexed ones, and the median weight of the second
    (None without any)."""
    weight = orientation_map.layers[WEIGHT_LAYER]
    two = np.isfinite(weight)
    return {
        "pixels": int(two.sum()),
        "share_of_indexed": float(two.sum() / max(int(orientation_map.indexed.sum()), 1)),
        "median_weight": float(np.median(weight[two])) if two.any() else None,
    }
