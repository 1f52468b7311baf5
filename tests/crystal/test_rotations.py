"""Quaternion arithmetic against orix, scipy and its own inverse functions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from orix.quaternion import Orientation, Rotation
from orix.vector import Vector3d

from stemtune.crystal import rotations
from stemtune.crystal.sampling import random_orientations

seeds = st.integers(min_value=0, max_value=2**31 - 1)


def half_turns() -> torch.Tensor:
    """Rotations by exactly 180 degrees: about the axes, face and body diagonals, and random directions."""
    axes = torch.cat((torch.eye(3), torch.tensor([[1.0, 1, 0], [0, 1, -1], [1, 1, 1]]), torch.randn(20, 3)))
    return rotations.from_axis_angle_deg(axes.double(), 180.0)


def same_rotation(p: torch.Tensor, q: torch.Tensor, tolerance_deg: float) -> None:
    """Assert that two sets of quaternions turn alike, whatever their signs."""
    assert float(rotations.angle_deg(rotations.multiply(p, rotations.inverse(q))).max()) < tolerance_deg


def test_product_and_rotation_are_those_of_orix() -> None:
    p, q = random_orientations(200, 1), random_orientations(200, 2)
    v = torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = (Rotation(p.numpy()) * Rotation(q.numpy())).data
    assert np.allclose(rotations.multiply(p, q).numpy(), expected, atol=1e-14)
    assert np.allclose(rotations.rotate(p, v).numpy(), (Rotation(p.numpy()) * Vector3d(v.numpy())).data, atol=1e-13)
    assert np.allclose(rotations.inverse(p).numpy(), (~Rotation(p.numpy())).data, atol=1e-15)


def test_euler_angles_are_those_of_orix() -> None:
    q = random_orientations(500, 4)
    ours = rotations.to_euler_deg(q).numpy()
    theirs = Orientation(q.numpy()).to_euler(degrees=True)
    difference = (ours - theirs + 180) % 360 - 180
    assert np.abs(difference).max() < 1e-8
    same_rotation(torch.from_numpy(Orientation.from_euler(ours, degrees=True).data), q, 1e-9)
    same_rotation(rotations.from_euler_deg(torch.from_numpy(theirs)), q, 1e-9)


@pytest.mark.parametrize("second", [0.0, 180.0])
def test_euler_angles_at_gimbal_lock(second: float) -> None:
    angles = torch.tensor([[10.0, second, 25.0], [200.0, second, 300.0], [0.0, second, 0.0]], dtype=torch.float64)
    q = rotations.from_euler_deg(angles)
    back = rotations.to_euler_deg(q)
    assert torch.equal(back[:, 2], torch.zeros(3, dtype=torch.float64))
    assert torch.allclose(back[:, 1], angles[:, 1], atol=1e-6)
    same_rotation(rotations.from_euler_deg(back), q, 1e-6)


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_euler_angles_stay_in_their_ranges_and_return(seed: int) -> None:
    q = random_orientations(50, seed)
    angles = rotations.to_euler_deg(q)
    assert bool((angles >= 0).all())
    assert bool((angles[:, [0, 2]] < 360).all())
    assert bool((angles[:, 1] <= 180).all())
    same_rotation(rotations.from_euler_deg(angles), q, 1e-9)


def test_matrices_are_those_of_orix_and_turn_vectors() -> None:
    q = random_orientations(100, 5)
    matrix = rotations.to_matrix(q)
    assert np.allclose(matrix.numpy(), Rotation(q.numpy()).to_matrix(), atol=1e-14)
    v = torch.randn(100, 3, dtype=torch.float64)
    assert torch.allclose((matrix @ v[..., None])[..., 0], rotations.rotate(q, v), atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrix_and_six_d_return_even_at_180_degrees(dtype: torch.dtype) -> None:
    q = torch.cat((random_orientations(300, 6), half_turns(), torch.tensor([[1.0, 0, 0, 0]]).double())).to(dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    same_rotation(rotations.from_matrix(rotations.to_matrix(q)), q, tolerance)
    same_rotation(rotations.from_six_d(rotations.to_six_d(q)), q, tolerance)
    assert bool((rotations.from_matrix(rotations.to_matrix(q))[:, 0] >= 0).all())


def test_six_d_of_anything_is_a_rotation_with_its_first_column_along_the_first_three() -> None:
    x = torch.randn(100, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    matrix = rotations.to_matrix(rotations.from_six_d(x))
    assert torch.allclose(matrix @ matrix.transpose(1, 2), torch.eye(3, dtype=torch.float64).expand(100, 3, 3))
    assert torch.allclose(torch.linalg.det(matrix), torch.ones(100, dtype=torch.float64))
    assert torch.allclose(matrix[:, :, 0], rotations.normalise(x[:, :3]))
    assert bool(((matrix[:, :, 1] * x[:, 3:]).sum(-1) > 0).all())


@pytest.mark.parametrize("angle", [1e-9, 1e-4, 1.0, 90.0, 179.9999, 180.0])
def test_angle_is_accurate_from_tiny_to_straight(angle: float) -> None:
    axis = torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64)
    assert float(rotations.angle_deg(rotations.from_axis_angle_deg(axis, angle))) == pytest.approx(angle, rel=1e-9)


def test_axis_angle_broadcasts_over_angles() -> None:
    turns = rotations.from_axis_angle_deg(torch.tensor([0.0, 0.0, 2.0]), torch.tensor([[0.0, 90.0], [180.0, 270.0]]))
    assert turns.shape == (2, 2, 4)
    turned = rotations.rotate(turns[0, 1], torch.tensor([1.0, 0.0, 0.0]))
    assert torch.allclose(turned, torch.tensor([0.0, 1.0, 0.0]), atol=1e-6)


@pytest.mark.parametrize("function", [rotations.from_six_d, rotations.from_euler_deg])
def test_gradients_are_those_of_finite_differences(function: object) -> None:
    x = torch.randn(5, 6 if function is rotations.from_six_d else 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x,))


def test_gradients_are_finite_at_the_hard_places() -> None:
    hard = torch.cat((half_turns(), torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64)))
    for function in (
        rotations.angle_deg,
        rotations.to_euler_deg,
        lambda q: rotations.from_matrix(rotations.to_matrix(q)),
    ):
        q = hard.clone().requires_grad_()
        function(q).sum().backward()
        assert q.grad is not None
        assert bool(torch.isfinite(q.grad).all())


def test_mean_ignores_signs_and_obeys_weights() -> None:
    centre = random_orientations(1, 8)
    axes = torch.eye(3, dtype=torch.float64)
    spread = rotations.from_axis_angle_deg(torch.cat((axes, -axes)), 3.0)
    cloud = rotations.multiply(spread, centre) * torch.tensor([1.0, -1, 1, -1, 1, -1]).double()[:, None]
    same_rotation(rotations.mean(cloud)[None], centre, 1e-9)
    weight = torch.tensor([1.0, 0, 0, 0, 0, 0], dtype=torch.float64)
    same_rotation(rotations.mean(cloud, weight)[None], cloud[:1], 1e-9)
