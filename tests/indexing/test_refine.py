"""The physical fit of answers: on py4DSTEM's Bloch waves orientation, scale and centre must come out better."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import testset
from benchmarks.testset import Condition
from stemtune.config import Config, SimulateConfig, Span
from stemtune.crystal.phase import Phase, linio2
from stemtune.crystal.rotations import multiply
from stemtune.crystal.sampling import random_orientations
from stemtune.crystal.symmetry import disorientation_deg
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator
from stemtune.indexing.predict import fit_geometry
from stemtune.indexing.predictor import Predictions
from stemtune.indexing.refine import Refinement, Refiner
from stemtune.learning.grid import from_rotation_vector
from stemtune.learning.inference import predict_candidates
from stemtune.learning.model import Candidates, OrientationModel
from stemtune.learning.models import build


def off_by(truth: torch.Tensor, degrees: float) -> torch.Tensor:
    """Return orientations (n, 4) that are `degrees` off in random directions."""
    axis = torch.randn(len(truth), 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    vector = axis / axis.norm(dim=1, keepdim=True) * math.radians(degrees)
    return multiply(truth, from_rotation_vector(vector))


def refined(patterns: torch.Tensor, orientation: torch.Tensor, spread_deg: float = 0.5) -> Refinement:
    refiner = Refiner(Config(), linio2(), testset.GEOMETRY, spread_deg=spread_deg)
    return refiner.refine(patterns, Candidates(orientation[:, None].float(), torch.ones(len(orientation), 1)))


def error_deg(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return disorientation_deg(found.double(), truth, linio2().symmetry)


@cache
def drawn(condition: Condition, seed: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    beams = testset.py4dstem(condition.precession_deg)
    return torch.from_numpy(testset.pictures(beams, condition, seed)), torch.from_numpy(beams.orientation)


@pytest.fixture(scope="module")
def matched() -> OrientationModel:
    return build(Config.from_flat({"model.name": "matched"}), linio2(), testset.GEOMETRY).eval()


@pytest.mark.parametrize("precession", testset.PRECESSIONS_DEG)
@pytest.mark.parametrize(("electrons", "centre", "scale"), [(3000, 0.0, 0.0), (3000, 1.0, 0.01), (300, 0.0, 0.0)])
def test_the_matched_filter_gets_better(
    matched: OrientationModel, precession: float, electrons: int, centre: float, scale: float
) -> None:
    patterns, truth = drawn(Condition(precession, electrons, centre, scale))
    with torch.inference_mode():
        given = predict_candidates(matched, patterns).orientation[:, 0]
    before, after = error_deg(given, truth), error_deg(refined(patterns, given).orientation[:, 0], truth)
    right = before < 3
    assert after.median() <= before.median()
    assert after[right].median() < 0.9 * before[right].median()
    assert (after < 5).double().mean() >= (before < 5).double().mean() - 0.005


@pytest.mark.parametrize("precession", testset.PRECESSIONS_DEG)
@pytest.mark.parametrize("degrees", [0.3, 0.5, 1.0])
def test_answers_that_say_how_good_they_are_get_better(precession: float, degrees: float) -> None:
    patterns, truth = drawn(Condition(precession))
    given = off_by(truth, degrees)
    after = error_deg(refined(patterns, given, degrees / math.sqrt(3)).orientation[:, 0], truth)
    assert after.median() < 0.8 * degrees


@pytest.mark.parametrize("precession", testset.PRECESSIONS_DEG)
def test_scale_and_centre_are_found(precession: float) -> None:
    """Patterns 1 px and 1 % off, every one in another direction: both are known to a quarter of it afterwards."""
    patterns, truth = drawn(Condition(precession, centre_px=1.0, scale_error=0.01))
    errors = np.random.default_rng((7, 1))  # as `testset.pictures` draws them
    azimuth = errors.uniform(0, 2 * np.pi, len(truth))
    stretch = 1 + 0.01 * errors.choice((-1.0, 1.0), len(truth))
    found = refined(patterns, off_by(truth, 0.5))
    middle = (testset.GEOMETRY.size - 1) / 2
    beam = np.stack((middle - np.sin(azimuth), middle + np.cos(azimuth)), axis=1)
    assert np.median(np.abs(found.scale.numpy() * stretch - 1)) < 0.0025
    assert np.median(np.linalg.norm(found.centre_px.numpy() - beam, axis=1)) < 0.25
    ideal, _ = drawn(Condition(precession))
    right = refined(ideal, off_by(truth, 0.5))
    assert abs(float(right.scale.median()) - 1) < 0.001
    assert (right.centre_px.median(0).values - middle).abs().max() < 0.05


def test_nothing_is_made_of_nothing() -> None:
    """Vacuum leaves answers where they are; no answer stays none; broken pixels and single spots break nothing."""
    patterns, truth = drawn(Condition())
    some = patterns[:6].float()
    some[0] = 0.0  # no electron at all
    some[1] = torch.poisson(torch.full((128, 128), 0.02), generator=torch.Generator().manual_seed(1))
    some[2, 40:60] = torch.nan
    some[3] = torch.nan
    some[4] = 0.0
    some[4, 60:67, 60:67] = 100.0  # the direct beam and one spot
    some[4, 30:33, 70:73] = 9.0
    given = off_by(truth[:6], 0.3).float()
    given[5] = torch.nan
    found = refined(some, given)
    assert found.orientation[:5].isfinite().all() and found.orientation[5].isnan().all()
    assert found.ncc[:5].isfinite().all() and found.ncc[5].isnan().all()
    assert found.scale[:5].isfinite().all() and found.centre_px[:5].isfinite().all() and found.scale[5].isnan()
    moved = disorientation_deg(found.orientation[:5, 0].double(), given[:5].double(), linio2().symmetry)
    assert moved[[0, 3]].max() < 0.01
    assert moved.max() < 1.5
    assert found.ncc[0] == 0 and found.ncc[2] > found.ncc[1]
    assert found.scale[0] == 1


def test_only_answers_that_are_worth_it_are_fitted() -> None:
    patterns, truth = drawn(Condition())
    two = torch.stack((off_by(truth, 0.4), off_by(truth, 8.0)), dim=1)[:8].float()
    confidence = torch.tensor([0.9, 0.04]).repeat(8, 1)
    confidence[4:, 1] = 0.05
    refiner = Refiner(Config(), linio2(), testset.GEOMETRY)
    found = refiner.refine(patterns[:8], Candidates(two, confidence))
    assert found.ncc[:4, 1].isnan().all()
    torch.testing.assert_close(found.orientation[:4, 1], two[:4, 1])
    assert found.ncc[4:, 1].isfinite().all()
    assert (found.ncc[4:, 0] > found.ncc[4:, 1]).all()
    alone = refiner.refine(patterns[:8], Candidates(two[:, :1], confidence[:, :1]))
    torch.testing.assert_close(alone.orientation, found.orientation[:, :1])


@pytest.mark.parametrize(("size", "scale", "kv"), [(128, 0.0235, 300.0), (96, 0.04, 200.0), (256, 0.011, 80.0)])
def test_other_microscopes(size: int, scale: float, kv: float) -> None:
    """Widths are reciprocal lengths: patterns of another camera length, size and voltage are fitted as well."""
    settings = SimulateConfig(
        size=size, scale=scale, kv=kv, dose=Span(5000, 5000), background=Span(0.0, 0.1), scale_error=0.0
    )
    geometry = Geometry(size, scale, kv, centre_px=((size - 1) / 2, (size - 1) / 2))
    truth = random_orientations(40, torch.Generator().manual_seed(3))
    patterns = KinematicSimulator(linio2(), geometry, settings).patterns(truth, torch.Generator().manual_seed(4))
    given = off_by(truth.double(), 0.6).float()
    found = Refiner(Config(), linio2(), geometry).refine(patterns, Candidates(given[:, None], torch.ones(40, 1)))
    after = disorientation_deg(found.orientation[:, 0].double(), truth.double(), linio2().symmetry)
    assert after.median() < 0.4
    assert abs(float(found.scale.median()) - 1) < 0.005


@pytest.mark.slow
def test_the_real_cathode(shared_data: Path) -> None:
    """On the particle, fitted spots explain the real patterns better than those of the same answers, tilted."""
    from stemtune.scan.readers import read_scan

    scan = read_scan(shared_data / "cathode" / "cathode_scan.hspy")
    counts = np.asarray(scan.data[20:24, 14:22].compute()).reshape(-1, 128, 128)
    phase = Phase.from_cif(shared_data / "cathode" / "LCO.cif")
    geometry = Geometry(128, 0.0235, 300.0)
    patterns = torch.from_numpy(counts.astype(np.float32))
    model = build(Config.from_flat({"model.name": "matched"}), phase, geometry).eval()
    with torch.inference_mode():
        given = predict_candidates(model, patterns)
    refiner = Refiner(Config(), phase, geometry)
    once = refiner.refine(patterns, given)
    tilted = multiply(given.orientation[:, 0].double(), off_by(torch.eye(4, dtype=torch.float64)[:1], 3.0))
    away = refiner.refine(patterns, Candidates(tilted[:, None].float(), torch.ones(len(tilted), 1)))
    assert once.orientation.isfinite().all()
    assert float((once.ncc[:, 0] > away.ncc[:, 0]).float().mean()) > 0.7


def answered(scale: torch.Tensor, centre: torch.Tensor) -> Predictions:
    n = len(scale)
    blank = np.ones(n, dtype=np.float32)
    columns = np.zeros((n, 1, 4)), blank[:, None], blank > 0, blank, blank, 0.8 * blank[:, None]
    return Predictions(*columns, scale.numpy(), centre.numpy())


def test_a_wrong_calibration_is_told_only_where_patterns_agree() -> None:
    noise = torch.randn(100, 3, generator=torch.Generator().manual_seed(2))
    geometry = testset.GEOMETRY
    centre = 63.5 + 0.2 * noise[:, 1:]
    off = fit_geometry(answered(1.007 + 0.002 * noise[:, 0], centre + torch.tensor([0.0, 1.2])), geometry)
    assert len(off.notes) == 2
    assert "0.7% larger" in off.notes[0] and "0.02518 instead of 0.025 1/Å" in off.notes[0]
    assert "row 63.5, column 64.7" in off.notes[1]
    assert off.figures["median_ncc"] == pytest.approx(0.8)
    assert off.figures["fitted"]["scale_inv_angstrom"] == pytest.approx(0.025175, rel=1e-3)
    assert off.figures["fitted"]["scale_spread"] == pytest.approx(0.002 * 0.025, rel=0.2)
    assert fit_geometry(answered(1.001 + 0.002 * noise[:, 0], centre), geometry).notes == []
    assert fit_geometry(answered(1.007 + 0.02 * noise[:, 0], centre), geometry).notes == []
    few = fit_geometry(answered(1.007 + 0.002 * noise[:10, 0], centre[:10]), geometry)
    assert few.notes == []
