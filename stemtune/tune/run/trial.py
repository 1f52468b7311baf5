"""One trial: training inside Ray Tune's own process, or as a Ray Train run of several data-parallel workers.

`run_trial` is what Tune starts for each trial. One worker trains right there, in a process that Tune keeps for the next
trial; several are a `TorchTrainer` whose workers run `train_worker`. All stand here, never in `__main__`, so that they
travel by name and a sweep can be restored. Ray, torch and the training code are imported inside the functions: start-up
is most of a short trial.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import math
import os
import tempfile
import time
import traceback
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stemtune.errors import UserError, is_out_of_memory
from stemtune.tune.cluster import ENVIRONMENT
from stemtune.tune.run.checkpoints import (
    StoredCheckpoint,
    annotate,
    how_ended,
    newest_intact,
    remove_partial,
    store,
    stored_checkpoints,
    train_folder,
)

START_WAIT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"

ELASTIC_START_S = "20"
"""How long an elastic trial waits for its workers' places before it asks anew how many there are: right after a node is
lost Ray still counts it, and would wait for it for ever."""

ELASTIC_STARTS = 200  # how often it asks
ELASTIC_LOSSES = 3
"""How many nodes it may lose before it is left to Tune, which starts it once more from its checkpoint."""

PASSED_ON = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG", "HF_HOME", "HF_HUB_OFFLINE", "TORCH_HOME")
"""Settings of the submitting process's environment that the workers get as well."""

WORST = 1e6  # stands for a figure that is not finite: Optuna refuses infinities and NaN
FAILURE = "failure.txt"  # why a trial failed, in its folder
NO_SPACE = os.strerror(errno.ENOSPC)  # what is said of a full disk, through whatever wraps it
DIVERGED = "diverged.txt"  # how a trial diverged, in its folder
EARLIER = "earlier"  # key of a report: the reports from before a restart
CORRUPT = "damaged"  # key of a report: which checkpoints were corrupt at a restart, and what the trial did then


@dataclass(frozen=True)
class Clock:
    """A moment, such that the time since then is right whatever is done to the clock of the machine."""

    boot: str
    forward_s: float
    wall_s: float

    @classmethod
    def now(cls) -> Clock:
        """Return this moment."""
        boot = ""
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return cls(boot, time.monotonic(), time.time())

    def since(self, earlier: Clock) -> float:
        """Return the seconds since `earlier`: on another machine, all there is to compare are the clocks."""
        if self.boot and self.boot == earlier.boot:
            return self.forward_s - earlier.forward_s
        return max(0.0, self.wall_s - earlier.wall_s)


def passed_on() -> dict[str, str]:
    """Return those of `PASSED_ON` that are set here."""
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ}


def run_trial(config: dict[str, Any]) -> None:
    """Run one trial to its end (the function of Ray Tune)."""
    started = Clock.now()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from ray import tune

    from stemtune.tune.run.trial_state import packed

    sweep, knobs = config["sweep"], config["knobs"]
    trial_id = tune.get_context().get_trial_id()
    folder = train_folder(sweep["folder"], trial_id)
    _raise_noted(folder)
    through = stored_checkpoints(folder)[-1:] if how_ended(folder) else []
    if through:  # a crash came between its end and Tune's next snapshot
        tune.report(packed({**through[0].metrics, EARLIER: through[0].history}, sweep["objectives"]))
        return
    remove_partial(folder)
    if int(knobs["train.workers"]) == 1:
        _train_here({"knobs": knobs, "sweep": sweep, "folder": str(folder), "started": started})
    else:
        _train_on_workers(knobs, sweep, folder, started)


def _train_here(config: dict[str, Any]) -> None:
    """Train with one worker, in this process of Tune's."""
    os.environ.update(config["sweep"]["environment"])
    began = Clock.now()
    import torch

    gpu = bool(config["sweep"]["gpus_per_worker"])
    gc.collect()  # what the trial before has left
    if gpu:
        torch.cuda.empty_cache()
    _train(
        config,
        TuneReporter(config, began),
        newest_intact(Path(config["folder"])),
        device=torch.device("cuda" if gpu else "cpu"),
    )


