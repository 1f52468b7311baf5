"""`python -m benchmarks NAME`: measure one figure, or all speeds without a name."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import benchmarks
from stemtune.cli.parsing import Parser, finite, positive
from stemtune.errors import UserError, did_you_mean

Options = TypeVar("Options")

_SPEEDS = {
    "simulate": ("kinematic patterns per second, beside diffsims", "simulation.kinematic"),
    "beams": ("patterns drawn from a store of beams per second, beside kinematic ones", "simulation.beams"),
    "bloch": ("Bloch waves per second, 100 beams and four thicknesses, beside py4DSTEM", "simulation.bloch"),
    "loading": ("shuffled batches from a store beside an array in memory; one copy for four readers", "loading.run"),
    "ingest": ("a scan into a store, beside copying or unpacking the same bytes (MiB/s of patterns)", "ingest.run"),
    "matched": ("patterns per second of the matched filter at 2 degrees", "training.matched"),
    "train": ("the training loop beside the plain forward, backward and step", "training.run"),
    "spread": ("prediction over a Ray of this machine, beside as many processes and beside one", "prediction.spread"),
    "predict": ("prediction from file to candidates, beside the forward pass alone and beside pyxem", "prediction.run"),
    "map": ("grains, KAM, GROD and boundaries of a map of 1,000 x 1,000 pixels", "maps.grains"),
    "refine": ("the physical fit of matched's candidates, alone and from the file on", "maps.refinement"),
}
"""What is measured under each name, and the function that does it."""

NAMES = (*_SPEEDS, "accuracy", "label", "sweep", "curves", "search")
"""What can be measured; those that are no speeds take minutes to hours and are run by name only."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what `argv` names and return the exit code: 0 done, 2 the user's mistake."""
    try:
        options = _parser().parse_args(argv)
        names = options.name or list(_SPEEDS)
        if options.json and len(names) > 1 and not set(names) <= set(_SPEEDS):
            raise UserError("with --json, what is no speed is measured alone")
        measured: dict[str, Any] = {}
        for name in names:
            if name not in _SPEEDS:
                _run(name, options)
                continue
            measured[name] = _speed(name, options)
            if options.json:
                found = measured if len(names) > 1 else measured[name]
                Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except UserError as mistake:
        print(f"benchmarks: {mistake}", file=sys.stderr)
        return 2
    return 0


def _speed(name: str, options: argparse.Namespace) -> dict[str, float]:
    about, place = _SPEEDS[name]
    module, function = place.split(".")
    print(f"{name}: {about}", flush=True)
    measure = getattr(importlib.import_module(f"benchmarks.{module}"), function)
    with tempfile.TemporaryDirectory(prefix="stemtune-bench-") as folder:
        if options.store:
            benchmarks.linio2_store(Path(folder), options.store)
        more = {"pythons": options.peer_pythons if options.peers else None} if name == "predict" else {}
        figures = dict(measure(Path(folder), **more))
    benchmarks.report(figures)
    return figures


def _run(name: str, options: argparse.Namespace) -> None:
    benchmark: Any = importlib.import_module(f"benchmarks.{'labelling' if name == 'label' else name}")
    benchmark.run(_chosen(benchmark.Options, options))


def _chosen(kind: type[Options], options: argparse.Namespace) -> Options:
    """Return the options that one benchmark has."""
    given = {item.name: getattr(options, item.name) for item in fields(kind) if hasattr(options, item.name)}  # type: ignore[arg-type]
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def _known(name: str) -> str:
    if name not in NAMES:
        raise UserError(f"no benchmark is called '{name}'{did_you_mean(name, NAMES)}; there are {', '.join(NAMES)}")
    return name


