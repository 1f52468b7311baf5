"""Ingest: real and made files through rosettasciio into a store, and one clear line for what cannot go."""

from pathlib import Path
from typing import Any

import dask.array
import h5py
import numpy as np
import pytest
from sample_scans import refused, write_scan

from stemtune.dataset import ingest as ingest_module
from stemtune.dataset.ingest import ScanHash, ingest
from stemtune.dataset.store import Store
from stemtune.scan.readers import read_scan, reciprocal_factor

SHAPE = (20, 18, 16, 16)


def counts(dtype: str = "uint16") -> np.ndarray:
    """Patterns with a beam at (7.5, 7.5) that all differ."""
    patterns = np.random.default_rng(3).integers(0, 20, SHAPE)
    patterns[..., 7:9, 7:9] += 100
    return patterns.astype(dtype)


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return write_scan(tmp_path / "scan.hspy", counts())


def test_calibrated_scan_is_copied_bit_for_bit(scan: Path, tmp_path: Path) -> None:
    facts = ingest(scan, tmp_path / "s.h5")
    with Store.open(tmp_path / "s.h5") as store:
        assert store.patterns.dtype == np.uint16
        np.testing.assert_array_equal(store.patterns.reshape(SHAPE), counts())
        assert (store.geometry.kv, store.geometry.scale_inv_angstrom) == (200, 0.05)
        assert store.geometry.centre_px == (7.5, 7.5)
        assert store.scan_shape == SHAPE[:2]
        assert store.attrs["step_nm"] == [4, 4]
        assert store.attrs["origin"] == "scan.hspy"
        assert store.attrs["origin_sha256"] == ScanHash(scan).finish()
        assert not store.labelled.any()
        np.testing.assert_array_equal(store.position.reshape(*SHAPE[:2], 2), np.indices(SHAPE[:2]).transpose(1, 2, 0))
        assert facts["copied"]


def test_the_hash_of_an_ingested_store_covers_every_byte_of_the_scan(tmp_path: Path) -> None:
    counts = np.random.default_rng(0).poisson(2.0, (20, 20, 16, 16)).astype(np.uint16)
    counts[:, :, 7:9, 7:9] += 900

    def made(counts: np.ndarray, **options: object) -> str:
        np.save(tmp_path / "a.npy", counts)
        ingest(tmp_path / "a.npy", tmp_path / "a.h5", kv=200, scale=0.05, **options)
        with Store.open(tmp_path / "a.h5") as store:
            return store.sha256

    whole = made(counts)
    assert made(counts) == whole
    for row in (0, 7, 13):
        changed = counts.copy()
        changed[row, 11, 2, 3] += 1
        assert made(changed) != whole
    assert made(counts, bad_pixels="off") != whole


def test_groups_are_scan_blocks_and_stay_together(scan: Path, tmp_path: Path) -> None:
    ingest(scan, tmp_path / "s.h5")
    with Store.open(tmp_path / "s.h5") as store:
        group, split = store.group.reshape(SHAPE[:2]), store.split.reshape(SHAPE[:2])
        assert len(np.unique(group)) == 9
        for top in range(0, 20, 8):
            for left in range(0, 18, 8):
                assert len(np.unique(group[top : top + 8, left : left + 8])) == 1
                assert len(np.unique(split[top : top + 8, left : left + 8])) == 1
        assert set(split.ravel()) == {0, 1, 2}


def test_options_win_over_the_file(scan: Path, tmp_path: Path) -> None:
    ingest(scan, tmp_path / "s.h5", kv=300, scale=0.04, centre="7.5,7.5", keep="2:12,:10", size=8)
    with Store.open(tmp_path / "s.h5") as store:
        assert store.geometry.kv == 300
        assert store.geometry.scale_inv_angstrom == pytest.approx(0.08)
        assert store.scan_shape == (10, 10)
        assert store.patterns.dtype == np.float32
        binned = counts()[2:12, :10].reshape(100, 8, 2, 8, 2).sum(axis=(2, 4))
        np.testing.assert_allclose(store.patterns, binned, rtol=1e-6)


