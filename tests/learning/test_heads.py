"""Heads: regression, indifferent to the choice among equal orientations; the mixture, its density against scipy."""

import math

import pytest
import torch
from scipy.integrate import quad
from scipy.special import iv

from stemtune.config import Config
from stemtune.crystal.point_groups import LAUE_CLASSES
from stemtune.crystal.rotations import from_euler_deg, multiply
from stemtune.crystal.sampling import random_orientations
from stemtune.crystal.symmetry import Symmetry, beam180, disorientation_deg
from stemtune.learning.heads import canonical_euler_deg, euler_ranges_deg, make_head, symmetric_angle
from stemtune.learning.mixture import NARROWEST_DEG, MixtureHead, log_density, mass_within

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


@pytest.mark.parametrize("kappa", [0.5, 3.0, 40.0])
def test_the_density_is_the_matrix_fisher_density_and_integrates_to_one(kappa: float) -> None:
    """Against the textbook formula with scipy; the angle of a random rotation has the density (1 - cos a) / pi."""

    def textbook(angle: float) -> float:
        return math.exp(2 * kappa * math.cos(angle)) / (iv(0, 2 * kappa) - iv(1, 2 * kappa))

    for angle in (0.1, 1.0, 3.0):
        ours = float(log_density(torch.tensor(math.cos(angle)), torch.tensor(kappa)))
        assert ours == pytest.approx(math.log(textbook(angle)), rel=1e-4)
    total, _ = quad(lambda angle: textbook(angle) * (1 - math.cos(angle)) / math.pi, 0, math.pi)
    assert total == pytest.approx(1, abs=1e-8)
    inside, _ = quad(lambda angle: textbook(angle) * (1 - math.cos(angle)) / math.pi, 0, math.radians(20))
    assert float(mass_within(20, torch.tensor(kappa))) == pytest.approx(inside, rel=0.01)


def test_the_narrowest_component_is_still_a_density() -> None:
    kappa = torch.tensor(0.5 / math.radians(NARROWEST_DEG) ** 2)
    assert float(mass_within(5, kappa)) == pytest.approx(1, abs=1e-3)


def test_the_mixture_is_a_density_over_all_orientations_whatever_equal_one_a_label_names() -> None:
    torch.manual_seed(1)
    head = MixtureHead(8, TRIGONAL, 5)
    output = {"centres": torch.randn(1, 5, 6), "weights": torch.randn(1, 5), "widths": torch.full((1, 5), 3.0)}
    everywhere = random_orientations(20_000, 1).float()
    same = {name: value.expand(len(everywhere), *value.shape[1:]) for name, value in output.items()}
    likelihood = head.log_likelihood(same, everywhere)
    assert float(likelihood.exp().mean()) == pytest.approx(1, abs=0.03)
    for operation in TRIGONAL.operations.float():
        equal = head.log_likelihood(same, multiply(operation, everywhere))
        torch.testing.assert_close(equal, likelihood, rtol=1e-4, atol=1e-3)


def test_it_names_both_where_a_pattern_is_ambiguous() -> None:
    """One input, two truths: a single answer would lie between them."""
    torch.manual_seed(0)
    head = MixtureHead(4, TRIGONAL, 12)
    one = random_orientations(1, 7).float()
    truths = torch.cat([one, one, one, beam180(one)]).repeat(4, 1)
    assert disorientation_deg(one, beam180(one), TRIGONAL) > 20
    features = torch.ones(16, 4)
    optimiser = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(150):
        optimiser.zero_grad()
        head.loss(head(features), truths).backward()
        optimiser.step()
    answers = head.candidates(head(features[:1]), 4)
    assert disorientation_deg(answers.orientation[0, 0], one[0], TRIGONAL) < 1
    assert disorientation_deg(answers.orientation[0, 1], beam180(one)[0], TRIGONAL) < 1
    assert answers.confidence[0, :2].tolist() == pytest.approx([0.75, 0.25], abs=0.05)


def test_components_start_spread_over_all_orientations() -> None:
    symmetry = Symmetry.of_laue("m-3m")
    head = MixtureHead(4, symmetry, 24)
    centre = head.components(head(torch.zeros(1, 4)))[0][0]
    apart = disorientation_deg(centre[:, None], centre, symmetry)[~torch.eye(24, dtype=torch.bool)]
    assert apart.min() > 15
    truth = random_orientations(500, 2).float()
    assert disorientation_deg(truth[:, None], centre, symmetry).amin(1).max() < 45
    assert Config.from_flat({"head.name": "mixture"}).head.components == 64
