"""One training run: the epoch loop that `stemtune train` and every trial of a search share.

A run is repeatable and resumes exactly: batches depend on (seed, epoch, rank), the learning rate on the step, and
torch's random numbers (dropout, stochastic depth) are seeded anew at the start of each epoch from (seed, epoch, rank).
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

from stemtune._files import shipped_or
from stemtune._progress import Progress, say
from stemtune.config import Config
from stemtune.dataset.batches import Loader
from stemtune.dataset.loaders import ResampledLoader, loaders, resampled_to
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError
from stemtune.learning.checkpoint import DESCRIPTION, load_checkpoint, read_description, save_checkpoint
from stemtune.learning.metrics import (
    WORST,
    fit_calibration,
    measured_spread_deg,
    model_figures,
    score_patterns,
    summarise,
)
from stemtune.learning.model import OrientationModel
from stemtune.learning.models import build
from stemtune.learning.trainer import Diverged, Trainer

Report = Callable[[dict[str, float], Path | None], None]

BEST_BY = "val/disorientation_median_deg"
"""The metric that says which epoch is the best one; the smaller, the better."""


def default_device() -> torch.device:
    """Return the GPU that this process was given, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


class Patience:
    """Whether a run is to end because `metric` has had no better value ("min" or "max") for so many `epochs`; 0: never.

    `best` is the best value so far, of epoch `best_epoch` (counted from 1); the sign is such that less is better.
    """

    def __init__(self, epochs: int, metric: str, mode: str) -> None:
        self.epochs, self.metric, self.sign = epochs, metric, 1.0 if mode == "min" else -1.0
        self.best, self.best_epoch = math.inf, 0

    def look(self, metrics: dict[str, float], epoch: int) -> None:
        """Take up the figures of an epoch."""
        value = self.sign * metrics.get(self.metric, math.nan)
        if value < self.best:
            self.best, self.best_epoch = value, epoch

    def over(self, epoch: int) -> bool:
        """Tell whether the run ends after `epoch` epochs."""
        return 0 < self.epochs <= epoch - self.best_epoch

    def state(self) -> dict[str, float]:
        """Return what a checkpoint holds of it."""
        return {"best": self.best, "best_epoch": self.best_epoch}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint; up to version 0.1 they know only the figures of their own epoch."""
        if "patience" in state:
            self.best, self.best_epoch = float(state["patience"]["best"]), int(state["patience"]["best_epoch"])
        else:
            self.look(state["metrics"], int(state["epoch"]))


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Seed torch for an epoch, differently on each worker."""
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def resample_to_pretrained(
    config: Config, train: Loader, validation: Loader, verbose: bool = True
) -> tuple[Loader, Loader]:
    """Return the loaders, resampled to the calibration of the model that `model.pretrained` starts from, if it is one.

    Its weights know patterns of that size and scale only. The trained model keeps that calibration, and prediction
    resamples to it as well; a line on stderr says so if `verbose`. Patterns that reach less than half as far (1/Å) as
    that model looks are a `UserError`.
    """
    start = config.model.pretrained
    folder = shipped_or(start) if isinstance(start, str) and start else None
    if folder is None or not (folder / DESCRIPTION).is_file():
        return train, validation
    target = Geometry.from_dict(read_description(folder)["geometry"])
    try:
        train, validation = resampled_to(train, target), resampled_to(validation, target)
    except UserError as mistake:
        raise UserError(f"`model.pretrained` is '{start}', but {mistake}") from None
    if isinstance(train, ResampledLoader) and verbose:
        print(f"note: {train.resampling.notes[0]}, that of `model.pretrained`", file=sys.stderr)
    return train, validation


