"""Commands that make, judge and hand on maps: predict, evaluate, export."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from stemtune.cli.parsing import command, over_ray, pair, positive, ray_option, scan_arguments, scan_options
from stemtune.errors import UserError

if TYPE_CHECKING:
    from stemtune.cli.parsing import Commands


def predict(commands: Commands) -> None:
    def call(options: argparse.Namespace) -> None:
        from stemtune.maps.predict import predict
        from stemtune.tracking import resolve_model

        model = resolve_model(options.model)
        summary = predict(
            options.scan,
            model,
            options.out,
            batch=options.batch,
            refine=options.refine,
            spread=None if options.ray is None else over_ray(options, "auto"),
            **scan_arguments(options),
        )
        print(
            f"{summary['patterns']:,} patterns, {summary['indexed_fraction']:.1%} of them indexed, at"
            f" {summary['patterns_per_second']:,.0f} patterns/s; figures in {Path(options.out) / 'summary.json'}"
        )
        if options.overlay:
            from stemtune.maps.overlay import overlay_positions

            picture = overlay_positions(options.out, [pair(text, "--overlay") for text in options.overlay])
            print(f"overlay: {picture}")

    parser = command(
        commands,
        "predict",
        "the orientation map",
        "stemtune predict scan.h5 --model champion --out map --overlay 23,18 30,40",
        call,
    )
    parser.add_argument("scan", metavar="SCAN|STORE")
    parser.add_argument(
        "--model", required=True, help="a model folder, models:/NAME@champion, runs:/ID/model, champion"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the map folder to write")
    parser.add_argument("--refine", action="store_true", help="fit the model's answers to the patterns")
    parser.add_argument("--batch", type=positive, default=256, metavar="N", help="patterns at a time; default 256")
    ray_option(parser)
    parser.add_argument("--overlay", nargs="+", metavar="Y,X", help="draw predicted spots on these measured patterns")
    scan_options(parser)


def evaluate(commands: Commands) -> None:
    def call(options: argparse.Namespace) -> None:
        if (options.truth is None) == (options.against_patterns is None):
            raise UserError("give either --truth, or where there is none --against-patterns STORE")
        if options.truth is None:
            for name in ("png", "risk"):
                if getattr(options, name):
                    raise UserError(f"--{name} draws what is known of the truth; give --truth, or leave it out")
            from stemtune.maps.agreement import agreement_in_words, judge

            print(agreement_in_words(judge(options.map, options.against_patterns, options.other, json=options.json)))
            return
        if options.other:
            raise UserError("--other is another map to agree with, beside --against-patterns; leave it out")
        if options.models and not options.risk:
            raise UserError("--models are drawn beside the labels that they were trained on; give --risk FILE")
        if options.risk:
            from stemtune.maps.risk import judge_labels, risk_in_words

            print(risk_in_words(judge_labels(options.map, options.truth, options.risk, options.models, options.json)))
            return
        from stemtune.maps.evaluate import evaluate, in_words

        print(in_words(evaluate(options.map, options.truth, json=options.json, png=options.png)))

    parser = command(
        commands,
        "evaluate",
        "a map, or the labels of a store, against the truth: disorientation, pseudo-symmetry confusion, calibration of"
        " the confidence; without a truth against the patterns: fit, coherence, agreement with another map",
        "stemtune evaluate map/map.h5 --truth scan.h5 --json figures.json\n"
        "  stemtune evaluate map --against-patterns scan.h5 --other labelled.h5",
        call,
    )
    parser.add_argument("map", metavar="MAP.h5|STORE")
    parser.add_argument("--truth", metavar="STORE|MAP.h5|.ang|.ctf")
    parser.add_argument("--against-patterns", metavar="STORE", help="there is no truth: judge by these patterns")
    parser.add_argument(
        "--other", metavar="MAP.h5|STORE|.ang|.ctf", help="a map to agree with, beside --against-patterns"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    parser.add_argument("--png", metavar="FILE", help="draw the reliability of the confidence")
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


EXPORTS = ("ctf", "ang", "h5", "dream3d", "csv")


def export(commands: Commands) -> None:
    def call(options: argparse.Namespace) -> None:
        from stemtune.maps.formats import export

        print(export(options.map, options.to, options.out))

    parser = command(
        commands,
        "export",
        "a map for other programs",
        "stemtune export map/map.h5 --to dream3d --out particle.dream3d",
        call,
    )
    parser.add_argument("map", metavar="MAP.h5", help="a map.h5 of stemtune, or its folder")
    parser.add_argument(
        "--to",
        required=True,
        choices=EXPORTS,
        help="ctf: Channel Text File in Oxford's axes (AZtec, MTEX, DREAM.3D); ang: EDAX TSL (OIM, MTEX, orix); h5:"
        " orix alone, without stemtune's layers; dream3d: DREAM.3D 6.5; csv: a table",
    )
    parser.add_argument("--out", metavar="FILE", help="the file to write; default beside the map, under its name")
