"""What the process that drives a sweep knows of its trials and says of them on stderr and in the table at the end.

The parts of a sweep that Tune pickles share their state there.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stemtune._files import damage
from stemtune._progress import Progress, duration, say
from stemtune.config import METRICS, Config, Scalar
from stemtune.tracking.events import NOTE_TAG
from stemtune.tracking.writer import journal_events
from stemtune.tune.formatting import (
    STATUS_WORDS,
    architecture,
    better,
    format_metric,
    format_settings,
    format_table,
    judged_by,
    tested_figure,
)
from stemtune.tune.run.checkpoints import StoredCheckpoint, ranked, stored_checkpoints, train_folder
from stemtune.tune.space.space import SearchSpace

FIGURES = "figures"


@dataclass
class DriverState:
    """What one sweep's callback, sampler and stopper share in the process that drives it.

    Tune pickles and restores each of them alone, so they find it by the sweep's id. What may have changed since they
    were pickled, they take from here: where the folder lies, and how much is to be tried.
    """

    folder: Path | None = None  # where the sweep's files lie; None outside of a sweep
    space: SearchSpace | None = None  # what is searched, with the budget in force
    records_id: str = ""  # the sweep's id in MLflow: of a copy it is another one
    at_once: int = 0  # how many trials the cluster has room for; 0 leaves it to the sampler's own limit
    restored: bool = True  # false until Tune took up its snapshot: where it fails to, it begins anew in silence
    time_over: bool = False  # whether the sweep's time has run out
    pruned: set[str] = field(default_factory=set)  # the trials that the scheduler has stopped
    callback: Any = None  # the `SweepCallback` in use: a restored sweep makes another one


_DRIVERS: dict[str, DriverState] = {}


def driver_state(sweep_id: str) -> DriverState:
    """Return what the parts of the sweep with this id share in this process."""
    return _DRIVERS.setdefault(sweep_id, DriverState())


def drop_driver_state(sweep_id: str) -> None:
    """Forget it: the sweep begins anew, or has ended."""
    _DRIVERS.pop(sweep_id, None)


@dataclass
class TrialState:
    """One trial as the sweep sees it."""

    trial: str
    number: int  # count from 0 in the order of proposal
    knobs: dict[str, Scalar]  # its settings
    status: str = "running"  # one of `tune.formatting.STATUS_WORDS`
    reason: str = ""  # why it stopped or failed
    epoch: int = 0  # epochs reported
    last: float = math.nan  # last and best value of the sweep's metric
    best: float = math.nan
    best_epoch: int = 0
    wall_s: float = 0.0  # since its start
    device_s: float = 0.0  # without the start-up, times its devices
    first_report_s: float = 0.0  # from its start to its first report
    values: dict[str, float] = field(default_factory=dict)  # the figures of the last report
    best_values: dict[str, float] = field(default_factory=dict)  # those of the best one
    nodes: tuple[str, ...] = ()  # names of the nodes where its workers run
    test: dict[str, float] = field(default_factory=dict)  # its figures on the test split, where it was tested
    note: str = ""  # that it learned nothing

    @property
    def label(self) -> str:
        """The architecture, with what tells its variants apart."""
        return architecture(self.knobs)

    def take(self, result: dict[str, Any], metric: str, mode: str) -> None:
        """Take up a report; one of an epoch that is trained again after a restart as well."""
        epoch, value = int(result.get("epoch", self.epoch + 1)), float(result[metric])
        if epoch >= self.epoch:
            self.epoch, self.last = epoch, value
        if math.isnan(self.best) or better(value, self.best, mode):
            self.best, self.best_epoch = value, epoch
            self.best_values = {key: float(result[key]) for key in METRICS if key in result and "val/" in key}
        self.device_s = float(result.get("time/device_s", self.device_s))
        self.first_report_s = float(result.get("time/first_report_s", self.first_report_s))


class SweepProgress:
    """Says what each of `total` trials tries and how it ended, and shows how many have.

    Settings that every trial shares (`fixed`) are left out; `before` are the trials from before a restart.
    """

    def __init__(
        self, total: int, metric: str, mode: str, fixed: Iterable[str], before: Iterable[TrialState] = ()
    ) -> None:
        self._metric, self._mode = metric, mode
        self._fixed = {*fixed, "train.epochs"}
        self._best: TrialState | None = None
        self._total, self._epochs, self._began = total, 0, time.monotonic()
        self._ends: list[int] = []  # after how many epochs the trials ended
        self._running: dict[str, TrialState] = {}
        ended = [state for state in before if state.status not in ("running", "interrupted")]
        for state in ended:
            self._note_best(state)
            self._ends.append(state.epoch)
        self._progress = Progress(total, "trials", "trial", done=len(ended))

    def started(self, state: TrialState) -> None:
        self._running[state.trial] = state
        say(f"trial {state.number} starts: {format_settings(state.knobs, self._fixed)}")

    def reported(self, state: TrialState) -> None:
        """Say what a trial reached: in a terminal behind the bar, elsewhere as a line of its own."""
        self._epochs += 1
        self._note_best(state)
        best = f"best so far {self._value(self._best)} (trial {self._best.number})" if self._best else ""
        value = f"trial {state.number} {state.label} epoch {state.epoch}: {format_metric(self._metric, state.last)}"
        if self._progress.in_terminal:
            self._progress.note(f"{value}; {best}")
        else:
            rate = self._epochs / max(time.monotonic() - self._began, 1e-6)
            left = f"{duration(self._epochs_left() / rate)} left at most"
            say("  ".join([time.strftime("%H:%M:%S"), value, best, f"{rate * 60:.3g} epochs/min", left]))

    def _epochs_left(self) -> float:
        """Return how many epochs there will be at most; of a trial to come, as many as those that ended had on average.

        Until one has ended, as many as those that run may have.
        """
        most = {one.trial: int(one.knobs.get("train.epochs", Config().train.epochs)) for one in self._running.values()}
        going_on = sum(max(0, most[one.trial] - one.epoch) for one in self._running.values())
        known = self._ends or list(most.values())
        to_come = max(0, self._total - len(self._ends) - len(self._running))
        return going_on + to_come * sum(known) / max(1, len(known))

    def ended(self, state: TrialState) -> None:
        self._note_best(state)
        self._running.pop(state.trial, None)
        self._ends.append(state.epoch)
        best = f"; best so far trial {self._best.number}, {self._value(self._best)}" if self._best else ""
        say(
            f"trial {state.number} {state.label} {STATUS_WORDS[state.status]} after epoch {state.epoch} and"
            f" {state.wall_s:.0f} s with {self._value(state)}{_because(state)}{best}"
        )
        self._progress.update()

    def _note_best(self, state: TrialState) -> None:
        if state.epoch and (self._best is None or better(state.best, self._best.best, self._mode)):
            self._best = state

    def close(self, finished: bool = True) -> None:
        """Take the bar away, or say that the sweep `finished`."""
        self._progress.close(finished)

    def _value(self, state: TrialState) -> str:
        return format_metric(self._metric, state.best)


def table(trials: Iterable[TrialState], metric: str, mode: str) -> str:
    """Return the trials as a table, best first."""
    trials, judged = list(trials), judged_by(metric)
    tested = any(state.test for state in trials)
    head = ("", "trial", "model", metric.removeprefix("val/"), "epoch", *([f"test {judged}"] if tested else []))
    rows = [(*head, "epochs", "wall", "status")]
    ranked = sorted(trials, key=lambda state: (not state.epoch, state.best if mode == "min" else -state.best))
    for place, state in enumerate(ranked, 1):
        rows.append(
            (
                str(place) if state.epoch else "-",
                str(state.number),
                state.label,
                format_metric(metric, state.best),
                str(state.best_epoch),
                *([tested_figure(state.test, judged)] if tested else []),
                str(state.epoch),
                f"{state.wall_s:.0f} s",
                STATUS_WORDS[state.status] + _because(state) + (f"; {state.note}" if state.note else ""),
            )
        )
    return format_table(rows)


def _because(state: TrialState) -> str:
    """Say why a trial failed or ended before its time; that ASHA stopped one its status says."""
    return f": {state.reason}" if state.reason and state.status in ("failed", "finished") else ""


def packed(report: dict[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    """Return a trial's report as Tune gets it: the `metrics` it goes by, and the rest as one text.

    Of every number Tune keeps six statistics and two histories per trial, and writes all trials' down every few
    seconds: two thirds of what a trial costs the driver.
    """
    numbers = {key for key, value in report.items() if isinstance(value, int | float)} - {*metrics, "epoch"}
    others = {key: value for key, value in report.items() if key not in numbers}
    return {**others, FIGURES: json.dumps({key: report[key] for key in sorted(numbers)})}


def unpacked(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result of Tune with every figure under its own name."""
    return {**json.loads(result.get(FIGURES, "{}")), **result}


