"""Which simulator `simulate.physics` names, and what every simulator can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from stemtune.config import SimulateConfig
from stemtune.crystal.phase import Phase
from stemtune.diffraction.conditions import Conditions
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import Diffracted, KinematicSimulator


class Simulator(Protocol):
    """Makes patterns of one phase; see `KinematicSimulator` for what each part takes and returns."""

    phase: Phase
    geometry: Geometry
    simulate: SimulateConfig
    device: torch.device

    def patterns(self, orientation: Tensor, generator: torch.Generator | None = None, noise: bool = True) -> Tensor:
        """Return patterns (B, size, size) of orientations (B, 4), all else drawn from the settings' ranges."""
        ...

    def in_chunks(
        self, count: int, generator: torch.Generator | None, make: Callable[[slice, torch.Generator], Tensor]
    ) -> Tensor:
        """Return patterns (count, size, size) put together from chunks `make(rows, generator of its own)`."""
        ...

    def diffracted(self, orientation: Tensor, conditions: Conditions) -> Diffracted:
        """Return what orientations (B, 4) send to the detector under given conditions (B,)."""
        ...

    def detect(
        self, lit: Diffracted, conditions: Conditions, generator: torch.Generator | None, noise: bool = True
    ) -> Tensor:
        """Return what the detector makes (B, size, size) of diffracted beams."""
        ...

    def expose(
        self, orientation: Tensor, conditions: Conditions, generator: torch.Generator | None, noise: bool = True
    ) -> Tensor:
        """Return patterns (B, size, size) of orientations (B, 4) under given conditions; NaN stands for vacuum."""
        ...


def simulator_for(
    phase: Phase, geometry: Geometry, simulate: SimulateConfig, device: torch.device | str = "cpu"
) -> Simulator:
    """Return the simulator that `simulate.physics` names: kinematic, or dynamical by Bloch waves.

    Raises
    ------
    UserError
        For settings that it cannot honour, and when no reflection falls on the detector.
    """
    if simulate.physics == "bloch":
        from stemtune.diffraction.bloch import BlochSimulator  # here, for kinematic simulation needs none of it

        return BlochSimulator(phase, geometry, simulate, device)
    return KinematicSimulator(phase, geometry, simulate, device)
