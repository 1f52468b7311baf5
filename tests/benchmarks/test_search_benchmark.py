"""The replay of searches on recorded curves: the clock, the goals, and that ASHA and TPE find sooner."""

from __future__ import annotations

import math
import random
import statistics
from pathlib import Path

import pytest

from benchmarks import search
from benchmarks.__main__ import main
from benchmarks.search.replay import replay
from benchmarks.search.table import METRICS, SECONDS, Run, Table, read_table, write_table
from stemtune.config import Config
from stemtune.dataset.beam_store import simulate_beams
from stemtune.tune.space.forms import Dice
from stemtune.tune.space.space import space_from_text

SPACE = """\
metric: val/disorientation_median_deg
budget: {trials: 16, epochs: 9, grace_epochs: 1, reduction: 3}
fixed: {data.source: simulate}
search:
  optim.lr: {log: [1.0e-5, 1.0e-1]}
  model.name: {one_of: {cnn: {model.width: [8, 16]}, polar: {}}}
"""


def made(count: int = 120) -> Table:
    """Made-up curves: the loss falls from the first epoch on, the median stays at chance until it has fallen far."""
    space, dice, noise = space_from_text(SPACE, "test"), Dice(0), random.Random(0)
    runs = []
    for _ in range(count):
        drawn = {key: value for key, value in space.suggest(dice).items() if key not in space.fixed}
        rate = math.exp(-((math.log10(float(drawn["optim.lr"])) + 3) ** 2)) * (
            0.5 + 0.5 * (drawn["model.name"] == "cnn")
        )
        loss = [9.0 - 0.8 * rate * epoch for epoch in range(1, 10)]
        median = [67.0 + noise.uniform(-3, 3) if value > 5.0 else 67.0 - 20.0 * (5.0 - value) for value in loss]
        curves = {SECONDS: [2.0 * epoch for epoch in range(1, 10)], "val/loss": loss}
        runs.append(Run(drawn, 0, {**curves, "val/disorientation_median_deg": median}))
    return Table(SPACE, ("made up",), tuple(runs))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "table.jsonl.gz"
    write_table(made(), path)
    return path


def test_the_clock_counts_what_runs_at_the_same_time(table: Path) -> None:
    one = replay(read_table(table), "random search", 0, 100.0, slots=2)
    assert len(one.spent_s) == 50 and one.spent_s[-1] == 100.0  # of epochs of two seconds, on two devices
    assert len(one.begun) == 2 + 2 * (50 // 18)  # two trials at a time, nine epochs each
    assert one.best == sorted(one.best, reverse=True)
    assert not one.stopped


def test_a_proposal_is_answered_by_the_nearest_setting(table: Path) -> None:
    read = read_table(table)
    assert len(read.runs) == 120
    for run in read.runs[:10]:
        near = {**run.settings, "optim.lr": float(run.settings["optim.lr"]) * 1.0001}
        assert read.nearest(near)[0].key == run.key
    polar = {"model.name": "polar", "optim.lr": 1e-3}
    assert read.nearest(polar)[0].settings["model.name"] == "polar"


def test_goals_are_the_best_settings(table: Path) -> None:
    read = read_table(table)
    final = sorted(min(run.curves[read.space.metric]) for run in read.runs)
    assert (read.goal(0.01), read.goal(0.1)) == (final[1], final[11])


def test_tpe_with_asha_finds_sooner_than_random_search(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sooner to every goal, and ASHA stops the best setting seldom."""
    found = search.run(search.Options(str(table), replays=4, ways=("random search", "TPE + ASHA")))
    ours = found["ways"]["TPE + ASHA"]
    ratios = [one["ratio"] for one in ours["beside random search"]]
    assert max(ratios) < 0.8 and not any(one["significantly worse"] for one in ours["beside random search"])
    assert ours["best setting stopped"] <= ours["best setting begun"] / 4
    assert "1.00" in capsys.readouterr().out
    regret = ours["regret"]["median"]
    assert regret == sorted(regret, reverse=True) and len(regret) == 24


def test_asha_by_a_figure_at_chance_is_a_lottery() -> None:
    """By the loss it finds sooner than by the median, which in the first epochs is noise."""
    good = made()
    wrong = Table(SPACE.replace("reduction: 3", "reduction: 3, stop_by: val/disorientation_median_deg"), (), good.runs)

    def cost(table: Table) -> float:
        done = [replay(table, "random + ASHA", seed, 288.0, 2) for seed in range(20)]
        return statistics.fmean(search.costs(table, done, 0.03, 288.0)[1])

    assert cost(good) < 0.8 * cost(wrong)


def test_what_is_no_table_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "no.gz").write_text("nothing")
    for arguments, wanted in (
        (["--table", str(tmp_path / "no.gz")], "is no table of learning curves"),
        (["--table", str(tmp_path / "none.gz")], "does not exist"),
    ):
        assert main(["search", *arguments]) == 2
        assert wanted in capsys.readouterr().err


def test_a_table_is_recorded_and_gone_on_with(tmp_path: Path) -> None:
    microscope = {"simulate.size": 64, "simulate.scale": 0.05, "simulate.physics": "bloch", "simulate.tilts": 1}
    simulate = Config.from_flat({**microscope, "simulate.beam_error": 0.002, "simulate.precession": 0}).simulate
    beams = simulate_beams("linio2", tmp_path / "beams.h5", 30, simulate, 1, 1)
    text = (Path(search.__file__).parent / "space.yaml").read_text()
    for old, new in (
        ("8192", "64"),
        ("512", "16"),
        ("epochs: 12", "epochs: 2"),
        ("grid_step: 5", "grid_step: 15"),
        ("angles: 72", "angles: 24"),
        ("radii: 24", "radii: 12"),
    ):
        text = text.replace(old, new)
    (tmp_path / "space.yaml").write_text(text)
    table = str(tmp_path / "table.jsonl.gz")
    given = {"table": table, "record": str(tmp_path / "space.yaml"), "beams": str(beams), "settings": 1}
    search.run(search.Options(**given, seeds=1))
    first = read_table(table)
    search.run(search.Options(**given, seeds=2))
    both = read_table(table)
    assert (len(first.runs), len(both.runs), len(both.settings)) == (1, 2, 1) and both.runs[:1] == first.runs
    for run in both.runs:
        assert set(run.curves) == {SECONDS, *METRICS} and {len(values) for values in run.curves.values()} == {2}
        assert 0 < run.curves[SECONDS][0] < run.curves[SECONDS][1]
    assert both.runs[0].curves["val/loss"] != both.runs[1].curves["val/loss"]
