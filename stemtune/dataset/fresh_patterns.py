"""Patterns that are made when they are asked for: simulated afresh, or drawn from a store of beams.

Shape legend: B patterns, T thicknesses, G tilt groups.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stemtune._parallel import prefetch
from stemtune.config import SimulateConfig, Span
from stemtune.crystal import rotations
from stemtune.crystal.phase import Phase
from stemtune.crystal.sampling import random_orientations
from stemtune.dataset.augment import turn_orientation
from stemtune.dataset.batches import Batch, Portion, batch_seed
from stemtune.dataset.beam_store import SCALE, BeamStore
from stemtune.diffraction import overlap
from stemtune.diffraction.bloch import FAINTEST
from stemtune.diffraction.conditions import draw_conditions
from stemtune.diffraction.detector import Detector, DiffractedBeams
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator, reach_of
from stemtune.errors import UserError

Part = Literal["training", "validation", "test"]
_STREAM: dict[Part, int] = {"training": 1, "validation": 2, "test": 3}  # keep their random numbers apart
HELD_OUT = 0.05  # share of the orientations of a store of beams that are never trained on: half validation, half test
_TOLERANCE = 1e-5  # relative difference of numbers that were stored as float32


class PatternSource(Protocol):
    """Makes as many patterns as are asked for; `source_sha256` is the hash of the file behind them, empty for none."""

    geometry: Geometry
    phase: Phase
    device: torch.device
    source_sha256: str

    def draw(self, count: int, generator: torch.Generator, part: Part) -> Batch:
        """Return `count` patterns of random orientations; where they are stored, no orientation is in two parts."""


class SimulatedPatterns:
    """Patterns simulated afresh, of uniformly random orientations.

    Where `simulate.overlap` is above 0, some show further grains; the orientation is that of the strongest.
    """

    source_sha256 = ""

    def __init__(self, simulator: KinematicSimulator) -> None:
        self.simulator, self.geometry, self.phase = simulator, simulator.geometry, simulator.phase
        self.device = simulator.device

    def draw(self, count: int, generator: torch.Generator, part: Part) -> Batch:
        """Return `count` patterns of random orientations."""
        orientation = random_orientations(count, generator)
        simulate = self.simulator.simulate
        several = overlap.draw_overlap(simulate, count, generator) if simulate.overlap > 0 else None
        return Batch(overlap.patterns(self.simulator, orientation, several, generator), orientation.to(torch.float32))


class BeamPatterns(Detector):
    """Patterns drawn from a store of beams.

    Each shows one of the stored orientations at one of its thicknesses and tilts, turned about the beam by any angle
    and, if the crystal has a centre of symmetry, perhaps mirrored: both are exact. Everything else is drawn from
    `simulate.*` as in a simulation. The last orientations, a share of `HELD_OUT`, are for
    validation and for test, apart.

    A `UserError` says that the store does not hold what the settings ask for.
    """

    def __init__(self, store: BeamStore, simulate: SimulateConfig, device: torch.device | str = "cpu") -> None:
        super().__init__(Geometry.of(simulate), simulate, device)
        self.store, self.phase, self.source_sha256 = store, store.phase, store.sha256
        self._check_settings()
        self.g = (torch.from_numpy(store.hkl).double() @ store.phase.reciprocal_matrix).float().to(self.device)
        held = max(2, round(HELD_OUT * store.n))
        if store.n < 3:
            raise UserError(f"'{store.path}' holds {store.n} orientation(s), too few to train, validate and test on")
        allowed, tested = self._allowed(), held // 2
        row = np.arange(store.n)[:, None, None]
        parts: dict[Part, npt.NDArray[np.bool_]] = {
            "training": row < store.n - held,
            "validation": (row >= store.n - held) & (row < store.n - tested),
            "test": row >= store.n - tested,
        }
        self._cells = {name: np.flatnonzero(allowed & rows) for name, rows in parts.items()}
        if not all(len(cells) for cells in self._cells.values()):
            raise UserError(
                f"'{store.path}' has no orientation with a thickness and tilts that `simulate.thickness`, `.precession`"
                " and `.convergence` allow; widen them"
            )

    def _check_settings(self) -> None:
        store, simulate, place = self.store, self.simulate, f"the beams in '{self.store.path}'"
        if abs(store.kv / simulate.kv - 1) > _TOLERANCE:
            raise UserError(f"`simulate.kv` is {simulate.kv:g}, but {place} are those of {store.kv:g} kV")
        reach = reach_of(self.geometry, simulate)
        if reach > store.reach * (1 + _TOLERANCE):
            raise UserError(
                f"patterns of `simulate.size` {simulate.size} and `.scale` {simulate.scale:g} reach {reach:.3g} 1/Å,"
                f" but {place} end at {store.reach:.3g} 1/Å; lower these, or simulate the beams anew"
            )
        for name in ("thickness", "precession", "convergence"):
            wanted, known = getattr(simulate, name), store.span(name)
            slack = _TOLERANCE * max(1.0, abs(known.high))
            if wanted.low < known.low - slack or wanted.high > known.high + slack:
                raise UserError(
                    f"`simulate.{name}` is {wanted}, but {place} were simulated for {known}; set"
                    f" simulate.{name}={known}, or simulate them anew"
                )
        if simulate.overlap > 0:
            raise UserError("`simulate.overlap` is above 0, but patterns drawn from beams show one grain; set it to 0")

    def _allowed(self) -> npt.NDArray[np.bool_]:
        """Return which values (n, G, T) of the store lie in the ranges that are asked for."""
        store, simulate = self.store, self.simulate
        tilts = _within(store.precession_deg, simulate.precession) & _within(
            store.convergence_mrad, simulate.convergence
        )
        return tilts[:, :, None] & _within(store.thickness_nm, simulate.thickness)[:, None, :]

    def draw(self, count: int, generator: torch.Generator, part: Part) -> Batch:
        """Return `count` patterns of the orientations of a part."""
        # Orientation, tilt group and thickness, and how the pattern is turned.
        cells, (groups, thicknesses) = self._cells[part], self.store.intensity.shape[1:]
        drawn = torch.randint(len(cells), (count,), generator=generator, device=generator.device).cpu().numpy()
        cell = cells[drawn]
        row, group, thickness = cell // (groups * thicknesses), cell // thicknesses % groups, cell % thicknesses
        turn = 360 * torch.rand(count, generator=generator, device=generator.device).cpu()
        mirrored = torch.rand(count, generator=generator, device=generator.device).cpu() < 0.5
        if not self.phase.is_centrosymmetric:
            mirrored = torch.zeros_like(mirrored)
        orientation = turn_orientation(torch.from_numpy(self.store.orientation[row]), turn, mirrored)

        def make(rows: slice, own: torch.Generator) -> Tensor:
            where = row[rows], group[rows], thickness[rows]
            return self._patterns(*where, orientation[rows].float(), mirrored[rows], own)

        return Batch(self.in_chunks(count, generator, make), orientation.float().to(self.device))

    def _patterns(
        self,
        row: npt.NDArray[np.int64],
        group: npt.NDArray[np.int64],
        thickness: npt.NDArray[np.int64],
        orientation: Tensor,
        mirrored: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the patterns (B, size, size) of stored beams whose crystals have been turned to `orientation`."""
        store, count, on = self.store, len(row), self.device
        # The beams of each pattern, one flat list.
        length = store.first[row + 1] - store.first[row]
        pattern = np.repeat(np.arange(count), length)
        place = np.arange(len(pattern)) + np.repeat(store.first[row] - (np.cumsum(length) - length), length)
        intensity = store.intensity[place, group[pattern], thickness[pattern]]
        seen = np.flatnonzero(intensity > FAINTEST * SCALE)
        number = torch.from_numpy(pattern[seen]).to(on)
        reflection = torch.from_numpy(store.reflection[place[seen]].astype(np.int64)).to(on)
        share = torch.from_numpy(intensity[seen].astype(np.float32)).to(on) / SCALE
        # Where they stand; the mirrored pattern of a crystal is that of its half turn, each beam opposite (`augment`).
        axes = rotations.rotate(rotations.inverse(orientation)[:, None], torch.eye(3)).to(on)
        x, y = torch.einsum("mi,mij->mj", self.g[reflection], axes[number][:, :, :2]).unbind(1)
        side = (1 - 2 * mirrored.to(on, torch.float32))[number]
        # What else is drawn, with the thickness and the tilts of these beams.
        convergence = torch.from_numpy(store.convergence_mrad[row, group]).to(on) * 1e-3
        wavelength_scale = self.geometry.wavelength_angstrom * self.geometry.scale_inv_angstrom
        conditions = dataclasses.replace(
            draw_conditions(self.simulate, self.geometry, count, generator, on),
            thickness_angstrom=10 * torch.from_numpy(store.thickness_nm[row, thickness]).to(on),
            precession_rad=torch.from_numpy(store.precession_deg[row, group]).to(on) * (math.pi / 180),
            convergence_rad=convergence,
            disk_px=convergence / wavelength_scale,
        )
        direct = torch.from_numpy(store.direct_beam[row, group, thickness]).to(on)
        lit = DiffractedBeams(number, x * side, y * side, share ** conditions.intensity_power[number], direct)
        return self.detect(lit, conditions, generator)


