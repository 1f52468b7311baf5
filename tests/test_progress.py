"""Long work says how far it is in a log too: plain lines with clock, done and total, rate and time left."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stemtune._progress import Progress, say

LINE = re.compile(r"\d\d:\d\d:\d\d  (\w+)  ([\d,]+)/([\d,]+) (\w+)  [\d.,e+]+/s  (.+)")


def lines(text: str) -> list[re.Match[str]]:
    assert "\r" not in text
    return [found for found in map(LINE.fullmatch, text.splitlines()) if found]


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEMTUNE_PROGRESS_S", "0.1")
    with Progress(2000, "label", "pattern", done=500) as progress:
        for _ in progress.over(range(3)):
            progress.update(399)
            progress.note("phase 1")
            time.sleep(0.15)
            say("said meanwhile")
    found = lines(capsys.readouterr().err)
    assert len(found) >= 4
    assert [(each[1], each[3], each[4]) for each in found] == [("label", "2,000", "patterns")] * len(found)
    counts = [int(each[2].replace(",", "")) for each in found]
    assert counts == sorted(counts) and counts[0] >= 899 and counts[-1] == 1700
    assert found[0][5] == "1 s left  phase 1" or "left  phase 1" in found[0][5]
    assert found[-1][5] == "done in 0 s  phase 1"
    time.sleep(0.3)
    assert capsys.readouterr().err == ""  # nothing goes on after the end


@pytest.mark.parametrize("interval", ["abc", "0", "-1", "nan", "inf"])
def test_an_interval_that_is_none_counts_as_not_set(
    interval: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEMTUNE_PROGRESS_S", interval)
    with Progress(10, "label", "pattern") as progress:
        progress.update(10)
        time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_what_takes_no_time_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10, "label", "pattern") as progress:
        progress.update(10)
    with pytest.raises(KeyboardInterrupt), Progress(10, "label", "pattern"):
        raise KeyboardInterrupt
    with Progress(10, "label", "pattern", shown=False):
        pass
    assert capsys.readouterr().err == ""


SIMULATE = ["simulate", "linio2", "--out", "train.h5", "--patterns", "6000", "--size", "64", "--scale", "0.05"]
TRAIN = ["train", "--store", "train.h5", "--out", "model", "--set", "train.epochs=40", "--set", "model.width=4"]
TRAIN += ["--set", "model.name=cnn", "--set", "head.step=20", "--set", "train.batch_size=32"]


@pytest.mark.parametrize(("stage", "command"), [("simulate", SIMULATE), ("train", TRAIN)])
def test_commands_say_how_far_they_are_in_a_file(
    stage: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`stemtune simulate ... > log 2>&1`: there before the command ends, whatever buffers a file would have."""
    monkeypatch.setenv("STEMTUNE_PROGRESS_S", "0.3")
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    if stage == "train":
        small = [*SIMULATE, "--patterns", "600", "--size", "32", "--scale", "0.1"]
        subprocess.run([sys.executable, "-m", "stemtune.cli", *small], cwd=tmp_path, check=True, capture_output=True)
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "stemtune.cli", *command], cwd=tmp_path, stdout=file, stderr=file
        )
    before_the_end: list[re.Match[str]] = []
    said = ""
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            said = log.read_text()
            before_the_end = lines(said[: said.rfind("\n") + 1]) or before_the_end
            if stage == "train" and len(before_the_end) > 2 and "epoch 2/40: loss" in said:
                process.terminate()
                process.wait(timeout=60)
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert before_the_end and before_the_end[0][1] == stage, said
    assert 0 < int(before_the_end[-1][2].replace(",", "")) <= int(before_the_end[-1][3].replace(",", ""))
    if stage == "train":
        assert "epoch 1/40: loss" in said and process.returncode == 143
    else:
        assert "done in" in lines(log.read_text())[-1][5] and process.returncode == 0
