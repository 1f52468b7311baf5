"""The `stemtune` command: parses and calls, nothing else.

Every heavy import happens inside the function that needs it, so that `stemtune --help` answers at once.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

from stemtune._version import __version__
from stemtune.cli import data, learning, maps, measure
from stemtune.cli.parsing import Parser
from stemtune.errors import UserError, fault_line

INTERRUPTED = 130
NOTHING_LEFT = "interrupted; nothing half-written was left under a final name"

COMMANDS = (
    data.simulate,
    data.ingest,
    data.label,
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
    measure.evaluate,
    maps.export,
    measure.demo,
    measure.study,
)
"""What adds each command to the parser, in the order of the help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 done; 2 the user's mistake; 1 an internal error; 130 interrupted by Ctrl-C (SIGINT), 143 by SIGTERM: both leave
    nothing half-written and say how to go on.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log shows what was said when it was said
    with _terminable() as received:
        code = _run(argv)
    return 128 + received[0] if code == INTERRUPTED and received else code


def _run(argv: Sequence[str] | None) -> int:
    try:
        options = _parser().parse_args(argv)
        options.run_command = main  # for commands that consist of others
        return options.call(options) or 0
    except UserError as mistake:
        print(f"stemtune: {mistake}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"stemtune: {str(stop) or NOTHING_LEFT}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, `head` for instance, has seen enough
        return 0
    except Exception as fault:
        print(f"stemtune: {fault_line(fault)}", file=sys.stderr)
        return 1


@contextlib.contextmanager
def _terminable() -> Iterator[list[int]]:
    """Answer SIGTERM in the block as Ctrl-C is answered; yield a list that holds the signal once it came.

    A process that was forked from this one, and any other thread than the main one, keep the usual answer.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    here = os.getpid()

    def answer(number: int, frame: FrameType | None) -> None:
        if os.getpid() != here:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        received.append(number)
        interrupt = signal.getsignal(signal.SIGINT)  # Ray Tune's own while a sweep runs
        if not callable(interrupt):  # ignored, as in the background of a script
            raise KeyboardInterrupt
        interrupt(signal.SIGINT, frame)

    before = signal.signal(signal.SIGTERM, answer)
    try:
        yield received
    finally:
        if received:  # the process ends now; a signal that follows, from Ray for instance, must not change how
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN if received else before)


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