def _parser() -> Parser:
    """Return the parser of the benchmarks' command line."""
    made = Parser(
        prog="python -m benchmarks",
        description="The figures of docs/measurements.md: speeds, each beside its peer or its limit, and accuracy.",
        epilog="example: python -m benchmarks accuracy --model model --json accuracy.json",
    )
    made.add_argument("name", nargs="*", type=_known, metavar="NAME", help=f"{', '.join(NAMES)}; default all speeds")
    made.add_argument("--json", metavar="FILE", help="write the figures there")
    made.add_argument("--store", type=positive, metavar="N", help="measure speeds on N patterns only, to try them")
    _add_accuracy_options(made)
    group = made.add_argument_group(
        "sweep: real trials on the slots of this machine, their makespan beside their training alone"
    )
    group.add_argument("--trials", type=positive, default=16, metavar="N", help="default 16")
    group.add_argument("--seconds", type=positive, default=60, metavar="S", help="training of a trial; default 60")
    group.add_argument("--slots", type=positive, default=2, metavar="N", help="trials at a time; default 2")
    group.add_argument("--keep", metavar="DIR", help="keep the sweeps and their records there")
    group = made.add_argument_group("curves: networks from random weights on a store of beams, into --out; resumes")
    group.add_argument("--beams", metavar="FILE", default="beams.h5", help="the store of beams; default beams.h5")
    group.add_argument("--network", action="append", default=[], dest="networks", metavar="NAME", help="default all")
    group.add_argument("--minutes", type=finite, default=60.0, metavar="M", help="of each network; default 60")
    group.add_argument(
        "--seen", type=positive, default=2_000_000, metavar="N", help="patterns of each; default 2000000"
    )
    group.add_argument("--workers", type=positive, default=2, metavar="N", help="processes; default 2")
    group = made.add_argument_group("search: a sweep's searcher and scheduler replayed on recorded learning curves")
    group.add_argument("--table", metavar="FILE", default="search_table.jsonl.gz", help="default search_table.jsonl.gz")
    group.add_argument("--replays", type=positive, default=100, metavar="N", help="searches of each way; default 100")
    group.add_argument("--way", action="append", default=[], dest="ways", metavar="WAY", help="default all four")
    group.add_argument("--record", metavar="SPACE", help="record the table instead, on --beams; resumes")
    group.add_argument("--settings", type=positive, default=200, metavar="N", help="that are recorded; default 200")
    group.add_argument("--seeds", type=positive, default=2, metavar="N", help="trainings of each; default 2")
    return made


def _add_accuracy_options(parser: argparse.ArgumentParser) -> None:
    """Add what `accuracy` and `label` can be asked for."""
    group = parser.add_argument_group(
        "accuracy: LiNiO2 patterns of Bloch waves, read by models and other programs; label: template matching beside"
        " pyxem, one crystal per Laue class (minutes; only by name)"
    )
    add = group.add_argument
    add("--patterns", type=positive, default=200, metavar="N", help="patterns of a set; default 200")
    add("--seed", type=positive, default=2024, help="of the test set; default 2024")
    add(
        "--model",
        action="append",
        default=[],
        dest="models",
        metavar="MODEL",
        help="a model to measure, repeatable; default matched and what ships",
    )
    add("--refine", action="store_true", help="measure every model refined as well")
    add(
        "--peer-python",
        action="append",
        default=[],
        dest="peer_pythons",
        metavar="PATH",
        help="a Python that has pyxem or py4DSTEM, repeatable; default this one; predict asks pyxem as well",
    )
    add("--no-peers", action="store_false", dest="peers", help="leave pyxem and py4DSTEM out")
    add(
        "--full",
        action="store_true",
        help="pyxem and py4DSTEM on every set (hours), not only on those of py4DSTEM's Bloch waves: pyxem with ideal"
        " calibration and with the worst, py4DSTEM at 3,000 electrons and ideal calibration",
    )
    add("--out", default=argparse.SUPPRESS, metavar="DIR", help="folder of the test set; default accuracy")
    add("--laue", action="append", default=[], dest="classes", metavar="CLASS", help="label: repeatable; default five")


if __name__ == "__main__":
    sys.exit(main())
