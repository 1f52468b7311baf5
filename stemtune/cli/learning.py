"""Commands around the search: train, check, compare."""

from __future__ import annotations

import argparse
from pathlib import Path

from stemtune.cli.parsing import Command, Parser, command, positive
from stemtune.config import Config, parse_assignments


@command(
    "one training run, the same code as a trial of the search",
    "stemtune train --store linio2.h5 --set model.name=cnn --set train.epochs=10 --out model",
)
def train(parser: Parser) -> Command:
    def call(options: argparse.Namespace) -> None:
        settings = parse_assignments(options.set)
        if options.store:
            settings["data.store"] = str(Path(options.store).expanduser().absolute())
        if options.workers:
            settings["train.workers"] = options.workers
        config = Config.from_flat(settings)
        from stemtune.learning.train import train

        train(config, options.out, config.train.workers)

    parser.option("--store", "training store; leave out with --set data.source=simulate", "STORE")
    parser.option("--set", "any setting of a trial", "KEY=VALUE", action="append", default=[])
    parser.option("--workers", "data-parallel processes", "N", type=positive)
    parser.option("--out", "the model folder to write", "MODEL", required=True)
    return call


@command(
    "validates search spaces and prints what would run; logs into the hosts of a cluster file",
    "stemtune check search_spaces/*.yaml\n  stemtune check cluster/hpc.yaml",
)
def check(parser: Parser) -> Command:
    def call(options: argparse.Namespace) -> None:
        from stemtune.tune.cluster.hosts import check_cluster
        from stemtune.tune.space.describe import check
        from stemtune.tune.space.yaml_loader import read_yaml

        contents = {path: read_yaml(Path(path).expanduser()) for path in options.spaces}
        checked = [check_cluster(*each) if "provider" in each[1] else check([each[0]]) for each in contents.items()]
        print("\n\n".join(checked))

    parser.option("spaces", metavar="FILE.yaml", nargs="+")
    return call


@command(
    "leaderboard, architectures side by side, importances, what accuracy costs, spread over seeds",
    "stemtune compare first --out first          # pictures, compare.json and the page compare.html\n"
    "  stemtune compare first --png first.png --json first.json",
)
def compare(parser: Parser) -> Command:
    def call(options: argparse.Namespace) -> None:
        from stemtune.tune.report import compare

        print(compare(options.name, png=options.png, json=options.json, out=options.out))
        if options.out:
            print(f"page: {Path(options.out) / 'compare.html'}")

    parser.option("name", "the sweep; default the newest", "NAME", nargs="?")
    parser.option("--out", "a folder for all pictures, the figures and the page compare.html", "DIR")
    parser.option("--png", "draw learning curves and architectures into this file", "FILE")
    parser.option("--json", "write every figure into this file", "FILE")
    return call
