"""Commands that judge maps and show what stemtune does: evaluate, demo, study."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stemtune._files import whole_file
from stemtune.cli.parsing import command, finite, positive
from stemtune.errors import UserError

if TYPE_CHECKING:
    from stemtune.cli.parsing import Commands


def _write_figures(figures: dict[str, Any], options: argparse.Namespace) -> None:
    if options.json:
        with whole_file(options.json) as part:
            part.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _draw_difference(options: argparse.Namespace) -> None:
    from stemtune.analysis.evaluation.ground_truth import map_or_labels, read_truth
    from stemtune.plot.evaluation import draw_difference

    draw_difference(map_or_labels(options.map), read_truth(options.truth or options.other), options.difference)


def _differ(options: argparse.Namespace) -> None:
    from stemtune.analysis.evaluation.agreement import describe_difference, differ

    _without_truth(options)
    figures = differ(options.map, options.other)
    _write_figures(figures, options)
    print(describe_difference(figures))
    if options.difference:
        _draw_difference(options)


def _without_truth(options: argparse.Namespace) -> None:
    for name in ("png", "risk"):
        if getattr(options, name):
            raise UserError(f"--{name} draws what is known of the truth; give --truth, or leave it out")
    if options.difference and not options.other:
        raise UserError("--difference draws two maps; give --truth or --other, or leave it out")


def _evaluate(options: argparse.Namespace) -> None:
    given = [options.truth, options.against_patterns]
    if given.count(None) != 1 and (options.other is None or given != [None, None]):
        raise UserError(
            "give either --truth, or where there is none --against-patterns STORE, or --other MAP to compare with"
        )
    if options.difference and options.risk:
        raise UserError("--risk judges labels and --difference draws two maps; give one of them")
    if given == [None, None]:
        _differ(options)
        return
    if options.truth is None:
        _without_truth(options)
        from stemtune.analysis.evaluation.agreement import against_patterns, describe_agreement
        from stemtune.analysis.evaluation.ground_truth import map_or_labels, read_truth

        other = read_truth(options.other) if options.other else None
        figures = against_patterns(map_or_labels(options.map), options.against_patterns, other)
        _write_figures(figures, options)
        print(describe_agreement(figures))
        if options.difference:
            _draw_difference(options)
        return
    if options.other:
        raise UserError("--other is another map to agree with, where there is no truth; leave it out")
    if options.models and not options.risk:
        raise UserError("--models are drawn beside the labels that they were trained on; give --risk FILE")
    if options.risk:
        from stemtune.analysis.evaluation.ground_truth import read_truth
        from stemtune.analysis.evaluation.risk import describe_risk, label_risk, networks
        from stemtune.plot.evaluation import draw_risk

        figures = label_risk(options.map, read_truth(options.truth)) | {"networks": networks(options.models)}
        _write_figures(figures, options)
        print(describe_risk(figures))
        draw_risk(figures, options.risk)
        return
    from stemtune.analysis.evaluation.evaluate import describe, evaluate
    from stemtune.plot.evaluation import draw_evaluation

    figures = evaluate(options.map, options.truth)
    _write_figures(figures, options)
    if options.png:
        draw_evaluation(figures, options.png)
    print(describe(figures))
    if options.difference:
        _draw_difference(options)


def evaluate(commands: Commands) -> None:
    parser = command(
        commands,
        "evaluate",
        "a map, or the labels of a store, against the truth: disorientation, pseudo-symmetry confusion, calibration of"
        " the confidence, risk-coverage, boundaries; without a truth against the patterns: fit, coherence, agreement"
        " with another map; or two maps with each other",
        "stemtune evaluate map/map.h5 --truth scan.h5 --json figures.json --png figures.png\n"
        "  stemtune evaluate map --other map_of_another_model --difference difference.png\n"
        "  stemtune evaluate map --against-patterns scan.h5 --other labelled.h5",
        _evaluate,
    )
    parser.add_argument("map", metavar="MAP.h5|STORE")
    parser.add_argument("--truth", metavar="STORE|MAP.h5|.ang|.ctf")
    parser.add_argument("--against-patterns", metavar="STORE", help="there is no truth: judge by these patterns")
    parser.add_argument(
        "--other",
        metavar="MAP.h5|STORE|.ang|.ctf",
        help="another map of the scan to compare with, alone or beside --against-patterns",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    parser.add_argument(
        "--png", metavar="FILE", help="draw what is known of the truth: reliability, risk-coverage, confusion"
    )
    parser.add_argument(
        "--difference", metavar="FILE", help="draw where the map and --truth or --other differ, and by how much"
    )
    parser.add_argument(
        "--risk", metavar="FILE", help="of a labelled store: draw the labels' error against the share that is kept"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="beside --risk: models that were trained on those labels and validated on a truth (data.validation_store)",
    )


def demo(commands: Commands) -> None:
    def call(options: argparse.Namespace) -> None:
        from stemtune.demo import run

        run(Path(options.out), options.run_command)

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
        from stemtune.study import run

        page = run(
            options.name,
            Path(options.out),
            options.run_command,
            options.small,
            options.only,
            options.share,
            options.seeds,
        )
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
    parser.add_argument("--share", type=finite, metavar="P", help="part of the epochs; default 1, 0.15 with --small")
    parser.add_argument("--seeds", type=positive, metavar="N", help="seeds of each setting; default 3, 2 with --small")
    parser.add_argument("--out", default="study", metavar="DIR", help="folder for everything it makes; default study")
