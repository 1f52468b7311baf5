"""One training run: the epoch loop that `stemtune train` and every trial of a search share.

A run is repeatable and resumes exactly: batches depend on (seed, epoch, rank), the learning rate on the step, and
torch's random numbers (dropout, stochastic depth) are seeded anew at the start of each epoch from (seed, epoch, rank).
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from stemtune._files import shipped_or
from stemtune._progress import Progress
from stemtune.config import Config, OptimConfig
from stemtune.dataset.batches import Batch, Loader
from stemtune.dataset.loaders import ResampledLoader, loaders, resampled_to
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError
from stemtune.learning.checkpoint import DESCRIPTION, load_checkpoint, read_description, save_checkpoint
from stemtune.learning.inference import autocast
from stemtune.learning.metrics import WORST, fit_calibration, model_figures, score_patterns, summarise
from stemtune.learning.model import OrientationModel
from stemtune.learning.models import build

Report = Callable[[dict[str, float], Path | None], None]

CHECK_EVERY = 25  # steps between two looks at whether the loss is still finite
COSINE_FLOOR = 0.01  # where the cosine schedule ends, as a share of the peak


class Diverged(UserError):
    """The loss became infinite or NaN; the metrics of `WORST` have been reported."""


def default_device() -> torch.device:
    """Return the GPU that this process was given, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def chosen_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the number format of the forward pass; None is float32.

    "auto" is bfloat16 on GPUs that have it and on CPUs with instructions for it (avx512_bf16, amx), else float32:
    elsewhere bfloat16 is emulated and slow.
    """
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = any(
                bool(getattr(torch.cpu, f"_is_{name}_supported", bool)()) for name in ("avx512_bf16", "amx_tile")
            )
        return torch.bfloat16 if fast else None
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def learning_rate(optim: OptimConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Return the learning rate of a step (counted from 0).

    It rises linearly over `optim.warmup` epochs to `optim.lr`, times `optim.lr_decay` per epoch (exponential) or
    half a cosine that ends at 1 % (cosine).
    """
    epoch = step // steps_per_epoch
    if optim.schedule == "cosine":
        progress = min(1.0, step / max(1, epochs * steps_per_epoch))
        factor = COSINE_FLOOR + (1.0 - COSINE_FLOOR) * 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        factor = optim.lr_decay**epoch
    return optim.lr * factor * min(1.0, (step + 1) / max(1.0, optim.warmup * steps_per_epoch))


