"""Stores of simulated patterns: random orientations to train on, and a polycrystal whose truth is known.

Patterns come in blocks, each with a random generator of its own made from the seed and the block's number, so the
same seed gives the same store whatever the number of worker processes, and whether or not it was made in one go.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stemtune._parallel import Spread, map_over_processes
from stemtune._progress import Progress
from stemtune.config import SimulateConfig, Span
from stemtune.crystal.phase import Phase, phase_from
from stemtune.crystal.sampling import random_orientations
from stemtune.dataset.polycrystal import VACUUM, Lattices, grain_map, neighbours
from stemtune.dataset.schema import SIMULATED
from stemtune.dataset.writer import ResumableWriter
from stemtune.diffraction import overlap
from stemtune.diffraction.bloch import simulator_for
from stemtune.diffraction.conditions import Conditions, draw_conditions
from stemtune.diffraction.detector import CHUNK
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator
from stemtune.diffraction.overlap import Overlap
from stemtune.errors import UserError

BLOCK = 4 * CHUNK  # patterns that are simulated and written at once
GROUP = 16  # patterns of one group, which stays on one side of a split
STEP_NM = 10.0  # scan step of a simulated polycrystal
_SATURATION = 65535
_PER_SCAN = (  # conditions of the microscope and the support film, which stay the same over a scan
    *("precession_rad", "convergence_rad", "shape_width", "intensity_power", "dose", "background", "background_width"),
    *("background_weight", "disk_px", "blur_px", "stop_px", "distortion"),
)


def simulate_store(
    cif: str | os.PathLike[str],
    out: str | os.PathLike[str],
    patterns: int,
    simulate: SimulateConfig,
    seed: int = 0,
    workers: int = 1,
    device: str = "cpu",
    restart: bool = False,
    spread: Spread | None = None,
) -> Path:
    """Write a store of simulated patterns at uniformly random orientations, or resume an unfinished one.

    Parameters are those of `stemtune.simulate`, and: `simulate`, the microscope; `device`, cpu, cuda, or auto (a GPU if
    there is one), whose own random numbers are used; `restart`, to begin anew even if there is an unfinished store;
    `spread`, what simulates the blocks instead of `workers` processes here, the nodes of a Ray cluster for instance
    (`device` is then theirs).

    The store at `out` has uint16 counts, or float32 where `simulate.dose` is 0; phase 0, confidence 1, a group for
    every 16 patterns, the orientation of the strongest grain and those of the others where `simulate.overlap` is above
    0. It appears when it is complete. Until then what there is of it lies in `OUT.part`, and the same call resumes;
    `Interrupted` after Ctrl-C says so. A `UserError` is for what cannot be simulated or written, and for an unfinished
    store that was made with other settings.
    """
    if patterns < 1:
        raise UserError(f"{patterns} patterns are asked for, but it must be at least 1")
    phase, geometry, device = phase_from(cif), Geometry.of(simulate), device if spread else chosen_device(device)
    simulator = simulator_for(phase, geometry, simulate, "cpu" if spread else device)
    attrs = _attributes(cif, simulate, patterns=patterns, seed=seed, device=device)
    spread = spread or map_over_processes(workers if device == "cpu" else 1)
    writer = _writer(out, patterns, simulator, attrs, seed, restart)
    return _fill(writer, spread, ((simulator.phase.cif, simulate, device), seed, patterns), _random_block)


Block = tuple[npt.NDArray[Any], dict[str, Any]]  # patterns (n, size, size) as stored, and their columns


def _writer(
    out: str | os.PathLike[str],
    count: int,
    simulator: KinematicSimulator,
    attrs: dict[str, Any],
    seed: int,
    restart: bool,
) -> ResumableWriter:
    phases, kind, several = [simulator.phase], _kind(simulator.simulate), simulator.simulate.overlap > 0
    return ResumableWriter(out, count, simulator.geometry, phases, kind, attrs, seed, several, restart=restart)


def _fill(
    unfinished: ResumableWriter, spread: Spread, given: tuple[Any, ...], work: Callable[[tuple[Any, ...], int], Block]
) -> Path:
    """Write the blocks that are not there yet as they come from `work`; show rate and time left."""
    with unfinished as writer:
        starts = range(0, writer.n, BLOCK)
        numbers = [start // BLOCK for start in starts if not writer.done[start : start + BLOCK].all()]
        done = int(writer.done.sum())
        if done:
            print(f"resuming '{writer.part}': {done:,} of {writer.n:,} patterns are there", file=sys.stderr)
        with (
            closing(spread(_prepare, given, work, numbers)) as blocks,
            Progress(writer.n, "simulate", "pattern", done) as progress,
        ):
            for number, (images, columns) in zip(numbers, blocks, strict=True):
                writer.write(BLOCK * number, images, **columns)
                progress.update(len(images))
    return writer.path


def _prepare(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what a worker needs: its simulator, made from (cif, simulate, device), and the rest of what is given."""
    cif, simulate, device = given[0]
    return (simulator_for(Phase.from_cif_text(cif), Geometry.of(simulate), simulate, device), *given[1:])


