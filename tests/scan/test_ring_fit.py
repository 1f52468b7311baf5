"""Scale and ellipse from the spots of a known phase, on simulated patterns of known distortion and on real ones."""

from pathlib import Path

import numpy as np
import pytest
from sample_scans import refused, scan_of, write_scan

from stemtune.crystal.phase import linio2
from stemtune.dataset.ingest import ingest
from stemtune.dataset.store import Store
from stemtune.scan.ellipse import Ellipse
from stemtune.scan.ring_fit import MIN_SPOTS, SpotList, find_spots, fit_rings, rings

CENTRE = np.array([[62.4, 64.3], [0.0, 0.0], [0.0, 0.0]])
TRUE, ELLIPSE = 0.025 / 1.013, Ellipse(0.032, 35.0)


@pytest.fixture(scope="module")
def distorted() -> np.ndarray:
    """Centre 1.4 px, scale 1.3 % and axes 3.2 % off; everything else over the whole of its ranges."""
    settings = {"size": 128, "scale": 0.025, "dose": "1000:100000", "background": "0:0.3"}
    return scan_of((10, 15), CENTRE, ELLIPSE, 1.013, **settings)


def components(ellipse: Ellipse) -> np.ndarray:
    return ellipse.ellipticity * np.array(
        [np.cos(np.deg2rad(2 * ellipse.azimuth_deg)), np.sin(np.deg2rad(2 * ellipse.azimuth_deg))]
    )


def test_shells_of_linio2_are_its_spacings() -> None:
    """|g| of a hexagonal cell by the textbook formula; (001) and (100) are absent in R-3m."""
    length, strength = rings(linio2(), 0.6)
    a, c = linio2().lattice.a, linio2().lattice.c
    expected = [
        np.sqrt(4 / 3 * (h * h + h * k + k * k) / a**2 + (m / c) ** 2)
        for h, k, m in ((0, 0, 3), (1, 0, 1), (0, 0, 6), (1, 0, 2), (1, 0, 4), (1, 0, 5))
    ]
    np.testing.assert_allclose(length, sorted(expected), rtol=1e-6)
    assert (strength > 0).all()


def test_spots_are_placed_to_a_tenth_of_a_pixel() -> None:
    row, column = np.indices((64, 64))
    places = np.array([(20.3, 40.8), (45.1, 10.6), (50.7, 52.2)])
    expected = np.full((64, 64), 0.2) + 300 * np.exp(-((row - 31.2) ** 2 + (column - 30.9) ** 2) / 3)
    for r, c in places:
        expected += 40 * np.exp(-((row - r) ** 2 + (column - c) ** 2) / 3)
    counts = np.random.default_rng(0).poisson(expected)
    found = find_spots(counts[None], np.array([[31.2, 30.9]]), 1.5)
    assert len(found.x) == 3
    got = np.column_stack((31.2 - found.y, 30.9 + found.x))
    off = np.hypot(*(got[:, None] - places).transpose(2, 0, 1)).min(axis=0)
    assert off.max() < 0.15


def test_distortion_is_found_through_ingest(distorted: np.ndarray, tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "d.hspy", distorted, scale=0.025)
    facts = ingest(scan, tmp_path / "s.h5", calibrate="linio2")
    np.testing.assert_allclose(facts["origin_centre_px"], CENTRE[0], atol=0.1)
    found = facts["corrections"]["calibrated"]
    assert found["scale_inv_angstrom"] == pytest.approx(TRUE, rel=0.002)
    ellipse = Ellipse(**facts["corrections"]["ellipse"])
    np.testing.assert_allclose(components(ellipse), components(ELLIPSE), atol=0.003)
    assert any("do not tell mirror and turn" in note for note in facts["notes"])
    with Store.open(tmp_path / "s.h5") as store:
        assert store.geometry.scale_inv_angstrom == pytest.approx(TRUE, rel=0.002)
        places = np.tile(store.geometry.centre_px, (store.n, 1))
        again = fit_rings(find_spots(store.patterns, places, 2.5), linio2(), TRUE, 128)
        assert again is not None
        assert again.ellipse.ellipticity < 0.003
        assert again.scale_inv_angstrom == pytest.approx(TRUE, rel=0.002)


def test_unknown_scale_is_found_and_a_wrong_phase_is_not(
    distorted: np.ndarray, shared_data: Path, tmp_path: Path
) -> None:
    plain = write_scan(tmp_path / "p.hspy", distorted, units="px")
    facts = ingest(plain, tmp_path / "s.h5", kv=200, calibrate="linio2")
    assert facts["scale_inv_angstrom"] == pytest.approx(TRUE, rel=0.002)
    silicon = str(shared_data / "cif" / "Si-Silicon.cif")
    message = refused(plain, tmp_path, kv=200, calibrate=silicon)
    assert "does not fit the spots" in message
    assert "give --scale" in message
    known = write_scan(tmp_path / "k.hspy", distorted, scale=0.025)
    facts = ingest(known, tmp_path / "k.h5", calibrate=silicon)
    assert "scale and ellipse stay as they were" in facts["notes"][0]
    assert facts["scale_inv_angstrom"] == 0.025
    assert facts["corrections"]["ellipse"] is None


def test_too_few_spots_change_nothing(distorted: np.ndarray, tmp_path: Path) -> None:
    few = SpotList(np.zeros(10, dtype=np.intp), np.full(10, 8.0), np.zeros(10))
    assert fit_rings(few, linio2(), 0.025, 128) is None
    scan = write_scan(tmp_path / "f.hspy", distorted[:1, :2], scale=0.025)
    facts = ingest(scan, tmp_path / "s.h5", calibrate="linio2")
    assert f"but {MIN_SPOTS} are needed to fit" in facts["notes"][0]
    assert facts["scale_inv_angstrom"] == 0.025


def test_real_cathode_scan(shared_data: Path, tmp_path: Path) -> None:
    """Scale 4 % off comes back; the one texture of the particle does not tell the ellipse, and that is said."""
    folder = shared_data / "cathode"
    facts = ingest(
        folder / "cathode_scan.hspy", tmp_path / "s.h5", kv=300, scale=0.0226, calibrate=str(folder / "LCO.cif")
    )
    assert facts["scale_inv_angstrom"] == pytest.approx(0.0235, rel=0.007)
    assert facts["origin_centre_px"] == [63.5, 63.5]
    ellipse = facts["corrections"]["ellipse"]
    assert ellipse is None or ellipse["ellipticity"] < 0.01
    assert facts["corrections"]["beam_stop"] is None
    assert facts["corrections"]["bad_pixels"] == {"hot": 0, "dead": 0}


def test_real_blockfile(shared_data: Path, tmp_path: Path) -> None:
    """Six patterns of an unnamed crystal: the beam is found, nothing else is invented."""
    facts = ingest(shared_data / "formats" / "blockfile" / "test1.blo", tmp_path / "s.h5", scale=0.01)
    assert facts["corrections"]["descan"] is None
    assert facts["corrections"]["beam_stop"] is None
    assert facts["corrections"]["bad_pixels"]["dead"] == 0
