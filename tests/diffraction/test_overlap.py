"""Overlapping grains: intensities add before electrons are counted, and the drawn weights keep to the settings."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from stemtune.config import Config
from stemtune.crystal.phase import linio2
from stemtune.crystal.sampling import random_orientations
from stemtune.diffraction import overlap
from stemtune.diffraction.bloch import simulator_for
from stemtune.diffraction.conditions import draw_conditions
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator

MANY = {"overlap": 0.6, "overlap_grains": 3, "overlap_weight": "0.2:0.8"}
BOTH = pytest.mark.parametrize("physics", ["kinematic", "bloch"])


def simulator(**given: object) -> KinematicSimulator:
    flat = {"size": 48, "scale": 0.04, "beams": 40, "tilts": 2, "absorption": "none", **MANY, **given}
    simulate = Config.from_flat({f"simulate.{key}": value for key, value in flat.items()}).simulate
    return simulator_for(linio2(), Geometry.of(simulate), simulate)


def drawn(simulate: Any, count: int) -> overlap.Overlap:
    return overlap.draw_overlap(simulate, count, torch.Generator().manual_seed(1))


@BOTH
def test_beams_side_by_side_add_up(physics: str) -> None:
    """The pattern is the sum of those of the grains alone, each of its own thickness, weighted by its share."""
    made = simulator(physics=physics, dose=0, dead_pixels=0)
    several, orientation = drawn(made.simulate, 24), random_orientations(24, 3).float()
    conditions = draw_conditions(made.simulate, made.geometry, 24, torch.Generator().manual_seed(4), made.device)
    mixed = made.detect(overlap.diffracted(made, orientation, several, conditions), conditions, None)
    expected = several.weight[:, 0, None, None] * made.expose(orientation, conditions, None)
    for number in (0, 1):
        own = dataclasses.replace(conditions, thickness_angstrom=several.thickness_angstrom[:, number])
        known = several.orientation[:, number].nan_to_num(nan=0.5).float()
        expected += several.weight[:, number + 1, None, None] * made.expose(known, own, None)
    assert (several.weight[:, 1] > 0).sum() > 8 and (several.weight[:, 2] > 0).sum() > 3
    assert torch.linalg.vector_norm(mixed - expected) < 1e-3 * torch.linalg.vector_norm(expected)
    alone = made.expose(orientation, conditions, None)
    shown = torch.linalg.vector_norm(mixed - alone, dim=(1, 2)) > 1e-4
    assert torch.equal(shown, several.weight[:, 1] > 0)


@BOTH
def test_electrons_are_counted_once(physics: str) -> None:
    """Counts of a mixed pattern are Poisson: their variance is their mean; mixing counted patterns would lower it."""
    still = dict.fromkeys(("centre_error", "ellipticity", "scale_error", "dead_pixels", "background"), 0)
    fixed = {"thickness": 40, "precession": 0, "convergence": 2, "blur": 1, "direct_beam": 0.4, "dose": 300}
    made = simulator(physics=physics, overlap=1, overlap_weight=1, **still, **fixed)
    one = random_orientations(3, 5)
    count = 800
    several = overlap.Overlap(
        torch.tensor([0.5, 0.5, 0]).expand(count, 3),
        torch.stack((one[1], torch.full((4,), torch.nan, dtype=torch.float64))).expand(count, 2, 4),
        torch.full((count, 2), 400.0),
    )
    counts = overlap.patterns(made, one[:1].expand(count, 4), several, torch.Generator().manual_seed(0))
    assert (counts == counts.round()).all()
    bright = counts.mean(0) > 0.5
    assert bright.sum() > 10
    assert float((counts.var(0) / counts.mean(0))[bright].mean()) == pytest.approx(1, abs=0.06)


def test_weights_keep_to_the_settings() -> None:
    simulate = simulator().simulate
    weight = drawn(simulate, 20_000).weight.numpy()
    grains = (weight > 0).sum(axis=1)
    assert weight.sum(axis=1) == pytest.approx(np.ones(20_000), abs=1e-5)
    assert (np.diff(weight, axis=1) <= 0).all()
    assert np.mean(grains > 1) == pytest.approx(0.6, abs=0.015)
    assert np.mean(grains[grains > 1] == 3) == pytest.approx(0.5, abs=0.02)
    relative = (weight[:, 1:] / weight[:, :1])[weight[:, 1:] > 0]
    assert relative.min() == pytest.approx(0.2, abs=0.01) and relative.max() == pytest.approx(0.8, abs=0.01)
    assert (drawn(simulator(overlap_grains=2).simulate, 500).weight[:, 2] == 0).all()


def test_further_grains_are_random_and_only_where_they_weigh() -> None:
    several = drawn(simulator(thickness="30:60").simulate, 5000)
    there = several.orientation.isfinite().all(-1)
    assert torch.equal(there, several.weight[:, 1:] > 0)
    known = several.orientation[there]
    assert (known.T @ known / len(known)).numpy() == pytest.approx(np.eye(4) / 4, abs=0.02)
    assert several.thickness_angstrom.min() >= 300 and several.thickness_angstrom.max() <= 600


@BOTH
def test_no_further_grain_changes_nothing(physics: str) -> None:
    made = simulator(physics=physics, dose=0)
    orientation = random_orientations(10, 3)
    nothing = drawn(simulator(overlap=0).simulate, 10)
    alone = made.patterns(orientation, torch.Generator().manual_seed(8))
    assert torch.equal(overlap.patterns(made, orientation, None, torch.Generator().manual_seed(8)), alone)
    assert torch.allclose(
        overlap.patterns(made, orientation, nothing, torch.Generator().manual_seed(8)), alone, atol=1e-6
    )
