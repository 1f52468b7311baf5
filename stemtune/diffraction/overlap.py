"""Patterns of two or three grains at once, as a beam gets them that passes the grains side by side.

What the grains diffract adds up as expected intensities, before the detector counts electrons: no wave of one
grain interferes with that of another.

Shape legend: B patterns, G = 3 grains, the strongest first.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from stemtune.config import SimulateConfig
from stemtune.crystal.sampling import random_orientations
from stemtune.diffraction.conditions import Conditions, draw_conditions
from stemtune.diffraction.detector import DiffractedBeams
from stemtune.diffraction.kinematic import KinematicSimulator

MOST_GRAINS = 3


class Overlap(NamedTuple):
    """What there is in B patterns beside the strongest grain.

    `weight` (B, 3): share of the beam that passes each grain, the strongest first; they add up to 1, and 0 is no grain.
    `orientation` (B, 2, 4) float64, NaN for no grain, and `thickness_angstrom` (B, 2) are those of the second and
    third.
    """

    weight: Tensor
    orientation: Tensor
    thickness_angstrom: Tensor

    def part(self, rows: slice) -> Overlap:
        """Return the patterns `rows` only."""
        return Overlap(*(values[rows] for values in self))


def draw_weights(simulate: SimulateConfig, possible_B: Tensor, generator: torch.Generator) -> Tensor:
    """Return the share (B, 3) of the beam that passes each grain, where `possible_B` (0 to 2) further ones may.

    A share `simulate.overlap` of the patterns that can have further grains get them: one, or with
    `simulate.overlap_grains` 3 as often two, each `simulate.overlap_weight` as strong as the strongest.
    """
    span, count = simulate.overlap_weight, len(possible_B)
    drawn_B4 = torch.rand(count, 4, generator=generator, device=generator.device)
    several_B = drawn_B4[:, 0] < simulate.overlap
    number_B = (1 + (drawn_B4[:, 1] * (simulate.overlap_grains - 1)).long()).minimum(possible_B) * several_B
    strength_B2 = (span.low + (span.high - span.low) * drawn_B4[:, 2:]).sort(dim=1, descending=True).values
    there_B2 = torch.arange(1, MOST_GRAINS, device=number_B.device) <= number_B[:, None]
    strength_B3 = torch.cat((torch.ones_like(strength_B2[:, :1]), strength_B2 * there_B2), dim=1)
    return strength_B3 / strength_B3.sum(1, keepdim=True)


def draw_overlap(simulate: SimulateConfig, count: int, generator: torch.Generator) -> Overlap:
    """Return further grains of uniformly random orientations for `count` patterns."""
    further = MOST_GRAINS - 1
    weight_B3 = draw_weights(simulate, torch.full((count,), further, device=generator.device), generator)
    orientation_B24 = random_orientations(further * count, generator).view(count, further, 4)
    orientation_B24 = orientation_B24.masked_fill((weight_B3[:, 1:] == 0)[..., None], torch.nan)
    span = simulate.thickness
    drawn_B2 = torch.rand(count, further, generator=generator, device=generator.device)
    return Overlap(weight_B3, orientation_B24, 10 * (span.low + (span.high - span.low) * drawn_B2))


def patterns(
    simulator: KinematicSimulator, orientation: Tensor, overlap: Overlap | None, generator: torch.Generator
) -> Tensor:
    """Return patterns (B, size, size) of orientations (B, 4) and the grains that overlap them, if any.

    Without `overlap` they are those of `simulator.patterns`; so they are where it has no further grain, down to
    rounding.
    """
    if overlap is None:
        return simulator.patterns(orientation, generator)
    first = orientation.to(simulator.device, torch.float32)
    further = Overlap(*(values.to(simulator.device) for values in overlap))

    def make(rows: slice, own: torch.Generator) -> Tensor:
        part = first[rows]
        conditions = draw_conditions(simulator.simulate, simulator.geometry, len(part), own, simulator.device)
        lit = diffracted(simulator, part, further.part(rows), conditions)
        return simulator.detect(lit, conditions, own)

    return simulator.in_chunks(len(first), generator, make)


def diffracted(
    simulator: KinematicSimulator, orientation: Tensor, overlap: Overlap, conditions: Conditions
) -> DiffractedBeams:
    """Return what all grains of B patterns send to the detector; conditions (B,) but for the further grains' thickness.

    The beams of each grain are brought to the grain's share of the electrons, its direct beam to the same.
    """
    grains = [_share(simulator.diffracted(orientation, conditions), overlap.weight[:, 0])]
    everything = torch.arange(len(orientation), device=simulator.device)
    for number in range(MOST_GRAINS - 1):
        there = everything[overlap.weight[:, number + 1] > 0]
        if not len(there):
            continue
        own = Conditions(**{name: values[there] for name, values in vars(conditions).items()})
        own = dataclasses.replace(own, thickness_angstrom=overlap.thickness_angstrom[there, number].float())
        lit = simulator.diffracted(overlap.orientation[there, number].to(orientation.dtype), own)
        lit = _share(lit, overlap.weight[there, number + 1])
        direct = torch.zeros_like(conditions.direct_beam).index_add_(0, there, lit.direct_beam)
        grains.append(lit._replace(pattern=there[lit.pattern], direct_beam=direct))
    pattern, x, y, intensity = (torch.cat(parts) for parts in zip(*(lit[:4] for lit in grains), strict=True))
    return DiffractedBeams(pattern, x, y, intensity, torch.stack([lit.direct_beam for lit in grains]).sum(0))


def _share(lit: DiffractedBeams, weight: Tensor) -> DiffractedBeams:
    """Return the same beams with intensities that add up to what `weight` (B,) leaves beside the direct beam."""
    weight = weight.to(lit.intensity.dtype)
    total = torch.zeros_like(weight).index_add_(0, lit.pattern, lit.intensity).clamp_min(1e-30)
    scale = weight * (1 - lit.direct_beam) / total
    return lit._replace(intensity=lit.intensity * scale[lit.pattern], direct_beam=weight * lit.direct_beam)
