"""What a model is judged by: disorientation, strict and modulo the beam-180 ambiguity, pseudo-symmetry, confidence."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed

from stemtune._progress import Progress
from stemtune.crystal.phase import Phase
from stemtune.crystal.pseudo_symmetry import pseudo_variants
from stemtune.crystal.rotations import multiply
from stemtune.crystal.symmetry import disorientation_beam180_deg, disorientation_deg
from stemtune.dataset.batches import Batch, Loader
from stemtune.learning.calibration import Calibration, cross_validated_error
from stemtune.learning.inference import predict_raw
from stemtune.learning.model import DIFFERENT_DEG, OrientationModel

WORST = {
    "val/disorientation_median_deg": 180.0,
    "val/disorientation_mean_deg": 180.0,
    "val/within_2deg": 0.0,
    "val/within_5deg": 0.0,
    "val/disorientation_median_deg_beam180": 180.0,
    "val/within_5deg_beam180": 0.0,
    "val/pseudo_symmetry_fraction": 1.0,
    "val/ece": 1.0,
    "val/loss": 1e6,
    "train/loss": 1e6,
    "train/learning_rate": 1.0,
    "train/samples_per_s": 0.0,
    "train/peak_memory_mb": 1e9,
    "model/ms_per_pattern": 1e6,
    "model/parameters": 1e12,
}
"""What a diverged run reports: finite, and worse than anything a sane run can show."""


def pseudo_symmetric(candidate: Tensor, truth: Tensor, phase: Phase) -> Tensor:
    """Return (B,) which candidates (B, 4) lie within 5 degrees of a pseudo-symmetric variant of the truth (B, 4)."""
    near = torch.zeros(len(candidate), dtype=torch.bool, device=candidate.device)
    for _, variant in pseudo_variants(phase):
        taken_for = multiply(variant.to(truth), truth)
        near |= disorientation_deg(candidate, taken_for, phase.symmetry) <= DIFFERENT_DEG
    return near


Angles = npt.NDArray[np.float64]

ERRORS: dict[str, Callable[[Angles, Angles], float]] = {
    "disorientation_median_deg": lambda strict, beam180: float(np.median(strict)),
    "disorientation_mean_deg": lambda strict, beam180: float(strict.mean()),
    "within_2deg": lambda strict, beam180: float((strict <= 2.0).mean()),
    "within_5deg": lambda strict, beam180: float((strict <= DIFFERENT_DEG).mean()),
    "disorientation_median_deg_beam180": lambda strict, beam180: float(np.median(beam180)),
    "within_5deg_beam180": lambda strict, beam180: float((beam180 <= DIFFERENT_DEG).mean()),
}
"""Figures of the disorientations (N,) in degrees, strict and modulo the beam-180 ambiguity."""


def errors_deg(scores: Tensor) -> tuple[Angles, Angles]:
    """Return the disorientations that `score_patterns` found; no candidate (NaN) counts as 180 degrees wrong."""
    strict, beam180 = scores[:2].double().nan_to_num(nan=180.0).numpy()
    return strict, beam180


def summarise(scores: Tensor) -> dict[str, float]:
    """Return the `val/` figures of `stemtune.config.METRICS` from the columns that `score_patterns` returns.

    Pseudo-symmetric confusions are counted among the candidates that are more than 5 degrees wrong. The expected
    calibration error (`val/ece`) is that of calibrated confidences, each half of the patterns calibrated by the other.
    """
    strict, beam180 = errors_deg(scores)
    pseudo, wrong = (scores[2] > 0.5).numpy(), strict > DIFFERENT_DEG
    return {
        **{f"val/{name}": figure(strict, beam180) for name, figure in ERRORS.items()},
        "val/pseudo_symmetry_fraction": float((pseudo & wrong).sum()) / max(1, int(wrong.sum())),
        "val/ece": cross_validated_error(scores[4].numpy(), strict <= DIFFERENT_DEG),
        "val/loss": float(scores[3].double().mean().nan_to_num(nan=1e6).clamp(max=1e6)),
    }


def model_figures(model: OrientationModel, scores: Tensor) -> dict[str, float]:
    """Return the `model/` figures: how large the model is, and how long it takes for a pattern of a batch (median)."""
    return {
        "model/ms_per_pattern": float(np.median(scores[5].numpy())),
        "model/parameters": float(sum(weight.numel() for weight in model.parameters())),
    }


def fit_calibration(scores: Tensor) -> Calibration:
    """Return the map to the probability of being within 5 degrees, fitted to what `score_patterns` returns."""
    return Calibration.fitted(scores[4].numpy(), (scores[0] <= DIFFERENT_DEG).numpy())


def measured_spread_deg(scores: Tensor) -> float | None:
    """Return how far right candidates are off about each axis, in degrees; None where fewer than 20 are right.

    From the median of what `score_patterns` returns, which is 1.538 standard deviations for a normal error in three
    directions (the median of the chi distribution).
    """
    right = scores[0][scores[0] <= DIFFERENT_DEG]
    return float(right.median()) / 1.538 if len(right) >= 20 else None


def score_patterns(
    model: OrientationModel,
    loader: Loader,
    device: torch.device,
    precision: torch.dtype | None = None,
    shown: bool = False,
    parts: int = 1,
) -> Tensor:
    """Return how good the model's best candidate for each validation pattern is: (6, N) over all data-parallel workers.

    The rows are the disorientation from the truth in degrees, the same modulo the beam-180 ambiguity, whether the
    candidate is near a pseudo-symmetric variant of the truth (0 or 1), the mean loss of its batch, the model's own
    confidence, and the milliseconds that the model took for it, its share of its batch. `shown` reports progress.
    Where memory is short, batches are worked through in `parts`.
    """
    training = model.training
    model.eval()
    symmetry = model.phase.symmetry
    columns: list[Tensor] = []
    progress = Progress(loader.batches_per_epoch, "validate", "batch", shown=shown)
    with torch.inference_mode(), progress:
        for patterns, truth in _in_parts(progress.over(loader.epoch(0)), parts):
            truth = truth.to(device)
            patterns = patterns.to(device, non_blocking=True)
            began = time.perf_counter()
            output, found = predict_raw(model, patterns, 1, precision)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            spent = truth.new_tensor(1e3 * (time.perf_counter() - began) / len(truth))
            loss = model.loss(output, truth)
            candidate = found.orientation[:, 0].to(truth)
            figures = [
                disorientation_deg(candidate, truth, symmetry),
                disorientation_beam180_deg(candidate, truth, symmetry),
                pseudo_symmetric(candidate, truth, model.phase).to(truth),
                loss.expand(len(truth)).to(truth),
                found.confidence[:, 0].to(truth),
                spent.expand(len(truth)),
            ]
            columns.append(torch.stack(figures).cpu())
    model.train(training)
    return _from_all_workers(torch.cat(columns, 1) if columns else torch.zeros(6, 0))


def _in_parts(batches: Iterable[Batch], parts: int) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        count = max(1, min(parts, len(batch.orientation)))
        yield from zip(batch.patterns.tensor_split(count), batch.orientation.tensor_split(count), strict=True)


def _from_all_workers(mine: Tensor) -> Tensor:
    """Return the columns of all data-parallel workers, in the order of their ranks."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return mine
    parts: list[Tensor] = [mine] * distributed.get_world_size()
    distributed.all_gather_object(parts, mine)
    return torch.cat(parts, 1)
