"""Losses of single-output heads that do not care which of the equal orientations a label happens to name.

Shape legend: B patterns, S symmetry operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stemtune.crystal.rotations import multiply, to_euler_deg
from stemtune.crystal.symmetry import Symmetry, disorientation_deg


def symmetric_angle(prediction: Tensor, truth: Tensor, symmetry: Symmetry) -> Tensor:
    """Return the angle (B,) in radians from `prediction` (B, 4) to the nearest orientation equal to `truth` (B, 4).

    Every equal orientation is as good as another, so the minimum over them is the loss; its gradient has length one
    wherever the two differ, which a squared angle does not have near the end nor a squared sine at 180 degrees.
    """
    return torch.deg2rad(disorientation_deg(prediction, truth, symmetry))


def euler_ranges_deg(symmetry: Symmetry) -> tuple[float, float, float]:
    """Return the largest phi1, Phi and phi2 in degrees that orientations need under a proper point group.

    phi2 needs 360/n for an n-fold axis along crystal z, Phi 90 where an operation turns z over and 180 otherwise
    (Bunge z-x-z angles, lab-to-crystal, so that symmetry acts on phi2).
    """
    operations_S4 = symmetry.operations
    about_z = int((operations_S4[:, 1:3].abs().amax(1) < 1e-6).sum())
    turns_over = bool((operations_S4[:, [0, 3]].abs().amax(1) < 1e-6).any())
    return 360.0, 90.0 if turns_over else 180.0, 360.0 / max(1, about_z)


def canonical_euler_deg(orientation: Tensor, symmetry: Symmetry) -> Tensor:
    """Return Bunge angles (B, 3) in degrees of the equal orientation that lies within `euler_ranges_deg`.

    Where several do (cubic groups), the one of smallest Phi is taken.
    """
    _, tilt, turn = euler_ranges_deg(symmetry)
    equal_BS4 = multiply(symmetry.operations.to(orientation), orientation.unsqueeze(1))
    euler_BS3 = to_euler_deg(equal_BS4)
    outside_BS = (euler_BS3[..., 1] > tilt + 1e-3) | (euler_BS3[..., 2] > turn - 1e-3)
    key_BS = 1e6 * outside_BS.to(euler_BS3.dtype) + euler_BS3[..., 1] + 1e-3 * euler_BS3[..., 2]
    best_B = key_BS.argmin(1)
    return euler_BS3[torch.arange(len(best_B), device=best_B.device), best_B]