def _within(values: npt.NDArray[np.float32], span: Span) -> npt.NDArray[np.bool_]:
    slack = _TOLERANCE * max(1.0, abs(span.high))
    return (values >= span.low - slack) & (values <= span.high + slack)


class FreshLoader:
    """Batches of a source that makes patterns when they are asked for.

    An epoch has `patterns` over all ranks: of the `part` for training fresh ones every time, else the same, made once
    and kept. The rest is as in `StoreLoader`; the device is the source's.
    """

    def __init__(
        self,
        source: PatternSource,
        patterns: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        part: Part = "training",
        portion: Portion | None = None,
    ) -> None:
        self.source, self.patterns, self.batch_size = source, patterns, batch_size
        self.geometry, self.phase, self.source_sha256 = source.geometry, source.phase, source.source_sha256
        self.seed, self.rank, self.world, self.part, self.training = seed, rank, world, part, part == "training"
        self.portion = portion or Portion.of(batch_size * world, rank, world)
        self._kept: list[Batch] = []

    @property
    def batches_per_epoch(self) -> int:
        if self.training:
            return self.patterns // self.portion.step
        return len(range(self.rank, math.ceil(self.patterns / self.batch_size), self.world))

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of epoch `epoch`, made ahead of their use by a thread."""
        if self._kept:
            yield from self._kept
            return
        kept = []
        for batch in prefetch(self._draw(epoch, number) for number in range(self.batches_per_epoch)):
            if not self.training:
                kept.append(batch)
            yield batch
        self._kept = kept

    def _draw(self, epoch: int, number: int) -> Batch:
        block = number * self.world + self.rank
        count = self.portion.size if self.training else min(self.batch_size, self.patterns - block * self.batch_size)
        if not count:
            return Batch(torch.zeros(0, self.geometry.size, self.geometry.size), torch.zeros(0, 4))
        seed = batch_seed(self.seed, _STREAM[self.part], epoch * self.training, block)
        return self.source.draw(count, torch.Generator(self.source.device).manual_seed(seed), self.part)
