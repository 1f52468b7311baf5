"""Simulations that are cut off and resumed: the result is the same, byte for byte, and nothing else is touched."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from stemtune.config import Config
from stemtune.dataset.simulate import BLOCK, simulate_polycrystal, simulate_store
from stemtune.dataset.store import Store
from stemtune.dataset.writer import ResumableWriter
from stemtune.errors import Interrupted, UserError

COARSE = {"size": 24, "scale": 0.12, "dose": 2000}
DYNAMICAL = {"physics": "bloch", "beams": 12, "tilts": 1, "size": 16, "scale": 0.05, "absorption": "none"}
N = 2 * BLOCK + 40


def settings(**given: object) -> Any:
    return Config.from_flat({f"simulate.{key}": value for key, value in {**COARSE, **given}.items()}).simulate


def random(out: Path, **given: object) -> Path:
    return simulate_store("linio2", out, N, settings(**given), seed=7)


def scan(out: Path, **given: object) -> Path:
    return simulate_polycrystal("linio2", out, (24, 24), 5, settings(**given), seed=7)


CASES: dict[str, tuple[Callable[..., Path], dict[str, object]]] = {
    "kinematic": (random, {}),
    "dynamical": (random, DYNAMICAL),
    "overlapping": (random, {"overlap": 0.5, "overlap_grains": 3}),
    "scan": (scan, {"overlap": 1}),
}


def interrupt_after(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a real SIGINT come once so many blocks are written."""
    write, count = ResumableWriter.write, 0

    def counting(self: ResumableWriter, *arguments: Any, **columns: Any) -> None:
        nonlocal count
        write(self, *arguments, **columns)
        count += 1
        if count == blocks:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ResumableWriter, "write", counting)


def cut_off(out: Path, make: Callable[..., Path] = random, **given: object) -> Path:
    """Interrupt a simulation after its first block, and return the unfinished file."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(1, patch)
        with pytest.raises(Interrupted):
            make(out, **given)
    return out.with_name(out.name + ".part")


@pytest.mark.parametrize("case", CASES)
def test_ctrl_c_and_the_same_again(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, given = CASES[case]
    whole, out = make(tmp_path / "whole.h5", **given), tmp_path / "again.h5"
    for blocks in (1, 1):  # twice: what was resumed can be cut off too
        with monkeypatch.context() as patch:
            interrupt_after(blocks, patch)
            with pytest.raises(Interrupted) as stop:
                make(out, **given)
        assert "again.h5.part', and the same command goes on" in str(stop.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["again.h5.part", "whole.h5"]
    assert f"interrupted; {2 * BLOCK} of " in str(stop.value)
    capsys.readouterr()
    make(out, **given)
    assert f"resuming '{out}.part': {2 * BLOCK} of" in capsys.readouterr().err
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.h5", "whole.h5"]


KILLED = """
import os, signal, sys
from stemtune.config import Config
from stemtune.dataset import simulate, writer
writer._KEEP_EVERY_S = 0.0
write = writer.ResumableWriter.write
def killing(self, start, *arguments, **columns):
    if start == simulate.BLOCK:
        self._file["patterns"][start:] = 7  # half-written: on the disk, but not marked as done
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, start, *arguments, **columns)
writer.ResumableWriter.write = killing
if __name__ == "__main__":
    settings = Config.from_flat({SETTINGS}).simulate
    simulate.simulate_store("linio2", sys.argv[1], {N}, settings, seed=7, workers=2)
