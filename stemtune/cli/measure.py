"""Commands that show what stemtune does: bench, demo."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from stemtune import bench as benchmark
from stemtune.cli.parsing import command, positive

if TYPE_CHECKING:
    from stemtune.cli.parsing import Commands


def bench(commands: Commands) -> None:
    def call(options: argparse.Namespace) -> None:
        speeds = [name for name in options.name if name not in (benchmark.ACCURACY, benchmark.LABEL)]
        if speeds or not options.name:
            benchmark.run(speeds, None if options.no_peers else options.peer_python)
        if benchmark.ACCURACY in options.name:
            benchmark.run_accuracy(options)
        if benchmark.LABEL in options.name:
            benchmark.run_label(options)

    parser = command(
        commands,
        "bench",
        "the figures of the README: speeds, each beside its peer or its limit, and accuracy",
        "stemtune bench accuracy --model model --json accuracy.json",
        call,
    )
    parser.add_argument(
        "name",
        nargs="*",
        metavar="NAME",
        help="simulate, bloch, loading, matched, train, predict, map, refine (default all), or accuracy, label",
    )
    benchmark.add_accuracy_options(parser, positive)


def demo(commands: Commands) -> None:
    def call(options: argparse.Namespace) -> None:
        from stemtune.cli import main
        from stemtune.demo import run

        run(Path(options.out), main)

    parser = command(
        commands,
        "demo",
        "simulate, sweep, compare, predict and map on a simulated LiNiO2 polycrystal",
        "stemtune demo --out demo",
        call,
    )
    parser.add_argument("--out", default="demo", metavar="DIR", help="folder for everything it makes; default demo")
