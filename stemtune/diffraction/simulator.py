"""Which simulator `simulate.physics` names."""

from __future__ import annotations

import torch

from stemtune.config import SimulateConfig
from stemtune.crystal.phase import Phase
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator


def simulator_for(
    phase: Phase, geometry: Geometry, simulate: SimulateConfig, device: torch.device | str = "cpu"
) -> KinematicSimulator:
    """Return the simulator that `simulate.physics` names: the kinematic one, or its dynamical kind (Bloch waves).

    Raises
    ------
    UserError
        For settings that it cannot honour, and when no reflection falls on the detector.
    """
    if simulate.physics == "bloch":
        from stemtune.diffraction.bloch import BlochSimulator  # here, for kinematic simulation needs none of it

        return BlochSimulator(phase, geometry, simulate, device)
    return KinematicSimulator(phase, geometry, simulate, device)
