"""Ctrl-C and SIGTERM, the real signal to the real process: one line, exit code 130 or 143, no file, no process left.

A simulation leaves its unfinished file, and the same command resumes it. A terminal sends Ctrl-C to every process
of a command; SIGTERM comes to all of them from a batch system, to the first alone from `kill`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import pytest
from test_bad_input import MICROSCOPE, here, inputs, write_scan

from stemtune.config import Config
from stemtune.dataset.simulate import simulate_store

__all__ = ["MICROSCOPE", "here", "inputs"]

LONG = {
    "ingest": ["ingest", "large.hspy", "--out", "new.h5", "--size", "128"],
    "train": ["train", "--store", "train.h5", "--set", "train.epochs=9999", "--set", "model.width=8", "--out", "new"],
    "predict": ["predict", "large.hspy", "--model", "model", "--out", "new", "--size", "128"],
    "label": ["label", "large.h5", "--out", "new.h5"],
    "demo": ["demo", "--out", "demo"],
}
LONG["train with workers"] = [*LONG["train"], "--workers", "2"]
SAID = {"train": "epoch 2/", "train with workers": "epoch 2/", "demo": "simulate"}
"""What a command prints when it is at work; of the others the unfinished output, or a line of progress, is seen."""

PROGRESS = re.compile(r"\d\d:\d\d:\d\d  ")

MAY_STAY = {"demo", "demo/.stemtune-demo", "demo/space.yaml", "demo/train.h5.part", "torchinductor_root"}
"""The demo's folder is marked as its own and used again; the last is torch's own cache."""


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def at_work(case: str, here: Path, before: set[str]) -> bool:
    if case in SAID:
        return SAID[case] in (here / "said").read_text()
    return names(here) != before or bool(PROGRESS.search((here / "error").read_text()))


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


def begun(command: list[str], here: Path) -> subprocess.Popen[bytes]:
    with (here / "said").open("wb") as said, (here / "error").open("wb") as error:
        # Not `python -m`: it dies of SIGINT where an import is interrupted just when it makes a dataclass.
        program = str(Path(sys.executable).with_name("stemtune"))
        return subprocess.Popen([program, *command], stdout=said, stderr=error, start_new_session=True)


SENT: dict[str, tuple[signal.Signals, Callable[[int, int], None]]] = {
    "Ctrl-C": (signal.SIGINT, os.killpg),
    "SIGTERM to all": (signal.SIGTERM, os.killpg),
    "SIGTERM": (signal.SIGTERM, os.kill),
}


def interrupted(
    process: subprocess.Popen[bytes], here: Path, working: Callable[[], bool], how: str = "Ctrl-C"
) -> list[str]:
    """Send the signal once the process is `working`, and return what it says to that."""
    number, send = SENT[how]
    try:
        deadline = time.monotonic() + 120
        while not working() and time.monotonic() < deadline:
            assert process.poll() is None, (here / "error").read_text()
            time.sleep(0.05)
        time.sleep(1.0)
        assert process.poll() is None, (here / "error").read_text()
        send(process.pid, number)
        code = process.wait(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert code == 128 + number, (here / "error").read_text()
    assert ended(process.pid, 10)
    return [line for line in (here / "error").read_text().splitlines() if not PROGRESS.match(line)]


@pytest.fixture
def short() -> Iterator[Path]:
    """A temporary folder whose name is short: in pytest's own, the names of Ray's sockets would be too long."""
    with tempfile.TemporaryDirectory(prefix="st") as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize("how", SENT)
@pytest.mark.parametrize("case", LONG)
def test_interrupts(case: str, how: str, here: Path, short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scan(here / "large.hspy", shape=(128, 120))
    if case == "label":
        simulate_store("linio2", here / "large.h5", 6000, Config.from_flat(MICROSCOPE).simulate, 0)
    (here / "said").touch()
    (here / "error").touch()
    monkeypatch.setenv("TMPDIR", str(short))
    monkeypatch.setenv("STEMTUNE_PROGRESS_S", "0.5")
    before = names(here)
    process = begun(LONG[case], here)
    said = interrupted(process, here, lambda: at_work(case, here, before), how)
    kept = " patterns are kept in 'train.h5.part', and the same command goes on from there"
    assert said == ["stemtune: interrupted; nothing half-written was left under a final name"] or (
        case == "demo" and len(said) == 1 and said[0].endswith(kept)
    )
    assert not names(here) - before - MAY_STAY
    assert not names(short) - MAY_STAY


SIMULATE = ["simulate", "linio2", "--size", "32", "--scale", "0.05", "--seed", "3", "--out", "new.h5"]
SIMULATIONS = {
    "kinematic": ["--patterns", "12000", "--size", "64"],
    "workers": ["--patterns", "40000", "--size", "64", "--workers", "2"],
    "dynamical": ["--patterns", "3000", "--dynamical", "--set", "simulate.beams=20", "--tilts", "2"],
    "scan": ["--scan", "60,60", "--dynamical", "--set", "simulate.beams=20", "--tilts", "2", "--overlap", "0.5"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "how"), [*((case, "Ctrl-C") for case in SIMULATIONS), ("workers", "SIGTERM to all")])
def test_ctrl_c_in_a_simulation_and_the_same_command_again(case: str, how: str, here: Path) -> None:
    """The patterns begin to fill the file; after Ctrl-C they are kept, and in the end all is as if in one go."""
    command, part = [*SIMULATE, *SIMULATIONS[case]], here / "new.h5.part"

    def filling() -> bool:
        if not part.exists():
            return False
        with h5py.File(part, locking=False) as file:
            return bool(file["patterns"][0].any())

    (line,) = interrupted(begun(command, here), here, filling, how)
    said = r"stemtune: interrupted; ([\d,]+) of ([\d,]+) patterns are kept in 'new\.h5\.part', and the same command"
    found = re.fullmatch(said + " goes on from there", line)
    assert found
    kept, whole = (int(number.replace(",", "")) for number in found.groups())
    assert 0 < kept < whole and not (here / "new.h5").exists()
    assert begun(command, here).wait(timeout=300) == 0, (here / "error").read_text()
    assert f"resuming 'new.h5.part': {kept:,} of {whole:,}" in (here / "error").read_text()
    assert not part.exists()
    content = (here / "new.h5").read_bytes()
    assert begun(command, here).wait(timeout=300) == 0
    assert "going on" not in (here / "error").read_text()
    assert (here / "new.h5").read_bytes() == content
