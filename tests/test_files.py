"""Outputs are whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from stemtune._files import existing, whole_file, whole_folder
from stemtune.errors import UserError


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    final = tmp_path / "store.h5"
    final.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(final) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert final.read_text() == "old"
    assert list(tmp_path.iterdir()) == [final]


def test_a_finished_write_replaces_the_file(tmp_path: Path) -> None:
    with whole_file(tmp_path / "new" / "a.h5") as part:
        part.write_text("whole")
    assert (tmp_path / "new" / "a.h5").read_text() == "whole"


@pytest.mark.parametrize("old", [False, True])
def test_a_folder_is_replaced_whole(tmp_path: Path, old: bool) -> None:
    final = tmp_path / "map"
    if old:
        final.mkdir()
        (final / "stale").write_text("x")
    with whole_folder(final) as part:
        (part / "a").write_text("1")
    assert [item.name for item in final.iterdir()] == ["a"]
    assert [item.name for item in tmp_path.iterdir()] == ["map"]


def test_an_interrupted_folder_leaves_the_old_one(tmp_path: Path) -> None:
    final = tmp_path / "map"
    final.mkdir()
    (final / "kept").write_text("x")
    with pytest.raises(KeyboardInterrupt), whole_folder(final) as part:
        (part / "a").write_text("1")
        raise KeyboardInterrupt
    assert [item.name for item in final.iterdir()] == ["kept"]
    assert [item.name for item in tmp_path.iterdir()] == ["map"]


def test_a_file_where_a_folder_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(UserError, match="is a file"), whole_folder(tmp_path / "taken"):
        pass
    with pytest.raises(UserError, match="cannot write to the folder"), whole_file(tmp_path / "taken" / "a.h5"):
        pass


def test_a_missing_input_is_named() -> None:
    with pytest.raises(UserError, match="store 'nowhere.h5' does not exist"):
        existing("nowhere.h5", "store")


def test_two_writers_of_one_file_never_share_a_temporary_path(tmp_path: Path) -> None:
    """Neither two threads of one process nor, with the same process id, two hosts that share a disk."""
    with whole_file(tmp_path / "a.txt") as one:
        one.write_text("one")
        with whole_file(tmp_path / "a.txt") as other:
            assert one != other
            other.write_text("other")
        assert one.read_text() == "one"
    assert (tmp_path / "a.txt").read_text() == "one"
    assert [item.name for item in tmp_path.iterdir()] == ["a.txt"]
