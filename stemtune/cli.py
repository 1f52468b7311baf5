"""The `stemtune` command: parses and calls, nothing else.

Every heavy import happens inside the function that needs it, so that `stemtune --help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stemtune import __version__, bench
from stemtune.config import Config, SimulateConfig, knobs, parse_assignments
from stemtune.errors import UserError, fault_line

Command = Callable[[argparse.Namespace], None]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 the user's mistake, 1 a fault of ours."""
    try:
        options = _parser().parse_args(argv)
        options.call(options)
    except UserError as mistake:
        print(f"stemtune: {mistake}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        kept = str(stop) or "interrupted; nothing half-written was left under a final name"
        print(f"stemtune: {kept}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except Exception as fault:
        print(f"stemtune: {fault_line(fault)}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="stemtune",
        description="Finds, trains and serves the network that reads crystal orientations out of STEM patterns.",
    )
    parser.add_argument("--version", action="version", version=f"stemtune {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_simulate, _ingest, _inspect, _train, _sweep, _check, _compare, _predict, _evaluate, _bench, _demo):
        add(commands)
    return parser


def _command(commands: argparse._SubParsersAction, name: str, does: str, example: str, call: Command) -> _Parser:  # type: ignore[type-arg]
    parser: _Parser = commands.add_parser(
        name,
        help=does,
        description=does[0].upper() + does[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(call=call)
    return parser


def _simulate_options(parser: _Parser) -> None:
    """Give every `simulate.*` knob as an option of its own name."""
    group = parser.add_argument_group("the microscope (low:high is drawn from anew for every pattern)")
    for key, knob in knobs().items():
        section, name = key.split(".", 1)
        if section == "simulate":
            unit = f" [{knob.unit}]" if knob.unit else ""
            text = f"{knob.about}{unit}; default {knob.default}"
            group.add_argument(f"--{name.replace('_', '-')}", dest=key, metavar="X", help=text.replace("%", "%%"))


def _simulate_config(options: argparse.Namespace) -> SimulateConfig:
    given = {key: value for key, value in vars(options).items() if key.startswith("simulate.") and value is not None}
    for key, value in parse_assignments(options.set).items():
        if not key.startswith("simulate."):
            raise UserError(f"--set {key}: a simulation has no other settings than those called simulate.*")
        given[key] = value
    if options.dynamical and given.setdefault("simulate.physics", "bloch") != "bloch":
        raise UserError(f"--dynamical asks for Bloch waves, but simulate.physics is {given['simulate.physics']!r}")
    return Config.from_flat(given).simulate


def _simulate(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    def call(options: argparse.Namespace) -> None:
        settings = _simulate_config(options)
        shape = _pair(options.scan, "--scan") if options.scan else None
        from stemtune.data import simulate

        how: dict[str, Any] = {"seed": options.seed, "device": options.device, "restart": options.restart}
        if shape:
            simulate.simulate_polycrystal(options.cif, options.out, shape, options.grains, settings, **how)
        else:
            simulate.simulate_store(
                options.cif, options.out, options.patterns, settings, workers=options.workers, **how
            )
        from stemtune.maps.inspect import describe

        print(describe(options.out))

    parser = _command(
        commands,
        "simulate",
        "simulated patterns with exact orientations; after an interrupt the same command goes on",
        "stemtune simulate linio2 --out linio2.h5 --patterns 20000 --dynamical --thickness 20:80 --precession 0.5",
        call,
    )
    parser.add_argument(
        "cif",
        metavar="CIF",
        help="the phase: a CIF file, or `linio2`, which ships with stemtune; atoms without displacement parameters"
        " (Debye-Waller factors) get a mean square of 0.005 Å²",
    )
    parser.add_argument("--out", required=True, metavar="STORE", help="the store to write")
    parser.add_argument("--patterns", type=_positive, default=10_000, metavar="N", help="how many; default 10000")
    parser.add_argument("--scan", metavar="NY,NX", help="instead a scan of a polycrystal with known truth")
    parser.add_argument("--grains", type=_positive, default=12, metavar="N", help="grains of --scan; default 12")
    parser.add_argument("--seed", type=_seed, default=0, help="same seed, same patterns; default 0")
    parser.add_argument("--workers", type=_positive, default=1, metavar="N", help="processes on a CPU; default 1")
    parser.add_argument("--dynamical", action="store_true", help="Bloch waves; the same as --physics bloch")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to simulate; default auto, a GPU if there is one (its random numbers are its own)",
    )
    parser.add_argument(
        "--restart", action="store_true", help="begin anew instead of going on with the unfinished STORE.part"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting simulate.*")
    _simulate_options(parser)


def _scan_options(parser: _Parser) -> None:
    group = parser.add_argument_group("the scan's calibration, where the file does not say")
    group.add_argument("--kv", type=float, help="acceleration voltage in kV")
    group.add_argument("--scale", type=float, help="1/Å per pixel of the file")
    group.add_argument("--centre", default="auto", metavar="Y,X", help="direct beam in pixels; default auto")
    group.add_argument("--shape", metavar="NY,NX", help="scan shape of a file that is only a stack of frames")
    group.add_argument("--size", type=_positive, help="resample the patterns to this size")
    group.add_argument("--keep", metavar="0:NY,0:NX", help="the part of the scan to keep")


def _scan_arguments(options: argparse.Namespace) -> dict[str, Any]:
    return {key: getattr(options, key) for key in ("kv", "scale", "centre", "shape", "size", "keep")}


def _ingest(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    def call(options: argparse.Namespace) -> None:
        from stemtune.data.ingest import ingest
        from stemtune.maps.inspect import describe

        ingest(options.scan, options.out, **_scan_arguments(options))
        print(describe(options.out))

    parser = _command(
        commands,
        "ingest",
        "a measured scan, calibrated and centred, into a store",
        "stemtune ingest scan.hspy --out scan.h5 --kv 300",
        call,
    )
    parser.add_argument("scan", metavar="SCAN", help="a file that rosettasciio reads")
    parser.add_argument("--out", required=True, metavar="STORE", help="the store to write")
    _scan_options(parser)


def _inspect(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    def call(options: argparse.Namespace) -> None:
        from stemtune.maps import inspect

        print(inspect.describe(options.path))
        if options.png:
            inspect.contact_sheet(options.path, options.png)
            print(f"contact sheet: {options.png}")

    parser = _command(
        commands,
        "inspect",
        "what a scan, store, map, model or search space holds",
        "stemtune inspect scan.h5 --png scan.png",
        call,
    )
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("--png", metavar="FILE", help="draw a contact sheet of patterns")


def _train(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    def call(options: argparse.Namespace) -> None:
        settings = parse_assignments(options.set)
        if options.store:
            settings["data.store"] = str(Path(options.store).expanduser().absolute())
        if options.workers:
            settings["train.workers"] = options.workers
        config = Config.from_flat(settings)
        from stemtune.learning.train import train

        train(config, options.out, config.train.workers)

    parser = _command(
        commands,
        "train",
        "one training run, the same code as a trial of the search",
        "stemtune train --store linio2.h5 --set model.name=cnn --set train.epochs=10 --out model",
        call,
    )
    parser.add_argument("--store", metavar="STORE", help="training store; leave out with --set data.source=simulate")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting of a trial")
    parser.add_argument("--workers", type=_positive, metavar="N", help="data-parallel processes")
    parser.add_argument("--out", required=True, metavar="MODEL", help="the model folder to write")


def _sweep(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    def call(options: argparse.Namespace) -> None:
        from stemtune.sweep import main as sweep

        raise SystemExit(sweep(options.arguments))

    parser = _command(
        commands,
        "sweep",
        "the search over a space, as python stemtune/sweep.py does it",
        "stemtune sweep search_spaces/smoke.yaml --local --trials 8 --name first",
        call,
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="SPACE.yaml [OPTION ...]")
    parser.prefix_chars = "\0"  # options, --help too, belong to sweep.py's own parser


def _check(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    def call(options: argparse.Namespace) -> None:
        from stemtune.tune.describe import check

        print(check(options.spaces))

    parser = _command(
        commands,
        "check",
        "validates search spaces, samples each, prints what would run",
        "stemtune check search_spaces/*.yaml",
        call,
    )
    parser.add_argument("spaces", nargs="+", metavar="SPACE.yaml")


def _compare(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    def call(options: argparse.Namespace) -> None:
        from stemtune.tune.report import compare

        print(compare(options.name, png=options.png, json=options.json))

    parser = _command(
        commands,
        "compare",
        "leaderboard, architectures side by side, importances, cost",
        "stemtune compare first --png first.png --json first.json",
        call,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the sweep; default the newest")
    parser.add_argument("--png", metavar="FILE")
    parser.add_argument("--json", metavar="FILE")


def _predict(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
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
            **_scan_arguments(options),
        )
        print(
            f"{summary['patterns']:,} patterns, {summary['indexed_fraction']:.1%} of them indexed, at"
            f" {summary['patterns_per_second']:,.0f} patterns/s; figures in {Path(options.out) / 'summary.json'}"
        )
        if options.overlay:
            from stemtune.maps.overlay import overlay_positions

            picture = overlay_positions(options.out, [_pair(text, "--overlay") for text in options.overlay])
            print(f"overlay: {picture}")

    parser = _command(
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
    parser.add_argument("--batch", type=_positive, default=256, metavar="N", help="patterns at a time; default 256")
    parser.add_argument("--overlay", nargs="+", metavar="Y,X", help="draw predicted spots on these measured patterns")
    _scan_options(parser)


def _evaluate(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    def call(options: argparse.Namespace) -> None:
        from stemtune.maps.evaluate import evaluate, in_words

        print(in_words(evaluate(options.map, options.truth, json=options.json, png=options.png)))

    parser = _command(
        commands,
        "evaluate",
        "a map against the truth: disorientation, pseudo-symmetry confusion, calibration of the confidence",
        "stemtune evaluate map/map.h5 --truth scan.h5 --json figures.json",
        call,
    )
    parser.add_argument("map", metavar="MAP.h5")
    parser.add_argument("--truth", required=True, metavar="STORE|MAP.h5|.ang")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    parser.add_argument("--png", metavar="FILE", help="draw the reliability of the confidence")


def _bench(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    def call(options: argparse.Namespace) -> None:
        speeds = [name for name in options.name if name != bench.ACCURACY]
        if speeds or not options.name:
            bench.run(speeds)
        if bench.ACCURACY in options.name:
            bench.run_accuracy(options)

    parser = _command(
        commands,
        "bench",
        "the figures of the README: speeds, each beside its peer or its limit, and accuracy",
        "stemtune bench accuracy --model model --json accuracy.json",
        call,
    )
    parser.add_argument(
        "name",
        nargs="*",
        metavar="NAME",
        help="simulate, bloch, loading, matched, train, predict, refine (default all), or accuracy",
    )
    bench.add_accuracy_options(parser, _positive)


def _demo(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    def call(options: argparse.Namespace) -> None:
        from stemtune.demo import run

        run(Path(options.out), main)

    parser = _command(
        commands,
        "demo",
        "simulate, sweep, compare, predict and map on a simulated LiNiO2 polycrystal",
        "stemtune demo --out demo",
        call,
    )
    parser.add_argument("--out", default="demo", metavar="DIR", help="folder for everything it makes; default demo")


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number of at least 0")
    return int(text)


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number of at least 1")
    return number


def _pair(text: str, option: str) -> tuple[int, int]:
    try:
        first, second = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} {text}: write two whole numbers, 23,18 for instance") from None
    return first, second


if __name__ == "__main__":
    sys.exit(main())
