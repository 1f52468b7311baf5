"""The Laue classes against orix, and the axioms that make disorientation a distance between crystals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from orix.quaternion import Orientation
from orix.quaternion import symmetry as orix_symmetry

from stemtune.crystal import rotations
from stemtune.crystal.point_groups import LAUE_CLASSES
from stemtune.crystal.sampling import random_orientations
from stemtune.crystal.symmetry import (
    Symmetry,
    _closure,
    _operations_on,
    beam180,
    disorientation_beam180_deg,
    disorientation_deg,
    mean_orientation,
    reduce_to_fundamental_zone,
)
from stemtune.errors import UserError

ALL_SETTINGS = ("1", "2", "121", "211", "222", "4", "422", "3", "32", "312", "6", "622", "23", "432")
ORDERS = dict(zip(LAUE_CLASSES, (1, 2, 4, 4, 8, 3, 6, 6, 12, 12, 24), strict=True))
seeds = st.integers(min_value=0, max_value=2**31 - 1)


def orix_laue(name: str) -> orix_symmetry.Symmetry:
    """The Laue class `name` as orix has it."""
    return next(group for group in orix_symmetry._groups if group.name == name)


def brute_force_deg(g1: torch.Tensor, g2: torch.Tensor, symmetry: Symmetry) -> torch.Tensor:
    """The definition: every equivalent of one against every equivalent of the other."""
    first = rotations.multiply(symmetry.operations[:, None, None], g1)
    second = rotations.multiply(symmetry.operations[None, :, None], g2)
    between = rotations.multiply(rotations.inverse(first), second)
    return rotations.angle_deg(between).amin((0, 1))


def nearest_deg(q: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """The angle of each rotation to the nearest member of a group."""
    return rotations.angle_deg(rotations.multiply(rotations.inverse(group), q[..., None, :])).amin(-1)


@pytest.mark.parametrize("name", LAUE_CLASSES)
def test_operations_are_those_of_orix(name: str) -> None:
    symmetry = Symmetry.of_laue(name)
    theirs = torch.from_numpy(orix_laue(name).proper_subgroup.data.copy())
    assert symmetry.order == len(theirs) == ORDERS[name]
    assert float(nearest_deg(theirs, symmetry.operations).max()) < 1e-9
    assert torch.equal(symmetry.operations[0], torch.tensor([1, 0, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize("proper", ALL_SETTINGS)
def test_operations_form_a_group(proper: str) -> None:
    operations = Symmetry.of_proper(proper).operations
    products = rotations.multiply(operations[:, None], operations[None])
    assert float(nearest_deg(products, operations).max()) < 1e-12
    assert float(nearest_deg(rotations.inverse(operations), operations).max()) < 1e-12
    apart = rotations.angle_deg(rotations.multiply(operations[:, None], rotations.inverse(operations)[None]))
    assert int((apart < 1).sum()) == len(operations)


@pytest.mark.parametrize("name", LAUE_CLASSES)
def test_disorientation_is_that_of_orix(name: str) -> None:
    symmetry, group = Symmetry.of_laue(name), orix_laue(name)
    g1, g2 = random_orientations(300, 1), random_orientations(300, 2)
    theirs = Orientation(g1.numpy(), symmetry=group).angle_with(Orientation(g2.numpy(), symmetry=group), degrees=True)
    ours = disorientation_deg(g1, g2, symmetry)
    assert np.abs(ours.numpy() - theirs).max() < 1e-4
    assert torch.allclose(ours, brute_force_deg(g1, g2, symmetry), atol=1e-9)


@pytest.mark.parametrize("name", LAUE_CLASSES)
def test_fundamental_zone_is_that_of_orix(name: str) -> None:
    symmetry, group = Symmetry.of_laue(name), orix_laue(name).proper_subgroup
    g = random_orientations(300, 3)
    ours = reduce_to_fundamental_zone(g, symmetry)
    theirs = Orientation(g.numpy(), symmetry=group).reduce()
    assert np.abs(rotations.angle_deg(ours).numpy() - np.rad2deg(theirs.angle)).max() < 1e-4
    apart = rotations.multiply(ours, rotations.inverse(torch.from_numpy(theirs.data.copy())))
    assert float(rotations.angle_deg(apart).max()) < 1e-4
    assert bool((ours[:, 0] >= 0).all())


@pytest.mark.parametrize("proper", ALL_SETTINGS)
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_axioms_of_disorientation(proper: str, seed: int) -> None:
    symmetry = Symmetry.of_proper(proper)
    g1, g2, g3 = random_orientations(3 * 8, seed).view(3, 8, 4)
    picks = torch.randint(symmetry.order, (2, 8), generator=torch.Generator().manual_seed(seed))
    angle = disorientation_deg(g1, g2, symmetry)
    assert float(disorientation_deg(g1, g1, symmetry).max()) < 1e-6
    assert torch.allclose(angle, disorientation_deg(g2, g1, symmetry), atol=1e-9)
    equivalent = [rotations.multiply(symmetry.operations[pick], g) for pick, g in zip(picks, (g1, g2), strict=True)]
    assert torch.allclose(angle, disorientation_deg(equivalent[0], equivalent[1], symmetry), atol=1e-9)
    assert torch.allclose(angle, disorientation_deg(-g1, g2, symmetry), atol=1e-9)
    lab_turn = random_orientations(1, seed + 1)
    turned = [rotations.multiply(g, lab_turn) for g in (g1, g2)]
    assert torch.allclose(angle, disorientation_deg(turned[0], turned[1], symmetry), atol=1e-9)
    detour = disorientation_deg(g1, g3, symmetry) + disorientation_deg(g3, g2, symmetry)
    assert bool((angle <= detour + 1e-9).all())


@pytest.mark.parametrize("proper", ALL_SETTINGS)
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_axioms_of_the_fundamental_zone(proper: str, seed: int) -> None:
    symmetry = Symmetry.of_proper(proper)
    g = random_orientations(16, seed)
    reduced = reduce_to_fundamental_zone(g, symmetry)
    assert torch.equal(reduce_to_fundamental_zone(reduced, symmetry), reduced)
    assert float(disorientation_deg(g, reduced, symmetry).max()) < 1e-6
    pick = torch.randint(symmetry.order, (16,), generator=torch.Generator().manual_seed(seed))
    equivalent = reduce_to_fundamental_zone(rotations.multiply(symmetry.operations[pick], g), symmetry)
    assert float(rotations.angle_deg(rotations.multiply(equivalent, rotations.inverse(reduced))).max()) < 1e-6


@pytest.mark.parametrize("proper", ALL_SETTINGS)
def test_reduction_keeps_the_operations_themselves_at_the_identity(proper: str) -> None:
    symmetry = Symmetry.of_proper(proper)
    reduced = reduce_to_fundamental_zone(symmetry.operations, symmetry)
    assert float(rotations.angle_deg(reduced).max()) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_disorientations_keep_their_digits(dtype: torch.dtype) -> None:
    symmetry = Symmetry.of_laue("m-3m")
    tiny = rotations.from_axis_angle_deg(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), 1e-3)
    g = random_orientations(50, 4)
    near = rotations.multiply(symmetry.operations[7], rotations.multiply(tiny, g))
    angle = disorientation_deg(g.to(dtype), near.to(dtype), symmetry)
    assert angle.dtype == dtype
    assert torch.allclose(angle.double(), torch.tensor(1e-3).double(), rtol=1e-9 if dtype == torch.float64 else 0.05)


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-3, 20.0])
def test_gradient_of_disorientation_is_finite_even_at_zero(angle: float) -> None:
    symmetry = Symmetry.of_laue("-3m")
    g = random_orientations(20, 5)
    turn = rotations.from_axis_angle_deg(torch.tensor([0.0, 0.6, 0.8], dtype=torch.float64), angle)
    other = rotations.multiply(symmetry.operations[3], rotations.multiply(turn, g)).requires_grad_()
    disorientation_deg(g, other, symmetry).sum().backward()
    assert other.grad is not None
    assert bool(torch.isfinite(other.grad).all())
    if angle >= 1e-3:
        assert float(torch.linalg.vector_norm(other.grad, dim=-1).min()) == pytest.approx(360 / np.pi, rel=1e-3)


def test_gradient_descent_on_disorientation_arrives() -> None:
    symmetry = Symmetry.of_laue("-3m")
    target = random_orientations(1, 6)
    start = rotations.from_axis_angle_deg(torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64), 15.0)
    g = rotations.multiply(rotations.multiply(start, symmetry.operations[4]), target).requires_grad_()
    optimiser = torch.optim.SGD([g], lr=1e-4)
    for _ in range(60):
        optimiser.zero_grad()
        disorientation_deg(g, target, symmetry).square().mean().backward()
        optimiser.step()
    assert float(disorientation_deg(g.detach(), target, symmetry)) < 0.1


def test_autocast_does_not_round_the_choice_of_equivalent() -> None:
    symmetry = Symmetry.of_laue("m-3m")
    g1, g2 = random_orientations(500, 13).float(), random_orientations(500, 14).float()
    expected = disorientation_deg(g1, g2, symmetry)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(disorientation_deg(g1, g2, symmetry), expected)


def test_nan_stays_with_its_own_orientation_and_shapes_broadcast() -> None:
    symmetry = Symmetry.of_laue("6/mmm")
    g = random_orientations(6, 7)
    g[2] = torch.nan
    angles = disorientation_deg(g[:, None], g[None], symmetry)
    assert angles.shape == (6, 6)
    assert int(torch.isnan(angles).sum()) == 11
    reduced = reduce_to_fundamental_zone(g, symmetry)
    assert bool(torch.isnan(reduced[2]).all())
    assert int(torch.isnan(reduced).any(-1).sum()) == 1


def test_beam180_turns_the_lab_about_z_and_is_its_own_inverse() -> None:
    symmetry = Symmetry.of_laue("-3m")
    g = random_orientations(100, 8)
    half_turn = rotations.from_axis_angle_deg(torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), 180.0)
    twin = beam180(g)
    assert torch.allclose(twin, rotations.multiply(g, half_turn), atol=1e-15)
    assert float(disorientation_deg(beam180(twin), g, symmetry).max()) < 1e-6
    beam = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    assert torch.allclose(rotations.rotate(twin, beam), rotations.rotate(g, beam), atol=1e-12)
    assert float(disorientation_beam180_deg(g, twin, symmetry).max()) < 1e-6
    assert float(disorientation_deg(g, twin, symmetry).median()) > 30
    other = random_orientations(100, 9)
    ambiguous = disorientation_beam180_deg(g, other, symmetry)
    assert torch.allclose(ambiguous, disorientation_beam180_deg(twin, other, symmetry), atol=1e-9)
    assert torch.allclose(ambiguous, disorientation_beam180_deg(other, g, symmetry), atol=1e-9)


@pytest.mark.parametrize("number", [*range(1, 231, 3), 149, 150, 157, 160, 162, 166])
def test_space_groups_have_the_symmetry_of_their_own_operations(number: int) -> None:
    from diffpy.structure.spacegroups import GetSpaceGroup

    from stemtune.crystal.lattice import Lattice

    # Any cell of the crystal system will do: what counts is how the operations stand to e1 || a and e3 || c*.
    lattice = {
        "TRICLINIC": Lattice(3, 4, 5, 80, 95, 110),
        "MONOCLINIC": Lattice(3, 4, 5, 90, 107, 90),
        "ORTHORHOMBIC": Lattice(3, 4, 5, 90, 90, 90),
        "TETRAGONAL": Lattice(3, 3, 5, 90, 90, 90),
        "TRIGONAL": Lattice(3, 3, 5, 90, 90, 120),
        "HEXAGONAL": Lattice(3, 3, 5, 90, 90, 120),
        "CUBIC": Lattice(3, 3, 3, 90, 90, 90),
    }
    group = GetSpaceGroup(number)
    columns = lattice[group.crystal_system].matrix().T
    fractional = torch.tensor(np.array([operation.R for operation in group.iter_symops()]), dtype=torch.float64)
    expected = Symmetry.of_matrices(columns @ fractional @ torch.linalg.inv(columns), tolerance=1e-6)
    assert Symmetry.of_space_group(number) == expected
    assert expected is not None
    if number not in (6, 7, 8, 9):  # orix does not name the Laue class of m
        assert expected.laue == orix_symmetry.get_point_group(number).laue.name


@pytest.mark.parametrize("proper", ALL_SETTINGS)
def test_to_orix_has_the_same_operations_and_the_inversion(proper: str) -> None:
    symmetry = Symmetry.of_proper(proper)
    group = symmetry.to_orix()
    assert group.name == symmetry.laue
    assert group.contains_inversion
    theirs = torch.from_numpy(group[~group.improper].data.copy())
    assert len(theirs) == symmetry.order
    assert float(nearest_deg(theirs, symmetry.operations).max()) < 1e-9


def test_a_grain_has_its_mean_whatever_equivalents_it_is_written_in() -> None:
    symmetry = Symmetry.of_laue("-3m")
    centre = random_orientations(1, 10)
    axes = torch.eye(3, dtype=torch.float64)
    spread = rotations.from_axis_angle_deg(torch.cat((axes, -axes)), 4.0)
    grain = rotations.multiply(symmetry.operations, rotations.multiply(spread, centre))
    mean = mean_orientation(grain, symmetry)
    assert float(disorientation_deg(mean, centre[0], symmetry)) < 0.01


def test_mistaken_names_are_one_sentence() -> None:
    with pytest.raises(UserError, match="no Laue class is called '3m'; did you mean '-3m'"):
        Symmetry.of_laue("3m")
    with pytest.raises(UserError, match="231, but must be in"):
        Symmetry.of_space_group(231)


def test_many_pairs_need_little_memory() -> None:
    g1, g2 = random_orientations(100_000, 11), random_orientations(100_000, 12)
    symmetry = Symmetry.of_laue("m-3m")
    with torch.profiler.profile(profile_memory=True) as profile:
        disorientation_deg(g1, g2, symmetry)
    largest = max(event.cpu_memory_usage for event in profile.key_averages())
    assert largest < 100e6  # 24 x 24 products of float64 quaternions would be 1.8 GB


def test_what_prediction_asked_for_first_serves_training_too() -> None:
    """Operations are kept: those made in inference mode could not take part in a gradient afterwards."""
    _closure.cache_clear()
    _operations_on.cache_clear()
    with torch.inference_mode():
        symmetry = Symmetry.of_laue("-3m")
        symmetry.operations_like(torch.zeros(4))
    for kind in (torch.float32, torch.float64):
        g = random_orientations(1, 0).to(kind).requires_grad_()
        rotations.multiply(symmetry.operations_like(g), g).sum().backward()
        assert g.grad is not None and g.grad.isfinite().all()
