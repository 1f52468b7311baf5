"""The decision *not indexed*: crystals are kept, vacuum, noise, halos and beam stops are not, whatever is answered."""

from __future__ import annotations

import pytest
import torch

from stemtune.config import Config, SimulateConfig
from stemtune.crystal.phase import linio2
from stemtune.crystal.rotations import from_axis_angle_deg, multiply
from stemtune.crystal.sampling import random_orientations
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator
from stemtune.errors import UserError
from stemtune.indexing.refine import Refiner
from stemtune.indexing.spot_check import SpotCheck, is_crystal
from stemtune.learning.model import Candidates
from stemtune.learning.models import build

GEOMETRY = Geometry(128, 0.025, 200)


@pytest.fixture(scope="module")
def check() -> SpotCheck:
    return SpotCheck(linio2(), GEOMETRY)


def crystals(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    truth = random_orientations(count, 5)
    patterns = KinematicSimulator(linio2(), GEOMETRY, SimulateConfig()).patterns(truth.float(), generator)
    axis = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator, dtype=torch.float64), dim=1)
    off = from_axis_angle_deg(axis, torch.full((count,), 1.2, dtype=torch.float64))
    return patterns, multiply(off, truth)


def junk(kind: str, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    line = torch.arange(128) - 63.5
    radius = torch.hypot(line[:, None], line[None, :])
    beam = torch.exp(-((radius / 1.5) ** 2) / 2)
    flat = torch.ones(128, 128)
    shape = {
        "noise": flat,
        "vacuum": 0.999 * beam / beam.sum() + 0.001 / 128**2,
        "halo": 0.5 * beam / beam.sum() + 0.5 * torch.exp(-(((radius - 12) / 14) ** 2) / 2) / 1200,
        "beam stop": torch.exp(-((radius / 8) ** 2) / 2) * (radius > 10),
        "nothing": 0 * flat,
    }[kind]
    dose = 10 ** (2.5 + 2.5 * torch.rand(count, 1, 1, generator=generator))
    return torch.poisson(shape / shape.sum().clamp_min(1e-9) * dose, generator=generator)


def adversary(check: SpotCheck, patterns: torch.Tensor, tries: int = 12) -> torch.Tensor:
    """The share of patterns that any of many random answers gets indexed: a model that loves spots in noise."""
    fooled = torch.zeros(len(patterns), dtype=torch.bool)
    for seed in range(tries):
        fooled |= is_crystal(check(patterns, random_orientations(len(patterns), 100 + seed)))
    return fooled.float().mean()


def test_crystals_are_kept(check: SpotCheck) -> None:
    patterns, answer = crystals(400)
    scores = check(patterns, answer)
    assert is_crystal(scores).float().mean() > 0.91
    assert bool(((scores.explained_intensity >= 0) & (scores.explained_intensity <= 1)).all())


def test_wrong_answers_mostly_are_not(check: SpotCheck) -> None:
    patterns, _ = crystals(400)
    assert is_crystal(check(patterns, random_orientations(400, 77))).float().mean() < 0.05


@pytest.mark.parametrize("kind", ["noise", "vacuum", "halo", "beam stop", "nothing"])
def test_junk_is_not_indexed(check: SpotCheck, kind: str) -> None:
    assert adversary(check, junk(kind, 60)) <= 0.02


def test_stray_peaks_of_a_support_film_are_not_a_crystal(check: SpotCheck) -> None:
    generator = torch.Generator().manual_seed(8)
    patterns = torch.zeros(60, 128, 128)
    patterns[:, 63:65, 63:65] = 800
    for pattern in patterns:
        for row, column in torch.randint(8, 119, (4, 2), generator=generator).tolist():
            pattern[row : row + 2, column : column + 2] = 10
    assert adversary(check, patterns) <= 0.05


def test_scores_do_not_depend_on_the_gain(check: SpotCheck) -> None:
    patterns, answer = crystals(50)
    for plain, scaled in zip(check(patterns, answer), check(patterns * 37.0, answer), strict=True):
        torch.testing.assert_close(plain, scaled, rtol=1e-4, atol=1e-4)


def test_fit_is_the_share_of_intensity_on_predicted_spots(check: SpotCheck) -> None:
    """A pattern made of nothing but the predicted spots fits fully; mixed half and half with a ring, half."""
    answer = random_orientations(20, 9)
    simulator = KinematicSimulator(linio2(), GEOMETRY, SimulateConfig())
    spots = simulator.template_spots(answer, 0.02, max_inv_angstrom=1.4)
    row, column = GEOMETRY.pixel_of(spots.x.numpy(), spots.y.numpy())
    pure = torch.zeros(20, 128, 128)
    for index in range(20):
        keep = spots.intensity[index] > 0
        place = torch.as_tensor(row[index]).round().long()[keep], torch.as_tensor(column[index]).round().long()[keep]
        pure[index].index_put_(place, spots.intensity[index][keep].float(), accumulate=True)
    assert check(pure, answer).explained_intensity.min() > 0.8
    line = torch.arange(128) - 63.5
    radius = torch.hypot(line[:, None], line[None, :]) * 0.025
    ring = ((radius > 0.3) & (radius < 1.4)).float()
    mixed = pure / pure.sum((1, 2), keepdim=True) + ring / ring.sum()
    assert 0.35 < check(mixed, answer).explained_intensity.median() < 0.6


def test_nan_answers_and_bad_counts_do_not_pass(check: SpotCheck) -> None:
    patterns, answer = crystals(4)
    patterns[1] = torch.nan
    patterns[2, 3, 4] = -5
    answer[0] = torch.nan
    kept = is_crystal(check(patterns, answer))
    assert not kept[0]
    assert not kept[1]
    assert torch.isfinite(torch.stack(check(patterns, answer))).all()


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(64, 1e-4, 200.0),  # nothing is as near to the beam as the corners are
        Geometry(64, 0.05, 200.0, (0.0, 32.0)),  # the beam at an edge, in a corner, beside the patterns
        Geometry(64, 0.05, 200.0, (63.0, 63.0)),
        Geometry(64, 0.05, 200.0, (-40.0, 32.0)),
    ],
)
def test_patterns_without_a_reflection_in_reach_are_refused(geometry: Geometry) -> None:
    with pytest.raises(UserError, match="no reflection of LiNiO2 lies between the direct beam, at row .* --centre"):
        SpotCheck(linio2(), geometry)


def test_whatever_else_reads_spots_bears_a_beam_at_the_edge_and_refuses_a_scale_without_reflections() -> None:
    patterns, answer = torch.poisson(torch.full((2, 64, 64), 2.0)), random_orientations(2, 0).float()
    settings = Config.from_flat({"model.name": "rerank", "model.grid_step": 10, "model.angles": 36})
    for centre in ((0.0, 32.0), (63.0, 63.0), (-3.0, 32.0), (-40.0, 32.0)):
        geometry = Geometry(64, 0.05, 200.0, centre)
        found = Refiner(Config(), linio2(), geometry).refine(patterns, Candidates(answer[:, None], torch.ones(2, 1)))
        assert found.orientation.isfinite().all()
        model = build(settings, linio2(), geometry).eval()
        assert model.candidates(model(patterns), 2).confidence.isfinite().all()
    empty = Geometry(64, 1e-4, 200.0)
    for make in (
        lambda: Refiner(Config(), linio2(), empty),
        lambda: build(settings, linio2(), empty),
        lambda: KinematicSimulator(linio2(), empty, SimulateConfig()),
    ):
        with pytest.raises(UserError, match="no reflection of LiNiO2 falls on"):
            make()
