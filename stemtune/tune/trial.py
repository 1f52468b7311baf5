"""One trial: a Ray Train run of one or more data-parallel workers, driven from inside Ray Tune.

`run_trial` is what Tune starts for each trial; it takes no CPU itself and launches a `TorchTrainer` whose workers
run `train_worker`. Both stand here, never in `__main__`, so that they travel by name and a sweep can be restored.
Ray, torch and the training code are imported inside the functions: start-up is most of a short trial.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a report takes 0.2 s instead of 2 s
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "86400",  # a trial that waits for its turn waits quietly
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
}
"""Set in every process of a sweep; one environment for all lets Ray reuse the processes it started ahead."""

START_WAIT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"

ELASTIC_START_S = "20"
"""How long an elastic trial waits for its workers' places before it asks anew how many there are: right after a node is
lost Ray still counts it, and would wait for it for ever."""

ELASTIC_STARTS = 200
"""How often it asks."""

ELASTIC_LOSSES = 3
"""How many nodes it may lose before it is left to Tune, which starts it once more from its checkpoint."""

PASSED_ON = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG", "HF_HOME", "HF_HUB_OFFLINE", "TORCH_HOME")
"""Settings of the submitting process's environment that the workers get as well."""

WORST = 1e6
"""Stands for a figure that is not finite: Optuna refuses infinities and NaN."""

FAILURE = "failure.txt"


def train_folder(sweep_folder: str | Path, trial_id: str) -> Path:
    """Return where a trial's checkpoints lie, on storage that all nodes see."""
    return Path(sweep_folder) / "train" / f"train-{trial_id}"


def run_trial(config: dict[str, Any]) -> None:
    """Run one trial to its end, passing every report up to Tune (the driver function of Ray Tune)."""
    started = time.time()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from ray import train, tune

    from stemtune.tune.meeting import MeetingConfig
    from stemtune.tune.trainer import QuietTrainer, ToTune

    sweep, knobs = config["sweep"], config["knobs"]
    trial_id = tune.get_context().get_trial_id()
    folder = train_folder(sweep["folder"], trial_id)
    _raise_noted(folder)
    workers = _how_many(knobs, sweep)
    elastic = isinstance(workers, tuple)
    os.environ[START_WAIT] = ELASTIC_START_S if elastic else ENVIRONMENT[START_WAIT]
    resources = {"CPU": float(sweep["cpus_per_worker"])}
    if sweep["gpus_per_worker"]:
        resources["GPU"] = float(sweep["gpus_per_worker"])
    trainer = QuietTrainer(
        train_worker,
        train_loop_config={"knobs": knobs, "sweep": sweep, "folder": str(folder), "started": started},
        torch_config=MeetingConfig(backend="nccl" if sweep["gpus_per_worker"] else "gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=workers, use_gpu=bool(sweep["gpus_per_worker"]), resources_per_worker=resources
        ),
        run_config=train.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            callbacks=[ToTune(sweep["metric"])],
            failure_config=train.FailureConfig(
                max_failures=ELASTIC_LOSSES if elastic else 1,
                controller_failure_limit=ELASTIC_STARTS if elastic else 1,
            ),
            checkpoint_config=train.CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute=sweep["metric"], checkpoint_score_order=sweep["mode"]
            ),
            worker_runtime_env={"env_vars": sweep["environment"]} if sweep["environment"] else None,
            logging_config=train.LoggingConfig(log_level="WARNING"),
        ),
    )
    trainer.fit()


def _how_many(knobs: dict[str, Any], sweep: dict[str, Any]) -> int | tuple[int, int]:
    """Return the number of workers, or the fewest and the most where a trial may go on with fewer."""
    most, least = int(knobs["train.workers"]), sweep.get("workers_least")
    return most if least is None or least >= most else (int(least), most)


def train_worker(config: dict[str, Any]) -> None:
    """Train in one data-parallel worker and report after every epoch (the loop of Ray Train)."""
    began = time.time()
    import ray.train
    import torch
    from ray.train.torch import get_device

    folder = Path(config["folder"])
    _raise_noted(folder)
    context = ray.train.get_context()
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, round(config["sweep"]["cpus_per_worker"])))
    from stemtune.config import Config
    from stemtune.learning.fit import Diverged, fit

    reporter = Reporter(config, context.get_world_size(), began)
    with tempfile.TemporaryDirectory(prefix="stemtune-") as scratch, _resumed(reporter) as resume:
        try:
            reporter.trains()
            fit(
                Config.from_flat(config["knobs"]),
                reporter.report,
                Path(scratch),
                resume=resume,
                rank=context.get_world_rank(),
                world=context.get_world_size(),
                device=get_device(),
            )
        except Diverged:
            return  # it has reported figures worse than any other trial's
        except Exception as problem:
            _note(folder, problem)
            raise
    reporter.finish()


