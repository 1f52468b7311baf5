"""The detector: counting noise against scipy, blurred disks against convolution, background, beam stop, dead pixels."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from stemtune.config import SimulateConfig, Span
from stemtune.diffraction import detector
from stemtune.diffraction.conditions import draw_conditions
from stemtune.diffraction.geometry import Geometry

CPU = torch.device("cpu")


def _conditions(count=4, size=64, **settings):
    simulate = SimulateConfig(**{"size": size, "scale": 0.05, **settings})
    geometry = Geometry.of(simulate)
    return draw_conditions(simulate, geometry, count, torch.Generator().manual_seed(3), CPU), geometry


@pytest.mark.parametrize("expected", [0.0, 0.004, 0.3, 1.7, 4.0, 9.0, 11.9, 12.1, 25.0, 300.0, 20_000.0])
def test_counts_are_poisson(expected):
    """Chi-squared against scipy's probabilities, and mean and variance; the seed is fixed, so this cannot flicker."""
    number = 200_000
    counts = detector.count_electrons(torch.full((number,), expected), torch.Generator().manual_seed(5)).numpy()
    assert (counts == counts.round()).all() and (counts >= 0).all()
    assert counts.mean() == pytest.approx(expected, abs=5 * math.sqrt(expected / number) + 1e-9)
    if expected == 0:
        return
    assert counts.var() == pytest.approx(expected, rel=0.03 + 5 / math.sqrt(number * expected))
    cuts = np.unique(stats.poisson.ppf(np.linspace(0.001, 0.999, 40), expected))
    edges = np.concatenate(([-1], cuts, [np.inf]))
    share = np.diff(np.concatenate(([0], stats.poisson.cdf(cuts, expected), [1])))
    seen, _ = np.histogram(counts, edges + 0.5)
    enough = share * number > 5
    assert stats.chisquare(seen[enough], share[enough] / share[enough].sum() * seen[enough].sum()).pvalue > 1e-3


@pytest.mark.parametrize("where", ["cpu", "given"])
def test_a_uniform_number_of_zero_counts_few_electrons_and_not_none(where, monkeypatch):
    expected = torch.tensor([0.0, 0.5, 13.0, 90.0, 200.0, 5000.0, 60_000.0])
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape))
    counts = detector.count_electrons(expected, torch.Generator() if where == "given" else None)
    assert counts[:2].tolist() == [0, 0]
    assert torch.isfinite(counts).all()
    assert ((expected - counts) < 6 * expected.sqrt() + 1).all()


def test_counts_mix_dim_and_bright_pixels():
    expected = torch.tensor([0.01, 0.5, 3.0, 8.0, 13.0, 5000.0]).repeat(100_000, 1)
    counts = detector.count_electrons(expected, torch.Generator().manual_seed(1))
    off = (counts.mean(0) - expected[0]) / (expected[0] / len(expected)).sqrt()
    assert off.abs().max() < 5
    assert counts.var(0).numpy() == pytest.approx(expected[0].numpy(), rel=0.05)
    assert np.abs(np.corrcoef(counts.T.numpy()) - np.eye(6)).max() < 0.02


@pytest.mark.parametrize(("radius", "blur"), [(0.0, 0.5), (0.8, 0.3), (2.5, 0.7), (4.0, 0.4), (12.0, 1.0)])
def test_disks_are_blurred_circles(radius, blur):
    """Against a disk on a grid 16 times finer, convolved with the blur and summed over the pixels."""
    row, column, size, fine = 31.3, 33.8, 64, 16
    image = detector.draw_spots(
        torch.tensor([0]),
        torch.tensor([row]),
        torch.tensor([column]),
        torch.tensor([2.0]),
        torch.tensor([radius]),
        torch.tensor([blur]),
        size,
    )[0].numpy()
    line = (np.arange(size * fine) + 0.5) / fine - 0.5
    disk = np.hypot(line[:, None] - row, line[None] - column) <= max(radius, 0.1)
    smooth = ndimage.gaussian_filter(disk / disk.sum() * 2.0, blur * fine)
    expected = smooth.reshape(size, fine, size, fine).sum((1, 3))
    assert image.sum() == pytest.approx(2.0, rel=0.02)
    assert np.abs(image - expected).max() < 0.05 * expected.max()
    down, right = np.mgrid[:size, :size]
    assert (image * down).sum() / image.sum() == pytest.approx(row, abs=0.02)
    assert (image * right).sum() / image.sum() == pytest.approx(column, abs=0.02)


def test_disks_at_the_edge_are_cut_not_moved():
    def one(size, shift):
        place = torch.tensor([-1.2 + shift]), torch.tensor([20.0 + shift])
        return detector.draw_spots(
            torch.tensor([0]), *place, torch.ones(1), torch.tensor([3.0]), torch.tensor([0.5]), size
        )[0]

    assert torch.allclose(one(64, 0.0), one(96, 16.0)[16:80, 16:80], atol=1e-6)
    assert one(64, 0.0).sum() > 0.1


def test_spots_far_outside_leave_nothing():
    far = torch.tensor([-30.0, 20.0, 500.0, 20.0]), torch.tensor([20.0, -30.0, 20.0, 500.0])
    image = detector.draw_spots(
        torch.zeros(4, dtype=torch.long), *far, torch.ones(4), torch.tensor([2.0]), torch.tensor([1.0]), 64
    )
    assert image.abs().max() == 0


