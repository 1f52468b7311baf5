"""Files that another process is still writing: what is whole of them, and who holds them for writing."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scan_writer import write_in_background as writer

from stemtune.live import growing_file
from stemtune.live.growing_file import NotReady, open_growing
from stemtune.scan.readers import read_scan

HOLD = "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"


@pytest.mark.parametrize("kind", ["npy", "mib"])
def test_half_a_frame_is_waited_for(kind: str, small: Path, tmp_path: Path) -> None:
    counts, path = np.load(small), tmp_path / f"scan.{kind}"
    assert writer(small, path, kind, 1e4).wait() == 0
    whole = path.read_bytes()
    frame = 64 * 64 * 2 + (384 if kind == "mib" else 0)
    start = len(whole) - 60 * frame
    path.write_bytes(whole[: start // 2])
    file = open_growing(path)
    assert file is not None
    with pytest.raises(NotReady):
        file.look()
    for size, frames in ((start + 5 * frame - 1, 4), (start + 5 * frame, 5), (len(whole) - 7, 59), (len(whole), 60)):
        path.write_bytes(whole[:size])
        file.look()
        assert (file.frames, file.whole) == (frames, frames == 60)
    np.testing.assert_array_equal(file.read(7, 23), counts.reshape(60, 64, 64)[7:23])
    read = read_scan(path)  # rosettasciio's way through a .mib
    assert read.shape == (6, 10)
    np.testing.assert_array_equal(file.scan(6).data.compute(), read.data.compute())


def test_frames_of_a_file_of_full_size_count_when_the_next_has_begun(small: Path, tmp_path: Path) -> None:
    counts = np.load(small)
    mapped = np.lib.format.open_memmap(tmp_path / "scan.npy", "w+", counts.dtype, counts.shape)
    file = open_growing(tmp_path / "scan.npy", stall_s=3)
    assert file is not None
    seen = []
    for written in (0, 1, 4):
        mapped.reshape(60, 64, 64)[:written] = counts.reshape(60, 64, 64)[:written]
        mapped.flush()
        file.look()
        seen.append(file.frames)
    assert seen == [0, 0, 3]
    mapped[:] = counts
    mapped.flush()
    file.look()
    assert (file.frames, file.whole) == (59, False)
    time.sleep(1.1)
    file.look()
    assert file.whole


def test_a_file_of_full_size_is_hardly_read_while_nothing_comes(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blank frames between others are found all the same."""
    counts = np.zeros((20, 40, 64, 64), np.uint16)
    mapped = np.lib.format.open_memmap(tmp_path / "scan.npy", "w+", counts.dtype, counts.shape)
    file = open_growing(tmp_path / "scan.npy", stall_s=60)
    assert file is not None
    file.look()
    read: list[int] = []
    whole = file.read
    monkeypatch.setattr(file, "read", lambda first, end: (read.append(end - first), whole(first, end))[1])
    for _ in range(20):
        file.look()
    assert sum(read) <= 20 * 4
    assert file.frames == 0
    mapped.reshape(800, 64, 64)[:100] = 1
    mapped.reshape(800, 64, 64)[150] = 1
    mapped.flush()
    file.look()
    assert file.frames in (99, 150)
    monkeypatch.setattr(growing_file, "QUIET_S", 0.0)
    file.look()
    assert file.frames == 150


@pytest.mark.parametrize("kind", ["swmr", "counted", "closing"])
def test_hdf5_is_read_while_another_process_writes_it(kind: str, small: Path, tmp_path: Path) -> None:
    path, seen = tmp_path / "scan.h5", set()
    process = writer(small, path, kind, 60)
    while not path.exists():
        time.sleep(0.02)
    file = open_growing(path, (6, 10))
    assert file is not None
    until = time.monotonic() + 60
    while not file.whole and time.monotonic() < until:
        try:
            file.look()
            if file.frames:
                file.read(file.frames - 1, file.frames)
        except (NotReady, FileNotFoundError):
            pass
        seen.add(file.frames)
        time.sleep(0.03)
    assert process.wait() == 0  # what looks on has not made it fail
    assert file.frames == 60
    assert len(seen) > 3
    np.testing.assert_array_equal(file.read(0, 60), np.load(small).reshape(60, 64, 64))


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="Linux alone has this list")
def test_the_same_inode_of_another_device_is_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "scan.h5"
    file.write_bytes(b"frames")
    assert not growing_file._written_now(file)
    writer = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdout is not None and writer.stdout.readline()
        if str(file.stat().st_ino) not in Path("/proc/locks").read_text():
            pytest.skip("this system does not list the locks of other processes")
        assert growing_file._written_now(file)
        monkeypatch.setattr(growing_file, "_device", lambda path: "ff:ff")
        assert not growing_file._written_now(file)
    finally:
        writer.communicate("\n")
