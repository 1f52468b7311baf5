"""Rotations as unit quaternions: batched, broadcastable and differentiable torch functions.

A quaternion is the last axis of a tensor, (..., 4), scalar first. The leading axes broadcast. A rotation acts
actively, `v' = q v q*`, as orix's `Rotation * Vector3d`; an orientation in this package is the rotation from
laboratory to crystal components. `q` and `-q` are the same rotation.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-12


def normalise(q: Tensor) -> Tensor:
    """Return `q` (..., 4), or vectors (..., 3), scaled to unit length."""
    length: Tensor = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    return q / length.clamp_min(_TINY)


def multiply(p: Tensor, q: Tensor) -> Tensor:
    """Return the product `p * q` (..., 4): the rotation that turns by `q` first and by `p` second."""
    p0, p1, p2, p3 = p.unbind(-1)
    q0, q1, q2, q3 = q.unbind(-1)
    return torch.stack(
        (
            p0 * q0 - p1 * q1 - p2 * q2 - p3 * q3,
            p0 * q1 + p1 * q0 + p2 * q3 - p3 * q2,
            p0 * q2 - p1 * q3 + p2 * q0 + p3 * q1,
            p0 * q3 + p1 * q2 - p2 * q1 + p3 * q0,
        ),
        dim=-1,
    )


def inverse(q: Tensor) -> Tensor:
    """Return the inverse of the unit quaternion `q` (..., 4)."""
    return torch.cat((q[..., :1], -q[..., 1:]), dim=-1)


def rotate(q: Tensor, v: Tensor) -> Tensor:
    """Return the vectors `v` (..., 3) turned by the unit quaternions `q` (..., 4)."""
    axis = q[..., 1:]
    twice = 2 * torch.linalg.cross(*torch.broadcast_tensors(axis, v))  # type: ignore[no-untyped-call]
    turned: Tensor = v + q[..., :1] * twice + torch.linalg.cross(axis.expand_as(twice), twice)
    return turned


def angle_deg(q: Tensor) -> Tensor:
    """Return the rotation angle in degrees (...), 0 to 180.

    The arctangent keeps full precision near 0, where the arccosine of the scalar part loses half of the digits;
    the gradient at exactly 0 is 0, not NaN. `q` need not be normalised.
    """
    return torch.rad2deg(2 * torch.atan2(torch.linalg.vector_norm(q[..., 1:], dim=-1), q[..., 0].abs()))


def from_axis_angle_deg(axis: Tensor, angle: Tensor | float) -> Tensor:
    """Return the rotation (..., 4) by `angle` degrees (...) about `axis` (..., 3), of any length but 0."""
    half = torch.deg2rad(torch.as_tensor(angle, dtype=axis.dtype, device=axis.device))[..., None] / 2
    unit = normalise(axis)
    vector = torch.sin(half) * unit
    return torch.cat((torch.cos(half).expand(*vector.shape[:-1], 1), vector), dim=-1)


def from_euler_deg(euler: Tensor) -> Tensor:
    """Return the orientation (..., 4) of Bunge's z-x-z Euler angles (..., 3) in degrees.

    The angles describe the rotation from laboratory to crystal, as in orix and in EBSD files; the scalar part is
    not negative.

    Source: D. Rowenhorst et al., Modelling Simul. Mater. Sci. Eng. 23 (2015) 083501, equations A.5 and A.6.
    """
    first, second, third = torch.deg2rad(euler).unbind(-1)
    sigma, delta = (first + third) / 2, (first - third) / 2
    c, s = torch.cos(second / 2), torch.sin(second / 2)
    q = torch.stack((c * sigma.cos(), -s * delta.cos(), -s * delta.sin(), -c * sigma.sin()), dim=-1)
    return torch.where(q[..., :1] < 0, -q, q)


def to_euler_deg(q: Tensor) -> Tensor:
    """Return Bunge's z-x-z Euler angles (..., 3) in degrees, in [0, 360), [0, 180] and [0, 360).

    Where the second angle is 0 or 180 only a sum or difference of the others is defined; the third is then 0.

    Source: D. Rowenhorst et al., Modelling Simul. Mater. Sci. Eng. 23 (2015) 083501, equation A.14.
    """
    q0, q1, q2, q3 = normalise(q).unbind(-1)
    along = torch.linalg.vector_norm(torch.stack((q0, q3), dim=-1), dim=-1)
    across = torch.linalg.vector_norm(torch.stack((q1, q2), dim=-1), dim=-1)
    second = 2 * torch.atan2(across, along)
    first = torch.atan2(q1 * q3 - q0 * q2, -q0 * q1 - q2 * q3)
    third = torch.atan2(q0 * q2 + q1 * q3, q2 * q3 - q0 * q1)
    tolerance = 10 * torch.finfo(q.dtype).eps
    upright, upside_down = across < tolerance, along < tolerance
    first = torch.where(upright, torch.atan2(-2 * q0 * q3, q0**2 - q3**2), first)
    first = torch.where(upside_down, torch.atan2(2 * q1 * q2, q1**2 - q2**2), first)
    third = torch.where(upright | upside_down, torch.zeros_like(third), third)
    angles = torch.rad2deg(torch.stack((first, second, third), dim=-1))
    turned = torch.where(angles < 0, angles + 360, angles)
    return torch.where(turned >= 360, turned - 360, turned)


def to_matrix(q: Tensor) -> Tensor:
    """Return the matrices (..., 3, 3) with `matrix @ v` equal to `rotate(q, v)`."""
    q0, q1, q2, q3 = q.unbind(-1)
    rows = (
        (q0 * q0 + q1 * q1 - q2 * q2 - q3 * q3, 2 * (q1 * q2 - q0 * q3), 2 * (q1 * q3 + q0 * q2)),
        (2 * (q1 * q2 + q0 * q3), q0 * q0 - q1 * q1 + q2 * q2 - q3 * q3, 2 * (q2 * q3 - q0 * q1)),
        (2 * (q1 * q3 - q0 * q2), 2 * (q2 * q3 + q0 * q1), q0 * q0 - q1 * q1 - q2 * q2 + q3 * q3),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def from_matrix(matrix: Tensor) -> Tensor:
    """Return the quaternions (..., 4) of rotation matrices (..., 3, 3), scalar part not negative.

    Four times the outer product of the quaternion with itself is linear in the matrix. Its row with the largest
    diagonal element is the quaternion but for its length, and is never short: exact at 180 degrees, and smooth.
    """
    m00, m01, m02, m10, m11, m12, m20, m21, m22 = matrix.flatten(-2).unbind(-1)
    rows = (
        (1 + m00 + m11 + m22, m21 - m12, m02 - m20, m10 - m01),
        (m21 - m12, 1 + m00 - m11 - m22, m10 + m01, m02 + m20),
        (m02 - m20, m10 + m01, 1 - m00 + m11 - m22, m21 + m12),
        (m10 - m01, m02 + m20, m21 + m12, 1 - m00 - m11 + m22),
    )
    outer = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
    best = outer.diagonal(dim1=-2, dim2=-1).argmax(-1)
    q = normalise(outer.gather(-2, best[..., None, None].expand(*best.shape, 1, 4)).squeeze(-2))
    return torch.where(q[..., :1] < 0, -q, q)


def to_six_d(q: Tensor) -> Tensor:
    """Return the first two columns of the matrix, one after the other, (..., 6): continuous in the rotation.

    Source: Y. Zhou et al., CVPR 2019, arXiv:1812.07035.
    """
    matrix = to_matrix(q)
    return torch.cat((matrix[..., :, 0], matrix[..., :, 1]), dim=-1)


def from_six_d(x: Tensor) -> Tensor:
    """Return the quaternions (..., 4) nearest in Gram and Schmidt's sense to any six numbers (..., 6)."""
    first = normalise(x[..., :3])
    rest = x[..., 3:] - (first * x[..., 3:]).sum(-1, keepdim=True) * first
    second = normalise(rest)
    return from_matrix(torch.stack((first, second, torch.linalg.cross(first, second)), dim=-1))


def mean(q: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the mean rotation (..., 4) of `q` (..., n, 4), blind to the sign of each quaternion.

    Symmetry is not considered: see `symmetry.mean_orientation`. Source: F. L. Markley et al., J. Guid. Control Dyn. 30
    (2007) 1193.
    """
    weighted = q if weight is None else q * weight[..., None]
    return mean_of_outer(q.transpose(-1, -2) @ weighted)


def mean_of_outer(outer: Tensor) -> Tensor:
    """Return the mean rotation (..., 4) from the sum (..., 4, 4) of the outer products of quaternions; see `mean`."""
    _, vectors = torch.linalg.eigh(outer)
    best = vectors[..., -1]
    return torch.where(best[..., :1] < 0, -best, best)
