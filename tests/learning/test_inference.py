"""Candidates as everybody gets them: views of a pattern merged, confidences calibrated, every head alike."""

from typing import Any

import pytest
import torch
from torch import Tensor

from stemtune.config import HEAD_NAMES, Config
from stemtune.crystal.phase import linio2
from stemtune.crystal.rotations import inverse, multiply, normalise
from stemtune.crystal.symmetry import disorientation_deg
from stemtune.dataset.augment import quarter_turns, turn_orientation
from stemtune.diffraction.geometry import Geometry
from stemtune.learning.calibration import Calibration
from stemtune.learning.inference import VIEWS, candidates_of, predict_candidates, predict_raw, view_of
from stemtune.learning.model import Candidates, OrientationModel
from stemtune.learning.models import build

FLIPS = {"model.test_time": "flips"}


class Equivariant(OrientationModel):
    """Candidates from whichever of the eight views weighs most, and brings the answer back: turning changes nothing."""

    def __init__(self, flat: dict[str, object]) -> None:
        super().__init__(Config.from_flat(flat), linio2(), Geometry(8, 0.2, 200.0))
        generator = torch.Generator().manual_seed(3)
        self.weigh = torch.rand(64, generator=generator)
        self.numbers = torch.randn(64, 8, generator=generator)

    def forward(self, patterns: Tensor) -> Tensor:
        return patterns

    def candidates(self, output: Any, n: int = 1) -> Candidates:
        views = torch.stack([view_of(output, *view) for view in VIEWS]).flatten(2)
        chosen = (views @ self.weigh).argmax(0)
        seen = views[chosen, torch.arange(len(output))]
        g = normalise((seen @ self.numbers).unflatten(1, (2, 4)))
        for number, (quarters, mirrored) in enumerate(VIEWS):
            same = g.new_tensor([[1.0, 0.0, 0.0, 0.0]])
            back = turn_orientation(same, torch.tensor([90.0 * quarters]), torch.tensor([mirrored]))
            g = torch.where((chosen == number)[:, None, None], multiply(g, inverse(back)), g)
        first = 0.5 + 0.4 * seen[:, :1]
        return Candidates(g[:, :n], torch.cat([first, 0.9 - first], 1)[:, :n])


def test_views_are_the_exact_augmentations() -> None:
    patterns = torch.rand(3, 8, 8)
    for quarters, mirrored in VIEWS:
        wanted = quarter_turns(patterns.numpy(), [quarters] * 3, [mirrored] * 3)
        torch.testing.assert_close(view_of(patterns, quarters, mirrored), torch.from_numpy(wanted))


def test_views_cannot_change_the_answer_of_an_exactly_equivariant_model() -> None:
    plain, averaged = Equivariant({}), Equivariant(FLIPS)
    patterns = torch.rand(40, 8, 8, generator=torch.Generator().manual_seed(1))
    one, two = predict_candidates(plain, patterns, 2), predict_candidates(averaged, patterns, 2)
    symmetry = plain.phase.symmetry
    different = disorientation_deg(one.orientation[:, 0], one.orientation[:, 1], symmetry) > 6
    assert different.sum() > 30
    assert disorientation_deg(one.orientation, two.orientation, symmetry)[different].max() < 0.05
    torch.testing.assert_close(one.confidence[different], two.confidence[different], atol=1e-5, rtol=0)


def network(**flat: object) -> OrientationModel:
    torch.manual_seed(4)
    settings = {"model.name": "cnn", "model.width": 8, "model.depth": 2, "head.step": 20, "head.components": 40}
    config = Config.from_flat(settings | {key.replace("__", "."): value for key, value in flat.items()})
    return build(config, linio2(), Geometry(32, 0.1, 200.0)).eval()


