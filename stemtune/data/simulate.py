"""Stores of simulated patterns: random orientations to train on, and a polycrystal whose truth is known.

Patterns come in blocks, each with a random generator of its own made from the seed and the block's number, so the
same seed gives the same store whatever the number of worker processes.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from stemtune.config import SimulateConfig, Span
from stemtune.crystal import rotations
from stemtune.crystal.phase import Phase, phase_from
from stemtune.crystal.sampling import random_orientations
from stemtune.data.store import StoreWriter
from stemtune.diffraction.conditions import Conditions, draw_conditions
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import CHUNK, KinematicSimulator
from stemtune.errors import UserError
from stemtune.processes import deaf_to_interrupts

BLOCK = 4 * CHUNK
"""Patterns that are simulated and written at once."""

GROUP = 16
"""Patterns of one group, which stays on one side of a split."""

VACUUM = -1
"""Grain number of scan positions beside the specimen."""

GRAIN_SPREAD_DEG = 0.5
"""Lattice rotation inside a grain, from its middle to its edge, in degrees."""

STEP_NM = 10.0
"""Scan step of a simulated polycrystal."""

_SATURATION = 65535
_PER_SCAN = (
    "precession_rad",
    "convergence_rad",
    "shape_width",
    "intensity_power",
    "dose",
    "background",
    "background_width",
    "background_weight",
    "disk_px",
    "blur_px",
    "stop_px",
    "distortion",
)
"""Conditions of the microscope and the support film, which stay the same over a scan."""


def simulate_store(
    cif: str | os.PathLike[str],
    out: str | os.PathLike[str],
    patterns: int,
    simulate: SimulateConfig,
    seed: int = 0,
    workers: int = 1,
) -> Path:
    """Write a store of simulated patterns at uniformly random orientations.

    Parameters
    ----------
    cif
        Path of the phase's CIF; "" or "linio2" is the LiNiO2 that ships.
    out
        Path of the store; it appears when it is complete.
    patterns
        How many.
    simulate
        The microscope.
    seed
        The same seed gives the same store, whatever the number of workers.
    workers
        Processes that simulate; torch's threads are shared out among them.

    Returns
    -------
    out
        The store: uint16 counts, or float32 where `simulate.dose` is 0; phase 0, confidence 1, a group for every 16
        patterns.
    """
    if patterns < 1:
        raise UserError(f"{patterns} patterns are asked for, but it must be at least 1")
    phase, geometry = phase_from(cif), Geometry.of(simulate)
    simulator = KinematicSimulator(phase, geometry, simulate)
    plan = [(seed, number, min(BLOCK, patterns - number * BLOCK)) for number in range(-(-patterns // BLOCK))]
    attrs = _attributes(cif, simulate, patterns=patterns, seed=seed)
    writer = StoreWriter(out, patterns, geometry, [phase], _kind(simulate), attrs, split_seed=seed)
    with tqdm(total=patterns, unit="pattern", desc="simulate", disable=None) as bar, writer:
        for (_, number, count), (images, orientation) in zip(plan, _blocks(simulator, plan, workers), strict=True):
            start = number * BLOCK
            writer.write(
                start,
                images,
                orientation=orientation,
                confidence=np.ones(count),
                phase=np.zeros(count),
                group=(start + np.arange(count)) // GROUP,
            )
            bar.update(count)
    return Path(out)


Block = tuple[npt.NDArray[Any], npt.NDArray[np.float64]]
"""Patterns (n, size, size) as stored, and their orientations (n, 4)."""


def _block(simulator: KinematicSimulator, seed: int, number: int, count: int) -> Block:
    generator = _generator(seed, number)
    orientation = random_orientations(count, generator)
    return _stored(simulator.patterns(orientation, generator), simulator.simulate), orientation.numpy()


def _blocks(simulator: KinematicSimulator, plan: list[tuple[int, int, int]], workers: int) -> Iterator[Block]:
    """Yield the planned blocks (seed, number, count) in order, simulated here or by worker processes."""
    workers = min(workers, len(plan))
    if workers <= 1:
        for block in plan:
            yield _block(simulator, *block)
        return
    threads = max(1, torch.get_num_threads() // workers)
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (simulator.phase.cif, simulator.simulate, threads)
    )
    waiting: deque[Future[Block]] = deque()
    try:
        for block in plan:
            with deaf_to_interrupts():  # a worker may be started here
                waiting.append(pool.submit(_work, *block))
            if len(waiting) > 2 * workers:  # no more than this waits in memory to be written
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker process died, perhaps for lack of memory; try fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_own: dict[str, KinematicSimulator] = {}
"""The simulator of a worker process."""


def _start_worker(cif: str, simulate: SimulateConfig, threads: int) -> None:
    torch.set_num_threads(threads)
    _own["simulator"] = KinematicSimulator(Phase.from_cif_text(cif), Geometry.of(simulate), simulate)


def _work(seed: int, number: int, count: int) -> Block:
    return _block(_own["simulator"], seed, number, count)


def simulate_polycrystal(
    cif: str | os.PathLike[str],
    out: str | os.PathLike[str],
    shape: tuple[int, int],
    grains: int,
    simulate: SimulateConfig,
    seed: int = 0,
) -> Path:
    """Write a store that is a scan over a particle of Voronoi grains in vacuum, with the true orientations.

    The microscope and the support film (dose, precession, blur, distortion, background ...) are drawn once for the
    scan, the thickness once for each grain (it varies by 5 % inside), the share of the direct beam, the error of the
    centre and dead pixels for every position. Inside a grain the lattice turns smoothly by up to
    about `GRAIN_SPREAD_DEG` towards its edge.

    Parameters
    ----------
    cif, out, simulate, seed
        As in `simulate_store`.
    shape
        Rows and columns of the scan.
    grains
        How many grains; `group` is the grain.

    Returns
    -------
    out
        The store. Vacuum has the direct beam only, phase -1, an orientation of NaN, confidence NaN, and a group of
        its own after those of the grains.
    """
    generator = _generator(seed, 0)
    grain, seeds = grain_map(shape, grains, generator)
    phase, geometry = phase_from(cif), Geometry.of(simulate)
    simulator = KinematicSimulator(phase, geometry, simulate)
    orientation = _grain_orientations(grain, seeds, generator)
    thickness = _grain_thickness(grain, simulate.thickness, generator)
    microscope = draw_conditions(simulate, geometry, 1, generator, simulator.device)
    rows, columns = shape
    flat = torch.from_numpy(grain).view(-1)
    attrs = {
        **_attributes(cif, simulate, scan=list(shape), grains=grains, seed=seed),
        "scan_shape": list(shape),
        "step_nm": STEP_NM,
    }
    writer = StoreWriter(out, rows * columns, geometry, [phase], _kind(simulate), attrs, split_seed=seed)
    with tqdm(total=rows * columns, unit="pattern", desc="simulate", disable=None) as bar, writer:
        for start in range(0, rows * columns, BLOCK):
            block = slice(start, min(start + BLOCK, rows * columns))
            images = _scan_block(simulator, orientation[block], thickness[block], microscope, generator)
            number = np.arange(block.start, block.stop)
            inside = (flat[block] != VACUUM).numpy()
            writer.write(
                start,
                _stored(images, simulate),
                orientation=orientation[block].numpy(),
                confidence=np.where(inside, 1.0, np.nan),
                phase=np.where(inside, 0, -1),
                position=np.stack((number // columns, number % columns), axis=1),
                group=np.where(inside, flat[block].numpy(), grains),
            )
            bar.update(len(number))
    return Path(out)


def grain_map(
    shape: tuple[int, int], grains: int, generator: torch.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the grain number of each position (rows, columns), `VACUUM` outside, and the grains' seeds (grains, 2).

    The particle is a rounded rectangle that leaves a margin of about a tenth. The seeds keep apart: each is the one
    of ten random positions that is farthest from those before it.
    """
    rows, columns = shape
    if grains < 1 or rows < 8 or columns < 8:
        raise UserError(f"a scan of {rows} x {columns} with {grains} grains is asked for; give at least 8 x 8 and 1")
    place = np.moveaxis(np.indices(shape), 0, -1).astype(float)
    reduced = np.abs((2 * place + 1) / np.array(shape) - 1)
    inside = (reduced**6).sum(-1) ** (1 / 6) < 0.9
    candidates = place[inside]
    if grains > len(candidates) // 4:
        raise UserError(f"{grains} grains do not fit into a scan of {rows} x {columns}; give fewer, or a larger scan")
    seeds = np.empty((0, 2))
    while len(seeds) < grains:
        tried = candidates[torch.randint(len(candidates), (10,), generator=generator).numpy()]
        nearest = np.linalg.norm(tried[:, None] - seeds, axis=2).min(axis=1, initial=np.inf)
        if nearest.max() > 0:
            seeds = np.concatenate((seeds, tried[[nearest.argmax()]]))
    grain = np.full(shape, VACUUM, dtype=np.int64)
    distance = np.linalg.norm(candidates[:, None] - seeds, axis=2)
    grain[inside] = distance.argmin(axis=1)
    return grain, seeds