def test_every_pattern_gets_its_own_spots():
    pattern = torch.tensor([0, 2, 2])
    place = torch.tensor([10.0, 20, 30]), torch.tensor([15.0, 25, 35])
    images = detector.draw_spots(
        pattern, *place, torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 1, 4]), torch.tensor([0.3, 0.5, 1]), 48
    )
    assert images.sum((1, 2)).tolist() == pytest.approx([1.0, 0.0, 5.0], rel=0.06)
    assert images[0].argmax() == 10 * 48 + 15


def test_shares_of_the_dose():
    conditions, geometry = _conditions(direct_beam=Span(0.4, 0.4), background=Span(0.25, 0.25), centre_error=0.0)
    nothing = torch.zeros(0)
    images = detector.render(torch.zeros(0, dtype=torch.long), nothing, nothing, nothing, conditions, geometry)
    assert images.sum((1, 2)).tolist() == pytest.approx([0.25 + 0.75 * 0.4] * 4, rel=0.02)
    background = detector.draw_background(conditions, geometry)
    assert background.sum((1, 2)).tolist() == pytest.approx([0.25] * 4, rel=1e-4)
    assert background.min() >= -1e-9


def test_background_surrounds_the_centre():
    conditions, geometry = _conditions(background=Span(0.3, 0.3), centre_error=3.0)
    background = detector.draw_background(conditions, geometry)
    for image, (row, column) in zip(background.numpy(), conditions.centre_px.tolist(), strict=True):
        down, right = np.unravel_index(image.argmax(), image.shape)
        assert math.hypot(down - row, right - column) < 0.8
        turn = np.linspace(0, 2 * math.pi, 13)
        for radius in (8, 15, 20):
            circle = np.array([row + radius * np.sin(turn), column + radius * np.cos(turn)])
            around = ndimage.map_coordinates(image, circle, order=3)
            assert around == pytest.approx(np.full(13, around.mean()), rel=0.06)
        assert around.mean() < image.max() / 3


def test_beam_stop_hides_the_direct_beam():
    conditions, geometry = _conditions(beam_stop=Span(5, 5), centre_error=2.0)
    image = detector.block(torch.ones(4, 64, 64), conditions, 0.0, None)
    down, right = np.mgrid[:64, :64]
    for one, (row, column) in zip(image.numpy(), conditions.centre_px.tolist(), strict=True):
        assert np.array_equal(one == 0, np.hypot(down - row, right - column) < 5)
    assert geometry.size == 64


def test_dead_pixels():
    conditions, _ = _conditions(count=200)
    image = detector.block(torch.ones(200, 64, 64), conditions, 0.001, torch.Generator().manual_seed(2))
    dead = (image == 0).sum((1, 2)).float()
    assert float(dead.mean()) == pytest.approx(0.001 * 64 * 64, rel=0.15)
    assert (image == 0).sum(0).max() < 10  # other pixels in every pattern


def test_conditions_stay_in_their_ranges():
    simulate = SimulateConfig(
        thickness=Span(30, 60), dose=Span(100, 10_000), centre_error=1.5, ellipticity=0.04, scale_error=0.015
    )
    geometry = Geometry.of(simulate)
    drawn = draw_conditions(simulate, geometry, 4000, torch.Generator().manual_seed(0), CPU)
    assert drawn.thickness_angstrom.min() >= 300 and drawn.thickness_angstrom.max() <= 600
    assert drawn.dose.min() >= 100 and drawn.dose.max() <= 10_000
    assert float(drawn.dose.log10().mean()) == pytest.approx(3.0, abs=0.05)  # log-uniform
    offset = torch.linalg.vector_norm(drawn.centre_px - 63.5, dim=1)
    assert 1.4 < offset.max() <= 1.5 and float(offset.mean()) == pytest.approx(1.0, abs=0.03)  # even over the disk
    stretch = torch.linalg.svdvals(drawn.distortion)
    assert float((stretch[:, 0] / stretch[:, 1]).max()) == pytest.approx(1.04, abs=0.002)
    scale = stretch.mean(1)
    assert 0.985 - 1e-6 <= scale.min() < 0.987 and 1.013 < scale.max() <= 1.015 + 1e-6
    assert drawn.disk_px.max() == pytest.approx(2e-3 / geometry.wavelength_angstrom / 0.025, rel=0.01)


def test_distortion_moves_the_spots():
    conditions, geometry = _conditions(count=1, scale_error=0.0, ellipticity=0.04, centre_error=0.0)
    angle = torch.linspace(0, 2 * math.pi, 361)
    ring = 0.8 * angle.cos(), 0.8 * angle.sin()
    row, column = detector.to_pixels(torch.zeros(361, dtype=torch.long), *ring, conditions, geometry)
    radius = torch.hypot(row - 31.5, column - 31.5) * geometry.scale_inv_angstrom
    stretch = torch.linalg.svdvals(conditions.distortion)[0]
    assert float(radius.max()) == pytest.approx(0.8 * float(stretch[0]), rel=1e-4)
    assert float(radius.min()) == pytest.approx(0.8 * float(stretch[1]), rel=1e-4)
    assert stretch[0] > stretch[1] + 1e-3


def test_whole_pixels_that_already_stand_right_are_only_averaged() -> None:
    """The short way gives what sampling at the same places gives."""
    patterns = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    short = detector.Resampling(Geometry(64, 0.05, 200.0), Geometry(32, 0.1, 200.0))
    assert short._averages
    direct = short(patterns)
    short._averages = False
    torch.testing.assert_close(direct, short(patterns), atol=1e-5, rtol=1e-5)
    moved = Geometry(64, 0.05, 200.0, (31.0, 31.5))
    assert not detector.Resampling(moved, Geometry(32, 0.1, 200.0))._averages
