"""The command that labels measured patterns: label."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from stemtune.cli.parsing import Parser, command, positive
from stemtune.config import parse_assignments
from stemtune.config.frames import AUTO, frames_in_words
from stemtune.errors import UserError

if TYPE_CHECKING:
    from stemtune.cli.parsing import Commands


def label(commands: Commands) -> None:
    def call(options: argparse.Namespace) -> None:
        if options.map:
            _label_from(options)
            return
        if options.frame is not None:
            raise UserError(f"--frame {options.frame} is the frame of a map; give the map with --from MAP")
        settings = parse_assignments(options.set)
        from stemtune.maps.inspect import describe
        from stemtune.maps.label import label_by_templates
        from stemtune.tracking import resolve_model

        done = label_by_templates(
            options.store,
            options.cif,
            options.out,
            settings=settings,
            model_folder=resolve_model(options.model) if options.model else None,
            refine=options.refine,
            batch=options.batch,
            device=None if options.device == "auto" else options.device,
        )
        print(f"{done['patterns']:,} patterns at {done['patterns_per_second']:,.0f} patterns/s")
        print(describe(done["store"]))

    parser = command(
        commands,
        "label",
        "orientations, confidence and scores for measured patterns",
        "stemtune label scan.h5 --cif LCO.cif --cif Li2MnO3.cif --out labelled.h5",
        call,
    )
    parser.add_argument("store", metavar="STORE", help="the store with the patterns; `stemtune ingest` makes one")
    parser.add_argument(
        "--cif",
        action="append",
        default=[],
        metavar="CIF",
        help="a phase, repeatable: a CIF file, or `linio2`; the phase that fits a pattern best is its label. Default"
        " the phases that the store names",
    )
    parser.add_argument("--out", metavar="STORE", help="the labelled store; default STORE itself, replaced as a whole")
    parser.add_argument("--method", choices=("template",), default="template", help="how; default template matching")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="take the settings of matching from this `matched`, `champion` for instance (search_spaces/matching.yaml)",
    )
    _map_options(parser)
    parser.add_argument("--refine", action="store_true", help="fit the best answers to the patterns")
    parser.add_argument("--batch", type=positive, default=256, metavar="N", help="patterns at a time; default 256")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default auto")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of matching, data.gamma=0.3 say"
    )


def _map_options(parser: Parser) -> None:
    """Give the options of labels from a map, and what the frames are, below the example."""
    parser.add_argument(
        "--from",
        dest="map",
        metavar="MAP",
        help="take the labels from a map made elsewhere instead: .ang (EDAX, ASTAR, EMsoft, orix), .ctf (Oxford,"
        " Bruker, ASTAR, MTEX), .h5 (orix, pyxem, py4DSTEM); each of its phases must be one of --cif or of the store's",
    )
    parser.add_argument("--frame", metavar="NAME", help="the frame of the map's angles; default auto; see below")
    parser.epilog = (
        f"{parser.epilog}\n  stemtune label scan.h5 --from scan.ctf --cif LCO.cif --out labelled.h5"
        "\n\nframes (x, y: lab axes on the map, whose rows run down, with z to the source; X, Z: crystal axes):"
        f"\n{frames_in_words()}"
    )


def _label_from(options: argparse.Namespace) -> None:
    """Label from the map --from, which matching's options have nothing to do with."""
    matching = {"--model": options.model, "--refine": options.refine, "--set": options.set}
    given = [name for name, value in matching.items() if value]
    if given:
        raise UserError(f"{given[0]} is an option of template matching; leave it out with --from {options.map}")
    from stemtune.maps.inspect import describe
    from stemtune.maps.label_from import label_from_map

    done = label_from_map(options.store, options.map, options.cif, options.out, frame=options.frame or AUTO)
    print(
        f"{done['indexed']:,} of {done['patterns']:,} patterns labelled from {options.map}"
        f" ({done['program']}, frame {done['frame']})"
    )
    print(describe(done["store"]))
