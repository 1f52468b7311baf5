"""The regression heads and their losses: indifferent to the choice among equal orientations, and able to learn."""

import math

import pytest
import torch

from stemtune.config import Config
from stemtune.crystal.point_groups import LAUE_CLASSES
from stemtune.crystal.rotations import from_euler_deg, multiply
from stemtune.crystal.sampling import random_orientations
from stemtune.crystal.symmetry import Symmetry, disorientation_deg
from stemtune.learning.heads import canonical_euler_deg, euler_ranges_deg, make_head, symmetric_angle

TRIGONAL = Symmetry.of_laue("-3m")


def head_config(**changes: object) -> Config:
    return Config.from_flat({f"head.{key}": value for key, value in changes.items()})


@pytest.mark.parametrize("laue", LAUE_CLASSES)
def test_the_angle_does_not_depend_on_the_choice_of_equal_orientation(laue: str) -> None:
    symmetry = Symmetry.of_laue(laue)
    p, q = random_orientations(20, 1), random_orientations(20, 2)
    angle = symmetric_angle(p, q, symmetry)
    for operation in symmetry.operations:
        torch.testing.assert_close(symmetric_angle(p, multiply(operation, q), symmetry), angle)
        torch.testing.assert_close(symmetric_angle(multiply(operation, p), q, symmetry), angle)


def test_the_gradient_of_the_angle_is_finite_where_it_is_zero() -> None:
    q = random_orientations(5, 1).float().requires_grad_()
    symmetric_angle(q, q.detach().clone(), TRIGONAL).sum().backward()
    assert q.grad is not None and torch.isfinite(q.grad).all()


@pytest.mark.parametrize("laue", LAUE_CLASSES)
def test_euler_labels_lie_in_their_ranges_and_name_the_same_orientation(laue: str) -> None:
    symmetry = Symmetry.of_laue(laue)
    truth = random_orientations(100, 3)
    euler = canonical_euler_deg(truth, symmetry)
    ranges = torch.tensor(euler_ranges_deg(symmetry), dtype=torch.float64)
    assert (euler >= -1e-6).all() and (euler <= ranges + 2e-3).all()
    assert disorientation_deg(from_euler_deg(euler), truth, symmetry).max() < 1e-4
    other = canonical_euler_deg(multiply(symmetry.operations[-1], truth), symmetry)
    torch.testing.assert_close(other, euler, atol=1e-6, rtol=0)


def test_euler_ranges_are_those_of_the_textbook() -> None:
    found = {laue: euler_ranges_deg(Symmetry.of_laue(laue)) for laue in ("-1", "-3", "-3m", "4/mmm", "6/mmm", "m-3m")}
    assert found == {
        "-1": (360.0, 180.0, 360.0),
        "-3": (360.0, 180.0, 120.0),
        "-3m": (360.0, 90.0, 120.0),
        "4/mmm": (360.0, 90.0, 90.0),
        "6/mmm": (360.0, 90.0, 60.0),
        "m-3m": (360.0, 90.0, 90.0),
    }


@pytest.mark.parametrize("changes", [{"name": "sixd"}, {"name": "quaternion"}, {"name": "euler"}, {"step": 15}])
def test_every_head_can_learn_eight_orientations_by_heart(changes: dict[str, object]) -> None:
    torch.manual_seed(0)
    head = make_head(head_config(**changes).head, TRIGONAL, 16)
    features, truth = torch.eye(16)[:8] * 4, random_orientations(8, 4).float()
    optimiser = torch.optim.Adam(head.parameters(), lr=0.02)
    for step in range(300):
        for group in optimiser.param_groups:
            group["lr"] = 0.02 * (1 - step / 300)
        optimiser.zero_grad()
        head.loss(head(features), truth).backward()
        optimiser.step()
    answers = head.candidates(head(features), 3)
    error = disorientation_deg(answers.orientation[:, 0], truth, TRIGONAL)
    assert error.median() < 2
    assert answers.orientation.shape == (8, 3, 4) and answers.confidence.shape == (8, 3)
    assert (answers.confidence[:, 0] > 0.5).float().mean() > 0.6
    assert torch.isfinite(answers.confidence).all()


def test_a_clamped_euler_head_answers_inside_the_ranges_and_has_no_gradient_outside() -> None:
    head = make_head(head_config(name="euler", clamp=True).head, TRIGONAL, 4)
    numbers = torch.tensor([[1.7, -0.4, 0.5]], requires_grad=True)
    truth = random_orientations(1, 5).float()
    head.loss({"numbers": numbers, "hit": torch.zeros(1)}, truth).backward()
    assert numbers.grad is not None
    assert numbers.grad[0, :2].abs().max() == 0 and numbers.grad[0, 2] != 0
    free = make_head(head_config(name="euler").head, TRIGONAL, 4)
    assert float(free.fractions(numbers).max()) > 1 > float(free.fractions(numbers).min())
    assert float(head.fractions(numbers).max()) == 1 and float(head.fractions(numbers).min()) == 0


def test_single_answers_are_followed_by_none() -> None:
    head = make_head(head_config(name="sixd").head, TRIGONAL, 4)
    answers = head.candidates(head(torch.randn(3, 4)), 2)
    assert answers.orientation[:, 1].isnan().all() and (answers.confidence[:, 1] == 0).all()


def test_a_fine_grid_is_factorised_and_stays_small() -> None:
    head = make_head(head_config(step=2).head, TRIGONAL, 256)
    assert sum(weight.numel() for weight in head.parameters()) < 10_000_000
    output = head(torch.randn(2, 256))
    assert math.prod(output["logits"].shape[1:]) > 250_000
    assert torch.isfinite(head.loss(output, random_orientations(2, 6).float()))
