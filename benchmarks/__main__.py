"""`python -m benchmarks NAME`: measure one figure, or all speeds without a name."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import benchmarks
from benchmarks import sweeping
from stemtune.cli.parsing import Parser, positive
from stemtune.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what `argv` names and return the exit code: 0 done, 2 the user's mistake."""
    try:
        options = _parser().parse_args(argv)
        _run(options)
    except UserError as mistake:
        print(f"benchmarks: {mistake}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    by_name = {
        benchmarks.ACCURACY: benchmarks.run_accuracy,
        benchmarks.LABEL: benchmarks.run_label,
        sweeping.SWEEP: sweeping.run,
    }
    speeds = [name for name in options.name if name not in by_name]
    if speeds or not options.name:
        benchmarks.run(speeds, None if options.no_peers else options.peer_python)
    for name, run in by_name.items():
        if name in options.name:
            run(options)


def _parser() -> Parser:
    """Return the parser of the benchmarks' command line."""
    made = Parser(
        prog="python -m benchmarks",
        description="The figures of docs/measurements.md: speeds, each beside its peer or its limit, and accuracy.",
        epilog="example: python -m benchmarks accuracy --model model --json accuracy.json",
    )
    made.add_argument(
        "name",
        nargs="*",
        type=benchmarks.known,
        metavar="NAME",
        help=f"{', '.join(benchmarks.NAMES)}; default all speeds",
    )
    benchmarks.add_accuracy_options(made, positive)
    sweeping.add_options(made, positive)
    return made


if __name__ == "__main__":
    sys.exit(main())
