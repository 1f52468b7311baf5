"""The two frames of an orientation: the pattern's, in which models answer and stores are labelled, and the scan's.

Both have x to the right, y up and z towards the electron source; the scan's x runs along a scan line towards larger
columns, its y towards smaller rows. The scan is turned against the pattern by the store's `scan_rotation_deg`: the
angle from the pattern's x to the scan's x, anticlockwise. A direction v in the scan's frame is Rz(angle) v in the
pattern's, so the orientation that takes the scan's frame to the crystal's is g * Rz(angle). Maps are in the scan's
frame.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stemtune.crystal.rotations import multiply


def scan_rotation_deg(attrs: Mapping[str, Any]) -> float:
    """Return the angle in the attributes of a store or map; 0 where there is none."""
    return float(attrs.get("scan_rotation_deg") or 0.0)


def to_scan_frame(orientation: npt.NDArray[np.float64], rotation_deg: float) -> npt.NDArray[np.float64]:
    """Return `orientation` (..., 4) of the pattern's frame in the scan's frame; NaN stays NaN."""
    if rotation_deg == 0:
        return orientation
    half = math.radians(rotation_deg) / 2
    about_beam = torch.tensor([math.cos(half), 0.0, 0.0, math.sin(half)], dtype=torch.float64)
    turned: npt.NDArray[np.float64] = multiply(torch.from_numpy(np.ascontiguousarray(orientation)), about_beam).numpy()
    return turned


def to_pattern_frame(orientation: npt.NDArray[np.float64], rotation_deg: float) -> npt.NDArray[np.float64]:
    """Return `orientation` (..., 4) of the scan's frame in the pattern's frame."""
    return to_scan_frame(orientation, -rotation_deg)
