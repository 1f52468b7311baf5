"""Commands that make, change and hand on maps: predict, watch, serve, grains, clean, export."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stemtune.cli.parsing import (
    Command,
    Parser,
    command,
    over_ray,
    pair,
    port,
    positive,
    ray_option,
    scan_arguments,
    scan_options,
    seconds,
    settings_given,
    settings_options,
)
from stemtune.config import CleanConfig, GrainsConfig
from stemtune.errors import UserError

LOGGED = ("report.html", "*.png", "summary.json")  # what of a map folder is logged to MLflow


@command(
    "the orientation map",
    "stemtune predict scan.h5 --model champion --out map --overlay 23,18 30,40",
)
def predict(parser: Parser) -> Command:
    def call(options: argparse.Namespace) -> None:
        from stemtune.map_folder.predict import predict
        from stemtune.tracking import resolve

        models = [resolve(model) for model in options.model]
        runs = [model.run for model in models if model.run]
        summary = predict(
            options.scan,
            [model.folder for model in models],
            options.out,
            batch=options.batch,
            refine=options.refine,
            spread=over_ray(options, "auto"),
            grains=settings_given(options, "grains", GrainsConfig),
            twins=options.twin,
            clean=settings_given(options, "clean", CleanConfig) if options.clean else None,
            overlap=options.overlap,
            addresses=[name for name in options.model if not Path(name).exists()],
            runs=runs,
            **scan_arguments(options),
        )
        folder = Path(options.out)
        _print_summary(summary, folder)
        if options.overlay:
            from stemtune.plot.patterns import overlay_positions

            picture = overlay_positions(options.out, [pair(text, "--overlay") for text in options.overlay])
            print(f"overlay: {picture}")
        if not options.no_log:
            _log(runs, folder)

    parser.option("scan", metavar="SCAN|STORE")
    parser.option(
        "--model",
        "a model folder, models:/NAME@champion, runs:/ID/model, champion; repeat it, one for each phase, and each"
        " pixel is of the phase that fits best",
        required=True,
        action="append",
    )
    parser.option("--out", "the map folder to write", "DIR", required=True)
    parser.flag("--refine", "fit the model's answers to the patterns")
    parser.flag("--overlap", "look for two crystals in each pattern; takes about three to four times as long")
    parser.option("--batch", "patterns at a time; default 256", "N", type=positive, default=256)
    ray_option(parser)
    _log_option(parser)
    parser.option("--overlay", "draw predicted spots on these measured patterns", "Y,X", nargs="+")
    scan_options(parser)
    parser.flag("--clean", "clean up the map by what neighbours say, see stemtune clean")
    settings_options(parser, "clean-up", "clean", CleanConfig, "clean-")
    _grain_options(parser)
    return call


def _print_summary(summary: dict[str, Any], folder: Path) -> None:
    print(
        f"{summary['patterns']:,} patterns, {summary['indexed_fraction']:.1%} of them indexed, at"
        f" {summary['patterns_per_second']:,.0f} patterns/s; look at {folder / 'report.html'}, figures in"
        f" {folder / 'summary.json'}"
    )
    for row in summary.get("phases", ()):
        print(f"{row['pixels']:8,} pixels ({row['share']:.1%}) are {row['name']}")
    if "overlaps" in summary:
        print(f"{summary['overlaps']['pixels']:8,} pixels hold two crystals")


def _log_option(parser: Parser) -> None:
    parser.flag("--no-log", "do not log report and pictures to the MLflow run of the model")


def _log(runs: Sequence[str], folder: Path) -> None:
    """Log a map's report and pictures to the runs of its models; that MLflow does not take them is worth a note."""
    from stemtune.tracking import log_files

    for run in runs:
        try:
            address = log_files(run, folder, LOGGED, f"maps/{folder.resolve().name}")
        except UserError as problem:
            print(f"note: report and pictures are not logged to MLflow: {problem}", file=sys.stderr)
        else:
            print(f"logged report and pictures to {address}")