"""


def test_a_kill_and_the_same_again(tmp_path: Path) -> None:
    """SIGKILL between two blocks; nothing can be tidied up, and the worker processes leave by themselves."""
    flat = {f"simulate.{key}": value for key, value in COARSE.items()}
    script = tmp_path / "killed.py"
    script.write_text(KILLED.replace("{SETTINGS}", repr(flat)).replace("{N}", str(N)))
    out, folder = tmp_path / "out" / "a.h5", tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, str(script), str(out)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    _, said = process.communicate(timeout=400)  # the workers hold the pipe: it closes when the last of them is gone
    assert process.returncode == -signal.SIGKILL, said.decode()
    assert [path.name for path in folder.iterdir()] == ["a.h5.part"]
    with pytest.raises(UserError, match="is an unfinished store"):
        Store.open(folder / "a.h5.part")
    assert random(out).read_bytes() == random(tmp_path / "whole.h5").read_bytes()
    assert [path.name for path in folder.iterdir()] == ["a.h5"]


def test_a_crash_before_the_renaming(tmp_path: Path) -> None:
    out = random(tmp_path / "a.h5")
    content = out.read_bytes()
    out.rename(tmp_path / "a.h5.part")
    assert random(out).read_bytes() == content


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"dose": 2001}, r"`simulate.dose` is 2000 there and 2001 here"),
        ({"overlap": 0.5}, r"`simulate.overlap` is 0.0 there and 0.5 here"),
        ({**DYNAMICAL, "size": 24, "scale": 0.12}, r"`simulate.physics` is kinematic there and bloch here"),
    ],
)
def test_other_settings_are_refused(given: dict[str, object], says: str, tmp_path: Path) -> None:
    part = cut_off(tmp_path / "a.h5")
    before = part.read_bytes()
    with pytest.raises(UserError, match=says) as refusal:
        random(tmp_path / "a.h5", **given)
    assert "give --restart to begin anew" in str(refusal.value) and "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5.part"] and part.read_bytes() == before


def test_another_seed_number_or_crystal_is_refused(tmp_path: Path) -> None:
    part = cut_off(tmp_path / "a.h5")
    cif = tmp_path / "other.cif"
    with h5py.File(part) as file:
        cif.write_text(str(file.attrs["phases_cif"][0]).replace("2.878", "2.9"))
    for arguments, says in [(("linio2", N + 1), "`patterns` is 552 there and 553 here"), ((cif, N), "other.cif here")]:
        with pytest.raises(UserError, match=says):
            simulate_store(arguments[0], tmp_path / "a.h5", arguments[1], settings(), seed=7)
    with pytest.raises(UserError, match="`seed` is 7 there and 8 here"):
        simulate_store("linio2", tmp_path / "a.h5", N, settings(), seed=8)


def test_a_crystal_that_changed_under_its_name_is_refused(tmp_path: Path) -> None:
    cif = tmp_path / "mine.cif"
    with h5py.File(random(tmp_path / "b.h5")) as file:
        cif.write_text(file.attrs["phases_cif"][0])
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(1, patch)
        with pytest.raises(Interrupted):
            simulate_store(cif, tmp_path / "a.h5", N, settings())
    cif.write_text(cif.read_text().replace("2.878", "2.9"))
    with pytest.raises(UserError, match="other settings .another crystal."):
        simulate_store(cif, tmp_path / "a.h5", N, settings())


def test_restart_begins_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut_off(tmp_path / "a.h5", dose=500)
    simulate_store("linio2", tmp_path / "a.h5", N, settings(), seed=7, restart=True)
    assert "going on" not in capsys.readouterr().err
    assert (tmp_path / "a.h5").read_bytes() == random(tmp_path / "b.h5").read_bytes()
    assert not (tmp_path / "a.h5.part").exists()


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("kind", ["text", "foreign", "folder"])
def test_what_is_no_unfinished_store_is_never_deleted(kind: str, restart: bool, tmp_path: Path) -> None:
    part = tmp_path / "a.h5.part"
    if kind == "text":
        part.write_text("years of work")
    elif kind == "folder":
        part.mkdir()
    else:
        with h5py.File(part, "w") as file:
            file["spectrum"] = [1, 2, 3]
    before = part.read_bytes() if part.is_file() else None
    with pytest.raises(UserError, match=r"a\.h5\.part'.*; remove it") as refusal:
        simulate_store("linio2", tmp_path / "a.h5", N, settings(), restart=restart)
    assert "\n" not in str(refusal.value)
    assert (part.read_bytes() if part.is_file() else None) == before and len(list(tmp_path.iterdir())) == 1


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    part = cut_off(tmp_path / "a.h5")
    hold = "import sys, h5py\nf = h5py.File(sys.argv[1], 'r+')\nprint('held', flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(part)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        other.stdout.readline()
        for restart in (False, True):
            with pytest.raises(UserError, match="is being written by another process"):
                simulate_store("linio2", tmp_path / "a.h5", N, settings(), seed=7, restart=restart)
        other.stdin.close()
    random(tmp_path / "a.h5")


def test_a_full_disk_is_said_and_what_is_there_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is the one that h5py raises on a full disk."""
    write = ResumableWriter.write

    def full(self: ResumableWriter, start: int, *arguments: Any, **columns: Any) -> None:
        if start:
            raise OSError(errno.ENOSPC, "Can't synchronously write data")
        write(self, start, *arguments, **columns)

    with monkeypatch.context() as patch:
        patch.setattr(ResumableWriter, "write", full)
        with pytest.raises(UserError, match=f"the disk is full; {BLOCK} of {N} patterns .* are kept: make room"):
            random(tmp_path / "a.h5")
    assert random(tmp_path / "a.h5").read_bytes() == random(tmp_path / "b.h5").read_bytes()


def test_an_unfinished_store_keeps_what_was_there(tmp_path: Path) -> None:
    """The store that is to be replaced stays until the new one is whole."""
    out = random(tmp_path / "a.h5", dose=100)
    before = out.read_bytes()
    cut_off(out)
    assert out.read_bytes() == before
    random(out)
    with Store.open(out) as store:
        assert np.median(store.patterns.sum(axis=(1, 2))) > 1000
