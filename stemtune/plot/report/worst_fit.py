"""The patterns of a map that its orientations explain least, beside what these orientations should give."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from stemtune.config import SimulateConfig, Span
from stemtune.crystal_map.frame_rotations import scan_rotation_deg, to_pattern_frame
from stemtune.crystal_map.orientation_map import OrientationMap
from stemtune.dataset.store import Store
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator
from stemtune.errors import UserError
from stemtune.plot.overlay import measured_patterns

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
    """Return the patterns that fit worst and their simulations.

    Parameters
    ----------
    orientation_map
        The map.
    store
        The patterns; left out, they are looked for where the map says that they were.

    Raises
    ------
    UserError
        When they are no longer there, or are not those of the map.
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
