"""The `stemtune` command: parses and calls, nothing else.

Every heavy import happens inside the function that needs it, so that `stemtune --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from stemtune._version import __version__
from stemtune.cli import data, labels, learning, maps, measure
from stemtune.cli.parsing import Parser
from stemtune.errors import UserError, fault_line

COMMANDS = (
    data.simulate,
    data.ingest,
    labels.label,
    data.inspect,
    learning.train,
    learning.sweep,
    learning.check,
    learning.compare,
    maps.predict,
    maps.watch,
    maps.serve,
    maps.grains,
    maps.clean,
    maps.evaluate,
    maps.export,
    measure.demo,
    measure.study,
)
"""What adds each command to the parser, in the order of the help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 the user's mistake, 1 a fault of ours."""
    try:
        options = _parser().parse_args(argv)
        return options.call(options) or 0
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


def _parser() -> Parser:
    parser = Parser(
        prog="stemtune",
        description="Finds, trains and serves the network that reads crystal orientations out of STEM patterns.",
    )
    parser.add_argument("--version", action="version", version=f"stemtune {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    return parser


__all__ = ["main"]
