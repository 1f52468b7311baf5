"""The searcher and the scheduler of a sweep on recorded curves, with a simulated clock in place of a cluster."""

from __future__ import annotations

import heapq
import itertools
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import FIFOScheduler

from benchmarks.search.table import SECONDS, Run, Table
from stemtune.tune.run.scheduler import STOP, SuccessiveHalving
from stemtune.tune.run.searcher import StudySearch
from stemtune.tune.run.trial_state import drop_driver_state
from stemtune.tune.space.forms import Dice

WAYS = {
    "random search": (False, False),
    "random + ASHA": (False, True),
    "TPE": (True, False),
    "TPE + ASHA": (True, True),
}
"""What is compared: whether Optuna proposes, and whether ASHA stops."""


@dataclass
class Replay:
    """What one search did: after each epoch that a trial reported, what had been spent and the best figure so far."""

    spent_s: list[float] = field(default_factory=list)  # seconds of all devices
    best: list[float] = field(default_factory=list)
    begun: list[str] = field(default_factory=list)  # the settings of each trial
    stopped: list[str] = field(default_factory=list)  # those that ASHA stopped

    def cost(self, goal: float, sign: int) -> tuple[float, float] | None:
        """Return the epochs and the seconds after which the best figure was as good as `goal`; None where never."""
        for number, value in enumerate(self.best):
            if sign * value <= sign * goal:
                return number + 1.0, self.spent_s[number]
        return None


class _Random:
    """Proposals at random, with the face of the searcher."""

    def __init__(self, table: Table, seed: int) -> None:
        self._space, self._dice = table.space, Dice(seed)

    def suggest(self, trial_id: str) -> dict[str, Any]:
        return {"knobs": self._space.settings(self._space.suggest(self._dice))}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """It learns nothing."""

    on_trial_complete = on_trial_result


def replay(table: Table, way: str, seed: int, seconds: float, slots: int) -> Replay:
    """Search once, as Tune would: it asks, reports and tells the end.

    It ends when `seconds` of all devices are spent, or a trial is as good as the best setting of the table.
    """
    proposes, stops = WAYS[way]
    sweep = f"replay-{seed}"
    with tempfile.TemporaryDirectory(prefix="stemtune-replay-", dir=_memory()) as folder:
        place = Path(folder) / "replay"
        searcher: Any = StudySearch(table.space, place, {}, seed, sweep) if proposes else _Random(table, seed)
        scheduler = SuccessiveHalving(table.space.budget, sweep) if stops else FIFOScheduler()
        try:
            return _run(table, searcher, scheduler, random.Random(seed), seconds, slots)
        finally:
            drop_driver_state(sweep)


def _run(table: Table, searcher: Any, scheduler: Any, dice: random.Random, seconds: float, slots: int) -> Replay:
    metric, done = table.space.metric, Replay()
    better = min if table.space.mode == "min" else max
    queue: list[tuple[float, int, Iterator[dict[str, Any]], dict[str, Any], Any]] = []
    numbers = itertools.count()

    def begin(now: float) -> None:
        number = next(numbers)
        config = searcher.suggest(f"t{number}")
        run = dice.choice(table.nearest(config["knobs"]))
        trial = SimpleNamespace(trial_id=f"t{number}", config=config, setting=run.key, began=now)
        scheduler.on_trial_add(None, trial)
        done.begun.append(run.key)
        reports = _reports(run)
        report = next(reports)
        heapq.heappush(queue, (now + report[SECONDS], number, reports, report, trial))

    for _ in range(slots):
        begin(0.0)
    spent, (top, _) = 0.0, table.ranked[0]
    while spent < seconds and (not done.best or better(top, done.best[-1]) != done.best[-1]):
        now, number, reports, report, trial = heapq.heappop(queue)
        spent += report["seconds"]
        done.spent_s.append(spent)
        done.best.append(better([report[metric], *done.best[-1:]]))
        following = next(reports, None)
        stop = scheduler.on_trial_result(None, trial, report) == STOP
        if not stop:
            searcher.on_trial_result(trial.trial_id, report)
        if stop or following is None:
            scheduler.on_trial_complete(None, trial, report)
            searcher.on_trial_complete(trial.trial_id, report)
            if stop:
                done.stopped.append(trial.setting)
            begin(now)
        else:
            heapq.heappush(queue, (trial.began + following[SECONDS], number, reports, following, trial))
    return done


def _reports(run: Run) -> Iterator[dict[str, Any]]:
    """Yield what a trial with this curve reports after every epoch, and under `seconds` how long that epoch took."""
    before = 0.0
    for epoch, values in enumerate(zip(*run.curves.values(), strict=True), 1):
        report = dict(zip(run.curves, values, strict=True))
        yield {**report, "epoch": epoch, "training_iteration": epoch, "seconds": report[SECONDS] - before}
        before = report[SECONDS]


def _memory() -> str | None:
    """Return the folder in memory, where there is one: a study on a disk waits for it after every line."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