def _random_block(state: tuple[Any, ...], number: int) -> Block:
    """Return the patterns of block `number`, at random orientations."""
    simulator, seed, patterns = state
    count, generator = min(BLOCK, patterns - number * BLOCK), seeded_generator(seed, number)
    orientation = random_orientations(count, generator)
    several = overlap.draw_overlap(simulator.simulate, count, generator) if simulator.simulate.overlap > 0 else None
    images = overlap.patterns(simulator, orientation, several, generator)
    columns = {
        "orientation": orientation.numpy(),
        "confidence": np.ones(count),
        "phase": np.zeros(count),
        "group": (number * BLOCK + np.arange(count)) // GROUP,
        **_overlap_columns(several),
    }
    return _stored(images, simulator.simulate), columns


def _overlap_columns(several: Overlap | None) -> dict[str, Any]:
    if several is None:
        return {}
    return {"overlap_orientation": several.orientation.numpy(), "overlap_weight": several.weight.numpy()}


def simulate_polycrystal(
    cif: str | os.PathLike[str],
    out: str | os.PathLike[str],
    shape: tuple[int, int],
    grains: int,
    simulate: SimulateConfig,
    seed: int = 0,
    workers: int = 1,
    device: str = "cpu",
    restart: bool = False,
    spread: Spread | None = None,
) -> Path:
    """Write a store that is a scan over a particle of Voronoi grains in vacuum, with the true orientations.

    The microscope and the support film (dose, precession, blur, distortion, background ...) are drawn once for the
    scan, the thickness once for each grain (it varies by 5 % inside), the share of the direct beam, the error of the
    centre and dead pixels for every position. Inside a grain the lattice turns smoothly by up to
    about `GRAIN_SPREAD_DEG` towards its edge. Where `simulate.overlap` is above 0, that share of the positions
    beside another grain shows the other grain too.

    `shape` are rows and columns of the scan; the other parameters are those of `simulate_store`. In the store `group`
    is the grain. Vacuum has the direct beam only, phase -1, an orientation of NaN, confidence NaN, and a group of its
    own after those of the grains.
    """
    generator = seeded_generator(seed, 0)
    grain, seeds = grain_map(shape, grains, generator)
    phase, geometry, device = phase_from(cif), Geometry.of(simulate), chosen_device(device)
    simulator = simulator_for(phase, geometry, simulate, device)
    scan = _draw_scan(simulator, grain, Lattices.draw(grain, seeds, generator), generator)
    attrs = _attributes(cif, simulate, scan=list(shape), grains=grains, seed=seed, device=device)
    attrs |= {"scan_shape": list(shape), "step_nm": STEP_NM}
    spread = spread or map_over_processes(workers if device == "cpu" else 1)
    writer = _writer(out, grain.size, simulator, attrs, seed, restart)
    return _fill(writer, spread, ((simulator.phase.cif, simulate, device), scan, grains, seed), _scan_block)


@dataclasses.dataclass(frozen=True)
class _Scan:
    """What there is to see: grain number (rows, columns), then orientation, thickness and overlap per position (N,)."""

    grain: npt.NDArray[np.int64]
    orientation: Tensor
    thickness_angstrom: Tensor
    overlap: Overlap | None
    microscope: Conditions


