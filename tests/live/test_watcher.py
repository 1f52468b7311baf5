"""Scans that another process writes, answered as they land: nothing lost, nothing twice, the map that predict makes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from listening import listening
from scan_writer import write_in_background as writer

from stemtune import cli
from stemtune.crystal_map.io import read_map_h5
from stemtune.errors import UserError
from stemtune.learning.checkpoint import load_model
from stemtune.live import watcher
from stemtune.live.session import LiveOptions, LiveScan
from stemtune.live.status_page import ScanStatus, StatusBoard, serve_page
from stemtune.live.watcher import Watch, watch
from stemtune.map_folder.predict import predict

GIVEN = {"kv": 200.0, "scale": 0.05, "centre": "31.5,31.5"}


def same_maps(found: Path, wanted: Path) -> None:
    """Compare two map folders: the same files, the same answers."""
    assert {path.name for path in found.iterdir()} == {path.name for path in wanted.iterdir()}
    one, other = read_map_h5(found), read_map_h5(wanted)
    assert one.shape == other.shape
    np.testing.assert_array_equal(one.indexed, other.indexed)
    np.testing.assert_allclose(one.answer_confidence, other.answer_confidence, atol=1e-4)
    alike = np.abs((one.answers[:, 0] * other.answers[:, 0]).sum(axis=-1))
    assert np.nanmin(alike) > 1 - 1e-6
    for name in ("origin_sha256", "geometry", "phase", "origin_centre_px"):
        assert one.attrs[name] == other.attrs[name], name


@pytest.mark.parametrize("centre", ["auto", pytest.param("31.5,31.5", marks=pytest.mark.slow)])
def test_scan_is_answered_while_it_is_written(centre: str, small: Path, model: Path, tmp_path: Path) -> None:
    """The writer stops for a while amid frame 53; the centre is found in the first rows, and then in all."""
    (tmp_path / "scans").mkdir()
    given = {**GIVEN, "centre": centre}
    watching = Watch(
        tmp_path / "scans", tmp_path / "maps", LiveOptions(load_model(model), str(model), calibration=given)
    )
    process = writer(small, tmp_path / "scans" / "scan.npy", "npy", 200, 53, 1.0)
    seen: set[int] = set()
    until = time.monotonic() + 120
    while time.monotonic() < until:
        watching.turn()
        entry = watching.entries.get("scan.npy")
        if entry is not None and entry.scan is not None:
            seen.add(entry.scan.done)
            assert entry.scan.done <= entry.scan.landed <= 60
        if entry is not None and entry.state == "done":
            break
        time.sleep(0.02)
    watching.close()
    assert process.wait() == 0
    assert watching.entries["scan.npy"].state == "done"
    assert 50 in seen  # and not 53
    assert not list((tmp_path / "maps" / ".live").glob("*/*.npz"))
    predict(tmp_path / "scans" / "scan.npy", model, tmp_path / "predicted", batch=20, **given)
    same_maps(tmp_path / "maps" / "scan", tmp_path / "predicted")


def test_stalled_scan_is_reported_and_goes_on_later(
    small: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "scan.npy"
    assert writer(small, path, "npy", 1e4).wait() == 0
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 21 * 8192 - 4000])  # 38 frames and a half
    (tmp_path / "bad.npy").write_bytes(b"no scan")
    (tmp_path / "notes.txt").write_text("no scan either")
    kept = {"shape": None, "port": None, **GIVEN}
    states = watch(tmp_path, model, tmp_path / "maps", once=True, stall_s=1.5, **kept)
    assert states == {"bad.npy": "failed", "scan.npy": "stalled"}
    said = capsys.readouterr().err
    assert "scan.npy has not grown for 1.5 s: 38 of 60 frames are there" in said
    assert "bad.npy cannot be read" in said
    assert read_map_h5(tmp_path / "maps" / "scan").shape == (3, 10)
    answered = {entry.name: entry.stat().st_mtime_ns for entry in (tmp_path / "maps/.live/scan").glob("*.npz")}
    assert "000000000-000000030.npz" in answered
    path.write_bytes(whole)
    states = watch(tmp_path, model, tmp_path / "maps", once=True, stall_s=1.5, **kept)
    assert states == {"bad.npy": "failed", "scan.npy": "done"}
    predict(path, model, tmp_path / "predicted", **GIVEN)
    same_maps(tmp_path / "maps" / "scan", tmp_path / "predicted")


@pytest.mark.parametrize("stage", ["reading", "mapping", "listing"])
def test_whatever_one_scan_raises_the_others_go_on(
    stage: str,
    small: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No permission, a stale handle, a full disk: that file is reported, and tried again by the next watch."""
    for name in ("bad", "good"):
        np.save(tmp_path / f"{name}.npy", np.load(small))

    def fails(self: LiveScan, *arguments: Path) -> object:
        if self.file.path.name == "bad.npy":
            raise OSError(errno.ESTALE, "Stale file handle")
        return (turn if stage == "reading" else finish)(self, *arguments)

    def unlisted(self: Path) -> bool:
        if self.name == "bad.npy":
            raise PermissionError(errno.EACCES, "Permission denied")
        return is_file(self)

    turn, finish, is_file = LiveScan.turn, LiveScan.finish, Path.is_file
    command = ["watch", str(tmp_path), "--model", str(model), "--out", str(tmp_path / "maps"), "--once", "--no-page"]
    command += ["--kv", "200", "--scale", "0.05", "--centre", "31.5,31.5", "--stall", "3"]
    with monkeypatch.context() as broken:
        if stage == "listing":
            broken.setattr(Path, "is_file", unlisted)
        else:
            broken.setattr(LiveScan, "turn" if stage == "reading" else "finish", fails)
        assert cli.main(command) == 2
    said = capsys.readouterr()
    assert "bad.npy: failed" in said.out
    assert "good.npy: done" in said.out
    assert said.err.splitlines()[-1] == "stemtune: 1 of 2 scans failed (bad.npy); see above"
    log = tmp_path / "maps" / ".live" / "errors.log"
    assert f"the traceback is in {log}" in said.err
    assert "Traceback" in log.read_text()
    assert read_map_h5(tmp_path / "maps" / "good").shape == (6, 10)
    assert cli.main(command) == 0
    assert read_map_h5(tmp_path / "maps" / "bad").shape == (6, 10)


