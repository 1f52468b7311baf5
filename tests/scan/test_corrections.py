"""What ingest mends: descan, ellipse, bad pixels, beam stop, background, mirrors; on, off, and when it cannot."""

from pathlib import Path

import numpy as np
import pytest
from sample_scans import PLANE, SHAPE, SIZE, refused, scan_of, write_scan
from scipy import ndimage

from stemtune.dataset.ingest import corrected_at, ingest
from stemtune.dataset.store import Store
from stemtune.errors import UserError
from stemtune.scan.bad_pixels import fill_bad_pixels, find_bad_pixels
from stemtune.scan.beam_center import Resampling, fit_centre
from stemtune.scan.beam_stop import StopShape, centre_by_symmetry, find_stop
from stemtune.scan.corrections import RadialBackground, flipped
from stemtune.scan.descan import fit_descan, improves, measure_centres
from stemtune.scan.ellipse import Ellipse, Warp


@pytest.fixture(scope="module")
def drifting() -> np.ndarray:
    return scan_of()


STILL = np.array([[31.5, 31.5], [0, 0], [0, 0]])


@pytest.fixture(scope="module")
def still() -> np.ndarray:
    return scan_of(plane=STILL)


def test_descan_is_found_to_a_tenth_of_a_pixel(drifting: np.ndarray) -> None:
    place = np.indices(SHAPE).reshape(2, -1).T
    measured = measure_centres(drifting.reshape(-1, SIZE, SIZE), place, SHAPE)
    descan = fit_descan(measured, place, SHAPE)
    assert descan is not None
    assert improves(descan, measured)
    r, c = (axis.ravel() for axis in np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij"))
    off = descan.at(place) - np.stack((np.ones(120), r, c), axis=1) @ PLANE
    assert np.sqrt((off**2).mean()) < 0.1
    assert np.abs(off).max() < 0.25


def test_descan_on_off_auto(drifting: np.ndarray, still: np.ndarray, tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "w.hspy", drifting)
    spread = {}
    for option in ("off", "auto", "on"):
        facts = ingest(scan, tmp_path / f"{option}.h5", descan=option)
        assert (facts["corrections"]["descan"] is None) == (option == "off")
        with Store.open(tmp_path / f"{option}.h5") as store:
            spread[option] = fit_centre(store.patterns).spread_px
            assert store.patterns.sum(dtype=float) == pytest.approx(drifting.sum(), rel=0.03)
    assert spread["auto"] == spread["on"] < 0.25 < 1 < spread["off"]
    np.testing.assert_allclose(corrected_at(scan, [(2, 3), (11, 9)]), _rows(tmp_path / "auto.h5", [23, 119]), rtol=1e-5)
    assert ingest(write_scan(tmp_path / "s.hspy", still), tmp_path / "s.h5")["corrections"]["descan"] is None
    assert ingest(scan, tmp_path / "g.h5", centre="30.2,33.1")["corrections"]["descan"] is None


def _rows(path: Path, rows: list[int]) -> np.ndarray:
    with Store.open(path) as store:
        return store.take(np.array(rows))


def test_too_few_patterns_for_a_descan_say_so(drifting: np.ndarray, tmp_path: Path) -> None:
    facts = ingest(write_scan(tmp_path / "w.hspy", drifting[:3, :3]), tmp_path / "s.h5", descan="on")
    assert "a surface needs 16" in facts["notes"][0]
    assert facts["corrections"]["descan"] is None


@pytest.mark.parametrize(("size", "fine"), [(40, 40), (20, 40)])
def test_warp_without_ellipse_is_the_area_weighted_shift(size: int, fine: int) -> None:
    patterns = np.random.default_rng(0).integers(0, 100, (3, 40, 40)).astype(np.uint16)
    moved = Warp((40, 40), size, Ellipse(0.0, 0.0))(patterns, np.tile([19.8, 18.1], (3, 1)))
    expected = Resampling((40, 40), (19.8, 18.1), fine)(patterns)
    expected = expected.reshape(3, size, fine // size, size, fine // size).sum(axis=(2, 4))
    np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-2)


def test_an_elliptical_ring_becomes_round() -> None:
    """The ring is drawn by the textbook equation of a turned ellipse, in py4DSTEM's convention: no matrix of ours.

    There theta counts from axis 0 (rows, down) towards axis 1: x' along the long axis, (x'/a)² + (y'/b)² = 1.
    """
    a, b, theta = 31.0, 29.0, np.deg2rad(25)
    row, column = np.indices((90, 90)) - 44.5
    along = row * np.cos(theta) + column * np.sin(theta)
    across = -row * np.sin(theta) + column * np.cos(theta)
    ring = np.exp(-(((np.hypot(along / a, across / b) - 1) * 30 / 1.2) ** 2) / 2)
    ellipse = Ellipse(2 * (a - b) / (a + b), (np.rad2deg(theta) - 90) % 180)
    round_ = Warp((90, 90), 90, ellipse)(1000 * ring[None], np.array([[44.5, 44.5]]))[0]
    distance, angle = np.hypot(row, column), np.arctan2(-row, column)
    for picture, least, most in ((ring, 0.9, 3.0), (round_, 0, 0.08)):
        means = [
            np.average(distance[part], weights=picture[part])
            for part in (
                np.abs((angle - middle + np.pi) % (2 * np.pi) - np.pi) < 0.2 for middle in np.arange(0, 6, 0.5)
            )
        ]
        assert least <= np.ptp(means) <= most
    assert np.average(distance, weights=round_) == pytest.approx(30, abs=0.1)
    assert round_.sum() == pytest.approx(1000 * ring.sum(), rel=0.005)


def test_a_given_ellipse_is_taken_out(still: np.ndarray, tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "s.hspy", still)
    facts = ingest(scan, tmp_path / "e.h5", ellipse="0.04,30")
    assert facts["corrections"]["ellipse"] == {"ellipticity": 0.04, "azimuth_deg": 30}
    assert not facts["copied"]
    assert "--ellipse is '4', but must be off, auto, or ellipticity" in refused(scan, tmp_path, ellipse="4")
    assert "must be in [0, 0.2]" in refused(scan, tmp_path, ellipse="0.5,0")


def test_hot_and_dead_pixels_are_found_and_mended(still: np.ndarray, tmp_path: Path) -> None:
    data = still.copy()
    hot, dead = [(5, 7), (40, 50), (41, 50)], [(28, 40), (50, 20), (36, 24)]
    for row, column in hot:
        data[..., row, column] = 900
    for row, column in dead:
        data[..., row, column] = 0
    scan = write_scan(tmp_path / "b.hspy", data)
    facts = ingest(scan, tmp_path / "on.h5")
    assert facts["copied"]
    with Store.open(tmp_path / "on.h5") as store:
        kinds = store.calibration["pixels"]
        assert {tuple(place) for place in np.argwhere(kinds == 1)} == set(hot)
        found = {tuple(place) for place in np.argwhere(kinds == 2)}
        assert len(found & set(dead)) >= 2
        assert len(found - set(dead)) == 0
        clean = still.reshape(-1, SIZE, SIZE)
        for row, column in hot:
            assert (
                store.patterns[:, row, column].mean() < 3 * clean[:, row - 1 : row + 2, column - 1 : column + 2].mean()
            )
    ingest(scan, tmp_path / "off.h5", bad_pixels="off")
    with Store.open(tmp_path / "off.h5") as store:
        np.testing.assert_array_equal(store.patterns.reshape(data.shape), data)


def test_sound_patterns_have_no_bad_pixels_and_no_stop(still: np.ndarray) -> None:
    flat = still.reshape(-1, SIZE, SIZE)
    beam = np.hypot(*(np.indices((SIZE, SIZE)) - 31.5)) < 5
    assert not find_bad_pixels(flat, beam).any
    assert find_stop(flat) is None


def test_mending_takes_the_mean_of_the_neighbours() -> None:
    pattern = np.full((1, 9, 9), 10, np.uint16)
    pattern[0, 4, 4:6] = 60_000
    bad = pattern[0] > 100
    corrected = fill_bad_pixels(pattern, bad)
    assert (corrected == 10).all()
    assert (pattern > 100).sum() == 2


def test_a_beam_stop_is_found_and_the_hidden_beam_with_it(tmp_path: Path) -> None:
    plane = np.array([[30.2, 33.1], [0, 0], [0, 0]])
    data = scan_of(plane=plane, dose="20000:20000", direct_beam="0.5:0.5", background="0.3:0.4")
    true = StopShape(6, "left", 5).mask((SIZE, SIZE), (30.2, 33.1))
    data[..., true] = 0
    found = find_stop(data.reshape(-1, SIZE, SIZE))
    assert found is not None
    assert (found & true).sum() / (found | true).sum() > 0.8
    row, column = centre_by_symmetry(data.reshape(-1, SIZE, SIZE), found, (31.5, 31.5))
    assert np.hypot(row - 30.2, column - 33.1) < 0.3
    facts = ingest(write_scan(tmp_path / "b.hspy", data), tmp_path / "s.h5", beam_stop="7,left,6")
    assert facts["corrections"]["beam_stop"]["hides_beam"]
    np.testing.assert_allclose(facts["origin_centre_px"], (30.2, 33.1), atol=0.3)
    with Store.open(tmp_path / "s.h5") as store:
        hidden = store.calibration["hidden"].astype(bool)
        assert hidden[31:33, 31:33].all()
        assert hidden[31, 0]
        assert not store.patterns[:, ndimage.binary_erosion(hidden, np.ones((3, 3)))].any()


@pytest.mark.parametrize("text", ["wide", "8,up", "-1", "8,left,4,2"])
def test_wrong_beam_stops_are_one_line(text: str) -> None:
    with pytest.raises(UserError, match="--beam-stop is"):
        StopShape.parse(text)


def test_background_goes_and_spots_stay(tmp_path: Path) -> None:
    middle = 31.5
    distance = np.hypot(*(np.indices((SIZE, SIZE)) - middle))
    halo = 200 * np.exp(-distance / 12)
    spot = 300 * np.exp(-(np.hypot(*(np.indices((SIZE, SIZE)) - np.array([12.0, 40.0])[:, None, None])) ** 2) / 4)
    left = RadialBackground(SIZE, None, 3)((halo + spot)[None])[0]
    outside = (distance > 4) & (spot < 1) & (distance < 30)
    assert left[outside].mean() < 0.02 * halo[outside].mean()
    assert left[spot > 50].sum() == pytest.approx(spot[spot > 50].sum(), rel=0.03)
    assert left[31, 31] == pytest.approx((halo + spot)[31, 31])


def test_background_is_an_option(still: np.ndarray, tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "s.hspy", still)
    facts = ingest(scan, tmp_path / "b.h5", background="on")
    assert not facts["copied"]
    with Store.open(tmp_path / "b.h5") as store:
        assert store.patterns.sum(dtype=float) < still.sum()
        assert store.patterns.min() >= 0


@pytest.mark.parametrize("flip", ["x", "y", "transpose"])
def test_flips_move_pixels_only(flip: str, still: np.ndarray, tmp_path: Path) -> None:
    mirrored = {"x": still[..., ::-1], "y": still[..., ::-1, :], "transpose": still.swapaxes(-1, -2)}[flip]
    facts = ingest(write_scan(tmp_path / "m.hspy", np.ascontiguousarray(mirrored)), tmp_path / "s.h5", flip=flip)
    assert facts["copied"]
    with Store.open(tmp_path / "s.h5") as store:
        np.testing.assert_array_equal(store.patterns.reshape(still.shape), still)
    np.testing.assert_array_equal(flipped(flipped(still[0], flip), flip), still[0])


def test_wrong_options_are_one_line(still: np.ndarray, tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "s.hspy", still)
    assert "--flip is 'z', but must be one of none, x, y, transpose" in refused(scan, tmp_path, flip="z")
    assert "--descan is 'maybe'" in refused(scan, tmp_path, descan="maybe")
    assert "--scan-rotation is nan" in refused(scan, tmp_path, scan_rotation=float("nan"))
    assert "the CIF 'no.cif' does not exist" in refused(scan, tmp_path, calibrate="no.cif")