def _grain_orientations(
    grain: npt.NDArray[np.int64], seeds: npt.NDArray[np.float64], generator: torch.Generator
) -> Tensor:
    """Return the orientation (positions, 4) everywhere: the grain's, turned slightly with the distance to its seed."""
    count = len(seeds)
    of_grain = random_orientations(count, generator)
    gradient = torch.randn(count, 2, 3, dtype=torch.float64, generator=generator)
    gradient /= torch.linalg.vector_norm(gradient, dim=(1, 2), keepdim=True)
    flat = grain.reshape(-1)
    place = np.indices(grain.shape).reshape(2, -1).T
    offset = torch.from_numpy(place - seeds[flat])
    size = np.array([np.linalg.norm((place - seeds[k])[flat == k], axis=1).max(initial=1.0) for k in range(count)])
    number = torch.from_numpy(flat)
    turn = torch.einsum("ni,nij->nj", offset / torch.from_numpy(size[flat])[:, None], gradient[number])
    bend = rotations.from_axis_angle_deg(turn, GRAIN_SPREAD_DEG * torch.linalg.vector_norm(turn, dim=1))
    orientation = rotations.normalise(rotations.multiply(of_grain[number], bend))
    return torch.where((number == VACUUM)[:, None], torch.nan, orientation)


