"""Every range that patterns are trained over is a setting of both simulators, and does what physics asks of it.

Each test changes one setting and measures the effect in the pattern, so a simulator that ignored it would fail.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch

from stemtune.config import Config, Span
from stemtune.crystal.phase import linio2
from stemtune.crystal.sampling import random_orientations
from stemtune.diffraction.bloch import simulator_for
from stemtune.diffraction.conditions import draw_conditions
from stemtune.diffraction.geometry import Geometry, wavelength_angstrom
from stemtune.diffraction.kinematic import KinematicSimulator

PLAIN = {
    "size": 96, "scale": 0.02, "thickness": 40, "precession": 0, "convergence": 1, "dose": 0, "direct_beam": 0.5,
    "background": 0, "blur": 0.4, "centre_error": 0, "ellipticity": 0, "scale_error": 0, "beam_stop": 0,
    "dead_pixels": 0, "beams": 60, "tilts": 6, "absorption": "none",
}  # fmt: skip
"""An ideal microscope."""

pytestmark = pytest.mark.parametrize("physics", ["kinematic", "bloch"])
MIDDLE = 47.5
DISTANCE = np.hypot(*(np.mgrid[:96, :96] - MIDDLE))


@cache
def simulator(physics: str, **changed: object) -> KinematicSimulator:
    settings = {f"simulate.{key}": value for key, value in {**PLAIN, "physics": physics, **changed}.items()}
    simulate = Config.from_flat(settings).simulate
    return simulator_for(linio2(), Geometry.of(simulate), simulate)


def shown(physics: str, count: int = 48, **changed: object) -> np.ndarray:
    """Return patterns (count, 96, 96) of the same orientations, with the same random numbers."""
    patterns = simulator(physics, **changed).patterns(random_orientations(count, 1), torch.Generator().manual_seed(2))
    return patterns.double().numpy()


def empty(physics: str, count: int = 32, **changed: object) -> np.ndarray:
    """Return patterns (count, 96, 96) of vacuum: the direct beam and what the support film scatters."""
    made = simulator(physics, **changed)
    generator = torch.Generator().manual_seed(2)
    conditions = draw_conditions(made.simulate, made.geometry, count, generator, made.device)
    return made.expose(torch.full((count, 4), torch.nan), conditions, generator).double().numpy()


def centroids(images: np.ndarray) -> np.ndarray:
    grid = np.mgrid[: images.shape[1], : images.shape[2]]
    return np.einsum("nyx,cyx->nc", images, grid) / images.sum(axis=(1, 2))[:, None]


def mean_square_radius(image: np.ndarray) -> float:
    return float((image * DISTANCE**2).sum() / image.sum())


def spread(images: np.ndarray) -> np.ndarray:
    """Return over how many pixels (n,) what is diffracted is spread: 1 / sum of squared shares."""
    share = np.where(DISTANCE > 6, images, 0)
    share /= share.sum(axis=(1, 2), keepdims=True)
    return 1 / (share**2).sum(axis=(1, 2))


def displaced(physics: str, **changed: object) -> np.ndarray:
    """Return where bright outer spots move (n, 2), along and across their radius, as shares of it."""
    before, after = shown(physics, **PLAIN | {"blur": 0.8}), shown(physics, **PLAIN | {"blur": 0.8} | changed)
    moved = []
    for one, other in zip(before, after, strict=True):
        outer = np.where((DISTANCE > 18) & (DISTANCE < 38), one, 0)
        row, column = np.unravel_index(outer.argmax(), outer.shape)
        window = (slice(row - 4, row + 5), slice(column - 4, column + 5))
        start = np.array([row, column]) - 4 - MIDDLE
        first, second = (centroids(image[window][None])[0] + start for image in (one, other))
        along = first / np.linalg.norm(first)
        step = (second - first) / np.linalg.norm(first)
        moved.append((step @ along, step @ np.array([-along[1], along[0]])))
    return np.array(moved)


def test_thickness(physics: str) -> None:
    """A thicker crystal has a narrower rocking curve; dynamically it leaves less of the direct beam."""
    if physics == "kinematic":
        assert np.median(spread(shown(physics, thickness=5)) / spread(shown(physics, thickness=60))) > 1.2
        return
    direct = [shown(physics, thickness=nm)[:, DISTANCE < 4].sum(axis=1) for nm in (2, 60)]
    assert direct[0].mean() > 0.98 and direct[1].mean() < 0.92


def test_precession_excites_more_reflections(physics: str) -> None:
    assert np.median(spread(shown(physics, precession=1)) / spread(shown(physics))) > 1.1


@pytest.mark.parametrize("kv", [200, 300])
@pytest.mark.parametrize("mrad", [0.5, 1, 2])
def test_voltage_and_convergence_make_the_disk(mrad: float, kv: float, physics: str) -> None:
    """A disk of radius r has the mean square radius r²/2; blur and pixels (a square: 1/6) add theirs."""
    radius = mrad * 1e-3 / wavelength_angstrom(kv) / 0.02
    expected = radius**2 / 2 + 2 * 0.4**2 + 1 / 6
    assert mean_square_radius(empty(physics, convergence=mrad, kv=kv)[0]) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("scale", [0.015, 0.03])
def test_scale_places_the_spots(scale: float, physics: str) -> None:
    """The brightest spot of a pattern stands where the calibration puts the strongest reflection."""
    spots = simulator(physics, scale=scale).spots(random_orientations(48, 1).float(), 40.0, 0.0, 1.0)
    distance = torch.hypot(spots.x, spots.y) / scale
    best = (spots.intensity * ((distance > 10) & (distance < 38))).argmax(1, keepdim=True)
    wanted = np.stack([-spots.y.gather(1, best)[:, 0], spots.x.gather(1, best)[:, 0]], axis=1) / scale + MIDDLE
    images = np.where((DISTANCE > 10) & (DISTANCE < 38), shown(physics, scale=scale), 0)
    found = np.stack(np.unravel_index(images.reshape(48, -1).argmax(1), (96, 96)), axis=1)
    assert np.mean(np.linalg.norm(found - wanted, axis=1) < 3) > 0.9


def test_dose(physics: str) -> None:
    counts = empty(physics, dose=400, count=200).sum(axis=(1, 2)) / 0.5 ** (physics == "kinematic")
    assert counts.mean() == pytest.approx(400, rel=0.03)
    drawn = shown(physics, count=128, dose="300:100000").sum(axis=(1, 2))
    assert drawn.min() < 1000 and drawn.max() > 50_000 and (drawn == drawn.round()).all()


def test_centre_error(physics: str) -> None:
    off = np.linalg.norm(centroids(empty(physics, count=300, centre_error=1.5)) - MIDDLE, axis=1)
    assert off.max() <= 1.52 and off.mean() == pytest.approx(1.0, abs=0.08)  # even over a disk: two thirds


def test_scale_error_moves_spots_along_their_radius(physics: str) -> None:
    along, across = displaced(physics, scale_error=0.015).T
    assert np.abs(along).max() < 0.017 and along.std() == pytest.approx(0.015 / math.sqrt(3), rel=0.3)
    assert np.abs(across).max() < 0.004


def test_ellipticity_moves_spots_across_too(physics: str) -> None:
    along, across = displaced(physics, ellipticity=0.04).T
    assert max(np.abs(along).max(), np.abs(across).max()) < 0.022
    assert across.std() > 0.004 and along.std() > 0.004


def test_amorphous_background(physics: str) -> None:
    """It takes its share of the dose, lies around the direct beam alike on all sides, and has a ring near 0.3 1/Å."""
    plain, images = empty(physics), empty(physics, background=0.3)
    lost = 1 if physics == "bloch" else 0.5
    assert plain.sum(axis=(1, 2)) == pytest.approx(np.full(32, lost), rel=0.02)
    assert images.sum(axis=(1, 2)) == pytest.approx(np.full(32, 0.3 + 0.7 * lost), rel=0.02)
    background = images - 0.7 * plain
    assert background.min() > -1e-6
    assert np.abs(background - background[:, ::-1]).max() < 1e-5
    assert np.abs(background - background.transpose(0, 2, 1)).max() < 1e-5
    rings = [np.diff(image[48, 48:]).max() > 0 for image in background]
    assert np.mean(rings) > 0.2  # where the ring outweighs the halo, intensity rises outwards


def test_detector_blur(physics: str) -> None:
    before, after = (mean_square_radius(empty(physics, blur=blur)[0]) for blur in (0.4, 1.5))
    assert after - before == pytest.approx(2 * (1.5**2 - 0.4**2), rel=0.05)
    rough, smooth = shown(physics), shown(physics, blur=1.5)
    assert np.median(spread(smooth) / spread(rough)) > 1.5


def test_beam_stop(physics: str) -> None:
    plain, images = shown(physics), shown(physics, beam_stop=7)
    assert (images[:, DISTANCE < 7] == 0).all() and plain[:, DISTANCE < 2].min() > 0
    assert np.array_equal(images[:, DISTANCE > 7], plain[:, DISTANCE > 7])


def test_dead_pixels(physics: str) -> None:
    plain = shown(physics, background=0.3)
    images = shown(physics, background=0.3, dead_pixels=0.01)
    dead = (images == 0) & (plain > 0)
    assert dead.mean() == pytest.approx(0.01, rel=0.1)
    assert np.array_equal(images[~dead], plain[~dead])


def test_defaults_are_the_ranges_to_train_over(physics: str) -> None:
    default = Config.from_flat({"simulate.physics": physics}).simulate
    spans = {
        "thickness": Span(20, 120), "convergence": Span(0.5, 2), "precession": Span(0, 1), "dose": Span(300, 100_000)
    }  # fmt: skip
    assert {name: getattr(default, name) for name in spans} == spans
    assert (default.centre_error, default.ellipticity, default.scale_error) == (1.5, 0.04, 0.015)
    assert default.kv in (200, 300) and 0.01 <= default.scale <= 0.03 and default.size == 128
    assert default.background.high > 0 and default.blur.high > 0 and default.dead_pixels > 0
