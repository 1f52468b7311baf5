"""The mixture head: its density against scipy and numerical integration, and two answers where one cannot do."""

import math

import pytest
import torch
from scipy.integrate import quad
from scipy.special import iv

from stemtune.config import Config
from stemtune.crystal.rotations import multiply
from stemtune.crystal.sampling import random_orientations
from stemtune.crystal.symmetry import Symmetry, beam180, disorientation_deg
from stemtune.learning.mixture import NARROWEST_DEG, MixtureHead, log_density, mass_within

TRIGONAL = Symmetry.of_laue("-3m")


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
