"""Random orientations are uniform, and the grid of beam directions leaves no direction out."""

import math

import numpy as np
import pytest
import torch
from orix.quaternion import symmetry as orix_symmetry
from orix.vector import Vector3d
from scipy.spatial import cKDTree
from scipy.stats import kstest

from stemtune.crystal import rotations
from stemtune.crystal.point_groups import LAUE_CLASSES
from stemtune.crystal.sampling import beam_directions, orientation_from_beam, random_orientations
from stemtune.crystal.symmetry import Symmetry, disorientation_deg, reduce_to_fundamental_zone

ALL_SETTINGS = ("1", "2", "121", "211", "222", "4", "422", "3", "32", "312", "6", "622", "23", "432")
BEAM = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)


def test_random_orientations_follow_the_uniform_density() -> None:
    q = random_orientations(20_000, 1)
    assert torch.allclose(torch.linalg.vector_norm(q, dim=-1), torch.ones(20_000, dtype=torch.float64))
    omega = np.deg2rad(rotations.angle_deg(q).numpy())
    assert kstest(omega, lambda x: (x - np.sin(x)) / np.pi).pvalue > 1e-3
    turned = rotations.rotate(q, torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)).numpy()
    for component in turned.T:
        assert kstest(component, "uniform", args=(-1, 2)).pvalue > 1e-3


@pytest.mark.parametrize("name", LAUE_CLASSES)
def test_random_orientations_fill_the_zone_as_those_of_orix(name: str) -> None:
    from orix.quaternion import Orientation

    group = next(group for group in orix_symmetry._groups if group.name == name).proper_subgroup
    rng = np.random.default_rng(2)
    theirs = rng.normal(size=(4000, 4))
    reduced = Orientation(theirs / np.linalg.norm(theirs, axis=1, keepdims=True), symmetry=group).reduce()
    ours = reduce_to_fundamental_zone(random_orientations(4000, 3), Symmetry.of_laue(name))
    a, b = np.sort(rotations.angle_deg(ours).numpy()), np.sort(np.rad2deg(reduced.angle))
    assert np.abs(a.mean() - b.mean()) < 4 * b.std() * math.sqrt(2 / 4000)


def test_random_orientations_repeat_with_their_seed() -> None:
    assert torch.equal(random_orientations(10, 4), random_orientations(10, 4))
    assert not torch.equal(random_orientations(10, 4), random_orientations(10, 5))
    generator = torch.Generator().manual_seed(4)
    assert torch.equal(random_orientations(10, generator), random_orientations(10, 4))
    assert not torch.equal(random_orientations(10, generator), random_orientations(10, 4))


@pytest.mark.parametrize("proper", ALL_SETTINGS)
@pytest.mark.parametrize("step", [3.0, 8.0])
def test_every_direction_is_within_a_step_of_the_grid(proper: str, step: float) -> None:
    symmetry = Symmetry.of_proper(proper)
    grid = beam_directions(step, symmetry)
    assert torch.allclose(torch.linalg.vector_norm(grid, dim=-1), torch.ones(len(grid), dtype=torch.float64))
    everywhere = rotations.rotate(symmetry.operations[:, None], grid[None]).reshape(-1, 3)
    random = rotations.rotate(random_orientations(20_000, 6), BEAM)
    chord = cKDTree(everywhere.numpy()).query(random.numpy())[0]
    distance = np.rad2deg(2 * np.arcsin(chord / 2))
    assert distance.max() < step
    assert distance.mean() < 0.42 * step  # 0.38 for squares, so no great part is empty


@pytest.mark.parametrize("proper", ALL_SETTINGS)
def test_the_grid_is_no_denser_than_it_says(proper: str) -> None:
    symmetry = Symmetry.of_proper(proper)
    expected = 4 * math.pi * (180 / math.pi) ** 2 / (4 * symmetry.order)
    assert len(beam_directions(2.0, symmetry)) == pytest.approx(expected, rel=0.02)
    assert len(beam_directions(10.0, symmetry)) >= 1


def test_lithium_nickel_oxide_has_1719_directions_at_two_degrees() -> None:
    assert len(beam_directions(2.0, Symmetry.of_laue("-3m"))) == pytest.approx(1719, abs=10)


@pytest.mark.parametrize("proper", [name for name in ALL_SETTINGS if name != "211"])
def test_directions_lie_in_the_sector_of_orix(proper: str) -> None:
    name = {"2": "112"}.get(proper, proper)
    group = next(group for group in orix_symmetry._groups if group.name == name)
    grid = Vector3d(beam_directions(3.0, Symmetry.of_proper(proper)).numpy())
    assert bool((grid <= group.fundamental_sector).all())


def test_the_whole_sphere_counts_without_symmetry() -> None:
    grid = beam_directions(5.0, Symmetry.of_laue("-1"))
    signs = torch.unique(torch.sign(grid), dim=0)
    assert len(signs) == 8
    assert torch.allclose(grid.mean(0), torch.zeros(3, dtype=torch.float64), atol=0.01)


def test_orientations_look_along_their_directions() -> None:
    directions = torch.cat((beam_directions(9.0, Symmetry.of_laue("-1")), BEAM[None], -BEAM[None]))
    angles = torch.arange(0, 360, 45, dtype=torch.float64)
    g = orientation_from_beam(directions, angles)
    assert g.shape == (len(directions), 8, 4)
    assert torch.allclose(rotations.rotate(g, BEAM), directions[:, None].expand(-1, 8, 3), atol=1e-12)


def test_the_inplane_angle_turns_the_pattern_forward() -> None:
    directions = beam_directions(20.0, Symmetry.of_laue("-3m"))
    g = orientation_from_beam(directions, torch.tensor([0.0, 30.0]))
    reflection = torch.tensor([0.3, -0.1, 0.4], dtype=torch.float64)
    first, second = rotations.rotate(rotations.inverse(g), reflection).unbind(1)  # where it stands in the lab
    turned = torch.atan2(second[:, 1], second[:, 0]) - torch.atan2(first[:, 1], first[:, 0])
    assert torch.allclose(torch.rad2deg(turned) % 360, torch.tensor(30.0).double(), atol=1e-9)
    assert torch.allclose(first[:, 2], second[:, 2], atol=1e-12)


@pytest.mark.parametrize("name", ["-1", "-3", "4/m", "m-3", "-3m", "m-3m"])
def test_beams_and_inplane_angles_reach_every_orientation(name: str) -> None:
    symmetry, step = Symmetry.of_laue(name), 12.0
    grid = orientation_from_beam(beam_directions(step, symmetry), torch.arange(0, 360, step)).flatten(0, 1)
    g = random_orientations(100, 7)
    nearest = disorientation_deg(g[:, None], grid[None], symmetry).amin(-1)
    assert float(nearest.max()) < 1.1 * step