def _grain_thickness(grain: npt.NDArray[np.int64], span: Span, generator: torch.Generator) -> Tensor:
    """Return the thickness in Å (positions,)."""
    of_grain = span.low + (span.high - span.low) * torch.rand(int(grain.max()) + 1, generator=generator)
    varied = 1 + 0.05 * (2 * torch.rand(grain.size, generator=generator) - 1)
    return 10 * of_grain[torch.from_numpy(grain.reshape(-1))] * varied


def _scan_block(
    simulator: KinematicSimulator,
    orientation: Tensor,
    thickness: Tensor,
    microscope: Conditions,
    generator: torch.Generator,
) -> Tensor:
    """Return the patterns (n, size, size) of scan positions; those without an orientation are vacuum."""
    vacuum = orientation.isnan().any(dim=1)

    def make(rows: slice, own: torch.Generator) -> Tensor:
        count, empty = rows.stop - rows.start, vacuum[rows]
        drawn = draw_conditions(simulator.simulate, simulator.geometry, count, own, simulator.device)
        fixed = {name: getattr(microscope, name).expand_as(getattr(drawn, name)) for name in _PER_SCAN}
        conditions = dataclasses.replace(
            drawn,
            thickness_angstrom=thickness[rows],
            direct_beam=torch.where(empty, 1.0, drawn.direct_beam),
            **{**fixed, "background": torch.where(empty, 0.0, fixed["background"])},
        )
        return simulator.expose(orientation[rows].float(), conditions, own)

    return simulator.in_chunks(len(orientation), generator, make)


def _generator(seed: int, number: int) -> torch.Generator:
    """Return the random generator of block `number`."""
    mixed = np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0] >> np.uint64(1)
    return torch.Generator().manual_seed(int(mixed))


def _kind(simulate: SimulateConfig) -> str:
    return "uint16" if simulate.dose.high > 0 else "float32"


def _stored(images: Tensor, simulate: SimulateConfig) -> npt.NDArray[Any]:
    """Return the patterns as they are stored; counts saturate where uint16 does."""
    if _kind(simulate) == "float32":
        return images.numpy()
    return images.clamp_(max=_SATURATION).to(torch.int32).numpy().astype(np.uint16)


def _attributes(cif: str | os.PathLike[str], simulate: SimulateConfig, **options: Any) -> dict[str, Any]:
    settings = {
        f"simulate.{item.name}": str(value) if isinstance(value := getattr(simulate, item.name), Span) else value
        for item in dataclasses.fields(simulate)
    }
    return {"origin": "stemtune simulate", "options": {"cif": str(cif), **options, **settings}}