def _train_on_workers(knobs: dict[str, Any], sweep: dict[str, Any], folder: Path, started: Clock) -> None:
    """Train with several workers of Ray Train, passing every report up to Tune."""
    from ray import train

    from stemtune.tune.cluster.ray_internals import trainer_class
    from stemtune.tune.run.workers import RendezvousConfig, ToTune

    most = int(knobs["train.workers"])
    least = int(sweep.get("workers_least") or most)
    elastic = least < most
    os.environ[START_WAIT] = ELASTIC_START_S if elastic else ENVIRONMENT[START_WAIT]
    trainer = trainer_class()(
        train_worker,
        train_loop_config={"knobs": knobs, "sweep": sweep, "folder": str(folder), "started": started},
        torch_config=RendezvousConfig(backend="nccl" if sweep["gpus_per_worker"] else "gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=(least, most) if elastic else most,
            use_gpu=bool(sweep["gpus_per_worker"]),
            resources_per_worker=worker_resources(sweep),
        ),
        run_config=train.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            callbacks=[ToTune(sweep["objectives"])],
            failure_config=train.FailureConfig(
                max_failures=ELASTIC_LOSSES if elastic else 1, controller_failure_limit=ELASTIC_STARTS if elastic else 1
            ),
            checkpoint_config=train.CheckpointConfig(num_to_keep=None),  # `store` keeps what is to be kept
            worker_runtime_env={"env_vars": sweep["environment"]} if sweep["environment"] else None,
            logging_config=train.LoggingConfig(log_level="WARNING"),
        ),
    )
    trainer.fit()


def worker_resources(sweep: dict[str, Any]) -> dict[str, float]:
    """Return what each worker of a trial asks of Ray."""
    each = {"CPU": float(sweep["cpus_per_worker"]), "GPU": float(sweep["gpus_per_worker"])}
    return {kind: need for kind, need in each.items() if need}


def train_worker(config: dict[str, Any]) -> None:
    """Train in one of several data-parallel workers (the loop of Ray Train)."""
    began = Clock.now()
    import ray.train
    import torch
    from ray.train.torch import get_device

    folder = Path(config["folder"])
    _raise_noted(folder)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    _train(config, Reporter(config, world, began), _resumed(folder), get_device(), rank, world)
    if world > 1:
        torch.distributed.destroy_process_group()


