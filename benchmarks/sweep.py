"""`python -m benchmarks sweep`: what a sweep costs besides its training, seen from outside.

Real trials of a given length run on some slots of this machine, as `stemtune sweep --local` runs them in a process of
its own; the figures come from the clock, from what the kernel says of that process, and from MLflow's records.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import benchmarks
from stemtune.errors import UserError

SPACE = """\
metric: val/disorientation_median_deg
budget: {{trials: {trials}, epochs: {epochs}, grace_epochs: {grace}, reduction: 3, concurrent: {slots}}}
resources: {{cpus_per_worker: 1}}
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
  optim.lr: {{log: [1.0e-4, 1.0e-2]}}
"""

WARM_UP_EPOCHS = 4
"""Epochs of the short sweep that tells how long one epoch takes while all slots are busy."""


@dataclass(frozen=True)
class Options:
    """What `python -m benchmarks sweep` is asked for; the command line's help says what each means."""

    trials: int = 16
    seconds: int = 60
    slots: int = 2
    keep: str | None = None
    json: str | None = None


class Sweep(NamedTuple):
    """A finished sweep: its seconds, those of its driver's processor, the driver's MiB, and the runs of its trials."""

    seconds: float
    processor_s: float
    peak_mib: float
    trials: list[Any]


def run(options: Options) -> benchmarks.Figures:
    """Run the sweeps that `options` ask for, print the figures and return them."""
    print(f"sweep: {options.trials} trials of about {options.seconds} s on {options.slots} slots")
    with tempfile.TemporaryDirectory(prefix="stemtune-bench-", ignore_cleanup_errors=True) as scratch:
        folder = Path(options.keep).absolute() if options.keep else Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        warm = run_sweep(folder, "warm-up", options.slots, WARM_UP_EPOCHS, options.slots)
        epoch_s = statistics.median(metric(trial, "time/train_s") / WARM_UP_EPOCHS for trial in warm.trials)
        epochs = max(2, math.ceil(options.seconds / epoch_s))
        sweep = run_sweep(folder, "makespan", options.trials, epochs, options.slots)
        figures = makespan(sweep, epochs, options.slots)
        figures["the same as a plain function of Ray Tune, s"] = alone = plain(folder, "makespan")
        figures["makespan / plain function"] = sweep.seconds / alone
    benchmarks.report(figures, options.json)
    return figures


def run_sweep(folder: Path, name: str, trials: int, epochs: int, slots: int) -> Sweep:
    """Run a sweep in a process of its own and return what it took and what MLflow keeps of it.

    Raises
    ------
    UserError
        When the sweep fails.
    """
    from mlflow import MlflowClient

    space = folder / f"{name}.yaml"
    space.write_text(SPACE.format(trials=trials, epochs=epochs, grace=max(1, epochs - 1), slots=slots))
    records = f"sqlite:///{folder / 'mlflow.db'}"
    settings = {"STEMTUNE_SWEEPS": str(folder / "sweeps"), "MLFLOW_TRACKING_URI": records}
    began = time.perf_counter()
    with (folder / f"{name}.log").open("w") as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "stemtune.cli", "sweep", str(space), "--local", "--name", name],
            env={**os.environ, **settings},
            stdout=log,
            stderr=log,
        )
        _, status, used = os.wait4(driver.pid, 0)
    driver.returncode = os.waitstatus_to_exitcode(status)
    if driver.returncode:
        raise UserError(f"the sweep '{name}' failed: {Path(log.name).read_text().strip()[-300:]}")
    client = MlflowClient(records)
    experiment = client.get_experiment_by_name(name)
    found = client.search_runs([experiment.experiment_id], "tags.`stemtune.kind` = 'trial'", max_results=10_000)
    seconds = time.perf_counter() - began
    return Sweep(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, list(found))


def plain(folder: Path, name: str) -> float:
    """Return the seconds that the same trials take as a plain function of Ray Tune, without records."""
    began = time.perf_counter()
    peer = [sys.executable, "-m", "benchmarks.peers.plain_tune", str(folder / f"{name}.yaml"), str(folder / "plain")]
    done = subprocess.run(peer, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the plain function of Ray Tune failed: {done.stderr.strip()[-300:]}")
    return time.perf_counter() - began


def makespan(sweep: Sweep, epochs: int, slots: int) -> dict[str, object]:
    """Return how long the trials of a sweep took in all, over their training alone on the slots, and where it went."""
    trials = sorted(sweep.trials, key=lambda trial: trial.info.start_time)
    training = [metric(trial, "time/train_s") for trial in trials]
    status = [trial.data.tags.get("stemtune.status", "") for trial in trials]
    first, later = trials[:slots], trials[slots:]  # the first ones also start their drivers
    first_training = min(trial.info.start_time / 1000 + metric(trial, "time/start_s") for trial in first)
    last_end = max(trial.info.end_time for trial in trials) / 1000
    return {
        "trials": len(trials),
        "epochs of a trial": epochs,
        "training alone, median s": statistics.median(training),
        "makespan, s": sweep.seconds,
        "makespan / training on the slots": sweep.seconds / (sum(training) / slots),
        "  from the first trial's training on": (last_end - first_training) / (sum(training) / slots),
        "start to training, s: first trials": _median([metric(trial, "time/start_s") for trial in first]),
        "start to training, s: later trials": _median([metric(trial, "time/start_s") for trial in later]),
        "start to first report, s: later trials": _median([metric(trial, "time/first_report_s") for trial in later]),
        "stopped by ASHA": status.count("stopped"),
        "failed": status.count("failed"),
        "driver's processor s per trial": sweep.processor_s / len(trials),
        "driver's memory at its peak, MiB": sweep.peak_mib,
    }


def metric(trial: Any, name: str) -> float:
    """Return the last value of a metric of an MLflow run; NaN where it has none."""
    return float(trial.data.metrics.get(name, math.nan))


def _median(values: Sequence[float]) -> float | str:
    known = [value for value in values if math.isfinite(value)]
    return statistics.median(known) if known else "none"
