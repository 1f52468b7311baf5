"""An orientation map made elsewhere, in our frame, and how it is laid on the patterns of a store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from stemtune.crystal.phase import Phase
from stemtune.dataset.labels import Labels
from stemtune.dataset.store import Store
from stemtune.errors import UserError


@dataclass(frozen=True)
class LabelMap:
    """Orientations on a scan of `shape` rows and columns; pixels run row by row, n = rows x columns.

    Parameters
    ----------
    shape
        Rows and columns.
    orientation
        Unit quaternions (n, 4), scalar first, lab-to-crystal; NaN where not indexed.
    phase
        Index (n,) into `phases`; -1 where not indexed.
    phases
        The crystals.
    scores
        The scores (n,) that the map holds, under the names it gives them.
    step_nm
        Distance between rows and between columns in nm; None when it is not known.
    notes
        What the user ought to know about the file, one sentence each.
    confidence
        Confidence (n,) of each orientation, larger is better; None where the map has nothing of the kind.
    """

    shape: tuple[int, int]
    orientation: npt.NDArray[np.float64]
    phase: npt.NDArray[np.int16]
    phases: list[Phase]
    scores: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    step_nm: tuple[float, float] | None = None
    notes: list[str] = field(default_factory=list)
    confidence: npt.NDArray[np.float32] | None = None


def laid_on(store: Store, label_map: LabelMap, facts: Mapping[str, Any]) -> Labels:
    """Return the labels that a map gives the patterns of a store.

    The map may cover the scan as it is in the store, or the whole scan that the store is a part of (`ingest --keep`).

    Raises
    ------
    UserError
        When the store is no scan, or the shapes do not fit.
    """
    if store.scan_shape is None:
        raise UserError(f"'{store.path}' is no scan, so a map cannot be laid on it; `stemtune ingest` makes one")
    row, column = store.position.T.astype(np.int64)
    if label_map.shape != store.scan_shape:
        window = store.attrs.get("origin_window")
        if not window or label_map.shape[0] < window[2] or label_map.shape[1] < window[3]:
            shapes = ["{} x {}".format(*shape) for shape in (label_map.shape, store.scan_shape)]
            raise UserError(f"the map has {shapes[0]} positions, but the scan in '{store.path}' has {shapes[1]}")
        row, column = row + int(window[0]), column + int(window[1])
    pixel = row * label_map.shape[1] + column
    indexed = label_map.phase[pixel] >= 0
    confidence = np.full(store.n, np.nan) if label_map.confidence is None else label_map.confidence[pixel]
    return Labels(
        orientation=np.where(indexed[:, None], label_map.orientation[pixel], np.nan),
        confidence=np.where(indexed, confidence, np.nan).astype(np.float32),
        phase=label_map.phase[pixel].astype(np.int16),
        phases=label_map.phases,
        scores={name: values[pixel] for name, values in label_map.scores.items()},
        facts=facts,
    )
