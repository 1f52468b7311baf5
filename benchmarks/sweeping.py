"""`python -m benchmarks sweep`: what a sweep costs besides training, and what its search saves; minutes."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stemtune.config import parse_assignments
from stemtune.errors import UserError

Figures = Mapping[str, object]

SWEEP = "sweep"


def add_options(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Add what `python -m benchmarks sweep` can be asked for; `positive` reads whole numbers."""
    group = parser.add_argument_group(
        "sweep: real trials on the slots of this machine, their makespan over their training alone; with --scale many"
        " trials without training, what they cost the driver; with --search TPE and ASHA beside random search"
    )
    group.add_argument("--trials", type=positive, default=16, metavar="N", help="real trials; default 16")
    group.add_argument(
        "--seconds", type=positive, default=60, metavar="S", help="training of a real trial, about; default 60"
    )
    group.add_argument("--slots", type=positive, default=2, metavar="N", help="trials at a time; default 2")
    group.add_argument(
        "--scale", type=positive, metavar="N", help="N trials whose training is replaced by made-up reports"
    )
    group.add_argument("--search", metavar="SPACE.yaml", help="a search space: epochs to the best of random search")
    group.add_argument("--seeds", type=positive, default=3, metavar="N", help="pairs of sweeps for --search; default 3")
    group.add_argument("--target", type=float, metavar="VALUE", help="figure to reach, instead of random search's best")
    group.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of --search's trials")
    group.add_argument("--keep", metavar="DIR", help="keep the sweeps and their records there")


def run(options: argparse.Namespace) -> None:
    """Measure what the parsed `options` ask for and print each figure."""
    if options.scale and options.search:
        raise UserError("--scale and --search are two measurements; give one of them")
    about, measure = _chosen(options)
    print(f"sweep: {about}", flush=True)
    with tempfile.TemporaryDirectory(prefix="stemtune-bench-", ignore_cleanup_errors=True) as scratch:
        folder = Path(options.keep).absolute() if options.keep else Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["STEMTUNE_SWEEPS"] = str(folder / "sweeps")
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
        figures = measure()
    for key, value in figures.items():
        shown = f"{value:,.4g}" if isinstance(value, float) else value
        print(f"  {key:64s} {shown}", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(dict(figures), indent=1) + "\n")


def _chosen(options: argparse.Namespace) -> tuple[str, Callable[[], Figures]]:
    """Return in words what is measured, and what measures it; the space is read before anything starts."""
    if options.search:
        from stemtune.tune.space.space import find_space, load_space

        space = load_space(find_space(options.search)).with_settings(parse_assignments(options.set))
        about = f"epochs to target in {options.search}: TPE and ASHA beside random search without stopping"
        return about, lambda: _rates().epochs_to_target(space, range(options.seeds), options.target)
    if options.scale:
        about = f"{options.scale} trials through Tune, Optuna, ASHA and MLflow (SQLite), training replaced"
        return about, lambda: _rates().scale(options.scale, options.slots)
    about = f"{options.trials} trials of about {options.seconds} s on {options.slots} slots, Ray Train in each"
    return about, lambda: _rates().makespan(options.trials, options.seconds, options.slots)


def _rates() -> Any:
    from benchmarks import sweep_rates

    return sweep_rates
