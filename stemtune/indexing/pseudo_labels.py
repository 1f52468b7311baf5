"""`stemtune label --method model`: a model's confident candidates become labels, to train on in the next round.

A model that was pretrained on simulation and reads some measured patterns with confidence teaches itself the detector,
the background and the intensities of the others. It also learns its own mistakes where it is confident of them, so
only candidates above a calibrated confidence are kept, and patterns without the predicted spots never are (`indexing`).
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stemtune._parallel import Spread
from stemtune.crystal.phase import Phase
from stemtune.dataset.labels import Labels, label_target, write_labels
from stemtune.dataset.store import Store
from stemtune.errors import UserError
from stemtune.indexing.predictor import Predictions, Predictor
from stemtune.learning.checkpoint import load_model

MIN_CONFIDENCE = 0.9
"""Smallest confidence, the probability of being within 5 degrees, of a candidate that becomes a label."""


def label_by_model(
    store: str | os.PathLike[str],
    model_folder: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    min_confidence: float = MIN_CONFIDENCE,
    refine: bool = False,
    batch: int = 256,
    device: torch.device | str | None = None,
    spread: Spread | None = None,
) -> dict[str, Any]:
    """Label the patterns of a store by what a model predicts with confidence.

    The store has any calibration that the model's can be resampled from; left out, `out`, the labelled store, takes its
    place. `refine`, `batch`, `device` and `spread` are as in `indexing.predict.predict_map`.

    The result holds `store`, `patterns`, `indexed` (those that were labelled), `patterns_per_second`, and `notes`. The
    scores kept are `spot_z_score`, `explained_intensity` and, refined, `ncc`, for every pattern, and `answered`, the
    confidence of those that were not labelled too.

    Raises a `UserError` for unusable input, or when no candidate is confident enough; nothing is written then.
    """
    if not 0 <= min_confidence <= 1:
        raise UserError(f"--min-confidence is {min_confidence:g}, but a confidence lies in [0, 1]")
    model = load_model(model_folder)
    target = label_target(store, out)
    with Store.open(store) as opened:
        predictor = Predictor(model, opened, batch, 1, device, refine)
        began = time.perf_counter()
        predictions = predictor.run() if spread is None else predictor.over(spread, Path(model_folder).resolve())
        rate = opened.n / (time.perf_counter() - began)
    confidence = predictions.confidence[:, 0]
    kept = predictions.indexed & (confidence >= min_confidence)
    if not kept.any():
        seen = "none, for nothing is indexed"
        if predictions.indexed.any():
            seen = f"{confidence[predictions.indexed].max():.4f}"
        raise UserError(
            f"no answer of '{model_folder}' has a confidence of {min_confidence:g}; the highest is {seen}; lower"
            " --min-confidence, or train the model further"
        )
    facts = {
        "method": "model",
        "store": Path(store).name,
        "model": str(model_folder),
        "architecture": model.config.model.name,
        "min_confidence": min_confidence,
        "refine": refine,
    }
    write_labels(store, _labels(predictions, kept, model.phase, facts), target)
    return {
        "store": str(target),
        "patterns": len(kept),
        "indexed": int(kept.sum()),
        "patterns_per_second": rate,
        "notes": predictor.notes,
    }


def _labels(predictions: Predictions, kept: npt.NDArray[np.bool_], phase: Phase, facts: dict[str, Any]) -> Labels:
    """Return the labels of those patterns that are `kept` (n,), and the scores of all."""
    confidence = predictions.confidence[:, 0]
    scores = {
        "spot_z_score": predictions.spot_z_score,
        "explained_intensity": predictions.explained_intensity,
        "answered": confidence,
    }
    if predictions.ncc is not None:
        scores["ncc"] = predictions.ncc[:, 0]
    return Labels(
        orientation=np.where(kept[:, None], predictions.candidates[:, 0], np.nan),
        confidence=np.where(kept, confidence, np.nan).astype(np.float32),
        phase=np.where(kept, 0, -1).astype(np.int16),
        phases=[phase],
        scores=scores,
        facts=facts,
    )