class _Loss(nn.Module):
    """Model and loss as one module, so that data-parallel training sees every weight in its forward pass."""

    def __init__(self, model: OrientationModel, device: torch.device, precision: torch.dtype | None) -> None:
        super().__init__()
        self.model, self.device, self.precision = model, device, precision

    def forward(self, patterns: Tensor, orientation: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            output = self.model(patterns)
        return self.model.loss(output, orientation)


class Trainer:
    """Model, optimiser and step count of a run, and the passes over the data, `steps_per_epoch` optimiser steps each.

    The weights of `model` are at their start; with `world` data-parallel workers above 1 the process group must be
    initialised.
    """

    def __init__(
        self, config: Config, model: OrientationModel, steps_per_epoch: int, device: torch.device, world: int = 1
    ) -> None:
        self.config, self.device, self.world, self.steps_per_epoch = config, device, world, steps_per_epoch
        self.precision = chosen_precision(config.train.precision, device)
        model = model.to(device)
        if config.train.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if world > 1 and device.type == "cuda":
            from timm.layers import convert_sync_batchnorm

            model = convert_sync_batchnorm(model)
        self.model = model
        self.step = 0
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        groups = [
            {"params": [weight for weight in self.weights if (weight.ndim > 1) == decayed], "weight_decay": decay}
            for decayed, decay in ((True, config.optim.weight_decay), (False, 0.0))
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=config.optim.lr, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.loss: nn.Module = _Loss(model, device, self.precision)
        if world > 1:
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.loss = DistributedDataParallel(self.loss, broadcast_buffers=False, gradient_as_bucket_view=True)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides the model's weights."""
        return {"step": self.step, "optimiser": self.optimiser.state_dict(), "scaler": self.scaler.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint."""
        self.step = int(state["step"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])

    def train(self, batches: Iterable[Batch]) -> float:
        """Take one optimiser step per batch and return the mean loss over all workers.

        Raises `Diverged` on all workers in the same step, when the loss of one is no longer finite.
        """
        self.model.train()
        total, steps = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for batch in batches:
            rate = learning_rate(self.config.optim, self.step, self.steps_per_epoch, self.config.train.epochs)
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            patterns = batch.patterns.to(self.device, non_blocking=True)
            loss = self.loss(patterns, batch.orientation.to(self.device, non_blocking=True))
            self.scaler.scale(loss).backward()
            if self.config.optim.grad_clip > 0:
                self.scaler.unscale_(self.optimiser)
                nn.utils.clip_grad_norm_(self.weights, self.config.optim.grad_clip)
            self.scaler.step(self.optimiser)
            self.scaler.update()
            self.optimiser.zero_grad(set_to_none=True)
            total += loss.detach()
            self.step += 1
            steps += 1
            if steps % CHECK_EVERY == 0:
                self._mean(total / steps)
        self._average_buffers()
        return self._mean(total / max(1, steps))

    def _mean(self, loss: Tensor) -> float:
        """Return the mean over the workers; raise `Diverged` on all of them when it is not finite."""
        if self.world > 1:
            loss = loss.clone()
            distributed.all_reduce(loss)
            loss /= self.world
        mean = float(loss)
        if not math.isfinite(mean):
            epoch = (self.step - 1) // self.steps_per_epoch + 1
            rate = self.config.optim.lr
            raise Diverged(f"the loss is {mean} in epoch {epoch}: training diverged; lower `optim.lr`, now {rate:g}")
        return mean

    def _average_buffers(self) -> None:
        """Give all workers the same running statistics (batch normalisation), the mean of theirs."""
        if self.world == 1:
            return
        kept = set(self.model.state_dict())
        for name, value in self.model.named_buffers():
            if name in kept and value.is_floating_point():
                distributed.all_reduce(value)
                value /= self.world


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
) -> dict[str, float]:
    """Train a model, report after every epoch, and return the metrics of the last.

    All `world` data-parallel workers call it, with their `rank`; above 1 the process group must be initialised, and
    `train.batch_size` is shared. `report` is called on every worker after every epoch with the metrics
    (`stemtune.config.METRICS`, equal on all workers) and, on rank 0, the checkpoint folder `folder/checkpoint`, which
    the next epoch replaces. From the checkpoint folder `resume` the run continues as if it had not stopped. The default
    `device` is the process's GPU, or the CPU.

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
    first, metrics = 0, dict[str, float]()
    if resume is not None:
        state = load_checkpoint(trainer.model, Path(resume))
        trainer.restore(state)
        first, metrics = int(state["epoch"]), dict(state["metrics"])
    steps = train.batches_per_epoch
    with Progress(config.train.epochs * steps, "train", "step", first * steps, shown=rank == 0) as progress:
        for epoch in range(first, config.train.epochs):
            seed_epoch(config.train.seed, epoch, rank)
            progress.note(f"epoch {epoch + 1}/{config.train.epochs}")
            began = time.perf_counter()
            try:
                loss = trainer.train(progress.over(train.epoch(epoch)))
            except Diverged:
                report(dict(WORST), None)
                raise
            rate = steps * config.train.batch_size / (time.perf_counter() - began)
            metrics = validate(trainer.model, validation, device, trainer.precision)
            metrics |= {"train/loss": loss, "train/samples_per_s": rate}
            metrics = broadcast_metrics(metrics, world)
            if rank == 0:
                state = {**trainer.state(), "epoch": epoch + 1, "metrics": metrics}
                save_checkpoint(trainer.model, state, checkpoint, metrics, source)
            report(metrics, checkpoint if rank == 0 else None)
    return metrics


def validate(
    model: OrientationModel, validation: Loader, device: torch.device, precision: torch.dtype | None
) -> dict[str, float]:
    """Return the `val/` and `model/` figures, and leave the model with a confidence that the validation bears out."""
    scores = score_patterns(model, validation, device, precision)
    model.calibration = fit_calibration(scores)
    return summarise(scores) | model_figures(model, scores)


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
    metrics |= {"train/loss": metrics["val/loss"], "train/samples_per_s": rate, **model_figures(model, scores)}
    metrics = broadcast_metrics(metrics, world)
    if rank == 0:
        save_checkpoint(model, {"step": 0, "epoch": 1, "metrics": metrics}, checkpoint, metrics, source)
    report(metrics, checkpoint if rank == 0 else None)
    return metrics
