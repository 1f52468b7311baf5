"""From patterns to candidates, the same for every model: several views of a pattern if wanted, and believable
confidences.

Training, prediction and evaluation all ask here, so that none of them sees another confidence than the others.

Shape legend: B patterns, H x W pixels with H = W, V views of a pattern, n candidates per pattern.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from stemtune._parallel import map_over_threads
from stemtune.crystal.rotations import inverse, multiply
from stemtune.dataset.augment import turn_orientation
from stemtune.learning.grid import most_probable
from stemtune.learning.model import Candidates, OrientationModel, Output

_CPU_BATCH = 128  # patterns that a thread works on at once on a CPU

VIEWS = tuple((quarters, mirrored) for mirrored in (False, True) for quarters in range(4))
"""The eight exact views of a pattern: quarter turns counter-clockwise, then a mirror left-right; itself first."""


def autocast(device: torch.device, precision: torch.dtype | None) -> AbstractContextManager[object]:
    """Return the context that runs a forward pass in `precision`; None means float32."""
    return nullcontext() if precision is None else torch.autocast(device.type, dtype=precision)


def predict_candidates(
    model: OrientationModel, patterns: Tensor, n: int = 1, precision: torch.dtype | None = None
) -> Candidates:
    """Return the model's `n` best different orientations of patterns (B, H, W), with calibrated confidences.

    The model is in evaluation mode; its `calibration` and the setting `model.test_time` act here. Patterns are counts
    of any numeric type, on the model's device and of its geometry; `precision` is the number format of the forward
    pass, None for float32. On a CPU each thread takes patterns of its own: shared out operation by operation, the
    threads of a small network wait for each other.
    """
    if patterns.device.type != "cpu" or len(patterns) <= _CPU_BATCH:
        return candidates_of(model, patterns, n, precision)
    pieces = patterns.split(_CPU_BATCH)  # type: ignore[no-untyped-call]
    parts = map_over_threads(lambda piece: candidates_of(model, piece, n, precision), pieces)
    return Candidates(*(torch.cat(column) for column in zip(*parts, strict=True)))


def candidates_of(
    model: OrientationModel, patterns: Tensor, n: int = 1, precision: torch.dtype | None = None
) -> Candidates:
    """Return what `predict_candidates` does, in one piece."""
    _, found = predict_raw(model, patterns, n, precision)
    return Candidates(found.orientation, model.calibration(found.confidence))


def predict_raw(
    model: OrientationModel, patterns: Tensor, n: int = 1, precision: torch.dtype | None = None
) -> tuple[Output, Candidates]:
    """Return the raw output for the patterns as they are, and the candidates with the model's own confidences."""
    with autocast(patterns.device, precision):
        output = model(patterns)
    plain = model.candidates(output, n)
    if model.config.model.test_time == "none":
        return output, plain
    views = [plain]
    for quarters, mirrored in VIEWS[1:]:
        with autocast(patterns.device, precision):
            turned = model(view_of(patterns, quarters, mirrored))
        views.append(model.candidates(turned, n))
    return output, merge_views(views, n, model)


def view_of(patterns_BHW: Tensor, quarters: int, mirrored: bool) -> Tensor:
    """Return the patterns turned by `quarters` x 90 degrees counter-clockwise, then mirrored left-right."""
    turned = torch.rot90(patterns_BHW, quarters, (-2, -1))
    return turned.flip(-1) if mirrored else turned


def merge_views(views: list[Candidates], n: int, model: OrientationModel) -> Candidates:
    """Return the `n` best orientations of the patterns from the candidates of each of their `VIEWS`.

    Every candidate is brought back to the pattern as it was, and counts with its confidence, shared among the views:
    those within 5 degrees of each other become one, and their confidences add up.
    """
    orientation, confidence = [], []
    same = views[0].orientation.new_tensor([[1.0, 0.0, 0.0, 0.0]])
    for (quarters, mirrored), found in zip(VIEWS, views, strict=True):
        turn_14 = turn_orientation(same, same.new_tensor([90.0 * quarters]), torch.tensor([mirrored]))
        orientation.append(multiply(found.orientation, inverse(turn_14)))
        confidence.append(found.confidence / len(VIEWS))
    g_BM4, share_BM = torch.cat(orientation, 1), torch.cat(confidence, 1)
    present_BM = g_BM4.isfinite().all(-1)
    g_BM4 = g_BM4.where(present_BM[..., None], same)
    return most_probable(g_BM4, share_BM.where(present_BM, 0.0), n, model.phase.symmetry)
