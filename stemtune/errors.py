"""The user's mistakes, as one sentence each.

Anything a user can cause and put right is raised as a `UserError`; the command line prints its sentence on stderr
and exits with 2. Every other exception is an internal error and exits with 1.
"""

from __future__ import annotations

import difflib
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from pathlib import Path

_SHOWN = 160  # characters of a fault's own message; the log has all of it
_LOGIN = re.compile(r"(\w[\w+.-]*://)[^\s'\"<>]*@")
_SECRET = re.compile(r"((?:^|[?&\s])\w*(?:password|passwd|pwd|token|secret)=)[^&\s'\"]+", re.IGNORECASE)


class UserError(Exception):
    """A mistake or unusable input: the message names the value, the place and the remedy in one line."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during work that can be resumed: the message says in one line what was kept and how to go on."""


def masked(text: str) -> str:
    """Return `text` with `...` for the name and password in every address, and for passwords and tokens in queries."""
    return _SECRET.sub(r"\1...", _LOGIN.sub(r"\1...@", text))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest known word, or an empty string when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def is_out_of_memory(problem: BaseException) -> bool:
    """Tell whether a GPU or the machine had not enough memory, by what torch and the system say then."""
    kind = isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError"
    return kind or any(words in str(problem) for words in ("out of memory", "allocate memory"))


def fault_line(fault: Exception) -> str:
    """Write the traceback of the exception in hand to a log file; return one line that names the fault and the log.

    The log goes to the working folder, or to the folder for temporary files where that cannot be written.
    """
    name = f"stemtune-fault-{time.strftime('%Y%m%d-%H%M%S')}.log"
    text = masked(f"{' '.join(sys.argv)}\n\n{''.join(traceback.format_exception(fault))}")
    place = "which could not be written"
    for folder in (Path.cwd(), Path(tempfile.gettempdir())):
        try:
            (folder / name).write_text(text)
        except OSError:
            continue
        place = str(folder / name)
        break
    lines = masked(str(fault)).strip().splitlines()
    reason = f"{type(fault).__name__}: {lines[0][:_SHOWN]}" if lines else type(fault).__name__
    return f"internal error ({reason}); the traceback is in the log {place}"
