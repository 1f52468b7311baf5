"""Exact augmentation: patterns turned and mirrored together with their orientations.

A crystal with a centre of symmetry (which every Laue class has) gives, turned by +a about the beam, the turned
pattern: g becomes g * Rz(-a). Mirroring the pattern left-right (x to -x) is the crystal turned by 180° about the
lab x, g * R180[100]: the half turn takes (x, y, z) to (x, -y, -z) and the centre of symmetry takes that to
(-x, y, z), so every reflection keeps its height z and with it its excitation error. Mirroring up-down is
g * R180[010] in the same way. Quarter turns and mirrors only move pixels; other angles interpolate.

Shape legend: B patterns, H x W pixels with H = W, row = -y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from stemtune.crystal import rotations

MODES = ("none", "flips", "rotate")


def augment(
    patterns_BHW: Tensor, orientation_B4: Tensor, mode: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Turn and mirror each pattern of a batch, the direct beam in its middle, at random, and its orientation with it.

    `mode` is "none"; "flips", the eight quarter turns and mirrors, which move pixels, change no count and are made on
    the CPU; or "rotate", any angle and the mirror, interpolated linearly on the device of the patterns, which makes
    float32 and fills corners with 0. The same state of the CPU `generator` gives the same augmentation on every device.
    """
    if mode == "none":
        return patterns_BHW, orientation_B4
    batch = len(patterns_BHW)
    mirrored_B = torch.randint(2, (batch,), generator=generator).bool()
    if mode == "flips":
        turns_B = torch.randint(4, (batch,), generator=generator)
        moved = quarter_turns(patterns_BHW.cpu().numpy(), turns_B.tolist(), mirrored_B.tolist())
        return torch.from_numpy(moved), turn_orientation(orientation_B4, 90.0 * turns_B, mirrored_B)
    angle_deg_B = 360 * torch.rand(batch, generator=generator)
    return (
        turn_patterns(patterns_BHW, angle_deg_B, mirrored_B),
        turn_orientation(orientation_B4, angle_deg_B.to(orientation_B4), mirrored_B),
    )


def turn_orientation(orientation_B4: Tensor, angle_deg_B: Tensor, mirrored_B: Tensor) -> Tensor:
    """Return the orientations of patterns turned by `angle_deg_B` (+ is counter-clockwise, y up), then mirrored.

    `mirrored_B` says which patterns are mirrored left-right (x to -x) after the turn.
    """
    half = torch.deg2rad(-angle_deg_B.to(orientation_B4)) / 2
    zero = torch.zeros_like(half)
    turned = rotations.multiply(orientation_B4, torch.stack([half.cos(), zero, zero, half.sin()], dim=-1))
    half_turn_x = torch.tensor([0.0, 1.0, 0.0, 0.0]).to(turned)
    mirrored = rotations.multiply(turned, half_turn_x)
    return torch.where(mirrored_B.to(turned.device)[:, None], mirrored, turned)


def quarter_turns(
    patterns_BHW: npt.NDArray[Any], turns_B: Sequence[int], mirrored_B: Sequence[bool]
) -> npt.NDArray[Any]:
    """Turn each pattern by 90° x `turns_B` counter-clockwise, then mirror it left-right where `mirrored_B`."""
    moved = np.empty_like(patterns_BHW)  # one copy by one thread: cores are for the network
    for new, old, turns, mirrored in zip(moved, patterns_BHW, turns_B, mirrored_B, strict=True):
        turned = np.rot90(old, turns)
        new[...] = turned[:, ::-1] if mirrored else turned
    return moved


def turn_patterns(patterns_BHW: Tensor, angle_deg_B: Tensor, mirrored_B: Tensor) -> Tensor:
    """Turn each pattern by `angle_deg_B` counter-clockwise about its middle, then mirror it where `mirrored_B`.

    Counts are interpolated linearly and come back as float32 on the device of the patterns.
    """
    angle = torch.deg2rad(angle_deg_B.to(patterns_BHW.device, torch.float32))
    side = 1 - 2 * mirrored_B.to(patterns_BHW.device, torch.float32)
    cosine, sine, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rows = [torch.stack([side * cosine, -sine, zero], dim=-1), torch.stack([side * sine, cosine, zero], dim=-1)]
    size = [len(patterns_BHW), 1, *patterns_BHW.shape[1:]]
    grid = functional.affine_grid(torch.stack(rows, dim=1), size, align_corners=False)
    counts = patterns_BHW.to(torch.float32)[:, None]
    return functional.grid_sample(counts, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0]
