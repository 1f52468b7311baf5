"""Commands that judge maps and show what stemtune does: evaluate, demo, study."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from stemtune._files import whole_file
from stemtune.cli.parsing import Command, Parser, command, finite, positive
from stemtune.errors import UserError


def _evaluate(options: argparse.Namespace) -> None:
    _check_evaluate(options)
    from stemtune.analysis.evaluation import agreement, evaluate, risk
    from stemtune.analysis.evaluation.ground_truth import map_or_labels, read_truth
    from stemtune.plot.evaluation import draw_difference, draw_evaluation, draw_risk

    figures: dict[str, Any]
    if options.risk:
        figures = risk.label_risk(options.map, read_truth(options.truth)) | {"networks": risk.networks(options.models)}
        described = risk.describe_risk(figures)
    elif options.truth is not None:
        figures = evaluate.evaluate(options.map, options.truth)
        described = evaluate.describe(figures)
    elif options.against_patterns is not None:
        other = read_truth(options.other) if options.other else None
        figures = agreement.against_patterns(map_or_labels(options.map), options.against_patterns, other)
        described = agreement.describe_agreement(figures)
    else:
        figures = agreement.differ(options.map, options.other)
        described = agreement.describe_difference(figures)
    if options.json:
        with whole_file(options.json) as part:
            part.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if options.png and not options.risk:
        draw_evaluation(figures, options.png)
    print(described)
    if options.risk:
        draw_risk(figures, options.risk)
    if options.difference:
        draw_difference(map_or_labels(options.map), read_truth(options.truth or options.other), options.difference)


def _check_evaluate(options: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    given = [options.truth, options.against_patterns]
    if given.count(None) != 1 and (options.other is None or given != [None, None]):
        raise UserError(
            "give either --truth, or where there is none --against-patterns STORE, or --other MAP to compare with"
        )
    if options.difference and options.risk:
        raise UserError("--risk judges labels and --difference draws two maps; give one of them")
    if options.truth is None:
        for name in ("png", "risk"):
            if getattr(options, name):
                raise UserError(f"--{name} draws what is known of the truth; give --truth, or leave it out")
        if options.difference and not options.other:
            raise UserError("--difference draws two maps; give --truth or --other, or leave it out")
    elif options.other:
        raise UserError("--other is another map to agree with, where there is no truth; leave it out")
    elif options.models and not options.risk:
        raise UserError("--models are drawn beside the labels that they were trained on; give --risk FILE")


@command(
    "a map, or the labels of a store, against the truth: disorientation, pseudo-symmetry confusion, calibration of"
    " the confidence, risk-coverage, boundaries; without a truth against the patterns: fit, coherence, agreement"
    " with another map; or two maps with each other",
    "stemtune evaluate map/map.h5 --truth scan.h5 --json figures.json --png figures.png\n"
    "  stemtune evaluate map --other map_of_another_model --difference difference.png\n"
    "  stemtune evaluate map --against-patterns scan.h5 --other labelled.h5",
)
def evaluate(parser: Parser) -> Command:
    parser.option("map", metavar="MAP.h5|STORE")
    parser.option("--truth", metavar="STORE|MAP.h5|.ang|.ctf")
    parser.option("--against-patterns", "there is no truth: judge by these patterns", "STORE")
    parser.option(
        "--other",
        "another map of the scan to compare with, alone or beside --against-patterns",
        "MAP.h5|STORE|.ang|.ctf",
    )
    parser.option("--json", "write the figures", "FILE")
    parser.option("--png", "draw what is known of the truth: reliability, risk-coverage, confusion", "FILE")
    parser.option("--difference", "draw where the map and --truth or --other differ, and by how much", "FILE")
    parser.option("--risk", "of a labelled store: draw the labels' error against the share that is kept", "FILE")
    parser.option(
        "--models",
        "beside --risk: models that were trained on those labels and validated on a truth (data.validation_store)",
        "MODEL",
        nargs="+",
        default=[],
    )
    return _evaluate


@command(
    "simulate, sweep, compare, predict and map on a simulated LiNiO2 polycrystal",
    "stemtune demo --out demo",
)
def demo(parser: Parser) -> Command:
    def call(options: argparse.Namespace) -> None:
        from stemtune.demo import run

        run(Path(options.out), options.run_command)

    parser.option("--out", "folder for everything it makes; default demo", "DIR", default="demo")
    return call


@command(
    "measures the findings of the reference study (arXiv:2507.01889) again where the truth is known: makes the"
    " data, runs a sweep for each finding of search_spaces/reference, writes report.html; goes on where an earlier"
    " run stopped",
    "stemtune study reference --small --out study",
)
def study(parser: Parser) -> Command:
    def call(options: argparse.Namespace) -> None:
        from stemtune.study import run

        given = {name: getattr(options, name) for name in ("small", "only", "share", "seeds")}
        print(f"report: {run(options.name, Path(options.out), options.run_command, **given)}")

    parser.option("name", "reference", "NAME")
    parser.flag("--small", "for two cores: 25,600 patterns of 64 px, two hours")
    parser.option("--only", "labels, kernel, ...; default all", "FINDING", nargs="+", default=[])
    parser.option("--share", "part of the epochs; default 1, 0.125 with --small", "P", type=finite)
    parser.option("--seeds", "seeds of each setting; default 3, 2 with --small", "N", type=positive)
    parser.option("--out", "folder for everything it makes; default study", "DIR", default="study")
    return call
