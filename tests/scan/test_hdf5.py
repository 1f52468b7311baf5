"""HDF5 files: which of their arrays is the scan, and what only looks like one."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
from test_readers import as_chosen_h5, as_npy, counts, wrong

from stemtune.dataset.ingest import ingest
from stemtune.scan.readers import read_scan


def test_several_scans_are_listed(tmp_path: Path) -> None:
    as_chosen_h5(tmp_path / "two.h5")
    message = wrong(tmp_path / "two.h5")
    assert message == "two.h5 holds several scans; give --dataset PATH: a (6 x 5 x 16 x 16), b/c (6 x 5 x 16 x 16)"
    assert "two.h5 has no array 'x' of patterns; a (6 x" in wrong(tmp_path / "two.h5", dataset="x")
    np.savez(tmp_path / "two.npz", a=counts(), b=counts())
    assert "a 6 x 5 x 16 x 16, b 6 x 5 x 16 x 16; give --dataset" in wrong(tmp_path / "two.npz")
    as_npy(tmp_path / "one.npy")
    assert "one.npy holds one scan, so there is nothing to choose" in wrong(tmp_path / "one.npy", dataset="x")


def test_a_name_of_dectris_is_no_array_of_frames_by_itself(tmp_path: Path) -> None:
    """Groups, scalars, lists and cubes called data_1, and other things in the places where detectors keep numbers."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["scan"] = counts()
        file["entry/data/data_1"] = 7
        file["entry/data/data_2/inner"] = np.arange(5)
        file["entry/data/data_3"] = np.arange(5)
        file["entry/data/data_4"] = np.array([b"text"])
    np.testing.assert_array_equal(read_scan(tmp_path / "a.h5").data.compute(), counts())
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["entry/data/data_1"] = counts()
    np.testing.assert_array_equal(read_scan(tmp_path / "b.h5").data.compute(), counts())
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["entry/data/data_1/inner"] = 3.0
    assert "no array in it has 3 axes or more" in wrong(tmp_path / "c.h5")
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["entry/data/data_1"] = counts().reshape(30, 16, 16)
        file["entry/data/data_2"] = "no frames"
        detector = file.create_group("entry/instrument/detector")
        detector["detectorSpecific/ntrigger"] = np.arange(3)
        detector.create_group("detectorSpecific/nimages")
        detector.create_group("detectorSpecific/pixel_mask")
        file["entry/instrument/beam/incident_energy"] = "much"
    np.testing.assert_array_equal(read_scan(tmp_path / "d.h5", (6, 5)).data.compute(), counts())
    with h5py.File(tmp_path / "e.h5", "w") as file:
        file["cube/data"] = counts()
        calibration = file.create_group("cube/calibration")
        calibration["qx0"], calibration["qy0"] = np.zeros((6, 5)), np.zeros((5, 6))
        calibration["QR_flip"] = np.zeros(3)
    assert read_scan(tmp_path / "e.h5").centre_px is None


def test_a_store_is_not_ingested(tmp_path: Path) -> None:
    options = as_npy(tmp_path / "scan.npy")
    ingest(tmp_path / "scan.npy", tmp_path / "s.h5", centre="7.5,7.5", **options)
    assert "is a stemtune store already" in wrong(tmp_path / "s.h5")
