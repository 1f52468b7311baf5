"""Commands that make, label and show data: simulate, ingest, label, inspect."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from stemtune.cli.parsing import (
    Command,
    Parser,
    command,
    finite,
    over_ray,
    pair,
    positive,
    ray_option,
    scan_arguments,
    scan_options,
    seed,
    settings_options,
)
from stemtune.config import Config, SimulateConfig, parse_assignments
from stemtune.errors import UserError


def _simulate_config(options: argparse.Namespace) -> SimulateConfig:
    given = {key: value for key, value in vars(options).items() if key.startswith("simulate.") and value is not None}
    for key, value in parse_assignments(options.set).items():
        if not key.startswith("simulate."):
            raise UserError(f"--set {key}: a simulation has no other settings than those called simulate.*")
        given[key] = value
    if options.dynamical and given.setdefault("simulate.physics", "bloch") != "bloch":
        raise UserError(f"--dynamical asks for Bloch waves, but simulate.physics is {given['simulate.physics']!r}")
    return Config.from_flat(given).simulate


def _simulate_beams(options: argparse.Namespace, settings: SimulateConfig, how: dict[str, Any]) -> None:
    if settings.physics != "bloch":
        raise UserError("--beams keeps the beams of Bloch waves; give --dynamical too (kinematic ones need no store)")
    if options.scan:
        raise UserError("--beams is a store to train on, --scan a scan to look at; give one of them")
    from stemtune.dataset.beam_store import simulate_beams

    number = options.patterns, settings, options.thicknesses, options.tilt_groups
    simulate_beams(options.cif, options.out, *number, **how)


@command(
    "simulated patterns with exact orientations; after an interrupt the same command goes on",
    "stemtune simulate linio2 --out linio2.h5 --patterns 20000 --dynamical --thickness 20:80 --precession 0.5\n"
    "  stemtune simulate linio2 --out beams.h5 --patterns 50000 --dynamical --beams --thickness 20:80",
)
def simulate(parser: Parser) -> Command:
    def call(options: argparse.Namespace) -> None:
        settings = _simulate_config(options)
        shape = pair(options.scan, "--scan") if options.scan else None
        from stemtune.dataset import simulate

        how: dict[str, Any] = {name: getattr(options, name) for name in ("seed", "workers", "device", "restart")}
        if options.ray is not None:
            if shape and options.device == "cuda":
                raise UserError("--ray spreads a --scan over CPUs only; leave out --device cuda")
            how["device"] = "cuda" if options.device == "cuda" else "cpu"
            how["spread"] = over_ray(options, how["device"])
        if options.beams:
            _simulate_beams(options, settings, how)
        elif shape:
            simulate.simulate_polycrystal(options.cif, options.out, shape, options.grains, settings, **how)
        else:
            simulate.simulate_store(options.cif, options.out, options.patterns, settings, **how)
        from stemtune.cli.inspect import describe

        print(describe(options.out))

    parser.option(
        "cif",
        "the phase: a CIF file, or `linio2`, which ships with stemtune; atoms without displacement parameters"
        " (Debye-Waller factors) get a mean square of 0.005 Å²",
        "CIF",
    )
    parser.option("--out", "the store to write", "STORE", required=True)
    parser.option("--patterns", "how many; default 10000", "N", type=positive, default=10_000)
    parser.option("--scan", "instead a scan of a polycrystal with known truth", "NY,NX")
    parser.option("--grains", "grains of --scan; default 12", "N", type=positive, default=12)
    parser.option("--seed", "same seed, same patterns; default 0", type=seed, default=0)
    parser.option("--workers", "processes on a CPU; default 1", "N", type=positive, default=1)
    ray_option(parser)
    parser.flag("--dynamical", "Bloch waves; the same as --physics bloch")
    parser.flag(
        "--beams",
        "keep the beams of --patterns random orientations, not pixels: training draws fresh patterns from them"
        " (data.source=beams), thousands a second; with --dynamical",
    )
    parser.option("--thicknesses", "--beams: thicknesses of each orientation; default 6", "N", type=positive, default=6)
    parser.option(
        "--tilt-groups",
        "--beams: pairs of precession and convergence of each orientation; default 2",
        "N",
        type=positive,
        default=2,
    )
    parser.option(
        "--device",
        "where to simulate; default auto, a GPU if there is one (its random numbers are its own), with --ray CPUs",
        choices=("auto", "cpu", "cuda"),
        default="auto",
    )
    parser.flag("--restart", "begin anew instead of going on with the unfinished STORE.part")
    parser.option("--set", "any setting simulate.*", "KEY=VALUE", action="append", default=[])
    title = "the microscope (low:high is drawn from anew for every pattern)"
    settings_options(parser, title, "simulate", SimulateConfig, without=("simulate.beams",))  # --beams is a store's
    return call


@command(
    "a measured scan, calibrated and centred, into a store",
    "stemtune ingest scan.hspy --out scan.h5 --kv 300",
)
def ingest(parser: Parser) -> Command:
    def call(options: argparse.Namespace) -> None:
        from stemtune.cli.inspect import describe
        from stemtune.dataset.ingest import ingest

        ingest(options.scan, options.out, **scan_arguments(options))
        print(describe(options.out))

    parser.option("scan", "the file: .hspy, .zspy, .mib, .blo, .dm4, .tvips, .h5, .npy, ...", "SCAN")
    parser.option("--out", "the store to write", "STORE", required=True)
    scan_options(parser)
    return call


@command(
    "what a scan, store, map, model or search space holds",
    "stemtune inspect scan.h5 --png scan.png",
)
def inspect(parser: Parser) -> Command:
    def call(options: argparse.Namespace) -> None:
        from stemtune.cli.inspect import describe

        print(describe(options.path))
        if options.png:
            from stemtune.plot.calibration import calibration_picture
            from stemtune.plot.patterns import contact_sheet

            contact_sheet(options.path, options.png)
            print(f"contact sheet: {options.png}")
            second = calibration_picture(options.path, options.png)
            if second:
                print(f"calibration: {second}")

    parser.option("path", metavar="PATH")
    parser.option(
        "--png", "draw a contact sheet of patterns; of a measured store also its calibration, FILE-calibration", "FILE"
    )
    return call


@command(
    "orientations, confidence and scores for measured patterns",
    "stemtune label scan.h5 --cif LCO.cif --cif Li2MnO3.cif --out labelled.h5\n"
    "  stemtune label scan.h5 --method model --model model --min-confidence 0.9 --out taught.h5",
)
def label(parser: Parser) -> Command:
    def call(options: argparse.Namespace) -> None:
        if options.map:
            _label_from(options)
            return
        if options.frame is not None:
            raise UserError(f"--frame {options.frame} is the frame of a map; give the map with --from MAP")
        from stemtune.cli.inspect import describe

        done = _by_model(options) if options.method == "model" else _by_templates(options)
        for note in done.get("notes", ()):
            print(f"note: {note}", file=sys.stderr)
        print(f"{done['patterns']:,} patterns at {done['patterns_per_second']:,.0f} patterns/s")
        print(describe(done["store"]))

    parser.option("store", "the store with the patterns; `stemtune ingest` makes one", "STORE")
    parser.option(
        "--cif",
        "a phase, repeatable: a CIF file, or `linio2`; the phase that fits a pattern best is its label. Default"
        " the phases that the store names",
        "CIF",
        action="append",
        default=[],
    )
    parser.option("--out", "the labelled store; default STORE itself, replaced as a whole", "STORE")
    parser.option(
        "--method",
        "template matching (default), or the confident answers of a model, for self-training",
        choices=("template", "model"),
        default="template",
    )
    parser.option(
        "--model",
        "template: take the settings of matching from this `matched`, `champion` for instance"
        " (search_spaces/matching.yaml); model: whose answers become labels",
        "MODEL",
    )
    parser.option("--min-confidence", "model: less confident answers are no labels; default 0.9", "P", type=finite)
    _map_options(parser)
    ray_option(parser)
    parser.flag("--refine", "fit the best answers to the patterns")
    parser.option("--batch", "patterns at a time; default 256", "N", type=positive, default=256)
    parser.option("--device", "default auto", choices=("auto", "cpu", "cuda"), default="auto")
    parser.option("--set", "a setting of matching, data.gamma=0.3 say", "KEY=VALUE", action="append", default=[])
    return call


def _map_options(parser: Parser) -> None:
    """Give the options of labels from a map, and what the frames are, below the example."""
    parser.option(
        "--from",
        "take the labels from a map made elsewhere instead: .ang (EDAX, ASTAR, EMsoft, orix), .ctf (Oxford,"
        " Bruker, ASTAR, MTEX), .h5 (orix, pyxem, py4DSTEM); each of its phases must be one of --cif or of the store's",
        "MAP",
        dest="map",
    )
    parser.option("--frame", "the frame of the map's angles; default auto; see below", "NAME")
    parser.epilog = f"{parser.epilog}\n  stemtune label scan.h5 --from scan.ctf --cif LCO.cif --out labelled.h5"
    parser.more_help = _frames


def _frames() -> str:
    from stemtune.crystal_map.frames import describe_frames

    where = "x, y: lab axes on the map, whose rows run down, with z to the source; X, Z: crystal axes"
    return f"\nframes ({where}):\n{describe_frames()}\n"


def _label_from(options: argparse.Namespace) -> None:
    """Label from the map --from, which matching's options have nothing to do with."""
    matching = {
        "--method model": options.method == "model",
        "--model": options.model,
        "--min-confidence": options.min_confidence is not None,
        "--refine": options.refine,
        "--set": options.set,
        "--ray": options.ray is not None,
    }
    given = [name for name, value in matching.items() if value]
    if given:
        raise UserError(
            f"{given[0]} has nothing to do with a map made elsewhere; leave it out with --from {options.map}"
        )
    from stemtune.cli.inspect import describe
    from stemtune.crystal_map.frames import AUTO
    from stemtune.indexing.import_labels import label_from_map

    done = label_from_map(options.store, options.map, options.cif, options.out, frame=options.frame or AUTO)
    print(
        f"{done['indexed']:,} of {done['patterns']:,} patterns labelled from {options.map}"
        f" ({done['program']}, frame {done['frame']})"
    )
    print(describe(done["store"]))


