"""A model as one file that torch alone can run: a `torch.export` program from patterns to orientations."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stemtune._files import replaceable_file, whole_file
from stemtune._version import __version__
from stemtune.config import MODEL_NAMES
from stemtune.errors import UserError
from stemtune.learning.checkpoint import load_model
from stemtune.learning.inference import candidates_of
from stemtune.learning.model import OrientationModel

ENDING = ".pt2"
METADATA = "stemtune.json"  # the name of the extra file in the program
MOST_ALTERNATIVES = 10
_CONVENTION = (
    "unit quaternions (w, x, y, z), scalar first: the rotation from lab to crystal components, v_crystal = g * v_lab;"
    " lab x to the right, y up, z towards the electron source; crystal e1 || a, e3 || c*; NaN where there is none"
)


class _Program(nn.Module):
    def __init__(self, model: OrientationModel, alternatives: int) -> None:
        super().__init__()
        self.model, self.alternatives = model, alternatives

    def forward(self, patterns: Tensor) -> tuple[Tensor, Tensor]:
        found = candidates_of(self.model, patterns, self.alternatives)
        return found.orientation, found.confidence


def metadata(model: OrientationModel, alternatives: int) -> dict[str, Any]:
    """Return what the file says of itself: input, output and their conventions, the crystal."""
    size = model.geometry.size
    return {
        "stemtune": __version__,
        "architecture": model.config.model.name,
        "input": f"counts (B, {size}, {size}) float32, the direct beam in the middle",
        "output": f"orientation (B, {alternatives}, 4) float32, best first, and confidence (B, {alternatives}) float32",
        "orientation": _CONVENTION,
        "confidence": "probability of being within 5 degrees of the truth, calibrated on validation patterns",
        "geometry": model.geometry.to_dict(),
        "phase": {
            "name": model.phase.name,
            "space_group": model.phase.space_group,
            "laue": model.phase.symmetry.laue,
            "cif": model.phase.cif,
        },
    }


def export_model(folder: str | os.PathLike[str], out: str | os.PathLike[str], alternatives: int = 1) -> Path:
    """Write the model in `folder` as a `torch.export` program and return where.

    It maps counts (B, S, S) float32, of any number B of patterns, to orientations (B, n, 4) and calibrated confidences
    (B, n) for `alternatives` n. `torch.export.load` reads it without stemtune; its extra file `stemtune.json` holds
    the pixel size, the voltage, the conventions and the crystal.

    Raises a `UserError` when there is no model, it cannot be exported, or `out` cannot be written.
    """
    if not 1 <= alternatives <= MOST_ALTERNATIVES:
        raise UserError(f"{alternatives} alternatives are asked for, but must be in [1, {MOST_ALTERNATIVES}]")
    target = Path(out).expanduser()
    if target.suffix != ENDING:
        raise UserError(f"'{target}' must end in {ENDING}, as a program of torch.export does; choose another --out")
    replaceable_file(target)
    model = load_model(folder)
    program = exported(model, alternatives)
    extra = {METADATA: json.dumps(metadata(model, alternatives), indent=1)}
    with whole_file(target) as part, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are not on the CPU
        torch.export.save(program, part, extra_files=extra)
    return target


def exported(model: OrientationModel, alternatives: int = 1) -> torch.export.ExportedProgram:
    """Return a model, in evaluation mode and on the CPU, as a program; see `export_model`."""
    size = model.geometry.size
    example = torch.poisson(torch.full((3, size, size), 2.0), generator=torch.Generator().manual_seed(0))
    program = _Program(model, alternatives).eval()
    shapes = {"patterns": {0: torch.export.Dim("batch", min=1)}}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program(example)  # fills caches with tensors, which tracing would fill with its own
            return torch.export.export(program, (example,), dynamic_shapes=shapes)
    except (RuntimeError, ValueError, TypeError) as problem:
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        name = model.config.model.name
        others = ", ".join(other for other in MODEL_NAMES if other != name)
        raise UserError(
            f"this model ('{name}') cannot be exported ({reason[:160]}); these can, with their usual settings: {others}"
        ) from None