def test_what_version_0_1_noted_as_failed_is_tried_again(small: Path, model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", np.load(small))
    watch(tmp_path, model, tmp_path / "maps", once=True, port=None, **GIVEN)
    known = tmp_path / "maps" / ".live" / "scans.json"
    shutil.rmtree(tmp_path / "maps" / "scan")
    known.write_text(known.read_text().replace('"done"', '"failed"'))
    assert watch(tmp_path, model, tmp_path / "maps", once=True, port=None, **GIVEN) == {"scan.npy": "done"}
    assert read_map_h5(tmp_path / "maps" / "scan").shape == (6, 10)


def test_a_folder_that_cannot_be_listed_is_no_success(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unlisted(self: Path) -> Iterator[Path]:
        if self == tmp_path / "scans":
            raise PermissionError(errno.EACCES, "Permission denied")
        return iterdir(self)

    (tmp_path / "scans").mkdir()
    iterdir = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", unlisted)
    command = ["watch", str(tmp_path / "scans"), "--model", str(model), "--out", str(tmp_path / "maps")]
    assert cli.main([*command, "--once", "--no-page"]) == 2
    assert "cannot be listed (Permission denied)" in capsys.readouterr().err.splitlines()[-1]


def test_a_full_disk_does_not_end_the_watch(
    small: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is known of the scans cannot be written down; they are answered all the same."""
    np.save(tmp_path / "scan.npy", np.load(small))

    @contextlib.contextmanager
    def full(path: Path) -> Iterator[Path]:
        raise OSError(errno.ENOSPC, "No space left on device")
        yield path

    monkeypatch.setattr(watcher, "whole_file", full)
    states = watch(tmp_path, model, tmp_path / "maps", once=True, port=None, **GIVEN)
    assert states == {"scan.npy": "done"}
    assert capsys.readouterr().err.count("scans.json cannot be written") == 1


def test_page_shows_the_scans_to_this_machine_only(tmp_path: Path) -> None:
    picture = tmp_path / "map.png"
    picture.write_bytes(b"picture")
    board = StatusBoard("a <title>")
    board.show(
        [ScanStatus("a & b.npy", "growing", "waits <", 3, 4, 10, 90.0, 0.2, 0.3, picture), ScanStatus("c.npy", "done")]
    )
    with serve_page(board, 0) as page:
        text = urllib.request.urlopen(page).read().decode()
        assert "a &amp; b.npy" in text
        assert "3 of 10 frames (30%)" in text
        assert "waits &lt;" in text
        assert re.match(r"http://127\.0\.0\.1:\d+/$", page)
        open_here = [place for _, place, port in listening(os.getpid()) if port == int(page.split(":")[2][:-1])]
        assert open_here == ["127.0.0.1"]
        assert urllib.request.urlopen(page + "picture/a%20%26%20b.npy?3").read() == b"picture"
        assert json.load(urllib.request.urlopen(page + "status.json"))[0]["landed"] == 4
        for path, host, code in (("picture/..%2Fmap.png", "", 404), ("", "elsewhere.example", 403)):
            request = urllib.request.Request(page + path, headers={"Host": host} if host else {})
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request)
            assert refused.value.code == code
        with pytest.raises(UserError, match="choose another --port"), serve_page(board, int(page.split(":")[2][:-1])):
            pass


def test_bad_options_are_said_in_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["watch", str(tmp_path), "--model", str(model), "--out", str(tmp_path / "maps")]
    for further, said in (
        (["--stall", "0"], "'0' must be a number of seconds above 0"),
        (["--port", "70000"], "from 0 (any free port) to 65535"),
        (["--shape", "4"], "two whole numbers as ny,nx"),
        (["--flip", "z"], "--flip"),
    ):
        assert cli.main([*command, *further, "--once"]) == 2
        assert said in capsys.readouterr().err
    assert cli.main(["watch", str(tmp_path / "gone"), *command[2:]]) == 2
    assert "does not exist" in capsys.readouterr().err


def runs_of(room: Path, times: dict[str, float]) -> None:
    """Note when each run of frames was written down."""
    for path in list(room.glob("[0-9]*-*.npz")):
        if path.name not in times:
            with contextlib.suppress(FileNotFoundError):
                times[path.name] = path.stat().st_mtime


@pytest.mark.slow
def test_watch_killed_and_restarted_keeps_up_with_a_camera(patterns: Path, model: Path, tmp_path: Path) -> None:
    """Two scans of 24 x 24 frames at 100 per second, the real command; killed in the first and started again."""
    scans, out = tmp_path / "scans", tmp_path / "maps"
    scans.mkdir()
    command = [sys.executable, "-m", "stemtune.cli", "watch", str(scans), "--model", str(model), "--out", str(out)]
    command += ["--kv", "200", "--scale", "0.05", "--centre", "31.5,31.5"]
    started: list[subprocess.Popen[bytes]] = []

    def begun(said: Path) -> bytes:
        with said.open("wb") as file:
            started.append(subprocess.Popen(command, stderr=file))
        return told(said, rb"http://\S+/")

    def told(said: Path, wanted: bytes, meanwhile: Callable[[], object] = lambda: None) -> bytes:
        until = time.monotonic() + 180
        while (found := re.search(wanted, said.read_bytes())) is None:
            assert time.monotonic() < until, said.read_text()
            meanwhile()
            time.sleep(0.02)
        return found[0]

    try:
        begun(tmp_path / "said1")
        camera = writer(patterns, scans / "first.npy", "npy", 100)
        first: dict[str, float] = {}
        while len(first) < 4:
            runs_of(out / ".live" / "first", first)
            time.sleep(0.02)
        started[0].kill()
        started[0].wait()
        page = begun(tmp_path / "said2").decode()
        after = dict(first)
        told(tmp_path / "said2", rb"first.npy: 576 patterns", lambda: runs_of(out / ".live" / "first", after))
        assert camera.wait() == 0
        # The runs of frames follow each other without a gap: none was answered twice, and none is missing.
        runs = sorted(tuple(map(int, name[:-4].split("-"))) for name in after)
        assert [end for _, end in runs] == [*(start for start, _ in runs[1:]), 576]

        camera = writer(patterns, scans / "second.npy", "npy", 100)
        times: dict[str, float] = {}
        told(tmp_path / "said2", rb"second.npy: 576 patterns", lambda: runs_of(out / ".live" / "second", times))
        status = json.load(urllib.request.urlopen(page + "status.json"))
        assert [(scan["name"], scan["state"]) for scan in status] == [("first.npy", "done"), ("second.npy", "done")]
        assert urllib.request.urlopen(page + "picture/second.npy").read().startswith(b"\x89PNG")
        started[1].send_signal(signal.SIGINT)
        assert started[1].wait(60) == 0
    finally:
        for process in started:
            process.kill()
    landed = json.loads((scans / "second.npy.times").read_text())
    ends = sorted((int(name[10:-4]), when) for name, when in times.items())
    waits = [next(when for end, when in ends if end >= 24 * (line + 1)) - there for line, there in enumerate(landed)]
    print(f"latency of {len(waits)} lines: median {np.median(waits):.2f} s, worst {max(waits):.2f} s")
    assert max(waits) < 5.0  # 1 s on a machine of one's own
    predict(scans / "first.npy", model, tmp_path / "predicted", **GIVEN)
    same_maps(out / "first", tmp_path / "predicted")
