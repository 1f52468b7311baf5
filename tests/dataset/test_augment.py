"""Augmentation keeps patterns and orientations together, checked against simulated spots and whole patterns."""

import numpy as np
import pytest
import torch

from stemtune.config import Config
from stemtune.crystal.phase import linio2
from stemtune.crystal.sampling import random_orientations
from stemtune.dataset.augment import augment, quarter_turns, turn_orientation, turn_patterns
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator

FIXED = {
    "simulate.size": 64,
    "simulate.scale": 0.04,
    "simulate.thickness": 40,
    "simulate.precession": 0,
    "simulate.convergence": 1,
    "simulate.dose": 0,
    "simulate.direct_beam": 0.3,
    "simulate.background": 0,
    "simulate.blur": 0.7,
    "simulate.centre_error": 0,
    "simulate.ellipticity": 0,
    "simulate.scale_error": 0,
    "simulate.dead_pixels": 0,
}
"""A microscope without chance: one orientation always gives the same pattern."""


@pytest.fixture(scope="module")
def simulator() -> KinematicSimulator:
    simulate = Config.from_flat(FIXED).simulate
    return KinematicSimulator(linio2(), Geometry(64, 0.04, 200.0), simulate)


def spot_table(simulator: KinematicSimulator, orientation: torch.Tensor) -> list[np.ndarray]:
    spots = simulator.spots(orientation, thickness_nm=40.0)
    return [
        np.column_stack([x[i > 0], y[i > 0], i[i > 0]])
        for x, y, i in zip(spots.x.numpy(), spots.y.numpy(), spots.intensity.numpy(), strict=True)
    ]


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("angle_deg", [0.0, 90.0, -37.0])
def test_turned_orientation_gives_turned_spots(simulator: KinematicSimulator, angle_deg: float, mirrored: bool) -> None:
    """+a about the beam turns every spot counter-clockwise by a (y up); the mirror takes x to -x; no spot changes."""
    g = random_orientations(6, 3)
    turned = turn_orientation(g, torch.full((6,), angle_deg), torch.full((6,), mirrored))
    angle = np.deg2rad(angle_deg)
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    if mirrored:
        matrix = np.diag([-1, 1]) @ matrix
    for before, after in zip(spot_table(simulator, g), spot_table(simulator, turned), strict=True):
        expected = np.column_stack([before[:, :2] @ matrix.T, before[:, 2]])
        assert len(expected) == len(after) > 3
        distance = np.linalg.norm(expected[:, None, :2] - after[None, :, :2], axis=-1)
        nearest = distance.argmin(axis=1)
        assert distance.min(axis=1).max() < 1e-6
        np.testing.assert_allclose(after[nearest, 2], expected[:, 2], rtol=1e-5)


def test_flips_equal_the_pattern_simulated_at_the_new_orientation(simulator: KinematicSimulator) -> None:
    g = random_orientations(24, 5)
    patterns = simulator.patterns(g, torch.Generator().manual_seed(0), noise=False)
    moved, orientation = augment(patterns, g, "flips", torch.Generator().manual_seed(1))
    again = simulator.patterns(orientation, torch.Generator().manual_seed(0), noise=False)
    peak = patterns.amax(dim=(1, 2))
    assert ((moved - again).abs().amax(dim=(1, 2)) / peak).max() < 1e-3
    assert ((patterns - again).abs().amax(dim=(1, 2)) / peak > 1e-2).sum() > 15  # most were really moved


def test_any_angle_agrees_up_to_interpolation(simulator: KinematicSimulator) -> None:
    g = random_orientations(8, 6)
    patterns = simulator.patterns(g, torch.Generator().manual_seed(0), noise=False)
    angle = torch.linspace(-40, 40, 8)
    unmirrored = torch.zeros(8, dtype=torch.bool)
    turned = turn_patterns(patterns, angle, unmirrored)
    new = turn_orientation(g, angle, unmirrored)
    again = simulator.patterns(new, torch.Generator().manual_seed(0), noise=False)

    def likeness(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        p, q = (x[:, 8:-8, 8:-8].sqrt().flatten(1) for x in (p, q))
        return (p * q).sum(1) / p.norm(dim=1) / q.norm(dim=1)

    wrong = simulator.patterns(turn_orientation(g, -angle, unmirrored), noise=False)
    assert likeness(turned, again).min() > 0.97
    assert likeness(turned, again).min() > likeness(turned, wrong)[[0, 1, 6, 7]].max()
    mirrored = turn_patterns(patterns, angle, ~unmirrored)
    torch.testing.assert_close(mirrored, turned.flip(2), rtol=1e-4, atol=1e-4 * float(patterns.max()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_flips_keep_counts_and_use_all_eight(dtype: torch.dtype) -> None:
    pattern = torch.tensor([[1, 2], [3, 4]]).to(dtype)
    q = torch.tensor([[1.0, 0, 0, 0]]).expand(200, 4)
    moved, orientation = augment(pattern.expand(200, 2, 2), q, "flips", torch.Generator().manual_seed(0))
    assert moved.dtype == dtype
    seen = {(tuple(p.flatten().tolist()), tuple((g * g[g.abs().argmax()].sign()).tolist()))
            for p, g in zip(moved, orientation.round(decimals=4), strict=True)}  # fmt: skip
    assert len({p for p, _ in seen}) == 8
    assert {tuple(sorted(p)) for p, _ in seen} == {(1, 2, 3, 4)}
    turned, mirrored = (
        quarter_turns(pattern[None].numpy(), [1], [False]),
        quarter_turns(pattern[None].numpy(), [0], [True]),
    )
    assert turned.tolist() == [[[2, 4], [1, 3]]]
    assert mirrored.tolist() == [[[2, 1], [4, 3]]]


def test_augmentation_repeats_and_can_be_off() -> None:
    patterns, g = torch.rand(5, 8, 8), random_orientations(5, 1).float()
    same = augment(patterns, g, "none", torch.Generator())
    assert same[0] is patterns
    assert same[1] is g
    first, second = (augment(patterns, g, "rotate", torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    torch.testing.assert_close(first[1].norm(dim=1), torch.ones(5))
