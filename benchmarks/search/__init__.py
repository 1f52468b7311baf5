"""`python -m benchmarks search`: does the search find good settings sooner than random search does?

The searcher and the scheduler of a sweep are replayed on a table of recorded learning curves, many times in minutes;
`--record` makes such a table by training every setting of a sample with the product's own loop.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import mannwhitneyu

from benchmarks.search.record import record
from benchmarks.search.replay import WAYS, Replay, replay
from benchmarks.search.table import SECONDS, Table, read_table
from benchmarks.table import markdown
from stemtune.errors import UserError

GOALS = (0.01, 0.03, 0.1)
"""Shares of the settings, the best ones, that a search is to reach."""

RANDOM, OURS = next(iter(WAYS)), list(WAYS)[-1]
_POINTS = 24  # of a regret curve
_SURE = 0.05  # chance at which a difference counts


@dataclass(frozen=True)
class Options:
    """What `python -m benchmarks search` is asked for; the command line's help says what each means."""

    table: str = "search_table.jsonl.gz"
    replays: int = 100
    slots: int = 2
    ways: tuple[str, ...] = ()
    record: str | None = None
    settings: int = 200
    seeds: int = 2
    beams: str = "beams.h5"
    json: str | None = None


def run(options: Options) -> dict[str, Any]:
    """Replay the searches, print how soon each comes to its goals, and return the figures; or record a table."""
    if options.record:
        command = "python -m benchmarks " + " ".join(sys.argv[1:])
        return record(options.record, options.table, options.settings, options.seeds, options.beams, command)
    if strange := [way for way in options.ways if way not in WAYS]:
        raise UserError(f"no way to search is called '{strange[0]}'; there are {', '.join(WAYS)}")
    table = read_table(options.table)
    budget = table.space.budget
    seconds = budget.trials * statistics.fmean(run.curves[SECONDS][-1] for runs in table.settings for run in runs)
    print(
        f"search: {len(table.settings)} settings, {len(table.runs)} runs; each search has the {seconds:,.0f} device"
        f" seconds of {budget.trials} whole trials; {options.replays} searches each on {options.slots} slots",
        flush=True,
    )
    found: dict[str, Any] = {"goals": {f"best {share:.0%}": table.goal(share) for share in GOALS}, "ways": {}}
    chance: dict[str, list[list[float]]] = {}
    for way in options.ways or WAYS:
        done = [replay(table, way, seed, seconds, options.slots) for seed in range(options.replays)]
        found["ways"][way] = figures(table, done, seconds)
        chance[way] = [costs(table, done, share, seconds)[1] for share in GOALS]
        print(f"  {way} done", flush=True)
    for way in chance:
        found["ways"][way]["beside random search"] = [
            beside(ours, theirs) for ours, theirs in zip(chance[way], chance.get(RANDOM, chance[way]), strict=True)
        ]
    print(format_figures(found))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def costs(table: Table, done: Sequence[Replay], share: float, seconds: float) -> tuple[list[float], list[float]]:
    """Return the epochs and device seconds that each search needed to a goal; one that never got there spent all."""
    sign = 1 if table.space.mode == "min" else -1
    found = [one.cost(table.goal(share), sign) or (float("inf"), seconds) for one in done]
    return [epochs for epochs, _ in found], [spent for _, spent in found]


def figures(table: Table, done: Sequence[Replay], seconds: float) -> dict[str, Any]:
    """Return what the searches of one way came to."""
    reached: dict[str, Any] = {}
    for share in GOALS:
        epochs, spent = costs(table, done, share, seconds)
        known = [value for value in epochs if value != float("inf")]
        reached[f"best {share:.0%}"] = {
            "reached": len(known) / len(done),
            "epochs": statistics.median(epochs) if len(known) > len(done) / 2 else None,
            "device_s": statistics.fmean(spent),
            "device_s_95": interval(spent),
        }
    top = table.ranked[0][1][0].key
    begun = sum(Counter(one.begun)[top] for one in done)
    stopped = sum(Counter(one.stopped)[top] for one in done)
    return {
        "goals": reached,
        "trials begun": statistics.fmean(len(one.begun) for one in done),
        "best setting begun": begun,
        "best setting stopped": stopped,
        "regret": regrets(table, done, seconds),
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean, by resampling the searches."""
    drawn = np.random.default_rng(0).choice(np.asarray(values), (2000, len(values))).mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def regrets(table: Table, done: Sequence[Replay], seconds: float) -> dict[str, list[float]]:
    """Return how far the best figure is behind the table's best setting: median and quartiles over device seconds."""
    at = np.linspace(seconds / _POINTS, seconds, _POINTS)
    behind = []
    for one in done:
        place = np.searchsorted(one.spent_s, at, side="right") - 1
        values = np.where(place >= 0, np.asarray(one.best)[np.maximum(place, 0)], one.best[0])
        behind.append(np.abs(values - table.ranked[0][0]) * (np.asarray(values) != table.ranked[0][0]))
    low, middle, high = np.quantile(behind, (0.25, 0.5, 0.75), axis=0)
    return {"device_s": at.tolist(), "median": middle.tolist(), "low": low.tolist(), "high": high.tolist()}


def beside(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Return the mean cost of one way over that of random search, and whether it is significantly more."""
    worse = bool(mannwhitneyu(ours, theirs, alternative="greater").pvalue < _SURE)
    return {"ratio": statistics.fmean(ours) / statistics.fmean(theirs), "significantly worse": worse}


def format_figures(found: dict[str, Any]) -> str:
    """Return the figures as a table."""
    head = ["search", *(f"{goal} ({value:.3g})" for goal, value in found["goals"].items()), "trials", "best stopped"]
    rows = []
    for way, one in found["ways"].items():
        cells = []
        for goal, ratio in zip(one["goals"].values(), one["beside random search"], strict=True):
            low, high = goal["device_s_95"]
            epochs = "-" if goal["epochs"] is None else f"{goal['epochs']:.0f}"
            worse = ", worse" if ratio["significantly worse"] else ""
            cells.append(
                f"{goal['device_s']:.0f} s [{low:.0f}, {high:.0f}], {epochs} epochs, {goal['reached']:.0%} there;"
                f" {ratio['ratio']:.2f}{worse}"
            )
        stopped = f"{one['best setting stopped']} of {one['best setting begun']}"
        rows.append([way, *cells, f"{one['trials begun']:.0f}", stopped])
    notes = (
        "mean device seconds to a figure as good as the best settings' [95 % interval], median epochs, share of the"
        " searches that got there; the ratio to random search. A search that did not get there spent all it had."
    )
    return markdown(head, rows) + "\n\n" + notes
