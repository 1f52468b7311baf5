"""`python -m benchmarks simulate` and `bloch`: simulated patterns per second, beside the field's own simulators."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stemtune.config import Config, SimulateConfig
from stemtune.crystal import rotations
from stemtune.crystal.phase import linio2
from stemtune.crystal.sampling import random_orientations
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator


def kinematic(
    _: Path | None = None,
    *,
    simulate: SimulateConfig | None = None,
    seconds: float = 4.0,
    device: torch.device | str = "cpu",
    peer: bool = True,
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
    dict
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

    rate, cpu = _throughput(ours, seconds)
    figures: dict[str, Any] = {
        "patterns_per_s": rate,
        "cpu_ms_per_pattern": 1e3 * cpu,
        "threads": torch.get_num_threads(),
        "device": str(simulator.device),
        "size": simulate.size,
    }
    if peer:
        figures["diffsims_patterns_per_s"] = diffsims_throughput(simulate, seconds)
        figures["times_faster"] = rate / figures["diffsims_patterns_per_s"]
    return figures


def diffsims_throughput(simulate: SimulateConfig, seconds: float) -> float:
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

    return _throughput(theirs, seconds)[0]


BLOCH_THICKNESS_NM = (20.0, 40.0, 60.0, 80.0)
BLOCH_BEAMS = 100
_BLOCH_ERROR = 0.09  # 1/Å; an orientation of LiNiO2 has about 100 beams within it and the corners of the pattern
_ATOMIC_NUMBERS = {"Li": 3, "O": 8, "Ni": 28}


def bloch(
    _: Path | None = None, *, seconds: float = 4.0, device: torch.device | str = "cpu", peer: bool = True
) -> dict[str, Any]:
    """Measure the Bloch waves of LiNiO2 at random orientations: 100 beams, four thicknesses, with absorption.

    Parameters
    ----------
    seconds
        Time to measure for, each.
    device
        Where ours runs.
    peer
        Whether to measure py4DSTEM as well, in this process: about as many beams, the same thicknesses. That takes a
        running interpreter that has it (0.14 wants numpy below 2).

    Returns
    -------
    dict
        `orientations_per_s`, `cpu_ms_per_orientation` (over all threads), `beams`, `thicknesses`, `threads`, `device`;
        with `peer` `py4dstem_orientations_per_s`, `py4dstem_beams` and `times_faster`, or `py4dstem`, that it is not
        installed.
    """
    from stemtune.diffraction.bloch import BlochSimulator

    simulate = SimulateConfig(
        physics="bloch",
        beams=BLOCH_BEAMS,
        beam_error=_BLOCH_ERROR,
        centre_error=0.0,
        ellipticity=0.0,
        scale_error=0.0,
    )
    simulator = BlochSimulator(linio2(), Geometry.of(simulate), simulate, device)
    thickness = torch.tensor(BLOCH_THICKNESS_NM)
    batch = 128 if simulator.device.type == "cpu" else 2048
    counted: list[float] = []

    def ours() -> int:
        beams = simulator.beams(random_orientations(batch, len(counted)), thickness)
        counted.append(float((beams.intensity[:, 0] > 0).sum()) / batch)  # waits for a GPU
        return batch

    rate, cpu = _throughput(ours, seconds)
    figures: dict[str, Any] = {
        "orientations_per_s": rate,
        "cpu_ms_per_orientation": 1e3 * cpu,
        "beams": float(np.mean(counted)),
        "thicknesses": len(thickness),
        "threads": torch.get_num_threads(),
        "device": str(simulator.device),
    }
    if peer and importlib.util.find_spec("py4DSTEM") is None:
        figures["py4dstem"] = "not installed for this interpreter, so not measured"
    elif peer:
        theirs, beams = py4dstem_throughput(simulator.geometry, seconds)
        figures |= {"py4dstem_orientations_per_s": theirs, "py4dstem_beams": beams, "times_faster": rate / theirs}
    return figures


def py4dstem_throughput(geometry: Geometry, seconds: float) -> tuple[float, float]:
    """Return how many orientations of LiNiO2 per second py4DSTEM's Bloch waves do, and with how many beams."""
    from py4DSTEM.process.diffraction import Crystal

    phase = linio2()
    numbers = np.array([_ATOMIC_NUMBERS[element] for element in phase.elements])
    crystal = Crystal(positions=phase.fractional.numpy(), numbers=numbers, cell=np.array(phase.lattice))
    crystal.calculate_dynamical_structure_factors(
        1e3 * geometry.kv,
        "WK-P",
        k_max=2 * geometry.corner_inv_angstrom,
        thermal_sigma=math.sqrt(float(phase.u_iso[0])),
    )
    thickness = [10 * value for value in BLOCH_THICKNESS_NM]
    counted: list[int] = []

    def theirs() -> int:
        matrix = rotations.to_matrix(random_orientations(1, len(counted)))[0].numpy()
        beams = crystal.generate_diffraction_pattern(
            orientation_matrix=matrix,
            sigma_excitation_error=_BLOCH_ERROR,
            tol_excitation_error_mult=1,
            tol_intensity=1e-9,  # without the reflections that the lattice forbids
            k_max=geometry.corner_inv_angstrom,
        )
        crystal.generate_dynamical_diffraction_pattern(beams, thickness=thickness, zone_axis_cartesian=matrix[:, 2])
        counted.append(len(beams.data))
        return 1

    rate, _ = _throughput(theirs, seconds)
    return rate, float(np.mean(counted))


