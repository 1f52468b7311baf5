"""What a run leaves on disk: the model folder that anyone can load, and the checkpoint that a run goes on from.

A model folder is `model.safetensors` and `model.json`; loading it runs no code from a file. A checkpoint folder is
`model/`, a complete model folder, beside `checkpoint.pt`, which holds what else the run needs, and `SHA256SUMS`, by
which damage is noticed. Both appear whole or not at all.
"""

from __future__ import annotations

import json
import os
import pickle
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from stemtune._files import damage, existing, seal, whole_folder
from stemtune.config import Config
from stemtune.crystal.phase import Phase
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError
from stemtune.learning.calibration import Calibration
from stemtune.learning.model import WEIGHTS, OrientationModel, read_weights
from stemtune.learning.models import build

SCHEMA = 1
DESCRIPTION = "model.json"
STATE = "checkpoint.pt"


def describe(model: OrientationModel, metrics: dict[str, float], store_hash: str) -> dict[str, Any]:
    """Return what `model.json` holds: all that is needed to build the model again, and where it comes from."""
    config = model.config
    return {
        "schema": SCHEMA,
        "architecture": config.model.name,
        "config": config.to_flat(),
        "phase": {"name": model.phase.name, "space_group": model.phase.space_group, "cif": model.phase.cif},
        "geometry": model.geometry.to_dict(),
        "normalisation": {
            "input_size": model.input_size,
            "clip_below": 0,
            "power": config.data.gamma,
            "per_pattern": "mean 0, standard deviation 1",
        },
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "store_sha256": store_hash,
        "calibration": model.calibration.to_dict(),
        "spread_deg": model.spread_deg,
        "metrics": metrics,
        "versions": {name: _version(name) for name in ("stemtune", "torch", "timm")}
        | {"python": platform.python_version()},
    }


def save_model(model: OrientationModel, folder: str | os.PathLike[str], metrics: dict[str, float], store: str) -> None:
    """Write a model folder, whole or not at all: persistent tensors, `metrics` of the last evaluation, and the hash of
    the training store (empty when there is none).
    """
    with whole_folder(folder) as part:
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
        save_file(tensors, part / WEIGHTS)
        (part / DESCRIPTION).write_text(json.dumps(describe(model, metrics, store), indent=1) + "\n")


def read_description(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the contents of a model folder's `model.json`.

    Raises a `UserError` when it is missing, damaged, or of a later version.
    """
    found = existing(folder, "the model folder")
    file = found / DESCRIPTION
    if not file.is_file():
        raise UserError(f"'{folder}' is not a model folder: {DESCRIPTION} is missing")
    try:
        read = json.loads(file.read_text())
    except (ValueError, OSError):
        raise UserError(f"'{file}' is damaged: it is not JSON") from None
    wanted = ("schema", "config", "phase", "geometry")
    missing = [key for key in wanted if not isinstance(read, dict) or key not in read]
    if missing:
        raise UserError(f"'{file}' is not a model description: {', '.join(missing)} is missing")
    if read["schema"] != SCHEMA:
        raise UserError(f"'{file}' has schema {read['schema']}, but this stemtune reads schema {SCHEMA}; update it")
    description: dict[str, Any] = read
    return description


def load_model(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> OrientationModel:
    """Load a model folder, ready to predict.

    Raises a `UserError` when a file is missing or damaged, or the weights do not fit the description.
    """
    description = read_description(folder)
    try:
        config = Config.from_flat(description["config"])
        phase = Phase.from_cif_text(description["phase"]["cif"], f"{folder}/{DESCRIPTION}")
        geometry = Geometry.from_dict(description["geometry"])
        calibration = Calibration.from_dict(description.get("calibration", {}))
        spread_deg = description.get("spread_deg")
        spread_deg = None if spread_deg is None else float(spread_deg)
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as problem:
        reason = problem if isinstance(problem, UserError) else "a part of it is missing or malformed"
        raise UserError(f"'{Path(folder) / DESCRIPTION}' does not describe a model: {reason}") from None
    model = build(config, phase, geometry, start=False)
    load_weights(model, folder)
    model.calibration = calibration
    if spread_deg is not None:  # up to version 0.1 it is not kept
        model.spread_deg = spread_deg
    return model.to(device).eval()


def load_weights(model: OrientationModel, folder: str | os.PathLike[str]) -> None:
    """Load the weights of a model folder into a model of the same architecture; every one must fit."""
    if not (Path(folder) / WEIGHTS).is_file():
        raise UserError(f"'{folder}' is not a model folder: {WEIGHTS} is missing")
    weights, here = read_weights(folder), model.state_dict()
    strange = sorted(set(weights) ^ set(here))
    if strange:
        raise UserError(f"the weights in '{folder}' do not fit its {DESCRIPTION}: '{strange[0]}' is not in both")
    for name, value in weights.items():
        if value.shape != here[name].shape:
            shapes = f"{tuple(value.shape)}, not {tuple(here[name].shape)}"
            raise UserError(f"the weights in '{folder}' do not fit its {DESCRIPTION}: '{name}' is {shapes}")
    model.load_state_dict(weights)


def save_checkpoint(
    model: OrientationModel, state: dict[str, Any], folder: Path, metrics: dict[str, float], store: str
) -> None:
    """Write a checkpoint folder, whole or not at all; `state` holds tensors, numbers and text only."""
    with whole_folder(folder) as part:
        save_model(model, part / "model", metrics, store)
        torch.save({**state, "config": model.config.to_flat()}, part / STATE)
        seal(part)


def load_checkpoint(model: OrientationModel, folder: Path) -> dict[str, Any]:
    """Load a checkpoint's weights into `model` and return the rest of its state.

    Raises a `UserError` when it is missing or damaged, or of a run with another model.
    """
    file = existing(folder / STATE, "the checkpoint")
    fault = damage(folder)
    if fault:
        raise UserError(f"the checkpoint is damaged: {fault}; start the run anew")
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError):
        raise UserError(f"the checkpoint '{file}' is damaged; start the run anew") from None
    mine = model.config.to_flat()
    for key, value in state["config"].items():
        if key.startswith(("model.", "head.")) and mine.get(key) != value:
            raise UserError(f"the checkpoint '{file}' has {key}={value}, but this run has {mine.get(key)}")
    load_weights(model, folder / "model")
    return state


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