def test_beam_aside_is_found_and_moved_to_the_middle(tmp_path: Path) -> None:
    data = np.pad(counts(), ((0, 0), (0, 0), (3, 0), (0, 1)))  # 19 x 17 pixels, beam at (10.5, 7.5)
    facts = ingest(write_scan(tmp_path / "a.hspy", data), tmp_path / "s.h5")
    np.testing.assert_allclose(facts["origin_centre_px"], [10.5, 7.5], atol=0.1)
    with Store.open(tmp_path / "s.h5") as store:
        mean = store.patterns.mean(axis=0)
        bright = np.where(mean > mean.max() / 2, mean, 0)
        at = [(bright.sum(axis=axis) * np.arange(17)).sum() / bright.sum() for axis in (1, 0)]
        np.testing.assert_allclose(at, [8, 8], atol=0.1)
        assert store.geometry.centre_px == (8, 8)


def test_stack_of_frames_needs_a_shape(tmp_path: Path) -> None:
    stack = write_scan(tmp_path / "scan.hspy", counts().reshape(360, 16, 16))
    assert "scan.hspy holds 360 frames and no scan shape; give --shape ny,nx" in refused(stack, tmp_path)
    assert "scan.hspy holds 360 frames, which is not 20 x 19; give" in refused(stack, tmp_path, shape="20,19")
    assert "--shape is '20', but must be two whole numbers" in refused(stack, tmp_path, shape="20")
    ingest(stack, tmp_path / "s.h5", shape="20,18")
    with Store.open(tmp_path / "s.h5") as store:
        assert store.scan_shape == (20, 18)
        np.testing.assert_array_equal(store.patterns.reshape(SHAPE), counts())


def test_missing_calibration_names_the_option(tmp_path: Path) -> None:
    plain = write_scan(tmp_path / "p.hspy", counts(), units="px", kv=None)
    assert (
        refused(plain, tmp_path)
        == "p.hspy does not say how many 1/Å a pixel is; give --scale, 0.02 for instance, and --kv"
    )
    assert "give --scale" in refused(plain, tmp_path, kv=200)
    assert "the acceleration voltage; give --kv" in refused(plain, tmp_path, scale=0.05)
    assert "is 200000 kV, but must be in [20, 1500]" in refused(plain, tmp_path, scale=0.05, kv=200_000)
    assert "is 5 1/Å per pixel" in refused(plain, tmp_path, scale=5, kv=200)
    ingest(plain, tmp_path / "s.h5", scale=0.05, kv=200)


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, "no number (nan)"), (-3, "a negative count (-3)"), (np.inf, "inf")]
)
def test_bad_counts_are_refused_with_their_place(value: float, words: str, tmp_path: Path) -> None:
    data = counts("float32")
    data[13, 11, 4, 6] = value
    message = refused(write_scan(tmp_path / "b.hspy", data), tmp_path)
    assert words in message
    assert "at pixel (4, 6) of the pattern at scan position (13, 11)" in message
    ingest(tmp_path / "b.hspy", tmp_path / "s.h5", keep="0:13,0:18")


def test_signed_counts_without_a_negative_are_taken(tmp_path: Path) -> None:
    ingest(write_scan(tmp_path / "i.hspy", counts("int16")), tmp_path / "s.h5")
    with Store.open(tmp_path / "s.h5") as store:
        assert store.patterns.dtype == np.uint16
        np.testing.assert_array_equal(store.patterns.reshape(SHAPE), counts())


def test_wrong_options_are_one_line(scan: Path, tmp_path: Path) -> None:
    assert "--keep is 'all', but must be rows and columns as 0:ny,0:nx" in refused(scan, tmp_path, keep="all")
    assert "the scan has the rows 0:20 and the columns 0:18" in refused(scan, tmp_path, keep="0:30,0:18")
    assert "--centre is 'middle', but must be auto or two numbers" in refused(scan, tmp_path, centre="middle")
    assert "--centre 99,3 lies outside of the 16 x 16 pixels" in refused(scan, tmp_path, centre="99,3")