def _log_again(path: str) -> None:
    """Log a map folder, or the one that a `map.h5` is in, to the runs that it says its models came from."""
    from stemtune.map_folder.files import made_by

    given = Path(path)
    _log(made_by(given), given.parent if given.is_file() else given)


@command(
    "predicts each scan that lands in a folder, and each line of a growing one, as it lands: a .npy, a Merlin .mib"
    " (with its .hdr or --shape), or HDF5 that grows along its first axis or counts its frames in 'frames_written'."
    " Maps are written when scans are whole; until then a page on this machine shows them. After Ctrl-C or a crash"
    " the same command goes on where it was",
    "stemtune watch /data/today --model linio2 --out maps --kv 200 --scale 0.025 --shape 256,256",
)
def watch(parser: Parser) -> Command:
    def call(options: argparse.Namespace) -> None:
        from stemtune.live.watcher import watch
        from stemtune.tracking import resolve_model

        states = watch(
            options.folder,
            resolve_model(options.model),
            options.out,
            once=options.once,
            stall_s=options.stall,
            port=None if options.no_page else options.port,
            refine=options.refine,
            **scan_arguments(options),
        )
        for name, state in states.items():
            print(f"{name}: {state}")
        failed = [name for name, state in states.items() if state == "failed"]
        if options.once and failed:
            raise UserError(f"{len(failed)} of {len(states)} scans failed ({', '.join(failed)}); see above")

    parser.option("folder", "where scans land", "DIR")
    parser.option("--model", "as stemtune predict takes it", required=True)
    parser.option("--out", "where the maps go, a folder for each scan", "DIR", required=True)
    parser.flag("--refine", "fit the model's answers to the patterns")
    parser.flag("--once", "end when every scan is done; of those that have stalled, map what is there")
    parser.option(
        "--stall",
        "a file that has not grown for so many seconds is reported; default 10",
        "S",
        type=seconds,
        default=10.0,
    )
    parser.option("--port", "where the page is; default any free port", "N", type=port, default=0)
    parser.flag("--no-page", "serve no page")
    scan_options(parser)
    return call


@command(
    "the model behind Ray Serve: POST frames (n, size, size) as a .npy with 'Authorization: Bearer TOKEN', and"
    " ?scale=1/Å per pixel where they are calibrated otherwise than the model's; orientation, confidence, whether"
    " a crystal is seen come back as JSON, or with 'Accept: application/x-npy' as a .npy. Too many requests get a"
    " 503, bad ones a 400 with the reason",
    "stemtune serve --model linio2 --token-file token.txt --port 8500\n"
    '  curl -H "Authorization: Bearer $(cat token.txt)" --data-binary @frames.npy http://127.0.0.1:8500/',
)
def serve(parser: Parser) -> Command:
    def call(options: argparse.Namespace) -> None:
        from stemtune.live.server import Limits, serve_until_stopped, token_from

        token = token_from(options.token_file)
        from stemtune.tracking import resolve_model

        folder = str(resolve_model(options.model).absolute())
        serve_until_stopped(
            folder,
            token,
            options.host,
            options.port,
            Limits(batch=options.requests, queue=options.queue),
            lambda address: print(f"serving {options.model} at {address}; Ctrl-C ends it", flush=True),
        )

    parser.option("--model", "as stemtune predict takes it", required=True)
    parser.option(
        "--token-file",
        "holds the token, readable by you alone; made if it does not exist. Left out: the variable STEMTUNE_TOKEN",
        "FILE",
    )
    parser.option("--host", "where to listen; default 127.0.0.1, this machine alone", default="127.0.0.1")
    parser.option("--port", "default 8500", "N", type=port, default=8500)
    parser.option("--requests", "requests answered together at most; default 16", "N", type=positive, default=16)
    parser.option("--queue", "requests that may wait; more get a 503; default 64", "N", type=positive, default=64)
    return call


