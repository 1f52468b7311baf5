"""The demonstration: never touches other people's files, and says which of its steps failed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import stemtune
from stemtune import demo
from stemtune.analysis.evaluation.ground_truth import map_of_labels
from stemtune.cli import _parser
from stemtune.crystal_map.io.orix_h5 import write_map_h5
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


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            ("rerank", 4.0, 1.0, 80),
            "The champion, rerank, beats .* 4.0 points more.*more than",
        ),
        (("circular", -4.0, 1.0, 80), "The champion, circular, is beaten by the matched filter.* 4.0 points less"),
        (("circular", 1.5, 1.0, 80), "is not told from the matched filter.* which is what chance may do"),
        (("matched", 0.0, 0.0, 80), "no network of this search beat it"),
    ],
)
def test_the_last_line_says_what_won_and_whether_it_is_chance(given: tuple, says: str) -> None:
    assert re.search(says, demo.verdict(*given))


def test_grains_are_counted_not_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map that is right in all grains but one, beside one that is right in all."""
    monkeypatch.chdir(tmp_path)
    store = stemtune.simulate("linio2", "scan.h5", scan=(8, 10), grains=6, size=16, scale=0.1, seed=3)
    truth = map_of_labels(store)
    wrong = truth.answers.copy()
    wrong[store.group == store.group[store.labelled][0]] = (0.5, 0.5, 0.5, 0.5)
    for folder, answers in (("map", truth.answers), ("matched_map", wrong)):
        Path(folder).mkdir()
        write_map_h5(dataclasses.replace(truth, answers=answers), Path(folder) / "map.h5")
    Path("map/summary.json").write_text('{"architecture": "circular"}')
    grains = len(np.unique(store.group[store.labelled]))
    assert f"over {grains} grains it reads {100 / grains:.1f} points more" in demo._won()
