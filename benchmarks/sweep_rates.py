"""What a sweep costs besides training: measured on sweeps that are made for it, in a folder of their own.

`scale` runs many trials through Tune, Optuna, ASHA, the records and MLflow with the training replaced by made-up
reports; `makespan` runs real trials of a given length and compares with their training alone; `epochs_to_target`
compares the search with random search that stops nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from stemtune.config import METRICS
from stemtune.tracking import Tracker, address
from stemtune.tune.formatting import better
from stemtune.tune.run.callback import SweepCallback
from stemtune.tune.run.manifest import absolute, new_manifest
from stemtune.tune.run.sweep import _finish, sweeps_folder
from stemtune.tune.run.trial_state import TrialState, driver_state, packed
from stemtune.tune.run.tuner import new_tuner
from stemtune.tune.space.space import SearchSpace, space_from_text

Figures = dict[str, object]

EPOCHS = 3  # reports of a made-up trial that is not stopped

SCALE = """\
metric: val/disorientation_median_deg
budget: {trials: TRIALS, epochs: 3, grace_epochs: 1, reduction: 3}
search:
  optim.lr: {log: [1.0e-5, 1.0e-2]}
  optim.lr_decay: {uniform: [0.85, 0.999]}
  model.name:
    one_of:
      cnn: {model.kernel_size: [3, 5, 7], model.width: {log_int: [16, 64]}}
      polar: {model.start: [matched, random]}
"""

REAL = """\
metric: val/disorientation_median_deg
budget: {trials: TRIALS, epochs: EPOCHS, grace_epochs: GRACE, reduction: 3, concurrent: SLOTS}
resources: {cpus_per_worker: 1}
fixed:
  data.source: simulate
  data.patterns_per_epoch: 1024
  data.validation_patterns: 256
  simulate.size: 64
  simulate.scale: 0.05
  train.batch_size: 32
  model.name: cnn
  model.width: 16
search:
  optim.lr: {log: [1.0e-4, 1.0e-2]}
"""


class Metered(SweepCallback):
    """A `SweepCallback` that notes when each trial began and ended, and how large the driver was then."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.begun: dict[str, float] = {}
        self.over: dict[str, float] = {}
        self.sizes: list[float] = []
        self.reports: list[tuple[str, int, float]] = []

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note the beginning."""
        self.begun[trial.trial_id] = time.time()
        super().on_trial_start(iteration, trials, trial, **info)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Note the report."""
        super().on_trial_result(iteration, trials, trial, result, **info)
        state = self.trials[trial.trial_id]
        self.reports.append((state.trial, state.epoch, state.last))

    def _end(self, trial_id: str, status: str, reason: str) -> None:
        super()._end(trial_id, status, reason)
        self.over[trial_id] = time.time()
        self.sizes.append(memory_mib())


def made_up(config: dict[str, Any]) -> None:
    """Report as a trial would, without training (what `scale` gives Tune to run)."""
    from ray import tune

    knobs = config["knobs"]
    goal = abs(math.log10(knobs["optim.lr"]) + 3.0) * 20 + (5.0 if knobs["model.name"] == "cnn" else 0.0)
    for epoch in range(1, EPOCHS + 1):
        figures = {**dict.fromkeys(METRICS, 0.5), "val/disorientation_median_deg": goal + 10.0 / epoch}
        times = {"time/start_s": 0.0, "time/first_report_s": 0.0, "time/train_s": 0.0, "time/device_s": 0.0}
        tune.report(packed({**figures, **times, "epoch": epoch}, ["val/disorientation_median_deg"]))


def memory_mib() -> float:
    """Return how much memory this process holds now, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextlib.contextmanager
def clocked(*methods: tuple[type, str]) -> Iterator[dict[str, tuple[float, int]]]:
    """Yield, by `Class.method`, the seconds spent in these methods and the number of calls while the block runs."""
    spent: dict[str, tuple[float, int]] = {}

    def timed(label: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def inner(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                seconds, count = spent.get(label, (0.0, 0))
                spent[label] = (seconds + time.perf_counter() - began, count + 1)

        return inner

    before = [(owner, name, getattr(owner, name)) for owner, name in methods]
    for owner, name, call in before:
        setattr(owner, name, timed(f"{owner.__name__}.{name}", call))
    try:
        yield spent
    finally:
        for owner, name, call in before:
            setattr(owner, name, call)


@contextlib.contextmanager
def counted_calls() -> Iterator[Counter[str]]:
    """Yield how often each call of MLflow's client is made while the block runs."""
    events: Any = importlib.import_module("stemtune.tracking.events")
    calls: Counter[str] = Counter()
    make = events.client

    class Counted:
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Any:
            calls[name] += 1
            return getattr(self._inner, name)

    events.client = lambda where: Counted(make(where))
    try:
        yield calls
    finally:
        events.client = make