def test_an_averaged_network_is_exactly_equivariant() -> None:
    """Turning the pattern turns the answer, which a plain network of random weights does not do."""
    patterns = torch.rand(20, 32, 32, generator=torch.Generator().manual_seed(2)) ** 4
    turned = view_of(patterns, 1, True)
    errors = {}
    for name in ("none", "flips"):
        model = network(model__test_time=name)
        with torch.no_grad():
            first, second = predict_candidates(model, patterns), predict_candidates(model, turned)
        wanted = turn_orientation(first.orientation[:, 0], torch.full((20,), 90.0), torch.full((20,), True))
        errors[name] = disorientation_deg(wanted, second.orientation[:, 0], model.phase.symmetry)
    assert errors["flips"].quantile(0.8) < 0.1
    assert errors["none"].median() > 10


@pytest.mark.parametrize("views", ["none", "flips"])
@pytest.mark.parametrize("name", HEAD_NAMES)
def test_every_head_gives_different_answers_best_first(name: str, views: str) -> None:
    model = network(head__name=name, model__test_time=views)
    model.calibration = Calibration(0.5, 0.7, 1.0)
    with torch.no_grad():
        found = predict_candidates(model, torch.rand(12, 32, 32, generator=torch.Generator().manual_seed(5)), 5)
    symmetry = model.phase.symmetry
    missing = found.orientation.isnan().any(-1)
    pairs = disorientation_deg(found.orientation[:, :, None], found.orientation[:, None], symmetry)
    pairs = pairs[~torch.eye(5, dtype=torch.bool).expand(12, -1, -1)]
    if name in ("grid", "mixture"):
        assert not missing.any()
    elif views == "none":
        assert not missing[:, 0].any() and missing[:, 1:].all()
    assert not missing[:, 0].any()
    assert not (pairs <= 5.0).any()
    torch.testing.assert_close(found.orientation[~missing].norm(dim=-1), torch.ones(int((~missing).sum())))
    assert (found.confidence.diff(dim=1) <= 1e-6).all()
    assert ((found.confidence >= 0) & (found.confidence <= 1)).all()
    assert (found.confidence[missing] == 0).all() and (found.confidence.sum(1) <= 1 + 1e-5).all()


def test_the_calibration_acts_on_answers_and_not_on_raw_ones() -> None:
    model = network()
    patterns = torch.rand(6, 32, 32)
    with torch.no_grad():
        _, raw = predict_raw(model, patterns, 2)
        torch.testing.assert_close(predict_candidates(model, patterns, 2).confidence, raw.confidence)
        model.calibration = Calibration(1.0, 1.0, 2.0)
        mapped = predict_candidates(model, patterns, 2)
        _, again = predict_raw(model, patterns, 2)
    torch.testing.assert_close(again.confidence, raw.confidence)
    torch.testing.assert_close(mapped.confidence[:, 0], torch.sigmoid(torch.logit(raw.confidence[:, 0]) + 2.0))
    torch.testing.assert_close(mapped.orientation, raw.orientation)


def test_many_patterns_are_answered_piece_by_piece() -> None:
    """Threads take pieces of a large batch; order and answers are those of one piece after the other."""
    flat = {"model.name": "circular", "model.width": 8, "model.depth": 1, "model.angles": 24, "model.radii": 8}
    config = Config.from_flat({**flat, "model.grid_step": 12})
    torch.manual_seed(0)
    model = build(config, linio2(), Geometry(32, 0.1, 200.0)).eval()
    model.calibration = Calibration(1.5, 1.0, -0.2)
    patterns = torch.poisson(torch.rand(300, 32, 32, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        whole = predict_candidates(model, patterns, 2)
        pieces = [candidates_of(model, piece, 2) for piece in patterns.split(100)]
    assert torch.allclose(whole.confidence, torch.cat([piece.confidence for piece in pieces]), atol=1e-5)
    off = disorientation_deg(whole.orientation, torch.cat([piece.orientation for piece in pieces]), linio2().symmetry)
    assert off.nan_to_num(0.0).max() < 0.05 and whole.orientation[:, 0].isfinite().all()
