"""Every kind of file that can hold a scan: genuine ones, and small ones written here as their programs write them."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest
from rsciio import blockfile, emd, nexus, tvips

from stemtune import cli
from stemtune.dataset.ingest import ScanHash, ingest
from stemtune.dataset.store import Store
from stemtune.errors import UserError
from stemtune.scan.readers import read_scan
from stemtune.scan.readers.rosetta import _whole_pieces
from stemtune.scan.readers.scan import Frames, lazily

SHAPE = (6, 5, 16, 16)
BARE = {"kv": 200.0, "scale": 0.05}
"""What a file without calibration needs."""

Writer = Callable[[Path], dict[str, Any]]


def counts(dtype: str = "uint16", shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Patterns that all differ, and whose rows differ from their columns."""
    patterns = np.random.default_rng(7).integers(0, 20, shape)
    patterns[..., 2, 9] += 5 + np.arange(shape[0] * shape[1]).reshape(*shape[:2])
    return patterns.astype(dtype)


def signal(data: np.ndarray, units: str = "1/nm") -> dict[str, Any]:
    """`data` as rosettasciio's writers take it."""
    axes = [
        {
            "name": "yxvu"[number - data.ndim], "scale": 1.0 if number < data.ndim - 2 else 0.5, "offset": 0.0,
            "units": "nm" if number < data.ndim - 2 else units, "size": length, "navigate": number < data.ndim - 2,
            "index_in_array": number, "_type": "UniformDataAxis", "is_binned": False,
        }
        for number, length in enumerate(data.shape)
    ]  # fmt: skip
    metadata = {
        "General": {"title": "scan", "date": "2024-01-01", "time": "12:00:00"},
        "Signal": {"signal_type": "electron_diffraction"},
        "Acquisition_instrument": {"TEM": {"beam_energy": 200.0}},
    }
    return {
        "data": data,
        "axes": axes,
        "metadata": metadata,
        "original_metadata": {},
        "learning_results": {},
        "attributes": {"_lazy": False},
    }


def as_npy(path: Path) -> dict[str, Any]:
    np.save(path, counts())
    return BARE


def as_fortran(path: Path) -> dict[str, Any]:
    np.save(path, np.asfortranarray(counts()))
    return BARE


def as_stack(path: Path) -> dict[str, Any]:
    np.save(path, counts().reshape(-1, 16, 16))
    return {**BARE, "shape": "6,5"}


def as_npz(path: Path) -> dict[str, Any]:
    np.savez(path, scan=counts(), sum=counts().sum(axis=(2, 3)))
    return BARE


def as_packed_npz(path: Path) -> dict[str, Any]:
    np.savez_compressed(path, first=counts() * 0, scan=counts())
    return {**BARE, "dataset": "scan"}


def as_blockfile(path: Path) -> dict[str, Any]:
    blockfile.file_writer(str(path), signal(counts("uint8"), units="cm"), intensity_scaling=None)
    return BARE


def as_tvips(path: Path) -> dict[str, Any]:
    tvips.file_writer(str(path), signal(counts()), mode=2)
    return {"kv": 200.0, "scale": 0.05, "shape": "6,5"}


def as_mrc(path: Path) -> dict[str, Any]:
    """The format's own header: 1,024 bytes, columns, rows, sections, and mode 6 for uint16."""
    header = struct.pack("<4i", 16, 16, 30, 6) + bytes(12) + struct.pack("<3i", 16, 16, 30)
    header += struct.pack("<3f", 16.0, 16.0, 30.0) + bytes(12) + struct.pack("<3i", 1, 2, 3)
    header = header.ljust(208, b"\0") + b"MAP " + b"\x44\x44\0\0"
    path.write_bytes(header.ljust(1024, b"\0") + counts().tobytes())
    return {**BARE, "shape": "6,5"}


def as_nexus(path: Path) -> dict[str, Any]:
    nexus.file_writer(str(path), signal(counts()))
    return BARE


def as_other_nexus(path: Path) -> dict[str, Any]:
    """As beamlines write it: the energy in keV, and the frames linked into the data group."""
    with h5py.File(path, "w") as file:
        file.create_dataset("entry/instrument/detector/data", data=counts().reshape(-1, 16, 16), chunks=(1, 16, 16))
        file["entry/data/data"] = h5py.SoftLink("/entry/instrument/detector/data")
        file["entry/instrument/source/energy"] = 200.0
        file["entry/instrument/source/energy"].attrs["units"] = "keV"
    return {"scale": 0.05, "shape": "6,5"}


