"""The command that labels measured patterns: label."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from stemtune.cli.parsing import command, positive
from stemtune.config import parse_assignments

if TYPE_CHECKING:
    from stemtune.cli.parsing import Commands


def label(commands: Commands) -> None:
    def call(options: argparse.Namespace) -> None:
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
    parser.add_argument("--refine", action="store_true", help="fit the best answers to the patterns")
    parser.add_argument("--batch", type=positive, default=256, metavar="N", help="patterns at a time; default 256")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default auto")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of matching, data.gamma=0.3 say"
    )