def best_checkpoint(sweep_folder: Path, trial: str, metric: str, mode: str) -> StoredCheckpoint | None:
    """Return the best by the figure among a trial's stored checkpoints.

    The checkpoints themselves are asked, not the reports: after a crash they know of epochs that Tune does not. A
    corrupt one cannot win.
    """
    entries = ranked(stored_checkpoints(train_folder(sweep_folder, trial)), metric, mode)
    return next((entry for entry in entries if not damage(entry.folder)), None)


def kept_checkpoints(folder: Path, states: Sequence[TrialState], metric: str, mode: str) -> dict[str, StoredCheckpoint]:
    """Return each trial's best stored checkpoint, and have its figure told: of a better epoch there are no weights."""
    kept = {}
    for state in states:
        if found := best_checkpoint(folder, state.trial, metric, mode):
            kept[state.trial] = found
            state.best, state.best_epoch = float(found.metrics[metric]), found.epoch
    return kept


def recorded_trials(sweep_folder: Path, metric: str, mode: str) -> list[TrialState]:
    """Return the trials of a sweep as its journal has them, in the order of proposal."""
    states: dict[str, TrialState] = {}
    for event in journal_events(sweep_folder):
        trial = event.get("trial", "")
        if event["kind"] == "trial" and trial not in states:
            states[trial] = TrialState(trial, int(event["tags"]["stemtune.number"]), event["params"])
        elif event["kind"] == "lost":
            states.pop(trial, None)
        elif event["kind"] == "metrics" and trial in states:
            states[trial].take({**event["values"], "epoch": event["step"]}, metric, mode)
            states[trial].wall_s = event["values"].get("time/wall_s", 0.0)
        elif event["kind"] == "end" and trial in states:
            states[trial].status, states[trial].reason = event["status"], event["reason"]
        elif event["kind"] == "figures" and trial in states:
            states[trial].test, states[trial].note = event["values"], event["tags"].get(NOTE_TAG, "")
    return sorted(states.values(), key=lambda state: state.number)


def history(sweep_folder: str | Path, trial: str) -> list[dict[str, Any]]:
    """Return every report of a trial that its checkpoints know of, by epoch."""
    entries = stored_checkpoints(train_folder(sweep_folder, trial))
    return max((entry.history for entry in entries), key=len, default=[])
