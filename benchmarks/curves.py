"""`python -m benchmarks curves`: networks from random weights on fresh dynamical patterns, epoch by epoch.

Every network trains on patterns of 64 px drawn from one store of beams, on all cores, up to the time and the patterns
that are asked for. What is done is kept, and the same command goes on from the last epoch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stemtune._files import existing, whole_file, writable_folder
from stemtune.config import Config
from stemtune.dataset.beam_store import BeamStore
from stemtune.errors import UserError
from stemtune.learning.fit import fit
from stemtune.learning.train import run_workers

EPOCH = 32_768  # patterns between two validations

COMMON: dict[str, object] = {
    "data.source": "beams",
    "data.validation_patterns": 1024,
    "simulate.size": 64,
    "simulate.scale": 0.05,
    "simulate.dose": "500:30000",
    "simulate.background": "0:0.25",
    "simulate.blur": "0.3:0.8",
    "simulate.centre_error": 1.0,
    "simulate.ellipticity": 0.02,
    "simulate.scale_error": 0.012,
    "model.angles": 72,
    "model.radii": 32,
    "model.grid_step": 4,
    "optim.schedule": "cosine",
    "optim.warmup": 1,
    "optim.weight_decay": 0.02,
    "train.batch_size": 128,
}
"""What all networks share; thickness and tilts are those of the store."""

NETWORKS: dict[str, dict[str, object]] = {
    "circular": {"model.name": "circular", "optim.lr": 3e-3},
    "cnn": {"model.name": "cnn", "model.view": "polar", "model.width": 8, "model.kernel_size": 9, "optim.lr": 2e-3},
    "densenet": {
        "model.name": "densenet",
        "model.view": "polar",
        "model.width": 32,
        "model.depths": "2-4-6-4",
        "head.softness": 0.8,
        "optim.lr": 8e-3,
        "optim.weight_decay": 1.4e-3,
        "train.batch_size": 256,
    },
    "swin": {
        "model.name": "swin",
        "model.view": "polar",
        "model.width": 32,
        "model.depths": "2-2-2",
        "head.softness": 0.75,
        "optim.lr": 3e-3,
    },
    "polar": {"model.name": "polar", "model.start": "random", "model.width": 16, "optim.lr": 2e-3},
}
"""The small variants that two cores can train, each with its recipe."""

_RANGES = ("thickness", "precession", "convergence")


@dataclass(frozen=True)
class Options:
    """What `python -m benchmarks curves` is asked for; the command line's help says what each means."""

    beams: str = "beams.h5"
    networks: tuple[str, ...] = ()
    minutes: float = 60.0
    seen: int = 2_000_000
    out: str = "curves"
    workers: int = 2


def run(options: Options) -> dict[str, Any]:
    """Train what is not trained yet, draw `curves.png` in the folder, and return the curves by network.

    Each is a list of epochs: `patterns` seen, `minutes` of training, and the validation's `median_deg`, `within_5deg`
    and both modulo beam-180. A `UserError` names an unknown network or a store of beams that is not there.
    """
    names = options.networks or tuple(NETWORKS)
    if strange := [name for name in names if name not in NETWORKS]:
        raise UserError(f"no network is called '{strange[0]}' here; there are {', '.join(NETWORKS)}")
    store = BeamStore.open(existing(options.beams, "the store of beams"))
    folder = writable_folder(options.out)
    given = {"data.store": str(Path(options.beams).resolve()), "train.epochs": max(1, options.seen // EPOCH)}
    given |= {"data.patterns_per_epoch": EPOCH}
    given |= {f"simulate.{name}": str(store.span(name)) for name in _RANGES}
    for name in names:
        print(f"{name}: up to {options.seen:,} patterns or {options.minutes:g} minutes", flush=True)
        place = writable_folder(folder / name)
        flat = Config.from_flat({**COMMON, **NETWORKS[name], **given}).to_flat()
        run_workers(_train, options.workers, (flat, str(place), options.minutes))
    curves = {place.parent.name: json.loads(place.read_text()) for place in sorted(folder.glob("*/curve.json"))}
    draw(curves, folder / "curves.png")
    return curves


class _Enough(Exception):
    """The time of a network is over."""


def _train(rank: int, world: int, flat: dict[str, object], folder: str, minutes: float) -> None:
    """Train one network as process `rank`; go on from the checkpoint that is there."""
    place, config = Path(folder), Config.from_flat(flat)
    record, checkpoint = place / "curve.json", place / "checkpoint"
    points: list[dict[str, float]] = json.loads(record.read_text()) if record.exists() else []
    before, began = points[-1]["minutes"] if points else 0.0, time.monotonic()
    if before >= minutes or len(points) >= config.train.epochs:
        return

    def report(metrics: dict[str, float], _: Path | None) -> None:
        spent = torch.tensor(before + (time.monotonic() - began) / 60)
        if world > 1:
            torch.distributed.broadcast(spent, 0)  # all end with the same epoch
        point = {"patterns": EPOCH * (len(points) + 1), "minutes": float(spent)}
        for key in ("disorientation_median_deg", "within_5deg"):
            for ending in ("", "_beam180"):
                point[key.removeprefix("disorientation_") + ending] = metrics[f"val/{key}{ending}"]
        points.append(point)
        if rank == 0:
            with whole_file(record) as part:
                part.write_text(json.dumps(points, indent=1) + "\n")
            print("  " + ", ".join(f"{name} {value:,.4g}" for name, value in point.items()), flush=True)
        if spent >= minutes:
            raise _Enough

    with suppress(_Enough):
        fit(config, report, place, checkpoint if points else None, rank, world)


def draw(curves: Mapping[str, list[dict[str, float]]], path: Path) -> None:
    """Draw median and share within 5° against patterns seen, strict and modulo beam-180, into the picture `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    panels = (("median_deg", "median disorientation (°)"), ("within_5deg", "share within 5°"))
    for row, (key, label) in enumerate(panels):
        for column, (ending, title) in enumerate((("", "strict"), ("_beam180", "modulo beam-180"))):
            panel = axes[row, column]
            for name, points in curves.items():
                seen = [point["patterns"] / 1e6 for point in points]
                panel.plot(seen, [point[key + ending] for point in points], marker=".", markersize=4, label=name)
            panel.set_title(title if row == 0 else "")
            panel.set_xlabel("million patterns seen" if row else "")
            panel.set_ylabel(label if column == 0 else "")
            panel.grid(alpha=0.3)
            if key == "median_deg":
                panel.set_yscale("log")
    axes[0, 0].legend(frameon=False)
    with whole_file(path) as part:
        figure.savefig(part, dpi=150)
