"""`python -m benchmarks train` and `matched`: the training loop beside the least it can cost, and matching."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from benchmarks import MODELS, Figures, linio2_store, timed
from stemtune.config import Config
from stemtune.crystal.symmetry import disorientation_beam180_deg
from stemtune.dataset.batches import Batch
from stemtune.dataset.loaders import loaders
from stemtune.errors import UserError
from stemtune.learning.fit import default_device
from stemtune.learning.inference import autocast
from stemtune.learning.models import build
from stemtune.learning.trainer import Trainer


def run(folder: Path) -> Figures:
    """Measure the loop of every one of `MODELS`."""
    figures: dict[str, object] = {}
    for name, settings in MODELS.items():
        config = Config.from_flat({"data.store": str(linio2_store(folder)), **settings})
        figures |= {f"{name} {key}": value for key, value in training_throughput(config).items()}
    return figures


def training_throughput(config: Config, rounds: int = 5, steps: int = 8) -> dict[str, float]:
    """Measure the real loop against the plain forward, backward and step on the same model and batch size.

    Both run in turns in this process, so that whatever else the machine does touches both alike; the rates are
    medians over the rounds.

    Parameters
    ----------
    config
        Every setting; `data` says where patterns come from.
    rounds
        Turns of each kind.
    steps
        Optimiser steps per turn.

    Returns
    -------
    dict
        `loop_samples_per_s` (loading, transfer, schedule, clipping, bookkeeping included), `plain_samples_per_s`,
        `ratio`, the median over the rounds of their quotient, and `ratio_of_processor_time`, the same in processor
        seconds, which other work on the machine distorts less.
    """
    device = default_device()
    torch.manual_seed(config.train.seed)
    loader, _ = loaders(config)
    model = build(config, loader.phase, loader.geometry)
    trainer = Trainer(config, model, loader.batches_per_epoch, device)
    first = next(iter(loader.epoch(0)))
    held = Batch(first.patterns.to(device), first.orientation.to(device))
    _plain_steps(trainer, held, 2)
    size, taken = len(held.orientation), min(steps, loader.batches_per_epoch - 1)
    if taken < 1:
        raise UserError(f"the loop is measured over several batches, but an epoch has {loader.batches_per_epoch}")
    loop, plain = [], []
    for number in range(rounds):
        batches = loader.epoch(number)
        trainer.train([next(batches)])  # the first batch of an epoch is waited for once, not once per few steps
        loop.append(timed(partial(_wait, trainer.train, islice(batches, taken))))
        batches.close()  # type: ignore[attr-defined]
        plain.append(timed(partial(_wait, _plain_steps, trainer, held, taken)))
    return {
        "loop_samples_per_s": size * taken / statistics.median(wall for wall, _ in loop),
        "plain_samples_per_s": size * taken / statistics.median(wall for wall, _ in plain),
        "ratio": statistics.median(b[0] / a[0] for a, b in zip(loop, plain, strict=True)),
        "ratio_of_processor_time": sum(cpu for _, cpu in plain) / sum(cpu for _, cpu in loop),
    }


def _wait(work: Callable[..., object], *given: object) -> None:
    """Do some work to its end, on a GPU too."""
    work(*given)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matched(
    folder: Path | None = None, *, config: Config | None = None, rounds: int = 3, batches: int = 4
) -> dict[str, float]:
    """Measure the matched filter from counts to orientations, on simulated 128 px patterns; no `folder` is needed.

    Parameters
    ----------
    config
        Every setting; the default is `matched` at its own defaults (directions 2 degrees apart) on LiNiO2.
    rounds
        Turns; the rate is the median over them.
    batches
        Batches of `train.batch_size` patterns per turn.

    Returns
    -------
    dict
        `patterns_per_s`, and `median_deg_beam180`, the median disorientation modulo beam-180 of the answers.
    """
    config = config or Config.from_flat({"data.source": "simulate", "model.name": "matched"})
    count = batches * config.train.batch_size
    config = config.replace({"data.validation_patterns": count, "data.patterns_per_epoch": count})
    device = default_device()
    _, loader = loaders(config)
    held = list(loader.epoch(0))
    model = build(config, loader.phase, loader.geometry).to(device).eval()
    rates: list[float] = []
    answers: list[torch.Tensor] = []
    with torch.inference_mode():
        for turn in range(rounds + 1):  # the first turn warms up
            began = time.perf_counter()
            answers = [model.candidates(model(batch.patterns.to(device)), 1).orientation[:, 0].cpu() for batch in held]
            if turn:
                rates.append(count / (time.perf_counter() - began))
    truth = torch.cat([batch.orientation for batch in held])
    error = disorientation_beam180_deg(torch.cat(answers), truth, loader.phase.symmetry)
    return {
        "patterns_per_s": statistics.median(rates),
        "median_deg_beam180": float(error.median()),
    }


def _plain_steps(trainer: Trainer, batch: Batch, steps: int) -> None:
    """Take steps on one batch that is already in place, with nothing around them."""
    for _ in range(steps):
        with autocast(trainer.device, trainer.precision):
            output = trainer.model(batch.patterns)
        loss = trainer.model.loss(output, batch.orientation)
        trainer.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        trainer.scaler.step(trainer.optimiser)
        trainer.scaler.update()
        trainer.optimiser.zero_grad(set_to_none=True)