def fit(
    config: Config,
    report: Report,
    folder: Path,
    resume: Path | None = None,
    rank: int = 0,
    world: int = 1,
    device: torch.device | None = None,
    objective: tuple[str, str] = (BEST_BY, "min"),
) -> dict[str, float]:
    """Train a model, report after every epoch, and return the metrics of the last.

    All `world` data-parallel workers call it, with their `rank`; above 1 the process group must be initialised, and
    `train.batch_size` is shared. `report` is called on every worker after every epoch with the metrics
    (`stemtune.config.METRICS`, equal on all workers) and, on rank 0, the checkpoint folder `folder/checkpoint`, which
    the next epoch replaces. From the checkpoint folder `resume` the run continues as if it had not stopped. The default
    `device` is the process's GPU, or the CPU. `objective` is the metric that `train.patience` looks at, and whether it
    is to be "min" or "max".

    Raises `Diverged` when the loss is no longer finite, after the metrics of `WORST` have been reported, and a
    `UserError` for settings or data that do not fit.
    """
    device = device or default_device()
    torch.manual_seed(config.train.seed)
    train, validation = resample_to_pretrained(config, *loaders(config, rank, world, device), verbose=rank == 0)
    model = build(config, train.phase, train.geometry)
    checkpoint, source = Path(folder) / "checkpoint", train.source_sha256
    if not model.trainable:
        return _evaluate_once(model.to(device), validation, report, checkpoint, source, rank, world)
    trainer = Trainer(config, model, train.batches_per_epoch, device, world)
    patience = Patience(config.train.patience, *objective)
    first, metrics = 0, dict[str, float]()
    if resume is not None:
        state = load_checkpoint(trainer.model, Path(resume))
        trainer.restore(state)
        patience.restore(state)
        first, metrics = int(state["epoch"]), dict(state["metrics"])
    steps = train.batches_per_epoch
    with Progress(config.train.epochs * steps, "train", "step", first * steps, shown=rank == 0) as progress:
        for epoch in range(first, config.train.epochs):
            if patience.over(epoch):
                if rank == 0:
                    say(f"ended after epoch {epoch}: no better {objective[0]} since epoch {patience.best_epoch}")
                break
            seed_epoch(config.train.seed, epoch, rank)
            progress.note(f"epoch {epoch + 1}/{config.train.epochs}")
            began = time.perf_counter()
            try:
                loss = trainer.train(progress.over(train.epoch(epoch)))
            except Diverged:
                report(dict(WORST), None)
                raise
            speed = steps * config.train.batch_size / (time.perf_counter() - began)
            with trainer.averaged():
                metrics = validate(trainer.model, validation, device, trainer.precision, trainer.micro_batches)
                metrics |= train_figures(loss, trainer.rate, speed, device)
                metrics = broadcast_metrics(metrics, world)
                patience.look(metrics, epoch + 1)
                if rank == 0:
                    state = {**trainer.state(), "epoch": epoch + 1, "metrics": metrics, "patience": patience.state()}
                    save_checkpoint(trainer.model, state, checkpoint, metrics, source)
            report(metrics, checkpoint if rank == 0 else None)
    return metrics


def validate(
    model: OrientationModel, validation: Loader, device: torch.device, precision: torch.dtype | None, parts: int = 1
) -> dict[str, float]:
    """Return the `val/` and `model/` figures, and leave the model with a confidence and a spread that they bear out.

    Batches are worked through in so many `parts`.
    """
    scores = score_patterns(model, validation, device, precision, parts=parts)
    model.calibration = fit_calibration(scores)
    if model.measures_spread:
        model.spread_deg = measured_spread_deg(scores) or model.spread_deg
    return summarise(scores) | model_figures(model, scores)


def train_figures(loss: float, learning_rate: float, samples_per_s: float, device: torch.device) -> dict[str, float]:
    """Return the `train/` figures of an epoch.

    The peak of memory (1 MB = 10^6 bytes) is that of tensors on the GPU in this epoch, elsewhere that of the process.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB
    figures = {
        "loss": loss,
        "learning_rate": learning_rate,
        "samples_per_s": samples_per_s,
        "peak_memory_mb": peak / 1e6,
    }
    return {f"train/{name}": value for name, value in figures.items()}


def broadcast_metrics(metrics: dict[str, float], world: int) -> dict[str, float]:
    """Return rank 0's figures on every worker: their clocks differ."""
    if world == 1:
        return metrics
    box: list[Any] = [metrics]
    distributed.broadcast_object_list(box, src=0)
    return dict(box[0])


def _evaluate_once(
    model: OrientationModel, validation: Loader, report: Report, checkpoint: Path, source: str, rank: int, world: int
) -> dict[str, float]:
    """Report a model that has nothing to learn; its rate is that of the evaluation."""
    device = next((value.device for value in model.buffers()), torch.device("cpu"))
    began = time.perf_counter()
    scores = score_patterns(model, validation, device, shown=rank == 0)
    rate = scores.shape[1] / (time.perf_counter() - began)
    metrics, model.calibration = summarise(scores), fit_calibration(scores)
    metrics |= {**train_figures(metrics["val/loss"], 0.0, rate, device), **model_figures(model, scores)}
    metrics = broadcast_metrics(metrics, world)
    if rank == 0:
        save_checkpoint(model, {"step": 0, "epoch": 1, "metrics": metrics}, checkpoint, metrics, source)
    report(metrics, checkpoint if rank == 0 else None)
    return metrics
