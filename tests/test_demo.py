"""The demonstration: never touches other people's files, and says which of its steps failed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from stemtune import demo
from stemtune.cli import _parser
from stemtune.errors import UserError
from stemtune.tune.space.describe import check


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        demo.run(tmp_path, lambda words: 0)
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_failed_step_is_named_and_ends_the_demonstration(tmp_path: Path) -> None:
    seen: list[Sequence[str]] = []

    def fails_at_sweep(words: Sequence[str]) -> int:
        seen.append(words)
        return 2 if words[0] == "sweep" else 0

    here = Path.cwd()
    with pytest.raises(UserError, match="`stemtune sweep space.yaml --local --name demo` ended with exit code 2"):
        demo.run(tmp_path / "demo", fails_at_sweep)
    assert [words[0] for words in seen] == ["simulate", "simulate", "sweep"]
    assert Path.cwd() == here
    check([tmp_path / "demo" / "space.yaml"])  # the space that it writes is valid


def test_an_interrupt_in_a_step_ends_the_demo_without_a_second_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.run(tmp_path / "demo", lambda words: 130)
    assert stop.value.code == 130


def test_every_step_is_a_command_line_that_parses(tmp_path: Path) -> None:
    def parses(words: Sequence[str]) -> int:
        _parser().parse_args(words)
        return 0

    with pytest.raises(FileNotFoundError):  # nothing ran, so there are no figures to close with
        demo.run(tmp_path / "demo", parses)
