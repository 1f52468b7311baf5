"""A table of learning curves, recorded by training a random sample of a search space with the product's own loop."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.search.table import METRICS, SECONDS, Run, Table, read_table, write_table
from stemtune._files import existing
from stemtune.config import Config
from stemtune.dataset.beam_store import BeamStore
from stemtune.learning.fit import fit
from stemtune.learning.trainer import Diverged
from stemtune.tune.run.trial import finite
from stemtune.tune.space.space import load_space, samples

_RANGES = ("thickness", "precession", "convergence")


def record(space_file: str, path: str, settings: int, seeds: int, beams: str, command: str) -> dict[str, Any]:
    """Train what the table at `path` does not hold yet of `settings` settings drawn at random, `seeds` times each.

    The table is written after every run, so that the same command goes on with it. One thread is used: a device second
    is a second of one core.
    """
    torch.set_num_threads(1)
    store = BeamStore.open(existing(beams, "the store of beams"))
    space = load_space(space_file)
    given: dict[str, object] = {"data.store": str(Path(beams).resolve())}
    given |= {f"simulate.{name}": str(store.span(name)) for name in _RANGES}
    table = read_table(path) if Path(path).exists() else Table(space.text, (), ())
    done = {(run.key, run.seed) for run in table.runs}
    for flat in samples(space, settings, seed=0):
        drawn = {key: value for key, value in flat.items() if key not in space.fixed}
        for seed in range(seeds):
            key = Run(drawn, seed, {}).key
            if (key, seed) in done:
                continue
            curves = train(Config.from_flat({**space.settings(flat), **given, "train.seed": seed}))
            commands = (*table.commands, *([command] if command not in table.commands else []))
            table = Table(space.text, commands, (*table.runs, Run(drawn, seed, curves)))
            write_table(table, path)
            last = curves[space.metric][-1]
            print(f"{len(table.runs)} of {settings * seeds}: {drawn}, seed {seed}: {last:.4g}", flush=True)
    return {"runs": len(table.runs)}


def train(config: Config) -> dict[str, list[float]]:
    """Train once, and return the figures and the seconds since the start of the training by epoch."""
    curves: dict[str, list[float]] = {name: [] for name in (SECONDS, *METRICS)}
    began = time.monotonic()

    def report(metrics: dict[str, float], _: Path | None) -> None:
        curves[SECONDS].append(time.monotonic() - began)
        figures = finite(metrics)
        for name in METRICS:
            curves[name].append(figures[name])

    with tempfile.TemporaryDirectory(prefix="stemtune-record-") as scratch:
        try:
            fit(config, report, Path(scratch))
        except Diverged:  # it has reported figures worse than any other's: they stand for the epochs that are left
            for values in curves.values():
                values += values[-1:] * (config.train.epochs - len(values))
    return curves
