"""Commands that train: train, sweep, check, compare."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from stemtune.cli.parsing import Command, Parser, above_zero, command, positive
from stemtune.config import Config, parse_assignments
from stemtune.errors import Interrupted, UserError

if TYPE_CHECKING:
    from stemtune.tune.run.sweep import SweepOutcome


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
    "leaderboard, architectures side by side, importances, what accuracy costs, spread over seeds; of one sweep, or of"
    " several of the same metric together",
    "stemtune compare first --out first          # pictures, compare.json and the page compare.html\n"
    "  stemtune compare first second third --best best.yaml",
)
def compare(parser: Parser) -> Command:
    def call(options: argparse.Namespace) -> None:
        from stemtune.tune.report import compare

        print(compare(options.names, png=options.png, json=options.json, out=options.out, best=options.best))
        if options.out:
            print(f"page: {Path(options.out) / 'compare.html'}")

    parser.option("names", "the sweeps; default the newest", "NAME", nargs="*")
    parser.option("--out", "a folder for all pictures, the figures and the page compare.html", "DIR")
    parser.option("--png", "draw learning curves and architectures into this file", "FILE")
    parser.option("--json", "write every figure into this file", "FILE")
    parser.option("--best", "write the best settings into this file, for the next space", "FILE.yaml")
    return call


@command(
    "trains the best settings of a finished sweep again with several seeds, and crowns the best of them if it beats"
    " chance, matched and the present champion on the test split by more than chance; or takes a crown back",
    "stemtune promote first --top 3 --seeds 3\n  stemtune promote --rollback",
)
def promote(parser: Parser) -> Command:
    def call(options: argparse.Namespace) -> int:
        if options.rollback:
            from stemtune.tracking import roll_back

            last, now = roll_back(options.name)
            print(f"no longer champion: {last}\nchampion: {now or 'none'}")
            return 0
        if not options.name:
            raise UserError("no sweep is named; give stemtune promote NAME, or --rollback")
        from stemtune.tune.run.replicates import promote

        how = {key: getattr(options, key) for key in ("top", "seeds", "epochs", "workers", "local", "nodes")}
        return _report(promote(options.name, **how))

    parser.option("name", "the sweep; with --rollback the newest champion's by default", "NAME", nargs="?")
    parser.option("--top", "how many settings; default 3", "K", type=positive, default=3)
    parser.option("--seeds", "how many seeds of each; default 3", "N", type=positive, default=3)
    parser.option("--epochs", "epochs, instead of the sweep's", "N", type=positive)
    parser.option("--workers", "data-parallel workers of a trial, instead of the sweep's", "N", type=positive)
    parser.flag("--local", "a Ray of our own on this machine, whatever else runs")
    parser.option("--nodes", "wait until N nodes of the cluster are there", "N", type=int, default=1)
    parser.flag("--rollback", "take the crown back: the champion before reigns again")
    return call


@command("who reigned: sweep, trial, figures, crystal, since when; newest first", "stemtune champions")
def champions(parser: Parser) -> Command:
    def call(options: argparse.Namespace) -> None:
        from stemtune.tracking import champions

        crystals = set[str]()
        for champion in champions():
            crystal = champion.tags.get("stemtune.crystal", "")
            first = champion.reigns and crystal not in crystals
            crystals |= {crystal} if first else set()
            word = "reigns" if first else "taken back" if champion.deposed else "succeeded"
            print(f"{word:10s}  {champion}  {champion.address}")
        if not crystals:
            print("nobody reigns; stemtune sweep and stemtune promote crown champions")

    return call


DEFAULT_SPACE = "search_spaces/smoke.yaml"

EXAMPLES = """stemtune sweep search_spaces/smoke.yaml --local --trials 4 --name first
  stemtune sweep --resume first
  stemtune sweep --resume first --trials 20            # of which those that ran are not run again
  stemtune sweep search_spaces/smoke.yaml --name second --study first
  ray submit cluster/hpc.yaml stemtune/sweep.py -- search_spaces/architectures.yaml --nodes 3 --name big \\
    --set data.store=/shared/linio2.h5