def _grain_options(parser: Parser) -> None:
    settings_options(parser, "grains and boundaries", "grains", GrainsConfig, "grains-")
    parser.option(
        "--twin",
        "a special boundary to look for: 60,[0 0 1], or with a plane's normal 180,(1 1 -2 1); repeatable",
        "ANGLE,[UVW]",
        action="append",
        default=[],
    )


@command(
    "finds the grains of a map anew, with other settings: tables, boundaries, KAM, GROD and their pictures",
    "stemtune grains map --grains-threshold 2 --twin '60,[0 0 1]'",
)
def grains(parser: Parser) -> Command:
    def call(options: argparse.Namespace) -> None:
        from stemtune.analysis.grain_analysis import describe_grains
        from stemtune.map_folder.files import regrain

        settings = settings_given(options, "grains", GrainsConfig)
        print(describe_grains(regrain(options.map, settings, options.twin)))
        if not options.no_log:
            _log_again(options.map)

    parser.option("map", "a map folder, or the map.h5 in it; its grains and what shows them are replaced", "MAP")
    _log_option(parser)
    _grain_options(parser)
    return call


@command(
    "cleans up a map by what neighbours say: pseudo-symmetric answers and single gaps; what was changed is a layer of"
    " the map and can be undone",
    "stemtune clean map --out cleaned",
)
def clean(parser: Parser) -> Command:
    def call(options: argparse.Namespace) -> None:
        from stemtune.analysis.grain_analysis import describe_grains
        from stemtune.map_folder.files import clean_map

        how = None if options.undo else settings_given(options, "clean", CleanConfig)
        figures = clean_map(
            options.map, options.out, how, settings_given(options, "grains", GrainsConfig), options.twin
        )
        for meaning, pixels in (figures["cleaned"] or {}).items():
            print(f"{pixels:8,} pixels: {meaning}")
        print(describe_grains(figures["grains"]))
        if not options.no_log:
            _log_again(options.out or options.map)

    parser.option("map", "a map folder, or the map.h5 in it", "MAP")
    parser.option("--out", "the map folder to write; left out, MAP is replaced", "DIR")
    parser.flag("--undo", "bring back what was there before")
    _log_option(parser)
    settings_options(parser, "clean-up", "clean", CleanConfig, "clean-")
    _grain_options(parser)
    return call


EXPORTS = ("ctf", "ang", "h5", "dream3d", "csv", "pt2")


@command(
    "a map for other programs, or a model as a program that torch alone runs",
    "stemtune export map/map.h5 --to dream3d --out particle.dream3d\n  stemtune export model --out model.pt2",
)
def export(parser: Parser) -> Command:
    def call(options: argparse.Namespace) -> None:
        to = options.to or ("pt2" if str(options.out).endswith(".pt2") else "")
        if not to:
            raise UserError(f"export needs --to {'|'.join(EXPORTS[:-1])} for a map, or --out FILE.pt2 for a model")
        if to == "pt2":
            if not options.out:
                raise UserError("--to pt2 needs --out FILE.pt2")
            from stemtune.api import export

            print(export(options.source, options.out, options.alternatives or 1))
            return
        if options.alternatives:
            raise UserError(f"--alternatives belongs to a model; {to} holds what the map holds")
        from stemtune.crystal_map.io import write_map

        print(write_map(options.source, to, options.out))

    parser.option("source", "a map.h5 of stemtune, or its folder; or a model, as --model takes it", "MAP.h5|MODEL")
    parser.option(
        "--to",
        "ctf: Channel Text File in Oxford's axes (AZtec, MTEX, DREAM.3D); ang: EDAX TSL (OIM, MTEX, orix); h5:"
        " orix alone, without stemtune's layers; dream3d: DREAM.3D 6.5; csv: a table; pt2: a model as a program of"
        " torch.export",
        choices=EXPORTS,
    )
    parser.option("--out", "the file to write; default, of a map, beside it under its name", "FILE")
    parser.option(
        "--alternatives", "orientations per pattern that a model's program returns; default 1", "N", type=positive
    )
    return call