def _by_templates(options: argparse.Namespace) -> dict[str, Any]:
    if options.min_confidence is not None:
        raise UserError(
            "--min-confidence goes with --method model; labels by matching keep their scores, so cut them in training"
            " (--set data.cut='Q>0.4 R>10')"
        )
    from stemtune.indexing.template_matching import label_by_templates
    from stemtune.tracking import resolve_model

    return label_by_templates(
        options.store,
        options.cif,
        options.out,
        settings=parse_assignments(options.set),
        model_folder=resolve_model(options.model) if options.model else None,
        **_how(options),
    )


def _by_model(options: argparse.Namespace) -> dict[str, Any]:
    if not options.model:
        raise UserError("--method model needs --model MODEL, whose answers become labels")
    for name in ("cif", "set"):
        if getattr(options, name):
            raise UserError(f"--{name} goes with --method template; a model brings its crystal and settings along")
    from stemtune.indexing.pseudo_labels import MIN_CONFIDENCE, label_by_model
    from stemtune.tracking import resolve_model

    given = MIN_CONFIDENCE if options.min_confidence is None else options.min_confidence
    return label_by_model(
        options.store, resolve_model(options.model), options.out, min_confidence=given, **_how(options)
    )


def _how(options: argparse.Namespace) -> dict[str, Any]:
    device = None if options.device == "auto" else options.device
    spread = over_ray(options, options.device)
    return {"refine": options.refine, "batch": options.batch, "device": device, "spread": spread}
