"""Ctrl-C, the real signal to the real process: one line, exit code 130, no file and no process left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_bad_input import MICROSCOPE, here, sound, write_scan

__all__ = ["MICROSCOPE", "here", "sound"]

LONG = {
    "simulate": ["simulate", "linio2", "--patterns", "400000", "--out", "new.h5"],
    "simulate with workers": ["simulate", "linio2", "--patterns", "400000", "--workers", "2", "--out", "new.h5"],
    "ingest": ["ingest", "large.hspy", "--out", "new.h5", "--size", "128"],
    "train": ["train", "--store", "train.h5", "--set", "train.epochs=9999", "--set", "model.width=8", "--out", "new"],
    "predict": ["predict", "large.hspy", "--model", "model", "--out", "new", "--size", "128"],
    "demo": ["demo", "--out", "demo"],
}
LONG["train with workers"] = [*LONG["train"], "--workers", "2"]
SAID = {"train": "epoch 2/", "train with workers": "epoch 2/", "demo": "simulate"}
"""What a command prints when it is at work; of the others the unfinished output is seen."""

MAY_STAY = {"demo", "demo/.stemtune-demo", "demo/space.yaml", "temporary/torchinductor_root"}
"""The demo's folder is marked as its own and used again; the last is torch's own cache."""


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def at_work(case: str, here: Path, before: set[str]) -> bool:
    if case in SAID:
        return SAID[case] in (here / "said").read_text()
    return names(here) != before


def ended(group: int, seconds: float) -> bool:
    """Wait for the last process of a group; Python's own tracker of semaphores ends a moment after its parent."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG)
def test_ctrl_c(case: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scan(here / "large.hspy", shape=(128, 120))
    (here / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(here / "temporary"))
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    with (here / "said").open("wb") as said, (here / "error").open("wb") as error:
        before = names(here)
        command = [sys.executable, "-m", "stemtune.cli", *LONG[case]]
        process = subprocess.Popen(command, stdout=said, stderr=error, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not at_work(case, here, before) and time.monotonic() < deadline:
            assert process.poll() is None, (here / "error").read_text()
            time.sleep(0.05)
        time.sleep(1.0)
        assert process.poll() is None, (here / "error").read_text()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the command
        code = process.wait(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert code == 130, (here / "error").read_text()
    assert (here / "error").read_text().splitlines() == [
        "stemtune: interrupted; nothing half-written was left under a final name"
    ]
    left = names(here) - before - MAY_STAY
    assert not left
    assert ended(process.pid, 10)
