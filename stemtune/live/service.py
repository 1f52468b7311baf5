"""What a served model does: frames of one request or several are checked, answered together, and given back apart."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError
from stemtune.indexing.predictor import Indexer
from stemtune.learning.checkpoint import load_model
from stemtune.scan.blocks import stored_type, valid_counts

_CALIBRATIONS = 8  # that are kept ready
_FRAMES = 4096  # of a request


class Asked(NamedTuple):
    """Frames (n, size, size) of one request, as a store has them, and how they are calibrated."""

    frames: npt.NDArray[Any]
    geometry: Geometry


class Service:
    """A model and what it takes to answer frames of several calibrations."""

    def __init__(self, folder: str) -> None:
        self.model = load_model(folder)
        self._indexers: dict[Geometry, Indexer] = {}

    def indexer(self, geometry: Geometry) -> Indexer:
        """Return what answers frames of this calibration."""
        if geometry not in self._indexers:
            if len(self._indexers) >= _CALIBRATIONS:
                self._indexers.pop(next(iter(self._indexers)))
            self._indexers[geometry] = Indexer(self.model, geometry, alternatives=1)
        return self._indexers[geometry]


def prepare(folder: str) -> Service:
    """Load the model in `folder`, and let it answer something, so that the first request does not wait for that."""
    service = Service(folder)
    size = service.model.geometry.size
    frames = np.random.default_rng(0).poisson(1.0, (2, size, size)).astype(np.uint16)
    service.indexer(service.model.geometry).index(frames)
    return service


def checked(service: Service, frames: npt.NDArray[Any], query: Mapping[str, str]) -> Asked:
    """Return the frames of a request, ready to be answered.

    The direct beam is in the middle of each. `scale` (1/Å per pixel) and `kv` of the query say how they are
    calibrated; left out, they are as the model's.

    Raises
    ------
    UserError
        For frames or a calibration that the model cannot answer.
    """
    if frames.ndim == 2:
        frames = frames[None]
    if frames.ndim != 3 or frames.shape[1] != frames.shape[2] or not 8 <= frames.shape[1] <= 2048:
        shape = " x ".join(map(str, frames.shape)) or "none"
        raise UserError(f"frames must be (n, size, size) of 8 to 2048 pixels, but these are {shape}")
    if not 1 <= len(frames) <= _FRAMES:
        raise UserError(f"a request has 1 to {_FRAMES} frames, but this one has {len(frames)}")
    if not valid_counts(frames):
        raise UserError("counts must be finite and 0 or more")
    unknown = sorted(set(query) - {"scale", "kv"})
    if unknown:
        raise UserError(f"'{unknown[0]}' is no part of a request; scale and kv are")
    own = service.model.geometry
    if frames.shape[1] != own.size and "scale" not in query:
        raise UserError(f"frames of {frames.shape[1]} px need ?scale=, for the model's have {own.size} px")
    scale = _number(query, "scale", own.scale_inv_angstrom, (0, 1))
    geometry = Geometry(frames.shape[1], scale, _number(query, "kv", own.kv, (20, 1500)))
    service.indexer(geometry)  # refuses what the model cannot look at
    return Asked(np.ascontiguousarray(frames, dtype=stored_type(frames.dtype)), geometry)


def answered(service: Service, asked: list[Any]) -> list[Mapping[str, npt.NDArray[Any]]]:
    """Return `orientation` (n, 4), `confidence` (n,) and `indexed` (n,) for each request, in their order."""
    found: list[Mapping[str, npt.NDArray[Any]]] = [{} for _ in asked]
    key = [(one.geometry, one.frames.dtype) for one in asked]
    for kind in dict.fromkeys(key):
        chosen = [number for number, own in enumerate(key) if own == kind]
        answers = service.indexer(kind[0]).index(np.concatenate([asked[number].frames for number in chosen]))
        ends = itertools.accumulate(len(asked[number].frames) for number in chosen)
        for number, end in zip(chosen, ends, strict=True):
            own = slice(end - len(asked[number].frames), end)
            found[number] = {
                "orientation": answers.candidates[own, 0],
                "confidence": answers.confidence[own, 0],
                "indexed": answers.indexed[own],
            }
    return found


def _number(query: Mapping[str, str], name: str, default: float, between: tuple[float, float]) -> float:
    try:
        value = float(query.get(name, default))
    except ValueError:
        value = float("nan")
    if not between[0] < value <= between[1]:
        raise UserError(f"{name} is '{query[name]}', but must be a number above {between[0]} and up to {between[1]}")
    return value