def _train(
    config: dict[str, Any],
    reporter: Reporter,
    start: tuple[StoredCheckpoint | None, list[str]],
    device: Any,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Train from the checkpoint that is there, and report after every epoch."""
    import torch

    folder, (resume, faults) = Path(config["folder"]), start
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, round(config["sweep"]["cpus_per_worker"])))
    from stemtune.config import Config
    from stemtune.learning.fit import fit
    from stemtune.learning.trainer import Diverged

    reporter.resume(resume.history if resume else [], faults)
    with tempfile.TemporaryDirectory(prefix="stemtune-") as scratch:
        try:
            reporter.trains()
            fit(
                Config.from_flat(config["knobs"]),
                reporter.report,
                Path(scratch),
                resume=None if resume is None else resume.folder,
                rank=rank,
                world=world,
                device=device,
                objective=(config["sweep"]["metric"], config["sweep"]["mode"]),
            )
        except Diverged as problem:  # it has reported figures worse than any other trial's
            _write(folder / DIVERGED, str(problem))
            return
        except Exception as problem:
            _note(folder, problem)
            raise
    reporter.finish()


class Reporter:
    """Passes a run's metrics to Ray Train, completed by epoch, times and the placement group.

    After a restart the first report carries under `EARLIER` what was reported before: Tune may not have heard of it.
    `config` is what `run_trial` gave the worker, one of `world`, whose loop `began` then.
    """

    def __init__(self, config: dict[str, Any], world: int, began: Clock) -> None:
        self.history: list[dict[str, Any]] = []
        self._extra: dict[str, list[Any]] = {}
        self._reported = False
        self._began, self._start_s = began, began.since(config["started"])
        self._folder = Path(config["folder"])
        self._metric, self._mode = config["sweep"]["metric"], config["sweep"]["mode"]
        self._spent = 0.0  # device seconds of the time before a restart
        self._first_s = 0.0
        self._train_began, self._reporting_s, self._trained_s = began, 0.0, 0.0
        self._devices = world * max(1.0, float(config["sweep"]["gpus_per_worker"]))

    def resume(self, history: list[dict[str, Any]], faults: list[str]) -> None:
        """Go on where a checkpoint left off; `faults` say what is wrong with others."""
        where = f"the trial goes on from epoch {len(history)}" if history else "the trial starts from the beginning"
        self._extra = {EARLIER: list(history), CORRUPT: [f"{fault}; {where}" for fault in faults]}
        self.history = list(history)
        if history:
            self._spent = float(history[-1].get("time/device_s", 0.0))
            self._trained_s = float(history[-1].get("time/train_s", 0.0))

    def trains(self) -> None:
        """Note that everything is imported and training begins."""
        self._train_began = Clock.now()

    def report(self, metrics: dict[str, float], folder: Path | None) -> None:
        """Report the metrics of one epoch and, on rank 0, the folder with its checkpoint."""
        self._reported = True
        values = finite(metrics)
        here_s = Clock.now().since(self._began)
        self._first_s = self._first_s or self._start_s + here_s
        values["epoch"] = len(self.history) + 1
        values["time/start_s"] = self._start_s
        values["time/first_report_s"] = self._first_s
        values["time/train_s"] = self._trained_s + Clock.now().since(self._train_began) - self._reporting_s
        values["time/device_s"] = self._spent + here_s * self._devices
        self.history.append(values)
        if folder is not None:
            annotate(folder, self.history)
        sent = Clock.now()
        self._send(values, folder)
        self._reporting_s += Clock.now().since(sent)

    def finish(self) -> None:
        """Tell Tune the last figures once more when there was nothing left to train after a restart."""
        if not self._reported and self.history:
            self._send(self.history[-1], None)

    def _send(self, values: dict[str, Any], folder: Path | None) -> None:
        sent, self._extra = {**values, **{key: one for key, one in self._extra.items() if one}}, {}
        self._send_to_ray(sent, folder)

    def _send_to_ray(self, values: dict[str, Any], folder: Path | None) -> None:
        import ray.train

        values = {**values, "placement_group": _placement_group()}
        if folder is None:
            ray.train.report(values)
        else:
            ray.train.report(values, ray.train.Checkpoint.from_directory(folder), checkpoint_upload_fn=self._upload)

    def _upload(self, checkpoint: Any, name: str) -> Any:
        """Store a checkpoint, as Ray Train asks for it; rank 0 alone has one."""
        import ray.train

        return ray.train.Checkpoint.from_directory(
            store(Path(checkpoint.path), self._folder, name, self._metric, self._mode)
        )


class TuneReporter(Reporter):
    """Passes the reports of a trial of one worker to Tune, in whose process it trains."""

    def __init__(self, config: dict[str, Any], began: Clock) -> None:
        super().__init__(config, 1, began)
        self._objectives = config["sweep"]["objectives"]

    def _send_to_ray(self, values: dict[str, Any], folder: Path | None) -> None:
        from ray import tune

        from stemtune.tune.run.trial_state import packed

        if folder is not None:
            name = f"checkpoint_{values['epoch']:06d}_{uuid.uuid4().hex[:8]}"
            store(folder, self._folder, name, self._metric, self._mode)
        values = {**values, "placement_group": _placement_group()}
        tune.report(packed(values, self._objectives))  # it returns when Tune goes on, or ends the thread


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics with every NaN or infinity replaced by the worst figure of its kind."""
    from stemtune.learning.metrics import WORST as worst

    return {key: float(value) if math.isfinite(value) else worst.get(key, WORST) for key, value in metrics.items()}


def _resumed(folder: Path) -> tuple[StoredCheckpoint | None, list[str]]:
    """Return the newest intact checkpoint of an earlier attempt, the same on every worker, and what others lack."""
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    context = ray.train.get_context()
    found = newest_intact(folder) if context.get_world_rank() == 0 else (None, [])
    return broadcast_from_rank_zero(found) if context.get_world_size() > 1 else found


def _placement_group() -> str:
    """Return the id of the resources this trial holds: the sweep returns them when a trial is stopped."""
    from ray.util import get_current_placement_group

    group = get_current_placement_group()
    return group.id.hex() if group is not None else ""


def _note(folder: Path, problem: Exception) -> None:
    """Leave word of a mistake that another attempt would only repeat."""
    memory = is_out_of_memory(problem) and not isinstance(problem, UserError)  # which says what to do
    if isinstance(problem, RuntimeError | OSError) and not memory:
        return  # a lost connection or node: worth another attempt
    reason = f"{type(problem).__name__}: {str(problem).strip() or type(problem).__name__}"
    if memory:
        reason = f"out of memory; lower train.batch_size or the size of the model ({reason.splitlines()[0]})"
    _write(folder / FAILURE, f"{reason}\n\n{traceback.format_exc()}")


def _write(note: Path, text: str) -> None:
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(text)


def _raise_noted(folder: Path) -> None:
    note = failure(folder)
    if note:
        raise RuntimeError(note)


def failure(folder: Path, note: str = FAILURE) -> str:
    """Return in one line why the trial in `folder` failed (or what another `note` there says), or an empty string."""
    with contextlib.suppress(OSError, IndexError):
        return (folder / note).read_text().splitlines()[0]
    return ""
