"""Whether another process holds a file for writing is told by device and inode: two devices have the same inodes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stemtune.live import growing_file

HOLD = "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"


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