def as_emd(path: Path) -> dict[str, Any]:
    emd.file_writer(str(path), signal(counts()))
    return {"kv": 200.0}


def as_plain_h5(path: Path) -> dict[str, Any]:
    with h5py.File(path, "w") as file:
        file.create_dataset("measured/frames", data=counts(), chunks=(2, 2, 16, 16), compression="gzip")
        file["measured/sum"] = counts().sum(axis=(2, 3))
        file["dark"] = np.zeros((3, 16, 16))
    return BARE


def as_chosen_h5(path: Path) -> dict[str, Any]:
    with h5py.File(path, "w") as file:
        file["a"], file["b/c"] = counts() + 1, counts()
    return {**BARE, "dataset": "b/c"}


def as_five_axes(path: Path) -> dict[str, Any]:
    with h5py.File(path, "w") as file:
        file["d"] = counts().reshape(2, 3, 5, 16, 16)
    return {**BARE, "shape": "6,5"}


def as_dectris(path: Path) -> dict[str, Any]:
    """A master file that links to files of 16 frames each, compressed as the detector does, with a dead pixel."""
    frames = counts("uint32").reshape(-1, 16, 16)
    frames[:, 4, 11] = 2**32 - 1
    with h5py.File(path, "w") as master:
        master["entry/instrument/detector/detectorSpecific/pixel_mask"] = np.zeros((16, 16), np.uint32)
        master["entry/instrument/detector/detectorSpecific/pixel_mask"][4, 11] = 1
        master["entry/instrument/beam/incident_energy"] = 200e3
        for number, start in enumerate((0, 16), 1):
            name = f"{path.stem.removesuffix('_master')}_data_{number:06d}.h5"
            with h5py.File(path.with_name(name), "w") as part:
                part.create_dataset(
                    "entry/data/data", data=frames[start : start + 16], chunks=(1, 16, 16),
                    **hdf5plugin.Bitshuffle(cname="lz4"),
                )  # fmt: skip
            master[f"entry/data/data_{number:06d}"] = h5py.ExternalLink(name, "entry/data/data")
    return {"scale": 0.05, "shape": "6,5"}


def as_cube(path: Path) -> dict[str, Any]:
    """py4DSTEM 0.14.18's layout, taken from a data cube that it saved; dim2 and dim3 are as odd as it writes them."""
    with h5py.File(path, "w") as file:
        file.attrs.update({"emd_group_type": "file", "authoring_program": "emdfile", "version_major": 1})
        file.create_group("datacube_root").attrs.update({"emd_group_type": "root", "python_class": "Root"})
        cube = file.create_group("datacube_root/datacube")
        cube.attrs.update({"emd_group_type": "array", "python_class": "DataCube"})
        cube["data"] = counts()
        cube["dim0"], cube["dim1"] = [0.0, 5.0], [0.0, 5.0]
        cube["dim2"], cube["dim3"] = -5.5 + 0.02 * np.arange(16), -4.25 + 0.02 * np.arange(16)
        calibration(file.create_group("datacube_root/metadatabundle/calibration"), 7.5, 7.5)
    return {"kv": 200.0}


def calibration(group: h5py.Group, x: float, y: float) -> None:
    """What py4DSTEM 0.14.18 keeps of a calibration, `x` along rows."""
    entries = {
        "Q_pixel_size": 0.02, "Q_pixel_units": "A^-1", "R_pixel_size": 5.0, "R_pixel_units": "nm", "QR_flip": True,
        "QR_rotation": np.deg2rad(12.5), "QR_rotation_degrees": 12.5, "a": 1.02, "b": 1.0, "theta": 0.3,
        "qx0": np.full(SHAPE[:2], x), "qy0": np.full(SHAPE[:2], y), "qx0_mean": x, "qy0_mean": y, "_root_treepath": "",
    }  # fmt: skip
    for name, value in entries.items():
        group[name] = value


