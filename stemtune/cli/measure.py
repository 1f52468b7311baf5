"""Commands that show what stemtune does: demo, study."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from stemtune.cli.parsing import command, positive

if TYPE_CHECKING:
    from stemtune.cli.parsing import Commands


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


def study(commands: Commands) -> None:
    def call(options: argparse.Namespace) -> None:
        from stemtune.cli import main
        from stemtune.study import run

        page = run(options.name, Path(options.out), main, options.small, options.only, options.share, options.seeds)
        print(f"report: {page}")

    parser = command(
        commands,
        "study",
        "measures the findings of the reference study (arXiv:2507.01889) again where the truth is known: makes the"
        " data, runs a sweep for each finding of search_spaces/reference, writes report.html; goes on where an earlier"
        " run stopped",
        "stemtune study reference --small --out study",
        call,
    )
    parser.add_argument("name", metavar="NAME", help="reference")
    parser.add_argument("--small", action="store_true", help="for two cores: 3,136 patterns of 64 px, about an hour")
    parser.add_argument("--only", nargs="+", default=[], metavar="FINDING", help="labels, kernel, ...; default all")
    parser.add_argument("--share", type=float, metavar="P", help="part of the epochs; default 1, 0.15 with --small")
    parser.add_argument("--seeds", type=positive, metavar="N", help="seeds of each setting; default 3, 2 with --small")
    parser.add_argument("--out", default="study", metavar="DIR", help="folder for everything it makes; default study")
