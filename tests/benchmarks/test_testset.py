"""The patterns of the accuracy benchmark: what is drawn, and that three programs agree about what is diffracted."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import testset
from benchmarks.testset import Beams, Condition


def one_spot(x: float, y: float, n: int = 1) -> Beams:
    """`n` patterns of one beam at x, y in 1/Å."""
    return Beams(np.tile([1.0, 0, 0, 0], (n, 1)), np.full(n, 50, np.float32), [np.array([[x, y, 1.0]])] * n)


def centroid(picture: np.ndarray) -> np.ndarray:
    """The mean (x, y) in pixels from the middle, y up."""
    axis = np.arange(128) - 63.5
    return np.array([(picture.sum(0) * axis).sum(), -(picture.sum(1) * axis).sum()]) / picture.sum()


def test_spots_stand_where_x_points_right_and_y_up() -> None:
    picture = testset.pictures(one_spot(0.5, 0.25), Condition(electrons=0))[0]
    assert picture.dtype == np.float32
    np.testing.assert_allclose(centroid(picture), (20, 10), atol=1e-3)
    assert picture.sum() == pytest.approx(testset.NOISE_FREE_COUNTS, rel=1e-4)


def test_errors_of_centre_and_scale_have_their_size_and_no_fixed_direction() -> None:
    beams = one_spot(0.5, 0.25, 40)
    moved = np.array([centroid(p) for p in testset.pictures(beams, Condition(electrons=0, centre_px=1.0))]) - (20, 10)
    np.testing.assert_allclose(np.hypot(*moved.T), 1, atol=1e-3)
    assert np.abs(moved.mean(0)).max() < 0.5
    scaled = np.array([centroid(p) for p in testset.pictures(beams, Condition(electrons=0, scale_error=0.01))])
    factor = scaled[:, 0] / 20
    np.testing.assert_allclose(np.abs(factor - 1), 0.01, atol=1e-4)
    assert 8 < (factor > 1).sum() < 32


def test_the_dose_counts_the_direct_beam_and_is_poisson() -> None:
    beams = testset.py4dstem(0.0).first(100)
    counted = testset.pictures(beams, Condition())
    assert counted.dtype == np.uint16
    total = counted.sum(axis=(1, 2), dtype=np.int64)
    assert total.mean() == pytest.approx(3000, rel=0.01)
    assert total.std() == pytest.approx(np.sqrt(3000), rel=0.3)
    assert counted[:, 60:68, 60:68].sum() > 0.2 * total.sum()
    assert (testset.pictures(beams, Condition()) == counted).all()
    assert (testset.pictures(beams, Condition(), seed=1) != counted).any()


def test_every_combination_is_there_once() -> None:
    assert len(set(testset.CONDITIONS)) == 16
    assert len({condition.name for condition in testset.CONDITIONS}) == 16


def test_the_default_seed_draws_the_orientations_of_the_shipped_patterns() -> None:
    for precession in testset.PRECESSIONS_DEG:
        theirs = testset.py4dstem(precession)
        orientation, thickness = testset.draw(12)
        np.testing.assert_array_equal(orientation, theirs.orientation[:12])
        np.testing.assert_array_equal(thickness, theirs.thickness_nm[:12])
    assert len(np.unique(testset.draw(300)[0], axis=0)) == 300


@pytest.mark.parametrize("precession", testset.PRECESSIONS_DEG)
def test_our_bloch_waves_are_py4dstems_and_are_built_once(precession: float, tmp_path: Path) -> None:
    """The same orientations and thicknesses: pictures must agree, though scattering factors and beams differ a bit."""
    theirs = testset.py4dstem(precession).first(4)
    ours, path, new = testset.bloch(theirs.orientation, theirs.thickness_nm, precession, tmp_path)
    assert new and path.is_file()
    clean = Condition(precession, 0)
    pairs = zip(testset.pictures(ours, clean), testset.pictures(theirs, clean), strict=True)
    assert min(np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs) > 0.97
    again, _, built = testset.bloch(theirs.orientation, theirs.thickness_nm, precession, tmp_path)
    assert not built
    assert (testset.pictures(again, clean) == testset.pictures(ours, clean)).all()
    other = testset.bloch(theirs.orientation[:1], theirs.thickness_nm[:1] + 1, precession, tmp_path)
    assert other[1] != path


def test_our_kinematic_spots_are_those_of_diffsims() -> None:
    """Strong spots agree; ours leave out thousands of faint ones, and diffsims' cell of reflections is a sphere."""
    drawn = testset.draw(3)
    clean = Condition(electrons=0)
    for a, b in zip(testset.kinematic(*drawn).beams, testset.diffsims(*drawn).beams, strict=True):
        strong = a[1:][a[1:, 2] > 0.03 * a[1:, 2].max()]
        distance = np.hypot(*(strong[:, None, :2] - b[None, 1:, :2]).transpose(2, 0, 1))
        ratio = b[1:, 2][distance.argmin(1)] / strong[:, 2]
        assert distance.min(1).max() < 1e-5
        np.testing.assert_allclose(ratio, 1, atol=0.02)
    assert testset.pictures(testset.kinematic(*drawn), clean).shape == (3, 128, 128)