def _draw_scan(
    simulator: KinematicSimulator, grain: npt.NDArray[np.int64], lattices: Lattices, generator: torch.Generator
) -> _Scan:
    simulate, flat = simulator.simulate, torch.from_numpy(grain).view(-1)
    low, high = simulate.thickness.low, simulate.thickness.high
    of_grain = 10 * (low + (high - low) * torch.rand(len(lattices.seeds), generator=generator))  # in Å
    varied = 1 + 0.05 * (2 * torch.rand(grain.size, generator=generator) - 1)
    microscope = draw_conditions(simulate, simulator.geometry, 1, generator, simulator.device)
    several = None
    if simulate.overlap > 0:
        other = neighbours(grain)
        beside = torch.from_numpy(other).view(2, -1)
        weight = overlap.draw_weights(simulate, (beside != VACUUM).sum(0), generator)
        orientation = torch.stack([lattices.over(one) for one in other], dim=1)
        orientation = orientation.masked_fill((weight[:, 1:] == 0)[..., None], torch.nan)
        several = Overlap(weight, orientation, (of_grain[beside] * varied).T)
    return _Scan(grain, lattices.over(grain), of_grain[flat] * varied, several, microscope)


def _scan_block(state: tuple[Any, ...], number: int) -> Block:
    """Return the patterns of block `number` of the scan positions; those without an orientation are vacuum."""
    simulator: KinematicSimulator
    scan: _Scan
    simulator, scan, grains, seed = state
    block = slice(number * BLOCK, min((number + 1) * BLOCK, scan.grain.size))
    place = np.arange(block.start, block.stop)
    orientation, thickness = scan.orientation[block], scan.thickness_angstrom[block].to(simulator.device)
    several = scan.overlap.part(block) if scan.overlap else None
    vacuum = orientation.isnan().any(dim=1)
    lit, empty = orientation.to(simulator.device, torch.float32), vacuum.to(simulator.device)
    further = Overlap(*(values.to(simulator.device) for values in several)) if several else None

    def make(rows: slice, own: torch.Generator) -> Tensor:
        count = rows.stop - rows.start
        drawn = draw_conditions(simulator.simulate, simulator.geometry, count, own, simulator.device)
        fixed = {name: getattr(scan.microscope, name).expand_as(getattr(drawn, name)) for name in _PER_SCAN}
        conditions = dataclasses.replace(
            drawn,
            thickness_angstrom=thickness[rows],
            direct_beam=torch.where(empty[rows], 1.0, drawn.direct_beam),
            **{**fixed, "background": torch.where(empty[rows], 0.0, fixed["background"])},
        )
        if further is None:
            return simulator.expose(lit[rows], conditions, own)
        diffracted = overlap.diffracted(simulator, lit[rows], further.part(rows), conditions)
        return simulator.detect(diffracted, conditions, own)

    images = simulator.in_chunks(len(place), seeded_generator(seed, 1 + number), make)
    inside, columns = ~vacuum.numpy(), scan.grain.shape[1]
    return _stored(images, simulator.simulate), {
        "orientation": orientation.numpy(),
        "confidence": np.where(inside, 1.0, np.nan),
        "phase": np.where(inside, 0, -1),
        "position": np.stack((place // columns, place % columns), axis=1),
        "group": np.where(inside, scan.grain.reshape(-1)[block], grains),
        **_overlap_columns(several),
    }


def seeded_generator(seed: int, number: int) -> torch.Generator:
    """Return the random generator of block `number`."""
    mixed = np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0] >> np.uint64(1)
    return torch.Generator().manual_seed(int(mixed))


def chosen_device(name: str) -> str:
    """Return "cpu" or "cuda" for one of these or "auto", which is a GPU if there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch sees no GPU here; leave it out to simulate on the CPU")
    return name


def _kind(simulate: SimulateConfig) -> str:
    return "uint16" if simulate.dose.high > 0 else "float32"


def _stored(images: Tensor, simulate: SimulateConfig) -> npt.NDArray[Any]:
    """Return the patterns as they are stored; counts saturate where uint16 does."""
    images = images.cpu()
    if _kind(simulate) == "float32":
        return images.numpy()
    return images.clamp_(max=_SATURATION).to(torch.int32).numpy().astype(np.uint16)


def _attributes(cif: str | os.PathLike[str], simulate: SimulateConfig, **options: Any) -> dict[str, Any]:
    settings = {
        f"simulate.{item.name}": str(value) if isinstance(value := getattr(simulate, item.name), Span) else value
        for item in dataclasses.fields(simulate)
    }
    return {"origin": SIMULATED, "options": {"cif": str(cif), **options, **settings}}
