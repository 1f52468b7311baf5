"""The figures a model is judged by, against answers whose errors are known."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from stemtune.config import METRICS, Config
from stemtune.crystal.phase import Phase, linio2
from stemtune.crystal.pseudo_symmetry import pseudo_variants
from stemtune.crystal.rotations import from_axis_angle_deg, multiply
from stemtune.crystal.sampling import random_orientations
from stemtune.crystal.symmetry import beam180
from stemtune.dataset.batches import Batch
from stemtune.diffraction.geometry import Geometry
from stemtune.learning.metrics import measured_spread_deg, score_patterns, summarise
from stemtune.learning.model import Candidates, OrientationModel

TURN = from_axis_angle_deg(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), 3.0)


class Oracle(OrientationModel):
    """Knows the truth and errs by a given rotation; the pattern's first pixel is the row number."""

    def __init__(self, truth: Tensor, wrong: Callable[[Tensor], Tensor], phase: Phase) -> None:
        super().__init__(Config(), phase, Geometry(16, 0.1, 200))
        self.truth, self.wrong = truth, wrong

    def forward(self, patterns: Tensor) -> Tensor:
        return patterns[:, 0, 0].long()

    def loss(self, output: Any, orientation: Tensor) -> Tensor:
        return output.float().mean()

    def candidates(self, output: Any, n: int = 1) -> Candidates:
        return Candidates(self.wrong(self.truth[output]).unsqueeze(1), torch.ones(len(output), 1))


class Listed:
    """Two batches of unequal size."""

    batches_per_epoch = 2

    def __init__(self, truth: Tensor) -> None:
        self.truth = truth

    def epoch(self, epoch: int) -> Iterator[Batch]:
        for rows in torch.arange(len(self.truth)).split(24):
            patterns = rows[:, None, None].expand(-1, 16, 16).float()
            yield Batch(patterns, self.truth[rows])


def figures(wrong: Callable[[Tensor], Tensor]) -> dict[str, float]:
    truth = random_orientations(32, 1)
    return summarise(score_patterns(Oracle(truth, wrong, linio2()), Listed(truth), torch.device("cpu")))  # type: ignore[arg-type]


def test_a_constant_error_is_measured_as_such() -> None:
    found = figures(lambda g: multiply(g, TURN))
    assert set(found) == {name for name in METRICS if name.startswith("val/")}
    assert found["val/disorientation_median_deg"] == pytest.approx(3.0)
    assert found["val/disorientation_mean_deg"] == pytest.approx(3.0)
    assert found["val/within_2deg"] == 0 and found["val/within_5deg"] == 1
    assert found["val/pseudo_symmetry_fraction"] == 0
    assert found["val/loss"] == pytest.approx(15.5)


def test_the_beam_180_twin_is_wrong_strictly_and_right_modulo_it() -> None:
    found = figures(lambda g: multiply(beam180(g), TURN))
    assert found["val/disorientation_median_deg"] > 20
    assert found["val/disorientation_median_deg_beam180"] == pytest.approx(3.0)
    assert found["val/within_5deg_beam180"] == 1 and found["val/within_5deg"] < 0.1


@pytest.mark.parametrize("number", range(len(pseudo_variants(linio2()))))
def test_pseudo_symmetric_answers_are_recognised(number: int) -> None:
    variant = pseudo_variants(linio2())[number][1]
    found = figures(lambda g: multiply(multiply(variant, g), TURN))
    assert found["val/within_5deg"] == 0
    assert found["val/pseudo_symmetry_fraction"] == 1


def test_other_wrong_answers_are_not_pseudo_symmetric() -> None:
    far = from_axis_angle_deg(torch.tensor([1.0, 0.3, 0.2], dtype=torch.float64), 25.0)
    assert figures(lambda g: multiply(far, g))["val/pseudo_symmetry_fraction"] == 0


def test_no_answer_is_as_wrong_as_can_be() -> None:
    found = figures(lambda g: torch.full_like(g, torch.nan))
    assert found["val/disorientation_median_deg"] == found["val/disorientation_mean_deg"] == 180
    assert found["val/within_5deg"] == found["val/within_5deg_beam180"] == 0


def test_the_spread_of_right_answers_is_that_of_a_normal_error() -> None:
    off = 0.8 * torch.randn(5000, 3, generator=torch.Generator().manual_seed(0)).norm(dim=1)
    scores = torch.zeros(6, 6000)
    scores[0] = torch.cat((off, torch.full((1000,), 60.0)))  # wrong answers do not count
    assert measured_spread_deg(scores) == pytest.approx(0.8, rel=0.03)
    assert measured_spread_deg(scores[:, 4990:]) is None  # too few are right
