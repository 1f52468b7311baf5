"""The direct beam is found, and patterns are moved and resampled with their counts."""

from pathlib import Path

import numpy as np
import pytest
import torch

from stemtune.config import Config
from stemtune.crystal.phase import linio2
from stemtune.crystal.sampling import random_orientations
from stemtune.dataset.ingest import ingest
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator
from stemtune.errors import UserError
from stemtune.scan.beam_center import Resampling, fit_centre


def simulated(centre: tuple[float, float], count: int = 40, **settings: object) -> np.ndarray:
    flat = {
        "simulate.size": 96, "simulate.scale": 0.03, "simulate.centre_error": 0, "simulate.ellipticity": 0,
        "simulate.dose": "1000:20000", "simulate.dead_pixels": 0.001,
    }  # fmt: skip
    simulate = Config.from_flat({**flat, **{f"simulate.{key}": value for key, value in settings.items()}}).simulate
    simulator = KinematicSimulator(linio2(), Geometry(96, 0.03, 200.0, centre), simulate)
    return simulator.patterns(random_orientations(count, 2), torch.Generator().manual_seed(0)).numpy()


@pytest.mark.parametrize("convergence", [0.3, 3.0])
@pytest.mark.parametrize("centre", [(47.5, 47.5), (44.3, 50.8), (39.1, 41.6)])
def test_direct_beam_of_noisy_patterns_is_found(centre: tuple[float, float], convergence: float) -> None:
    found = fit_centre(simulated(centre, convergence=convergence))
    assert abs(found.row - centre[0]) < 0.1
    assert abs(found.column - centre[1]) < 0.1
    assert found.spread_px < 0.5


def test_hot_pixels_and_a_wandering_beam_do_not_matter_much() -> None:
    patterns = simulated((46.2, 49.7), count=60)
    patterns[:, 5, 80] = 20 * patterns.max()
    drifting = np.stack([np.roll(pattern, number % 3 - 1, axis=0) for number, pattern in enumerate(patterns)])
    assert np.hypot(fit_centre(patterns).row - 46.2, fit_centre(patterns).column - 49.7) < 0.15
    found = fit_centre(drifting)
    assert np.hypot(found.row - 46.2, found.column - 49.7) < 0.4
    assert found.spread_px > 2 * fit_centre(patterns).spread_px


def test_empty_patterns_have_no_beam() -> None:
    with pytest.raises(UserError, match="give --centre y,x"):
        fit_centre(np.zeros((4, 16, 16)))


@pytest.mark.parametrize("shape", [(4, 32, 32), (1, 16, 64), (8, 64, 256)])
def test_patterns_without_a_bright_centre_ask_for_it(shape: tuple[int, ...]) -> None:
    flat = np.full(shape, 3, np.uint16)
    gradient = flat + np.arange(shape[2], dtype=np.uint16)
    for patterns in (flat, flat.astype(np.float32)):
        with pytest.raises(UserError, match="no bright direct beam to fit a centre to; give --centre y,x"):
            fit_centre(patterns)
    assert np.isfinite(fit_centre(gradient)).all()


def test_a_genuine_flat_scan_asks_for_its_centre(shared_data: Path, tmp_path: Path) -> None:
    scan = shared_data / "formats" / "mib" / "003_merlin_test_roi_sig256x64_nav4x2_hot_pixel_52x_39y.mib"
    with pytest.raises(UserError, match="give --centre y,x"):
        ingest(scan, tmp_path / "a.h5", kv=200, scale=0.02)
    assert ingest(scan, tmp_path / "a.h5", kv=200, scale=0.02, centre="30,60")["patterns"] == 8


def test_centred_patterns_of_the_same_size_are_copied() -> None:
    patterns = np.random.default_rng(0).integers(0, 60_000, (3, 32, 32)).astype(np.uint16)
    resampling = Resampling((32, 32), (15.5, 15.5), 32)
    assert resampling.exact
    assert resampling(patterns).dtype == np.uint16
    np.testing.assert_array_equal(resampling(patterns), patterns)


@pytest.mark.parametrize("shift", [(3, -5), (-2, 4)])
def test_whole_pixels_are_moved_without_change(shift: tuple[int, int]) -> None:
    patterns = np.random.default_rng(0).integers(0, 60_000, (3, 40, 32)).astype(np.uint16)
    resampling = Resampling((40, 32), (19.5 + shift[0] + 1e-3, 15.5 + shift[1]), 32)
    moved = resampling(patterns)
    assert moved.dtype == np.uint16
    padded = np.pad(patterns, ((0, 0), (16, 16), (16, 16)))
    top, left = 4 + shift[0] + 16, shift[1] + 16
    np.testing.assert_array_equal(moved, padded[:, top : top + 32, left : left + 32])


@pytest.mark.parametrize(("size", "shape"), [(24, (24, 24)), (16, (48, 48)), (40, (30, 34))])
def test_resampling_keeps_counts_and_positions(size: int, shape: tuple[int, int]) -> None:
    """A Gaussian spot keeps its sum, and stands where the calibration says it should."""
    centre, scale = (shape[0] / 2 - 0.2, shape[1] / 2 - 0.9), 0.02
    resampling = Resampling(shape, centre, size)
    row, column = np.indices(shape)
    for dy, dx in ((0.0, 0.0), (0.11, -0.06), (-0.08, 0.09)):  # 1/Å from the beam, row and column
        spot = 1000 * np.exp(-((row - centre[0] - dy / scale) ** 2 + (column - centre[1] - dx / scale) ** 2) / 4)
        new = resampling(spot[None].astype(np.float32))[0]
        new_scale = scale * resampling.factor
        at = [(new.sum(axis=axis) * np.arange(size)).sum() / new.sum() for axis in (1, 0)]
        expected = np.array([dy, dx]) / new_scale + (size - 1) / 2
        np.testing.assert_allclose(at, expected, atol=0.05)
        assert new.sum() == pytest.approx(spot.sum(), rel=0.02)


def test_binning_by_whole_factors_sums_pixels() -> None:
    patterns = np.random.default_rng(0).integers(0, 100, (2, 32, 32)).astype(np.uint16)
    binned = Resampling((32, 32), (15.5, 15.5), 16)(patterns)
    np.testing.assert_allclose(binned, patterns.reshape(2, 16, 2, 16, 2).sum(axis=(2, 4)), rtol=1e-6)
