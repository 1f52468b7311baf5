"""Outputs at the command line that cannot be written, or that would replace what is not stemtune's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test_bad_input import TRAIN, here, inputs, refused, tree, write_scan

from stemtune import cli
from stemtune._files import whole_file, whole_folder
from stemtune.errors import UserError

__all__ = ["here", "inputs"]

COMMANDS = {
    "train": ["train", "--store", "train.h5", *TRAIN, "--out"],
    "predict": ["predict", "scan.h5", "--model", "model", "--out"],
    "simulate": ["simulate", "linio2", "--patterns", "4", "--out"],
    "scan": ["simulate", "linio2", "--scan", "9,9", "--grains", "2", "--out"],
    "ingest": ["ingest", "good.hspy", "--out"],
    "demo": ["demo", "--out"],
    "export": ["export", "model", "--to", "pt2", "--out"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_cannot_be_written(command: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A path below a file cannot be written even by root, whom permissions do not stop."""
    write_scan(here / "good.hspy")
    (here / "file").write_text("mine")
    assert "choose another --out" in refused(capfd, *COMMANDS[command], "file/new")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("beside", [None, "map.h5", "summary.json", "model.json"])
def test_the_users_files_are_never_deleted(
    command: str, beside: str | None, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_scan(here / "good.hspy")
    folder = here / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    if beside:
        (folder / beside).write_text("{}")
    assert "mine" in refused(capfd, *COMMANDS[command], "mine")


@pytest.mark.parametrize("command", ["simulate", "scan", "ingest"])
@pytest.mark.parametrize("file", ["good.hspy", "thesis.txt", "model/model.json", "map/map.h5"])
def test_a_store_replaces_nothing_but_a_store(
    command: str, file: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_scan(here / "good.hspy")
    (here / "thesis.txt").write_text("years of work")
    assert "is no store, so it is not replaced" in refused(capfd, *COMMANDS[command], file)


def test_a_picture_does_not_replace_the_store(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = tree(here)
    assert cli.main(["inspect", "scan.h5", "--png", "scan.h5"]) == 2
    assert "must be called .png" in capfd.readouterr().err
    assert tree(here) == before


def test_what_is_no_ordinary_file_stays(tmp_path: Path) -> None:
    """Renaming over a device, /dev/null say, would take it from the whole machine; a pipe stands in for it here."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is no ordinary file"), whole_file(tmp_path / "pipe") as part:
        part.write_text("x")
    assert (tmp_path / "pipe").is_fifo()


def test_an_interrupt_between_the_renames_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "map").mkdir()
    (tmp_path / "map" / "kept").touch()
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.suffix == ".part":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "map") as part:
        (part / "new").touch()
    assert list(tree(tmp_path)) == ["map", "map/kept"]
