"""What a report holds of its map: numbers of every pixel as typed arrays in base64, and the patterns that fit worst."""

from __future__ import annotations

import base64
import dataclasses
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from stemtune.config import SimulateConfig, Span
from stemtune.crystal.rotations import to_euler_deg
from stemtune.crystal_map.frame_rotations import scan_rotation_deg, to_pattern_frame
from stemtune.crystal_map.orientation_map import OrientationMap
from stemtune.dataset.store import Store
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator
from stemtune.errors import UserError
from stemtune.indexing.overlap import WEIGHT_LAYER
from stemtune.plot.patterns import measured_patterns

ANGLE_STEP_DEG = 0.01
"""To how much angles are rounded: 360 degrees in a 16-bit number."""

_SHARE_STEP = 1 / 250


def pixel_data(orientation_map: OrientationMap) -> dict[str, Any]:
    """Return what the page's script reads, ready for JSON.

    Returns
    -------
    dict
        `rows`, `columns`, `step` (between rows and columns) and `unit`, `phases` (names), and `layers`: of each name
        the numbers of all pixels, row by row, as `data` (base64 of little-endian numbers of `type`), `per` numbers a
        pixel; a number n means n * `step`, but `missing` means that nothing is known. `euler` are Bunge's angles in
        degrees, lab to crystal, of pixels that are indexed.
    """
    indexed = orientation_map.indexed
    euler = np.full((len(indexed), 3), np.nan)
    euler[indexed] = to_euler_deg(torch.from_numpy(orientation_map.orientation[indexed])).numpy()
    shown = {
        "euler": _angles(euler),
        "phase": _packed(orientation_map.phase, "int16", missing=-1),
        "confidence": _shares(np.where(indexed, orientation_map.confidence, np.nan)),
        "explained_intensity": _shares(np.where(indexed, orientation_map.score("explained_intensity"), np.nan)),
    }
    layers = orientation_map.layers
    if "grain" in layers:
        shown["grain"] = _packed(layers["grain"], "int32", missing=-1)
    shown |= {name.removesuffix("_deg"): _angles(layers[name]) for name in ("kam_deg", "grod_deg") if name in layers}
    if WEIGHT_LAYER in layers:
        shown["second"] = _shares(layers[WEIGHT_LAYER])
    dy, dx = orientation_map.step_nm or (1.0, 1.0)
    return {
        "rows": orientation_map.shape[0],
        "columns": orientation_map.shape[1],
        "step": [dy, dx],
        "unit": orientation_map.scan_unit,
        "phases": orientation_map.phase_names,
        "layers": shown,
    }


def _angles(values: npt.NDArray[Any]) -> dict[str, Any]:
    missing = 65535
    whole = np.where(np.isfinite(values), np.round(np.nan_to_num(values) / ANGLE_STEP_DEG), missing)
    return _packed(whole, "uint16", missing=missing, step=ANGLE_STEP_DEG)


def _shares(values: npt.NDArray[Any]) -> dict[str, Any]:
    missing = 255
    whole = np.where(np.isfinite(values), np.round(np.clip(np.nan_to_num(values), 0, 1) / _SHARE_STEP), missing)
    return _packed(whole, "uint8", missing=missing, step=_SHARE_STEP)


def _packed(values: npt.NDArray[Any], kind: str, missing: int, step: float = 1) -> dict[str, Any]:
    data = np.ascontiguousarray(values, dtype=np.dtype(kind).newbyteorder("<")).tobytes()
    return {
        "type": kind,
        "per": 1 if values.ndim == 1 else values.shape[1],
        "step": step,
        "missing": missing,
        "data": base64.b64encode(data).decode("ascii"),
    }


COUNT = 6
"""How many patterns are shown."""

_SHOWN = SimulateConfig(
    thickness=Span(50, 50),
    precession=Span(0.5, 0.5),
    convergence=Span(1, 1),
    dose=Span(0, 0),
    direct_beam=Span(0.4, 0.4),
    background=Span(0, 0),
    blur=Span(0.7, 0.7),
    centre_error=0,
    ellipticity=0,
    scale_error=0,
    dead_pixels=0,
)
"""What is simulated: no noise, no background, an undistorted detector; the orientation alone is the map's."""


class WorstFit(NamedTuple):
    """Pixels (k,), flat, worst first, with their patterns and simulations (k, size, size)."""

    pixel: npt.NDArray[np.intp]
    measured: npt.NDArray[np.float64]
    simulated: npt.NDArray[np.float64]


def worst_fit(orientation_map: OrientationMap, store: Store | None = None) -> WorstFit:
    """Return the patterns that fit worst and their simulations, from `measured_patterns`.

    Raises `UserError` when no pixel is indexed, or the patterns are no longer there or not those of the map.
    """
    shown = orientation_map.indexed & orientation_map.measured
    explained = np.where(shown, orientation_map.score("explained_intensity"), np.inf)
    order = np.argsort(explained, kind="stable")[:COUNT]
    pixel = order[np.isfinite(explained[order])]
    if not len(pixel):
        raise UserError("no pixel is indexed")
    geometry = Geometry.from_dict(orientation_map.attrs["geometry"])
    measured = measured_patterns(orientation_map, pixel.tolist(), store).astype(np.float64)
    simulated = np.empty((len(pixel), geometry.size, geometry.size))
    answers = to_pattern_frame(orientation_map.answers[pixel, 0], scan_rotation_deg(orientation_map.attrs))
    for index, phase in enumerate(orientation_map.crystals):
        own = orientation_map.phase[pixel] == index
        if own.any():
            simulator = KinematicSimulator(phase, geometry, dataclasses.replace(_SHOWN, kv=geometry.kv))
            made = simulator.patterns(torch.from_numpy(answers[own]), torch.Generator().manual_seed(0), noise=False)
            simulated[own] = made.double().numpy()
    return WorstFit(pixel, measured, simulated)
