"""`stemtune train`: one training run on this machine, from settings to a model folder."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from stemtune._files import replaceable_folder, whole_folder
from stemtune._parallel import exit_with_parent, interrupts_blocked
from stemtune._progress import say
from stemtune.config import Config
from stemtune.errors import UserError
from stemtune.learning.checkpoint import DESCRIPTION
from stemtune.learning.fit import BEST_BY, fit
from stemtune.learning.model import WEIGHTS


def train(config: Config, out: str | os.PathLike[str], workers: int = 1) -> dict[str, float]:
    """Train a model and write the best epoch's model folder to `out`; return the metrics of that epoch.

    A model that is in `out` is replaced, a folder with anything else in it is refused. It appears when training has
    ended well, and not before. The `workers` are data-parallel processes on this machine, which share
    `train.batch_size`: one GPU each where there are as many, else CPU processes that share the cores.

    Raises a `UserError` for settings or data that do not fit, an unwritable folder, or a diverged run (`Diverged`).
    """
    target = replaceable_folder(out, (WEIGHTS, DESCRIPTION), "a model")
    with whole_folder(target) as part, tempfile.TemporaryDirectory(prefix="stemtune-train-") as scratch:
        work = Path(scratch)
        keeper = BestEpoch(work / "best", config.train.epochs)
        if workers == 1:
            fit(config, keeper, work)
        else:
            run_workers(_train_worker, workers, (config.to_flat(), str(work)))
            keeper.recall()
        shutil.copytree(work / "best" / "model", part, dirs_exist_ok=True)
    print(f"kept the model of epoch {keeper.epoch_kept} ({BEST_BY} {keeper.kept[BEST_BY]:.2f}): {out}")
    return keeper.kept


class BestEpoch:
    """Takes the report of each of `epochs` epochs: prints a line and keeps the best one's checkpoint in `folder`."""

    def __init__(self, folder: Path, epochs: int) -> None:
        self.folder, self.epochs = folder, epochs
        self.epoch = self.epoch_kept = 0
        self.kept: dict[str, float] = {}

    def __call__(self, metrics: dict[str, float], checkpoint: Path | None) -> None:
        """Take one epoch's metrics; only rank 0 has a checkpoint, and only it prints."""
        self.epoch += 1
        if checkpoint is None:
            return
        say(epoch_line(self.epoch, self.epochs, metrics), sys.stdout)
        if not self.kept or metrics[BEST_BY] < self.kept[BEST_BY]:
            self.kept, self.epoch_kept = metrics, self.epoch
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.copytree(checkpoint, self.folder)

    def recall(self) -> None:
        """Read what another process's keeper left in the folder."""
        state = torch.load(self.folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        self.kept, self.epoch_kept = dict(state["metrics"]), int(state["epoch"])


def epoch_line(epoch: int, epochs: int, metrics: dict[str, float]) -> str:
    """Return the line that is printed after an epoch."""
    return (
        f"epoch {epoch}/{epochs}: loss {metrics['train/loss']:.3f}, validation {metrics['val/loss']:.3f}; "
        f"median {metrics['val/disorientation_median_deg']:.2f}° "
        f"({metrics['val/disorientation_median_deg_beam180']:.2f}° modulo beam-180), "
        f"within 5° {metrics['val/within_5deg']:.1%}; {metrics['train/samples_per_s']:.0f} patterns/s"
    )


def _train_worker(rank: int, world: int, flat: dict[str, Any], work: str) -> None:
    config = Config.from_flat(flat)
    fit(config, BestEpoch(Path(work) / "best", config.train.epochs), Path(work), rank=rank, world=world)


def run_workers(task: Callable[..., None], workers: int, arguments: tuple[Any, ...]) -> None:
    """Run `task(rank, world, *arguments)` in `workers` new processes that form a torch process group.

    The first process that fails ends the others. A `UserError` in a worker is raised here as one, any other failure as
    a `RuntimeError` with the worker's traceback.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="stemtune-meet-") as meet:
        running: dict[Connection, BaseProcess] = {}
        try:
            for rank in range(workers):
                mine, theirs = context.Pipe(duplex=False)
                given = (theirs, task, rank, workers, meet, arguments)
                process = context.Process(target=_worker, args=given, daemon=True)
                with interrupts_blocked():  # the parent hears Ctrl-C and ends its workers
                    process.start()
                theirs.close()
                running[mine] = process
            _watch(running)
        finally:
            for worker in running.values():
                worker.kill()  # it does not hear SIGTERM
            for worker in running.values():
                worker.join(10)


def _watch(running: dict[Connection, BaseProcess]) -> None:
    """Wait until every worker has said that it is done; raise what the first failing one says."""
    waiting, faults = set(running), list[tuple[str, str]]()
    deadline: float | None = None
    while waiting and (deadline is None or time.monotonic() < deadline):
        for connection in wait(list(waiting), timeout=0.5):
            assert isinstance(connection, Connection)
            waiting.remove(connection)
            try:
                kind, text = connection.recv()
            except EOFError:
                running[connection].join(5)
                kind, text = "fault", f"a training process ended with exit code {running[connection].exitcode}"
            if kind != "done":
                faults.append((kind, text))
                # The others fail soon after, for want of their partner: whoever made the user's mistake is heard.
                deadline = deadline or time.monotonic() + 3
    for kind, text in sorted(faults, key=lambda fault: fault[0] != "user"):
        raise UserError(text) if kind == "user" else RuntimeError(text)


def _worker(
    connection: Connection, task: Callable[..., None], rank: int, world: int, meet: str, arguments: tuple[Any, ...]
) -> None:
    """Join the process group, run the task, and say how it went."""
    exit_with_parent()
    try:
        gpu = torch.cuda.is_available() and torch.cuda.device_count() >= world
        if gpu:
            torch.cuda.set_device(rank)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
        torch.distributed.init_process_group(
            "nccl" if gpu else "gloo",
            init_method=f"file://{meet}/address",
            rank=rank,
            world_size=world,
            timeout=timedelta(minutes=30),
        )
        task(rank, world, *arguments)
        torch.distributed.destroy_process_group()
        connection.send(("done", ""))
    except UserError as problem:
        connection.send(("user", str(problem)))
    except BaseException:
        connection.send(("fault", traceback.format_exc()))
