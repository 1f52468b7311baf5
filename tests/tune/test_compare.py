"""The comparison of a sweep's trials, from records as a sweep writes them."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import distribution_to_json

from stemtune.errors import UserError
from stemtune.tracking import Tracker, address
from stemtune.tune.formatting import format_metric
from stemtune.tune.report import compare
from stemtune.tune.report.leaderboard import (
    Row,
    architectures,
    by_method,
    pareto,
    rows,
    rungs,
    seeds,
    setting_importances,
)

LR = optuna.distributions.FloatDistribution(1e-5, 1e-1, log=True)
WIDTH = optuna.distributions.IntDistribution(8, 64)


def kept(rate: float, width: int) -> dict[str, Any]:
    kinds = {"optim.lr": LR, "model.width": WIDTH}
    written = {name: json.loads(distribution_to_json(kind)) for name, kind in kinds.items()}
    return {"params": {"optim.lr": rate, "model.width": width}, "distributions": written}


def loss(rate: float, width: int) -> float:
    """A figure that the learning rate decides and the width hardly touches."""
    return 10 * (math.log10(rate) + 3) ** 2 + 0.01 * width


METRIC = "val/disorientation_median_deg"


def shown(curves: list[list[float]], status: str = "finished") -> dict[str, Any]:
    """Return the importances over trials of these curves, whose settings are drawn at random."""
    dice = random.Random(0)
    ranked = [
        row(number, min(curve), curve=list(enumerate(curve, 1)), status=status) for number, curve in enumerate(curves)
    ]
    proposals = {each.trial: kept(10 ** dice.uniform(-5, -1), dice.randint(8, 64)) for each in ranked}
    return setting_importances(proposals, ranked, METRIC, "min")[0]


def test_importances_need_twenty_trials_that_learned() -> None:
    dice = random.Random(1)
    learning = [[67.0, 40.0, dice.uniform(1, 30)] for _ in range(20)]
    assert shown(learning)["importances"] and shown(learning)["method"] == "fANOVA"
    few = shown(learning[:19])
    assert few["importances"] == {} and few["method"].startswith(
        "too few trials: 19 of the sampler's learned something"
    )
    chance = [[67.0 + dice.uniform(-3, 3) for _ in range(9)] for _ in range(60)]
    assert shown(chance)["by_method"] == {} and "too few trials: 0" in shown(chance)["method"]
    once = [[dice.uniform(1, 30)] for _ in range(20)]  # templates, or networks that see every pattern once
    assert shown(once)["importances"] and not shown(once, "stopped")["importances"]
    assert "too few trials: 0" in setting_importances({}, [], METRIC, "min")[0]["method"]


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = Tracker(tmp_path / "sweep", "alpha", "id1", address())
    tracker.sweep({"metric": "val/disorientation_median_deg", "mode": "min"}, {"stemtune.commit": "abc"}, "")
    curves = {
        ("t0", "matched"): [4.0],
        ("t1", "cnn"): [30.0, 9.0, 12.0],
        ("t2", "swin adjusted"): [20.0, 6.0, 3.0],
        ("t3", "cnn"): [60.0],
    }
    for number, ((trial, name), values) in enumerate(curves.items()):
        tags = {"stemtune.number": str(number), "stemtune.architecture": name}
        if name != "matched":
            tags["stemtune.optuna"] = json.dumps(kept(1e-3 * (number + 1), 8 * number))
        tracker.trial(trial, f"{number:03d} {name}", {"model.name": name.split()[0]}, tags)
        for epoch, value in enumerate(values, 1):
            figures = {"val/disorientation_median_deg": value, "train/samples_per_s": 100.0}
            tracker.metrics(trial, epoch, {**figures, "time/device_s": 10.0 * epoch, "time/first_report_s": 20.0})
        tracker.end(trial, "stopped" if trial == "t3" else "finished", "", {"time/wall_s": 30.0}, {})
    tracker.trial("t4", "004 densenet", {"model.name": "densenet"}, {"stemtune.number": "4"})
    tracker.end("t4", "failed", "UserError: no network", {}, {})
    tracker.done("finished", {"time/wall_s": 99.0}, {})
    assert tracker.close() == 0
    return tmp_path


def test_compare_in_words_picture_and_json(sweep: Path) -> None:
    text = compare(png="out/board.png", json="out/board.json")
    board = [line.split()[1:4] for line in text.splitlines() if line[:2] in ("1 ", "2 ", "3 ", "4 ", "- ")]
    assert [row[0] for row in board] == ["2", "0", "1", "3", "4"]  # by their best epoch, the failed one last
    assert "matched (baseline)" in text
    assert "UserError: no network" in text
    assert "9.00°" in text
    assert "too few trials: 2 of the sampler's learned something" in text
    found = json.loads((sweep / "out" / "board.json").read_text())
    assert [entry["architecture"] for entry in found["architectures"]] == [
        "swin adjusted",
        "matched",
        "cnn",
        "densenet",
    ]
    assert [entry["baseline"] for entry in found["architectures"]] == [False, True, False, False]
    assert found["trials"][0]["best_epoch"] == 3
    assert found["trials"][2]["curve"] == [[1, 30.0], [2, 9.0], [3, 12.0]]
    assert found["trials"][4]["best"] is None
    assert found["cost"]["device_s"] == 10 + 30 + 30 + 10
    assert found["cost"]["wall_s"] == 99.0
    from matplotlib.image import imread

    picture = imread(sweep / "out" / "board.png")
    assert picture.shape[0] > 300
    assert picture[..., :3].std() > 0.05


def beta(here: Path, metric: str = "val/disorientation_median_deg") -> None:
    tracker = Tracker(here / "sweep of beta", "beta", "id2", address())
    tracker.sweep({"metric": metric, "mode": "min", "searched": "optim.lr, model.width, train.seed"}, {}, "")
    params = {"model.name": "cnn", "optim.lr": 0.004, "model.width": 24, "train.seed": 2}
    tracker.trial("b0", "000 cnn", params, {"stemtune.number": "0", "stemtune.architecture": "cnn"})
    for epoch, value in enumerate((2.0, 1.0), 1):
        tracker.metrics("b0", epoch, {metric: value})
    tracker.end("b0", "finished", "", {"best": 2.0, "best_epoch": 1.0}, {})  # of the second epoch no weights are left
    name = "test/disorientation_median_deg"
    tracker.figures("b0", 2, {name: 2.5, f"{name}_low": 2.2, f"{name}_high": 2.9}, {"stemtune.note": "a note"})
    assert tracker.close() == 0


def test_several_sweeps_stand_in_one_leaderboard(sweep: Path) -> None:
    beta(sweep)
    board = [line.split() for line in compare(["alpha", "beta"], json="both.json").splitlines()]
    assert [row[1:3] for row in board if row[:1] in (["1"], ["2"], ["3"])] == [
        ["beta", "0"],
        ["alpha", "2"],
        ["alpha", "0"],
    ]
    found = json.loads((sweep / "both.json").read_text())
    assert (found["sweep"], len(found["trials"])) == ("alpha, beta", 6)
    best = found["trials"][0]
    assert (best["best"], best["best_epoch"], best["note"]) == (2.0, 1, "a note")  # of the weights that are kept
    assert best["test"] == "2.50° (2.20° to 2.90°)"


def test_sweeps_of_two_metrics_are_not_mixed(sweep: Path) -> None:
    beta(sweep, "val/loss")
    with pytest.raises(UserError, match=r"different metrics cannot be compared \(alpha: .*; beta: val/loss \(min\)\)"):
        compare(["alpha", "beta"])


def test_the_best_settings_go_into_the_next_space(sweep: Path) -> None:
    from stemtune.tune.space.space import space_from_text

    beta(sweep)
    compare(["beta"], best="best.yaml")
    text = (sweep / "best.yaml").read_text()
    assert text.startswith("# beta, trial 0 (cnn): val/disorientation_median_deg 2.00°, 2.50° (2.20° to 2.90°) on the")
    under = "\n".join(f"  {line}" for line in text.splitlines())
    assert space_from_text(f"fixed:\n{under}\n", "next").fixed == {"optim.lr": 0.004, "model.width": 24}
    first = (
        f"search: {{optim.lr: {{log: [1e-4, 1e-2]}}, model.width: [8, 24]}}\nfirst:\n  -\n{under.replace('  ', '    ')}"
    )
    assert space_from_text(first, "next").first == ({"optim.lr": 0.004, "model.width": 24},)


def test_more_is_better_when_the_metric_says_so(sweep: Path) -> None:
    from stemtune.tracking import read_sweep

    read = read_sweep("alpha", curves=("val/disorientation_median_deg",))
    ranked = rows(read, "val/disorientation_median_deg", "max")
    assert [row.best for row in ranked[:4]] == [60.0, 30.0, 20.0, 4.0]
    assert architectures(ranked, "max")[0]["architecture"] == "cnn"


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("val/disorientation_median_deg", 1.234, "1.23°"),
        ("val/disorientation_median_deg_beam180", 1.234, "1.23°"),
        ("val/within_5deg", 0.5, "50.0%"),
        ("val/within_5deg_beam180", 0.5, "50.0%"),
        ("val/loss", 0.12345, "0.1235"),
        ("val/loss", math.nan, "-"),
    ],
)
def test_figures_have_units(metric: str, value: float, text: str) -> None:
    assert format_metric(metric, value) == text


def row(number: int, best: float, parameters: float = 1.0, seed: str = "0", alike: str = "a", **other: Any) -> Row:
    plain: dict[str, Any] = dict.fromkeys(("wall_s", "device_s", "first_report_s", "samples_per_s"), 0.0)
    plain |= {"trial": f"t{number}", "run_id": "", "architecture": "cnn", "status": "finished", "reason": ""}
    plain |= {"best_epoch": 1, "epochs": 1, "ms_per_pattern": math.nan, "searched": {}, "curve": []}
    plain |= {"number": number, "best": best, "parameters": parameters, "seed": seed, "alike": alike}
    return Row(**plain | other)


def test_the_pareto_front_holds_what_nothing_beats() -> None:
    ranked = [row(0, 1.0, 90), row(1, 2.0, 50), row(2, 3.0, 60), row(3, 5.0, 10), row(4, 5.0, 9), row(5, math.nan, 1)]
    ranked += [row(6, 0.5, 0), row(7, 0.5, math.nan)]  # without weights, or unknown: on no such front
    assert pareto(ranked, "min", "parameters") == [4, 1, 0]
    assert pareto(ranked, "max", "parameters") == [4]
    assert pareto(ranked, "min", "ms_per_pattern") == []


def test_seeds_spread_over_trials_that_are_alike_otherwise() -> None:
    ranked = [row(0, 1.0, seed="0"), row(1, 3.0, seed="1"), row(2, 9.0, alike="b"), row(3, 8.0, alike="b")]
    ranked.append(row(4, 50.0, seed="2", status="stopped"))  # was not trained as long
    (group,) = seeds(ranked)
    assert (group["trials"], group["mean"]) == ([0, 1], 2.0)
    assert group["spread"] == pytest.approx(math.sqrt(2))


def test_rungs_are_where_asha_decides() -> None:
    budget = {"budget.grace_epochs": "2", "budget.reduction": "3"}
    assert rungs({**budget, "budget.epochs": "30"}) == [2, 6, 18]
    assert rungs({**budget, "train.epochs": "6"}) == [2]  # the last epoch decides nothing
    assert rungs({**budget, "train.epochs": "6", "design": "grid"}) == []
    assert rungs({}) == []


def test_every_method_finds_what_mattered() -> None:
    dice = random.Random(0)
    drawn = [(10 ** dice.uniform(-5, -1), dice.randint(8, 64)) for _ in range(40)]
    found = by_method([(kept(rate, width), loss(rate, width)) for rate, width in drawn], "min")
    assert list(found) == ["fANOVA", "PED-ANOVA"]
    assert all(sum(shares.values()) == pytest.approx(1.0) for shares in found.values())
    assert all(shares["optim.lr"] > 0.7 for shares in found.values())


def test_the_folder_holds_pictures_figures_and_a_page_that_needs_nothing_else(sweep: Path) -> None:
    from matplotlib.image import imread

    compare(out="all")
    folder = sweep / "all"
    pictures = {file.stem for file in folder.glob("*.png")}
    assert {"overview", "parallel"} <= pictures
    for name in pictures:
        assert imread(folder / f"{name}.png")[..., :3].std() > 0.03, name
    text = (folder / "compare.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*(?!['"]?data:)""", text)
    assert "http:" not in text
    assert "https:" not in text
    assert text.count("data:image/png;base64,") == len(pictures)
    body = text.split("<tbody>")[1].split("</tbody>")[0]
    assert body.count("<tr") == len(json.loads((folder / "compare.json").read_text())["trials"]) == 5
    assert "UserError: no network" in body
