"""Several models, one for each phase: which phase each pixel is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stemtune.crystal.phase import Phase
from stemtune.crystal_map.orientation_map import NOT_INDEXED, OrientationMap
from stemtune.errors import UserError
from stemtune.indexing.predictor import Predictions


class PhaseChoice(NamedTuple):
    """The predictions for n patterns, each by one of m models.

    `predictions` are by the model that was chosen for each pattern, `model` (n,) says which, -1 where none of them sees
    its crystal; `explained_intensity` (n, m) is that of every model's best candidate (`indexing.spot_check`), 0 where
    its crystal is not in the pattern.
    """

    predictions: Predictions
    model: npt.NDArray[np.int16]
    explained_intensity: npt.NDArray[np.float32]


def choose(every: Sequence[Predictions]) -> PhaseChoice:
    """Return for each pattern the predictions of the model whose best candidate fits best.

    A model counts only where its crystal is in the pattern at all. The fit is the share of the scattered intensity
    that the predicted spots hold beyond chance, so that a phase of many reflections has no advantage; a confidence
    only compares orientations of one phase.
    """
    fit = np.stack([np.where(one.indexed, one.explained_intensity, 0) for one in every], axis=1).astype(np.float32)
    best = fit.argmax(axis=1)
    none = ~np.stack([one.indexed for one in every], axis=1).any(axis=1)
    rows = np.arange(len(best))
    columns = [None if values[0] is None else np.stack(values)[best, rows] for values in zip(*every, strict=True)]
    predictions = Predictions(*columns)  # type: ignore[arg-type]
    return PhaseChoice(predictions, np.where(none, NOT_INDEXED, best).astype(np.int16), fit)


def phase_figures(orientation_map: OrientationMap) -> list[dict[str, Any]]:
    """Return the phase table: of each phase `name`, `space_group`, `pixels`, `share` of the indexed ones, `area` in
    nm² (px² where the step is not known), `median_confidence` and `median_explained_intensity`, None without pixels."""
    dy, dx = orientation_map.step_nm or (1.0, 1.0)
    total = max(int(orientation_map.indexed.sum()), 1)
    rows = []
    for index, phase in enumerate(orientation_map.crystals):
        own = orientation_map.phase == index
        pixels = int(own.sum())
        rows.append(
            {
                "name": orientation_map.phase_names[index],
                "space_group": phase.space_group,
                "pixels": pixels,
                "share": pixels / total,
                "area": pixels * dy * dx,
                "median_confidence": _median(orientation_map.confidence, own),
                "median_explained_intensity": _median(orientation_map.score("explained_intensity"), own),
            }
        )
    return rows


def _median(values: npt.NDArray[Any], own: npt.NDArray[np.bool_]) -> float | None:
    return float(np.median(values[own])) if own.any() else None


def check_distinct(phases: Sequence[Phase]) -> None:
    """Refuse the phases of several models with a `UserError` when two of them are the same crystal."""
    if len({phase.cif for phase in phases}) < len(phases):
        raise UserError("two of the models are for the same phase; give one --model for each phase")
