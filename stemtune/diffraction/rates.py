"""How fast patterns are simulated, beside diffsims, the field's own simulator, on the same machine in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import resources
from typing import Any

import torch

from stemtune.config import SimulateConfig
from stemtune.crystal.phase import linio2
from stemtune.crystal.sampling import random_orientations
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator


def simulation_rate(
    simulate: SimulateConfig | None = None, seconds: float = 4.0, device: torch.device | str = "cpu", peer: bool = True
) -> dict[str, Any]:
    """Measure the simulation of LiNiO2 patterns at random orientations, ours and diffsims'.

    Parameters
    ----------
    simulate
        The microscope; the defaults, 128 x 128 pixels, if left out.
    seconds
        Time to measure for, each.
    device
        Where ours runs.
    peer
        Whether to measure diffsims as well: kinematic spots with its `sin2c` shape factor and a Gaussian picture of
        them, without noise, background or precession, which ours has.

    Returns
    -------
    rates
        `patterns_per_s`, `cpu_ms_per_pattern` (over all threads), `threads`, `device`, `size`; with `peer`
        `diffsims_patterns_per_s` and `times_faster`.
    """
    simulate = simulate or SimulateConfig()
    simulator = KinematicSimulator(linio2(), Geometry.of(simulate), simulate, device)
    generator = torch.Generator(simulator.device).manual_seed(0)
    batch = 512 if simulator.device.type == "cpu" else 8192

    def ours() -> int:
        images = simulator.patterns(random_orientations(batch, generator), generator)
        float(images[-1, -1, -1])  # waits for a GPU
        return batch

    rate, cpu = _rate(ours, seconds)
    rates: dict[str, Any] = {
        "patterns_per_s": rate,
        "cpu_ms_per_pattern": 1e3 * cpu,
        "threads": torch.get_num_threads(),
        "device": str(simulator.device),
        "size": simulate.size,
    }
    if peer:
        rates["diffsims_patterns_per_s"] = diffsims_rate(simulate, seconds)
        rates["times_faster"] = rate / rates["diffsims_patterns_per_s"]
    return rates


def diffsims_rate(simulate: SimulateConfig, seconds: float) -> float:
    """Return how many noise-free LiNiO2 patterns per second diffsims' `SimulationGenerator` makes."""
    from diffsims.generators.simulation_generator import SimulationGenerator
    from orix.crystal_map import Phase
    from orix.quaternion import Rotation

    with resources.as_file(resources.files("stemtune.crystal").joinpath("linio2.cif")) as path:
        phase = Phase.from_cif(path)
    phase.expand_asymmetric_unit()  # or most of the intensity goes to forbidden reflections
    rotation = Rotation(random_orientations(16, 0).numpy())
    generator = SimulationGenerator(simulate.kv, shape_factor_model="sin2c")
    radius = simulate.size / 2 * simulate.scale

    def theirs() -> int:
        made = generator.calculate_diffraction2d(phase, rotation, reciprocal_radius=radius, max_excitation_error=0.05)
        for number in range(rotation.size):
            made.irot[number].get_diffraction_pattern(
                shape=(simulate.size, simulate.size), sigma=1, calibration=simulate.scale, fast=True
            )
        return int(rotation.size)

    return _rate(theirs, seconds)[0]


def _rate(work: Callable[[], int], seconds: float) -> tuple[float, float]:
    """Return units of work per second, and CPU seconds per unit, after one warm-up call."""
    work()
    done, started, used = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        done += work()
    return done / (time.perf_counter() - started), (time.process_time() - used) / done