def test_damaged_and_foreign_files_are_one_line(scan: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.hspy"
    short.write_bytes(scan.read_bytes()[:-3000])
    assert "short.hspy cannot be read: the file is truncated" in refused(short, tmp_path)
    text = tmp_path / "text.hspy"
    text.write_text("no HDF5")
    assert "text.hspy cannot be read: it is no HDF5 file" in refused(text, tmp_path)
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["spectrum"] = np.arange(5)
    assert "other.hdf5 cannot be read" in refused(tmp_path / "other.hdf5", tmp_path)
    (tmp_path / "scan.xyz").touch()
    assert refused(tmp_path / "scan.xyz", tmp_path) == "scan.xyz is empty; copy it again"
    (tmp_path / "scan.xyz").write_text("something else")
    assert "has no ending that rosettasciio knows" in refused(tmp_path / "scan.xyz", tmp_path)
    assert "the scan 'gone.hspy' does not exist" in refused(Path("gone.hspy"), tmp_path)
    spectra = write_scan(tmp_path / "s.hspy", np.ones((3, 3)))
    assert "cannot" not in refused(spectra, tmp_path, kv=200, centre="50,50")


def test_interrupt_leaves_nothing(scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(tmp_path.iterdir())

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ingest_module, "scan_group", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ingest(scan, tmp_path / "s.h5")
    assert sorted(tmp_path.iterdir()) == before


def test_only_blocks_are_in_memory(scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read is bounded, also where the file is one single chunk."""
    sizes: list[int] = []
    whole = dask.array.Array.compute

    def watched(self: Any, **options: Any) -> Any:
        sizes.append(self.nbytes)
        return whole(self, **options)

    monkeypatch.setattr(dask.array.Array, "compute", watched)
    monkeypatch.setattr("stemtune.scan.readers.scan._READ_BYTES", 40 * 16 * 16 * 2)
    ingest(scan, tmp_path / "s.h5", centre="7.5,7.5")
    assert max(sizes) <= 40 * 16 * 16 * 2
    with Store.open(tmp_path / "s.h5") as store:
        np.testing.assert_array_equal(store.patterns.reshape(SHAPE), counts())


@pytest.mark.parametrize(
    ("units", "factor"),
    [
        ("1/Å", 1), ("1/A", 1), ("Å^-1", 1), ("$A^{-1}$", 1), ("1 / Å", 1), ("A-1", 1), ("1/nm", 0.1), ("nm^-1", 0.1),
        ("nm⁻¹", 0.1), ("$nm^{-1}$", 0.1), ("1/pm", 100), ("1/m", 1e-10), ("px", None), ("", None), ("nm", None),
        ("cm", None), ("eV", None),
    ],
)  # fmt: skip
def test_units_of_reciprocal_length(units: str, factor: float | None) -> None:
    found = reciprocal_factor(units, 200.0)
    assert found is None if factor is None else found == pytest.approx(factor)


def test_angles_need_the_voltage() -> None:
    assert reciprocal_factor("mrad", None) is None
    assert reciprocal_factor("mrad", 200.0) == pytest.approx(1e-3 / 0.025079, rel=1e-4)  # wavelength at 200 kV in Å


def test_real_cathode_scan(shared_data: Path, tmp_path: Path) -> None:
    """Axes in order: patterns agree with the Bragg peaks they were made from, row along qx, column along qy."""
    path = shared_data / "cathode" / "cathode_scan.hspy"
    assert "cathode_scan.hspy does not say the acceleration voltage; give --kv" in refused(path, tmp_path)
    facts = ingest(path, tmp_path / "s.h5", kv=300)
    assert facts["scan_shape"] == [80, 58]
    assert facts["origin_centre_px"] == [63.5, 63.5]
    with Store.open(tmp_path / "s.h5") as store, h5py.File(path) as file:
        np.testing.assert_array_equal(
            store.patterns, next(iter(file["Experiments"].values()))["data"][:].reshape(-1, 128, 128)
        )
        assert store.geometry.scale_inv_angstrom == pytest.approx(0.0235)
        peaks = h5py.File(shared_data / "cathode" / "braggdisks_cali.h5")["4DSTEM/braggpeaks_cal_raw/data"]
        for row, column in ((23, 18), (40, 30), (50, 25), (70, 20)):
            found, pattern = peaks[row, column], store.patterns[row * 58 + column]
            at = np.rint(63.5 + np.stack([found["qx"], found["qy"]]) / 0.0235).astype(int)
            at = at[:, ((at >= 0) & (at < 128)).all(axis=0)]
            assert (pattern[at[0], at[1]] > 0).mean() > 0.95
            assert (pattern[at[1], at[0]] > 0).mean() < 0.3


REAL_FILES = {
    "blockfile/test1.blo": ({}, "does not say how many 1/Å a pixel is; give --scale"),
    "dm/dmTest_3D_int16_64,65,66.dm4": ({}, "holds 66 frames and no scan shape; give --shape ny,nx"),
    "emd/Si100_4D.emd": ({}, "holds several scans; give --dataset PATH: 4DSTEM_simulation/data"),
    "emd/py4DSTEM_size2x3x4x5.h5": ({"kv": 200}, "has a negative count"),
    "empad/EMPAD_v1.2.2_x32_y64_size0.8.xml": ({"kv": 300, "scale": 0.02}, "cannot be read to its end"),
    "mib/Single_9_Frame_CounterDepth_1_Rows_256RAW.mib": (
        {"kv": 200},
        "or read it with LiberTEM and save the array as .npy",
    ),
    "zspy/signal1d_10x10-ZipStore.zspy": ({}, "holds spectra or numbers, not diffraction patterns"),
    "zspy/signal2d_20x10x10-ragged_markers.zspy": ({}, "cannot be read"),
}


@pytest.mark.parametrize("name", REAL_FILES)
def test_real_files_that_cannot_go_say_why(name: str, shared_data: Path, tmp_path: Path) -> None:
    options, words = REAL_FILES[name]
    assert words in refused(shared_data / "formats" / name, tmp_path, **options)


@pytest.mark.parametrize(
    ("name", "options", "shape", "kv"),
    [
        ("blockfile/test1.blo", {"scale": 0.01}, (3, 2), 200),
        ("empad/map4x4.xml", {}, (4, 4), 300),
        ("mib/Single_9_Frame_CounterDepth_12_Rows_256.mib", {"shape": "3,3", "kv": 80, "scale": 0.01}, (3, 3), 80),
        ("mib/002_merlin_test_roi_sig256x128_nav4x2_hot_pixel_52x_39y.mib", {"kv": 80, "scale": 0.01}, (2, 4), 80),
        ("dm/test_diffraction_pattern.dm3", {}, (1, 1), 200),
    ],
)
def test_real_files_of_other_formats(
    name: str, options: dict[str, Any], shape: tuple[int, int], kv: float, shared_data: Path, tmp_path: Path
) -> None:
    path = shared_data / "formats" / name
    ingest(path, tmp_path / "s.h5", **options, centre="20,20")
    source = read_scan(path, shape).data.compute()
    with Store.open(tmp_path / "s.h5") as store:
        assert store.scan_shape == shape
        assert store.geometry.kv == kv
        corner = store.patterns.reshape(*shape, store.size, store.size)
        middle = (store.size - 1) // 2
        if store.size % 2:  # the beam lands on a pixel, so that counts are only moved
            np.testing.assert_array_equal(corner[:, :, middle, middle], source[:, :, 20, 20])
        else:
            near = source[:, :, 20:22, 20:22].astype(float)
            assert (corner[:, :, middle + 1, middle + 1] <= near.max(axis=(2, 3)) + 1e-3).all()
            assert corner.sum() <= source.sum(dtype=float) * (1 + 1e-5)


@pytest.mark.filterwarnings("ignore:The NestedDirectoryStore:FutureWarning")
def test_zarr_scan(tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "scan.zspy", counts())
    assert scan.is_dir()
    ingest(scan, tmp_path / "s.h5")
    with Store.open(tmp_path / "s.h5") as store:
        np.testing.assert_array_equal(store.patterns.reshape(SHAPE), counts())
        assert store.attrs["origin_sha256"] == ScanHash(scan).finish()