Without --local the Ray of RAY_ADDRESS, or the one that was started on this machine, is joined; where there is
none, one is started. A space is looked up in the working folder and then in the checkout."""


@command(
    "the search over architectures and training settings; every trial is kept in MLflow",
    EXAMPLES,
)
def sweep(parser: Parser) -> Command:
    parser.option("space", f"the search space; default {DEFAULT_SPACE}", "SPACE.yaml", nargs="?")
    parser.flag("--local", "a Ray of our own on this machine, whatever else runs")
    parser.option("--trials", "number of trials, instead of the space's", "N", type=positive)
    parser.option("--hours", "hours after which the sweep ends, instead of the space's", "H", type=above_zero)
    parser.option("--name", "name of the sweep; default the space's file name", "NAME")
    parser.option(
        "--resume",
        "go on with the sweep NAME, by default the newest interrupted; finished trials are not run again, and more"
        " --trials or --hours extend it",
        "NAME",
        nargs="?",
        const="",
    )
    parser.option(
        "--study",
        "search together with the sweep NAME of the same space, or with all that name the same"
        " postgresql://USER@HOST/DATABASE: each proposes from what all have learned",
        "NAME",
        default="",
    )
    parser.option("--nodes", "wait until N nodes of the cluster are there", "N", type=int, default=1)
    parser.option("--set", "fix any setting of a trial", "KEY=VALUE", action="append", default=[])
    parser.flag("--check", "validate the space, print what would run, also with --resume, and stop")
    return lambda options: _start(options) if options.resume is None else _resume(options)


def _start(options: argparse.Namespace) -> int:
    from stemtune.tune.space.space import find_space, load_space

    file = find_space(options.space or DEFAULT_SPACE)
    space = load_space(file)
    if options.set:
        space = space.with_settings(parse_assignments(options.set))
    if options.check:
        from stemtune.tune.space.describe import describe_space

        print(describe_space(space, file))
        return 0
    from stemtune.tune.run.sweep import run_sweep

    how = {name: getattr(options, name) for name in ("local", "trials", "hours", "nodes", "study")}
    try:
        return _replicated(run_sweep(space, options.name, **how), options)
    except KeyboardInterrupt as stop:
        raise Interrupted(str(stop) or "interrupted before any trial began; start the sweep again") from None


def _resume(options: argparse.Namespace) -> int:
    from stemtune.tune.run.manifest import sweeps_folder, unfinished

    for option in ("set", "study"):
        if getattr(options, option):
            raise UserError(f"--resume goes on with the sweep as it began, so --{option} cannot change it")
    name = options.resume or options.name
    if name and name.endswith((".yaml", ".yml")) and not options.space:
        name = Path(name).stem  # `--resume SPACE.yaml`
    if not name and options.space:
        name = Path(options.space).stem
    if not name:
        waiting = unfinished()
        if not waiting:
            raise UserError(f"no interrupted sweep is in {sweeps_folder()}; --resume NAME names one elsewhere")
        name = waiting[0]
    if options.check:
        from stemtune.tune.run.manifest import describe_resume

        print(describe_resume(name, options.trials, options.hours))
        return 0
    from stemtune.tune.run.sweep import resume_sweep

    how = {one: getattr(options, one) for one in ("local", "trials", "hours", "nodes")}
    return _replicated(resume_sweep(name, **how), options)


def _replicated(outcome: SweepOutcome, options: argparse.Namespace) -> int:
    """Report a sweep, and then its best settings with several seeds if its space asks for that."""
    from stemtune.tune.run.replicates import replicated

    code = _report(outcome)
    again = replicated(outcome, local=options.local, nodes=options.nodes)
    return code if again is outcome else _report(again)


def _report(outcome: SweepOutcome) -> int:
    """Print how a sweep ended and what to type next; return the exit code."""
    from stemtune.tracking import address
    from stemtune.tune.formatting import format_metric
    from stemtune.tune.run.trial_state import table

    print("\n".join([table(outcome.trials, outcome.metric, outcome.mode), *outcome.verdict]))
    if outcome.champion and outcome.model:
        print(
            f"champion: trial {outcome.champion.number} ({outcome.champion.label}) with {outcome.metric}"
            f" {format_metric(outcome.metric, outcome.value)}, model {outcome.model}"
        )
    where = address().shown
    if outcome.unsent:
        print(
            f"the tracking server {where} is away: {outcome.unsent} records wait in {outcome.folder};"
            f" stemtune sweep --resume {outcome.name} sends them",
            file=sys.stderr,
        )
    refused = outcome.folder / "tracking.refused.jsonl"
    if refused.exists():
        print(f"MLflow refused some records; they and the reasons are in {refused}", file=sys.stderr)
    if outcome.status == "interrupted":
        print(f"interrupted: stemtune sweep --resume {outcome.name} goes on with it", file=sys.stderr)
        return 130
    print(f"records: {where}, experiment {outcome.name}; stemtune compare {outcome.name} shows them")
    return 0 if outcome.model else 1