def scale(trials: int, at_once: int = 2) -> Figures:
    """Return what `trials` trials cost the driver when the training is nothing.

    Everything is what a sweep uses (Tune, Optuna's study on disk, ASHA, the records, the writer to MLflow and its
    journal), except that a trial's function reports made-up figures instead of starting Ray Train.
    """
    from ray.tune.execution.experiment_state import _ExperimentCheckpointManager

    from stemtune.tracking.events import Sender
    from stemtune.tune.cluster.connect import connect
    from stemtune.tune.run.scheduler import LearnersASHA
    from stemtune.tune.run.searcher import StudySearch

    space = space_from_text(SCALE.replace("TRIALS", str(trials)), "scale")
    connect(local=True)
    clocks = clocked(
        (StudySearch, "suggest"),
        (StudySearch, "on_trial_result"),
        (StudySearch, "on_trial_complete"),
        (LearnersASHA, "on_trial_result"),
        (Metered, "on_trial_start"),
        (Metered, "on_trial_result"),
        (Metered, "on_trial_complete"),
        (_ExperimentCheckpointManager, "sync_up_experiment_state"),
        (Sender, "send"),
    )
    with clocks as spent, counted_calls() as calls, _quiet():
        began = time.perf_counter()
        watch, folder, sheet = _ran(space, "scale", at_once, run=made_up)
        seconds = time.perf_counter() - began
        behind = watch.tracker.waiting() if isinstance(watch.tracker, Tracker) else 0
        outcome = _finish(watch, folder, sheet, False)
        left = outcome.unsent
        if left:
            left = Tracker(folder, "scale", sheet["sweep_id"], address()).close(3600.0)
        sent = time.perf_counter() - began
    return _scale_figures(watch, trials, seconds, spent, calls, folder) | {
        "MLflow events that waited when the last trial ended": behind,
        "seconds until MLflow had all": sent,
        "events lost": left,
    }


def _scale_figures(
    watch: Metered,
    trials: int,
    seconds: float,
    spent: dict[str, tuple[float, int]],
    calls: Counter[str],
    folder: Path,
) -> Figures:
    ends = sorted(watch.over.values())
    tenth = max(1, len(ends) // 10)
    early, late = watch.sizes[tenth - 1], watch.sizes[-1]
    figures: Figures = {
        "trials": len(ends),
        "driver's memory at its peak, MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "growth after the first tenth, KiB per trial": (late - early) * 1024 / max(1, len(ends) - tenth),
        "seconds per trial": seconds / max(1, len(ends)),
        "  of the second tenth": (ends[2 * tenth - 1] - ends[tenth - 1]) / tenth,
        "  of the last tenth": (ends[-1] - ends[-1 - tenth]) / tenth,
    }
    for label, (total, count) in sorted(spent.items()):
        figures[f"ms per trial in {label}"] = 1000 * total / trials
        figures[f"  calls of {label}"] = count
    figures["MLflow calls per trial"] = sum(calls.values()) / trials
    for name, count in calls.most_common():
        figures[f"  of {name}"] = count / trials
    for file in ("tracking.jsonl", "study.journal"):
        figures[f"{file}, KiB per trial"] = (folder / file).stat().st_size / 1024 / trials
    snapshot = sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) / 2**10
    journals = sum((folder / file).stat().st_size for file in ("tracking.jsonl", "study.journal")) / 2**10
    figures["Tune's snapshot, KiB per trial"] = (snapshot - journals) / trials
    return figures


