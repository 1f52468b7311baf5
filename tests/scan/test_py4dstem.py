"""Bragg peaks drawn as patterns: beside a scan drawn by others from the same file, and py4DSTEM's calibration."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from stemtune.dataset.ingest import ingest
from stemtune.dataset.store import Store
from stemtune.errors import UserError
from stemtune.scan.readers import read_scan
from stemtune.scan.readers.py4dstem import COUNTS, SPOT_PX, draw

PEAK = np.dtype([("qx", float), ("qy", float), ("intensity", float)])


def write_peaks(path: Path, lists: dict[tuple[int, int], np.ndarray], shape: tuple[int, int], place: str) -> None:
    """Write a PointListArray as py4DSTEM does: a variable-length list of peaks for each scan position."""
    with h5py.File(path, "a") as file:
        data = file.create_dataset(f"{place}/data", shape, h5py.vlen_dtype(PEAK))
        for position, peaks in lists.items():
            data[position] = peaks.astype(PEAK)


def peaks(*rows: tuple[float, float, float]) -> np.ndarray:
    return np.array(list(rows), dtype=PEAK)


def test_real_peaks_make_the_real_scan(shared_data: Path, tmp_path: Path) -> None:
    """The scan beside the peaks was drawn from them by somebody else, in whole counts: only its weak spots differ."""
    source = shared_data / "cathode" / "braggdisks_cali.h5"
    ingest(source, tmp_path / "s.h5", kv=300, size=128, scale=0.0235, keep="20:44,:")
    with Store.open(tmp_path / "s.h5") as store, h5py.File(shared_data / "cathode" / "cathode_scan.hspy") as file:
        drawn = store.patterns.reshape(-1, 128 * 128).astype(float)
        theirs = next(iter(file["Experiments"].values()))["data"][20:44].reshape(-1, 128 * 128).astype(float)
        assert store.geometry.scale_inv_angstrom == pytest.approx(0.0235)
        assert store.scan_shape == (24, 58)
    assert np.corrcoef(drawn.ravel(), theirs.ravel())[0, 1] > 0.9999
    each = [np.corrcoef(one, other)[0, 1] for one, other in zip(drawn, theirs, strict=True)]
    assert min(each) > 0.99
    assert np.median(each) > 0.9995


def test_the_grid_holds_every_peak_where_none_is_asked_for(shared_data: Path) -> None:
    scan = read_scan(shared_data / "cathode" / "braggdisks_cali.h5")
    assert scan.pattern_shape == (128, 128)
    assert scan.centre_px == (63.5, 63.5)
    with h5py.File(scan.path) as file:
        held = np.concatenate([one for row in file["4DSTEM/braggpeaks_cal_raw/data"][:] for one in row])
    reach = max(np.abs(held["qx"]).max(), np.abs(held["qy"]).max())
    assert reach / scan.scale[0] + 63.5 == pytest.approx(124, abs=1)


def test_a_spot_stands_where_the_peak_is_with_all_its_counts() -> None:
    at = np.array([[10.3, 20.8], [5.0, 7.5], [15.6, 3.2]])
    drawn = draw(at, np.array([100.0, 50.0, 200.0]), np.array([0, 1, 1]), 3, 32)
    assert drawn.sum(axis=(1, 2)) == pytest.approx([100, 250, 0], rel=1e-3)
    row, column = np.mgrid[:32, :32]
    assert (drawn[0] * row).sum() / 100 == pytest.approx(10.3, abs=1e-3)
    assert (drawn[0] * column).sum() / 100 == pytest.approx(20.8, abs=1e-3)
    spread = np.sqrt((drawn[0] * (row - 10.3) ** 2).sum() / 100)
    assert spread == pytest.approx(SPOT_PX, rel=1e-2)


def test_spots_over_the_edge_are_cut_off() -> None:
    drawn = draw(np.array([[-0.5, 3.0], [300.0, 300.0]]), np.array([100.0, 100.0]), np.array([0, 0]), 1, 16)
    assert drawn.sum() == pytest.approx(50, rel=1e-2)


def test_raw_peaks_are_calibrated_as_py4dstem_does(tmp_path: Path) -> None:
    """One position of `BraggVectors` of py4DSTEM 0.14.18, before and after its own `setcal(center, ellipse, pixel)`."""
    raw = peaks((1.23174153, 2.51822689, 1.0), (10.68830699, 2.64671962, 1.0), (1.34366054, 9.05348366, 1.0))
    by_py4dstem = np.array([[-0.08364579, -0.0341036], [0.1020867, -0.03258512], [-0.08217101, 0.09636533]])
    place = "py4DSTEM_root/braggvectors/_v_uncal"
    write_peaks(tmp_path / "bv.h5", {(0, 0): raw, (0, 1): raw[:1]}, (1, 2), place)
    with h5py.File(tmp_path / "bv.h5", "a") as file:
        file["py4DSTEM_root/braggvectors/metadatabundle/_braggvectors_shape/Qshape"] = [12, 10]
        kept = {
            "Q_pixel_size": 0.02, "Q_pixel_units": "A^-1", "R_pixel_size": 5.0, "R_pixel_units": "nm",
            "qx0": [[5.5, 6.5]], "qy0": [[4.25, 4.25]], "a": 1.02, "b": 1.0, "theta": 0.3, "QR_flip": False,
        }  # fmt: skip
        for name, value in kept.items():
            file[f"py4DSTEM_root/metadatabundle/calibration/{name}"] = value
    scan = read_scan(tmp_path / "bv.h5", size=64, scale=0.005)
    assert (scan.step_nm, scan.flip) == ((5, 5), False)
    found = scan.data.compute()
    expected = draw(by_py4dstem / 0.005 + 31.5, np.ones(3), np.zeros(3, int), 1, 64)[0]
    np.testing.assert_allclose(found[0, 0] / found[0, 0].sum(), expected / expected.sum(), atol=1e-6)
    moved = draw(by_py4dstem[:1] / 0.005 + 31.5, np.ones(1), np.zeros(1, int), 1, 64)[0]
    beam = np.unravel_index(found[0, 1].argmax(), (64, 64))  # its own origin: a pixel of 0.02 further along rows
    assert beam[0] == pytest.approx(np.unravel_index(moved.argmax(), (64, 64))[0] - 4, abs=1)
    native = read_scan(tmp_path / "bv.h5")
    assert (native.pattern_shape, native.scale_inv_angstrom(None)) == ((12, 12), pytest.approx(0.02))


def test_raw_peaks_without_calibration_keep_the_pixels_of_the_detector(tmp_path: Path) -> None:
    """The strongest peak is the direct beam; what a pixel is, is for the user to say."""
    lists = {(0, x): peaks((60.0, 70.0, 9.0), (72.0, 70.0, 1.0), (60.0, 55.0, 2.0)) for x in range(4)}
    write_peaks(tmp_path / "raw.h5", lists, (1, 4), "4DSTEM/braggpeaks_raw")
    with pytest.raises(UserError, match="does not say how many 1/Å a pixel is; give --scale"):
        ingest(tmp_path / "raw.h5", tmp_path / "s.h5", kv=200)
    ingest(tmp_path / "raw.h5", tmp_path / "s.h5", kv=200, scale=0.02, size=64)
    with Store.open(tmp_path / "s.h5") as store:
        assert store.geometry.scale_inv_angstrom == pytest.approx(0.02)
        pattern = store.patterns[0]
    assert pattern.sum() == pytest.approx(COUNTS, rel=1e-3)
    assert pattern[43:45, 31:33].sum() == pytest.approx(pattern[31:33, 31:33].sum() / 9, rel=1e-3)
    assert pattern[31:33, 16:18].sum() == pytest.approx(pattern[31:33, 31:33].sum() / 4.5, rel=1e-3)


def test_files_without_peaks_are_refused(tmp_path: Path) -> None:
    write_peaks(tmp_path / "none.h5", {}, (2, 2), "4DSTEM/peaks")
    with pytest.raises(UserError, match="holds no Bragg peaks in /4DSTEM/peaks"):
        read_scan(tmp_path / "none.h5")
    write_peaks(tmp_path / "two.h5", {(0, 0): peaks((0, 0, 1))}, (1, 1), "a")
    write_peaks(tmp_path / "two.h5", {(0, 0): peaks((0, 0, 1))}, (1, 1), "b")
    with pytest.raises(UserError, match=r"a \(1 x 1 lists of peaks\), b \(1 x 1 lists of peaks\)"):
        read_scan(tmp_path / "two.h5")