class Reporter:
    """Passes a run's metrics to Ray Train, completed by epoch, times and the placement group.

    Parameters
    ----------
    config
        What `run_trial` gave the worker.
    world
        Number of workers.
    began
        When this worker's loop began, in seconds since the epoch.
    """

    def __init__(self, config: dict[str, Any], world: int, began: float) -> None:
        self.epoch = 0
        self.before: dict[str, float] = {}
        self._reported = False
        self._started, self._began, self._world = config["started"], began, world
        self._spent = 0.0  # device seconds of the time before a restart
        self._first_s = 0.0
        self._train_began, self._reporting_s, self._trained_s = began, 0.0, 0.0
        self._devices = world * max(1.0, float(config["sweep"]["gpus_per_worker"]))

    def resume(self, metadata: dict[str, Any]) -> None:
        """Go on where a checkpoint left off."""
        self.epoch = int(metadata.get("epoch", 0))
        self.before = dict(metadata.get("metrics", {}))
        self._spent = float(self.before.get("time/device_s", 0.0))
        self._trained_s = float(self.before.get("time/train_s", 0.0))

    def trains(self) -> None:
        """Note that everything is imported and training begins."""
        self._train_began = time.time()

    def report(self, metrics: dict[str, float], folder: Path | None) -> None:
        """Report the metrics of one epoch and, on rank 0, the folder with its checkpoint."""
        import ray.train

        self.epoch += 1
        self._reported = True
        values = finite(metrics)
        now = time.time()
        self._first_s = self._first_s or now - self._started
        values["epoch"] = self.epoch
        values["time/start_s"] = self._began - self._started
        values["time/first_report_s"] = self._first_s
        values["time/train_s"] = self._trained_s + now - self._train_began - self._reporting_s
        values["time/device_s"] = self._spent + (now - self._began) * self._devices
        values["placement_group"] = _placement_group()  # type: ignore[assignment]
        checkpoint = None
        if folder is not None:
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            checkpoint.set_metadata({"epoch": self.epoch, "metrics": values})
        ray.train.report(values, checkpoint=checkpoint)
        self._reporting_s += time.time() - now

    def finish(self) -> None:
        """Tell Tune the last figures once more when there was nothing left to train after a restart."""
        import ray.train

        if not self._reported and self.before:
            ray.train.report({**self.before, "placement_group": _placement_group()})


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics with every NaN or infinity replaced by the worst figure of its kind."""
    from stemtune.learning.metrics import WORST as worst

    return {key: float(value) if math.isfinite(value) else worst.get(key, WORST) for key, value in metrics.items()}


@contextlib.contextmanager
def _resumed(reporter: Reporter) -> Iterator[Path | None]:
    """Yield the folder of the latest checkpoint of this trial, if an earlier attempt left one."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    reporter.resume(checkpoint.get_metadata())
    with checkpoint.as_directory() as folder:
        yield Path(folder)


def _placement_group() -> str:
    """Return the id of the resources this trial holds: the sweep returns them when a trial is stopped."""
    from ray.util import get_current_placement_group

    group = get_current_placement_group()
    return group.id.hex() if group is not None else ""


def _note(folder: Path, problem: Exception) -> None:
    """Leave word of a mistake that another attempt would only repeat."""
    if isinstance(problem, RuntimeError | OSError) and "out of memory" not in str(problem):
        return  # a lost connection or node: worth another attempt
    reason = str(problem).strip() or type(problem).__name__
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FAILURE).write_text(f"{type(problem).__name__}: {reason}\n\n{traceback.format_exc()}")


def _raise_noted(folder: Path) -> None:
    note = failure(folder)
    if note:
        raise RuntimeError(note)


def failure(folder: Path) -> str:
    """Return in one line why the trial in `folder` failed, or an empty string."""
    try:
        return (folder / FAILURE).read_text().splitlines()[0]
    except (OSError, IndexError):
        return ""
