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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

from stemtune._version import __version__
from stemtune.cli import data, learning, maps, measure
from stemtune.cli.parsing import Parser
from stemtune.errors import UserError, fault_line

INTERRUPTED = 130
NOTHING_LEFT = "interrupted; nothing half-written was left under a final name"
_AGAIN_S = 0.05  # how long a signal waits before it is looked at again
_STARTS = (threading.Thread.start.__code__, ThreadPoolExecutor.submit.__code__)

COMMANDS = (
    data.simulate,
    data.ingest,
    data.label,
    data.inspect,
    learning.train,
    learning.sweep,
    learning.check,
    learning.compare,
    learning.promote,
    learning.champions,
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

    0 done; 2 the user's mistake; 1 an internal error; 130 interrupted by Ctrl-C (SIGINT), 143 by SIGTERM, 129 by SIGHUP
    (the terminal is gone): all leave nothing half-written and say how to go on.
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
    """Answer SIGTERM and SIGHUP in the block as Ctrl-C is answered; yield a list that holds the signal once it came.

    While a module is imported, a CIF read or a thread started, both wait until that is done: extension modules and
    PyCifRW (a bare `except`) swallow a KeyboardInterrupt, and the command would go on; a thread that its pool does not
    know of yet never ends, nor would the process. A process that was forked from this one, and any other thread than
    the main one, keep the usual answers.
    """
    received: list[int] = []
    terminals = [number for number in (0, 1, 2) if os.isatty(number)]
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    here = os.getpid()

    def answer(number: int, frame: FrameType | None) -> None:
        if os.getpid() != here:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if _delicate(frame):
            signal.signal(signal.SIGALRM, lambda _, frame: answer(number, frame))
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
            return
        if number == signal.SIGHUP:  # it may come twice; and what is said from now on would fail with the terminal gone
            signal.signal(number, signal.SIG_IGN)
            with Path(os.devnull).open("r+") as nothing:
                for terminal in terminals:
                    os.dup2(nothing.fileno(), terminal)
        if number != signal.SIGINT:
            received.append(number)
            interrupt = signal.getsignal(signal.SIGINT)  # Ray Tune's own while a sweep runs
            if callable(interrupt) and interrupt is not answer:
                interrupt(signal.SIGINT, frame)
                return
        raise KeyboardInterrupt

    answered = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in (*answered, signal.SIGALRM)}
    for number in answered:
        if before[number] is not signal.SIG_IGN:  # as SIGINT is in the background of a script, and SIGHUP by nohup
            signal.signal(number, answer)
    try:
        yield received
    finally:
        if signal.getsignal(signal.SIGALRM) is not before[signal.SIGALRM]:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            # After SIGTERM or SIGHUP the process ends; what follows, from Ray perhaps, must not change how.
            if handler is not None:  # not one that C code set
                signal.signal(number, signal.SIG_IGN if received and number != signal.SIGALRM else handler)


def _delicate(frame: FrameType | None) -> bool:
    """Whether the command is importing a module, reading a CIF or starting a thread."""
    while frame is not None and frame.f_code is not main.__code__:
        file = frame.f_code.co_filename
        if file.startswith("<frozen importlib") or "/CifFile/" in file or frame.f_code in _STARTS:
            return True
        frame = frame.f_back
    return False


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