def beams(folder: Path, *, orientations: int = 256, seconds: float = 4.0) -> dict[str, Any]:
    """Measure patterns of 64 px drawn from a store of beams, beside kinematic ones simulated directly, in turns.

    Returns
    -------
    dict
        `orientations_per_s` of making the store (6 thicknesses, 2 tilt groups of 8 directions), `drawn_patterns_per_s`
        and `kinematic_patterns_per_s` with the detector's every effect, their ratio, and `threads`.
    """
    from stemtune.dataset.beam_store import BeamStore, simulate_beams
    from stemtune.dataset.fresh_patterns import BeamPatterns

    microscope = {"simulate.size": 64, "simulate.scale": 0.05, "simulate.thickness": "20:80", "simulate.tilts": 8}
    simulate = Config.from_flat({**microscope, "simulate.precession": "0:0.5", "simulate.physics": "bloch"}).simulate
    path = folder / "beams.h5"
    path.unlink(missing_ok=True)
    began = time.perf_counter()
    simulate_beams("linio2", path, orientations, simulate)
    made = orientations / (time.perf_counter() - began)
    drawn, generator = BeamPatterns(BeamStore.open(path), simulate), torch.Generator().manual_seed(0)
    direct = KinematicSimulator(linio2(), drawn.geometry, simulate)

    def from_beams() -> int:
        return len(drawn.draw(512, generator, "training").patterns)

    def directly() -> int:
        return len(direct.patterns(random_orientations(512, generator), generator))

    rates = [(_throughput(from_beams, seconds / 3)[0], _throughput(directly, seconds / 3)[0]) for _ in range(3)]
    ours, theirs = (float(np.median(column)) for column in zip(*rates, strict=True))
    return {
        "orientations_per_s": made,
        "drawn_patterns_per_s": ours,
        "kinematic_patterns_per_s": theirs,
        "ratio": float(np.median([one / other for one, other in rates])),
        "threads": torch.get_num_threads(),
    }


def _throughput(work: Callable[[], int], seconds: float) -> tuple[float, float]:
    """Return units of work per second, and CPU seconds per unit, after one warm-up call."""
    work()
    done, started, used = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        done += work()
    return done / (time.perf_counter() - started), (time.process_time() - used) / done