FORMATS: dict[str, tuple[str, Writer]] = {
    "npy": ("scan.npy", as_npy),
    "npy in Fortran's order": ("scan.npy", as_fortran),
    "npy of frames": ("scan.npy", as_stack),
    "npz": ("scan.npz", as_npz),
    "npz, compressed": ("scan.npz", as_packed_npz),
    "blo": ("scan.blo", as_blockfile),
    "tvips": ("scan_000.tvips", as_tvips),
    "mrc": ("scan.mrc", as_mrc),
    "nxs": ("scan.nxs", as_nexus),
    "nxs of others": ("scan.nxs", as_other_nexus),
    "emd": ("scan.emd", as_emd),
    "h5": ("scan.h5", as_plain_h5),
    "h5 of several": ("scan.h5", as_chosen_h5),
    "h5 of five axes": ("scan.hdf5", as_five_axes),
    "dectris": ("scan_master.h5", as_dectris),
    "py4DSTEM": ("scan.h5", as_cube),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", FORMATS)
def test_patterns_come_through_bit_for_bit(kind: str, tmp_path: Path) -> None:
    name, write = FORMATS[kind]
    options = write(tmp_path / name)
    ingest(tmp_path / name, tmp_path / "store.h5", centre="7.5,7.5", **options)
    expected = counts()
    if kind == "dectris":
        expected[..., 4, 11] = 0
    with Store.open(tmp_path / "store.h5") as store:
        np.testing.assert_array_equal(store.patterns.reshape(SHAPE), expected)
        assert store.geometry.kv == 200
        assert store.scan_shape == SHAPE[:2]


def test_two_readers_of_an_hdf5_file_agree(tmp_path: Path) -> None:
    """The blocks that hyperspy files are read in here hold what those of rosettasciio hold."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset("d", data=counts(), chunks=(4, 2, 16, 16))
        small = lazily(data, (1, 1)).rechunk((1, 2, 16, 16))
        assert _whole_pieces(small) is small  # not an array of a file alone
        np.testing.assert_array_equal(lazily(data, (4, 2)).compute(), small.compute())


@pytest.mark.parametrize(
    "index",
    [(slice(1, 3), slice(None)), (2, slice(1, 4)), (slice(None), 3), (4, 4), (slice(0, 6, 2), slice(4, None, -2))],
)
def test_frames_are_indexed_as_arrays_are(index: tuple[Any, ...]) -> None:
    flat = counts().reshape(-1, 16, 16)
    frames = Frames(SHAPE, flat.dtype, lambda first, end: flat[first:end])
    np.testing.assert_array_equal(frames[index], counts()[index])
    np.testing.assert_array_equal(lazily(frames)[index].compute(), counts()[index])


def test_calibration_of_a_data_cube(tmp_path: Path) -> None:
    as_cube(tmp_path / "cube.h5")
    scan = read_scan(tmp_path / "cube.h5")
    assert scan.scale_inv_angstrom(None) == pytest.approx(0.02)
    assert (scan.step_nm, scan.centre_px, scan.rotation_deg, scan.flip) == ((5, 5), (7.5, 7.5), 12.5, True)


def test_genuine_py4dstem_and_prismatic_files(shared_data: Path) -> None:
    cube = read_scan(shared_data / "formats/emd/py4DSTEM_size2x3x4x5.h5")
    assert cube.data.shape == (2, 3, 4, 5)
    assert cube.scale_inv_angstrom(None) == pytest.approx(0.044251566616)
    assert (cube.step_nm, cube.flip) == (pytest.approx((0.126796875,) * 2), False)
    simulated = shared_data / "formats/emd/Si100_4D.emd"
    depth = "4DSTEM_simulation/data/datacubes/CBED_array_depth0001/datacube"
    found = read_scan(simulated, dataset=depth)
    with h5py.File(simulated) as file:
        np.testing.assert_array_equal(found.data.compute(), file[depth][()])
    assert found.kv == 100
    assert found.scale_inv_angstrom(None) == pytest.approx(1 / 5.43, rel=1e-4)  # a simulated cell of Si is one pixel
    assert found.centre_px == pytest.approx((4, 4))


def test_genuine_raw_of_empad_is_found_by_its_header_or_its_name(shared_data: Path, tmp_path: Path) -> None:
    genuine = shared_data / "formats/empad/scan_x4_y4.raw"
    by_header, bare = read_scan(genuine), tmp_path / "scan_x4_y4.raw"
    bare.write_bytes(genuine.read_bytes())
    alone = read_scan(bare)
    assert (by_header.kv, alone.kv) == (300, None)
    np.testing.assert_array_equal(alone.data.compute(), by_header.data.compute())
    assert by_header.parts == (genuine,)
    with pytest.raises(UserError, match=r"holds 10 frames and no scan shape"):
        read_scan(shared_data / "formats/empad/series_x10.raw")


def test_the_fingerprint_covers_every_file_of_a_scan(tmp_path: Path) -> None:
    options = as_dectris(tmp_path / "a_master.h5")
    ingest(tmp_path / "a_master.h5", tmp_path / "s.h5", centre="7.5,7.5", **options)
    parts = [tmp_path / f"a_data_00000{number}.h5" for number in (1, 2)]
    with Store.open(tmp_path / "s.h5") as store:
        first = store.attrs["origin_sha256"]
    assert first == ScanHash(tmp_path / "a_master.h5", parts).finish()
    with h5py.File(parts[1], "r+") as file:
        file.attrs["changed"] = True
    assert ScanHash(tmp_path / "a_master.h5", parts).finish() != first


def wrong(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_scan(path, **options).data.compute()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    as_npy(tmp_path / "whole.npy")
    whole = (tmp_path / "whole.npy").read_bytes()
    cases = {
        "short.npy": (whole[:-100], "the file is truncated, 100 bytes are missing"),
        "text.npy": (b"1 2 3 4 5 6 7 8 9 10", "it is no whole numpy file"),
        "head.npy": (whole[:20], "it is no whole numpy file"),
        "empty.h5": (b"", "empty.h5 is empty"),
        "text.h5": (b"text, not HDF5", "it is no HDF5 file"),
        "text.npz": (b"text, not zip", "cannot be read"),
        "other.raw": (bytes(1000), "no .xml in its folder names it"),
        "nameless": (b"text without a name", "does not begin as HDF5 or numpy files do"),
    }
    for name, (content, words) in cases.items():
        (tmp_path / name).write_bytes(content)
        assert words in wrong(tmp_path / name)
    np.save(tmp_path / "objects.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    assert "which are no counts" in wrong(tmp_path / "objects.npy")
    np.save(tmp_path / "waves.npy", np.ones((2, 2, 4, 4), dtype=complex))
    assert "holds complex128 pixels, which are no counts" in wrong(tmp_path / "waves.npy")
    with h5py.File(tmp_path / "spectra.h5", "w") as file:
        file["spectra"] = np.ones((5, 100))
    assert "no array in it has 3 axes or more (it holds spectra)" in wrong(tmp_path / "spectra.h5")
    (tmp_path / "a.hdr").write_text("HDR")
    (tmp_path / "a.mib").touch()
    assert wrong(tmp_path / "a.hdr") == "a.hdr is only the header of a scan; give a.mib"
    as_dectris(tmp_path / "lost_master.h5")
    (tmp_path / "lost_data_000002.h5").unlink()
    assert "lost_master.h5 needs 'lost_data_000002.h5', which cannot be opened" in wrong(
        tmp_path / "lost_master.h5", shape=(6, 5)
    )


def test_a_file_without_ending_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    for name, write in (("a.npy", as_npy), ("a.npz", as_npz), ("a.h5", as_plain_h5)):
        write(tmp_path / name)
        bare = (tmp_path / name).rename(tmp_path / f"bare-{name[2:]}")
        np.testing.assert_array_equal(read_scan(bare).data.compute(), counts())


def test_dataset_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    as_chosen_h5(tmp_path / "two.h5")
    command = ["ingest", str(tmp_path / "two.h5"), "--out", str(tmp_path / "s.h5"), "--kv", "200", "--scale", "0.05"]
    assert cli.main(command) == 2
    assert "give --dataset PATH: a (6 x 5" in capsys.readouterr().err
    assert cli.main([*command, "--dataset", "b/c"]) == 0
    assert "dataset b/c" in capsys.readouterr().out


MEMORY = """
import pathlib, re, sys
from stemtune.dataset.ingest import ingest
ingest(sys.argv[1], sys.argv[2], kv=200, scale=0.02, centre="63.5,63.5", keep=sys.argv[3], size=int(sys.argv[4]))
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) // 1024)
"""


def peak_mib(scan: Path, keep: str, size: int) -> int:
    """Peak memory in MiB of a process that ingests a scan."""
    command = [sys.executable, "-c", MEMORY, str(scan), str(scan.with_suffix(".store.h5")), keep, str(size)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return int(done.stdout)


def sparse_npy(path: Path, rows: int) -> Path:
    """A file of `rows` x 256 patterns of 128 x 128 uint16, 8 MiB a row, nearly all of it a hole in the file."""
    array = np.lib.format.open_memmap(path, "w+", np.uint16, (rows, 256, 128, 128))
    array[0, 0], array[-1, -1] = 1, 2
    return path


@pytest.mark.slow
def test_memory_does_not_grow_with_the_scan(tmp_path: Path) -> None:
    """Read, hashed and resampled from end to end: 512 MiB take no more than 64 do."""
    small, large = (peak_mib(sparse_npy(tmp_path / f"{rows}.npy", rows), ":,:", 8) for rows in (8, 64))
    assert large < 400
    assert large < small + 64