def _ran(space: SearchSpace, name: str, at_once: int, **settings: Any) -> tuple[Metered, Path, dict[str, Any]]:
    """Run a sweep up to its last trial and return what watched it, its folder and its sheet."""
    folder = sweeps_folder() / name
    folder.mkdir(parents=True)
    sheet = new_manifest(space, name)
    watch = Metered(space, folder, name, sheet["sweep_id"], True, "")
    new_tuner(space, folder, watch, at_once, **settings).fit()
    seen = driver_state(sheet["sweep_id"]).callback
    assert isinstance(seen, Metered)
    return seen, folder, sheet


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep a line per trial off the terminal."""
    with Path(os.devnull).open("w") as nothing, contextlib.redirect_stderr(nothing):
        yield


def makespan(trials: int, seconds: float, slots: int) -> Figures:
    """Return how long real trials of about `seconds` of training take in all, over their training alone on `slots`."""
    from stemtune.tune.cluster.connect import connect

    connect(local=True)
    epochs = max(2, math.ceil(seconds / _epoch_s(slots)))
    watch, folder, sheet, whole = _real(trials, epochs, slots, "makespan")
    outcome = _finish(watch, folder, sheet, False)
    states = list(watch.trials.values())
    pure = [float(state.values["time/train_s"]) for state in states]
    begun = {state.trial: watch.begun[state.trial] for state in states}
    gaps = _gaps(watch, [state for state in states if state.status == "stopped"])
    later = sorted(states, key=lambda state: state.number)[slots:]  # the first ones also start their drivers
    return {
        "trials": len(states),
        "epochs of a trial": epochs,
        "training alone, median s": statistics.median(pure),
        "makespan, s": whole,
        "makespan / (training alone / slots)": whole / (sum(pure) / slots),
        "the same without the first start of Ray's workers": _from_first_report(watch, states, begun, pure, slots),
        "start to training, s: first trials": statistics.median(
            float(state.values["time/start_s"]) for state in states if state not in later
        ),
        "start to training, s: later trials, median": _median([float(state.values["time/start_s"]) for state in later]),
        "start to first report, s: later trials, median": _median([state.first_report_s for state in later]),
        "stopped by ASHA": sum(state.status == "stopped" for state in states),
        "from a stop to the next trial's start, s: median": _median(gaps),
        "failed": sum(state.status == "failed" for state in outcome.trials),
    }


def _from_first_report(
    watch: Metered, states: list[TrialState], begun: dict[str, float], pure: list[float], slots: int
) -> float:
    """Return the makespan from the moment the first trial trains, over training alone on the slots."""
    first = min(begun[state.trial] + float(state.values["time/start_s"]) for state in states)
    return (max(watch.over.values()) - first) / (sum(pure) / slots)


def _median(values: Sequence[float]) -> float | str:
    return statistics.median(values) if values else "none"


def _gaps(watch: Metered, stopped: list[TrialState]) -> list[float]:
    """Return the seconds from each stop to the start of the next trial."""
    starts = sorted(watch.begun.values())
    found = []
    for state in stopped:
        after = [start for start in starts if start >= watch.over[state.trial] - 0.5]
        if after:
            found.append(max(0.0, after[0] - watch.over[state.trial]))
    return found


def _epoch_s(slots: int) -> float:
    """Return the seconds of an epoch while all slots are busy, from a short sweep."""
    watch, folder, sheet, _ = _real(slots, 4, slots, "warm-up")
    _finish(watch, folder, sheet, False)
    return statistics.median(float(state.values["time/train_s"]) / 4 for state in watch.trials.values())


def _real(trials: int, epochs: int, slots: int, name: str) -> tuple[Metered, Path, dict[str, Any], float]:
    words = {"TRIALS": trials, "EPOCHS": epochs, "GRACE": max(1, epochs - 1), "SLOTS": slots}
    text = REAL
    for word, value in words.items():
        text = text.replace(word, str(value))
    began = time.perf_counter()
    watch, folder, sheet = _ran(space_from_text(text, name), name, slots)
    return watch, folder, sheet, time.perf_counter() - began


def epochs_to_target(space: SearchSpace, seeds: Sequence[int], target: float | None = None) -> Figures:
    """Return the epochs that TPE with ASHA and random search without stopping need to reach a figure.

    Parameters
    ----------
    space
        What to search; its budget counts for both.
    seeds
        A pair of sweeps is run for each.
    target
        The figure to reach; by default the best that random search of that seed came to.
    """
    from dataclasses import replace

    from stemtune.tune.cluster.connect import concurrency, connect
    from stemtune.tune.cluster.node_check import alive

    space = absolute(space, Path.cwd())
    connect(local=True)
    figures: Figures = {}
    ratios = []
    for seed in seeds:
        seeded = replace(space, fixed={**space.fixed, "train.seed": seed})
        at_once = concurrency(seeded, [node["Resources"] for node in alive()])
        curves = {}
        for plain in (True, False):
            watch, folder, sheet = _ran(seeded, f"{'random' if plain else 'search'}-{seed}", at_once, plain=plain)
            _finish(watch, folder, sheet, False)
            curves[plain] = [value for _, _, value in watch.reports]
        goal = target if target is not None else (min if space.mode == "min" else max)(curves[True])
        counts = [(plain, reached(curves[plain], goal, space.mode)) for plain in (True, False)]
        for plain, count in counts:
            label = "random without stopping" if plain else "TPE and ASHA"
            figures[f"seed {seed}, {label}: epochs to {goal:.4g}"] = count or f"not in {len(curves[plain])}"
        (_, at_random), (_, searched) = counts
        if at_random and searched:
            ratios.append(searched / at_random)
    figures["ratio, median of the seeds that reached it"] = _median(ratios)
    return figures


def reached(values: Sequence[float], goal: float, mode: str) -> int | None:
    """Return how many reports it took to reach `goal`, or None."""
    for count, value in enumerate(values, 1):
        if value == goal or better(value, goal, mode):
            return count
    return None
