"""How far long work is: a bar in a terminal; elsewhere, in the log of a batch job for instance, plain lines.

A plain line reads `12:03:44  simulate  1,200/20,000 patterns  85.3/s  3 min 41 s left`. There is one every
`STEMTUNE_PROGRESS_S` seconds (an environment variable; 30 by default), and one when the work ends; work of less than
a second says nothing.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeVar

Item = TypeVar("Item")

EVERY_S = 30.0
BRIEF_S = 1.0


def say(line: str, file: TextIO | None = None) -> None:
    """Write a line to stderr, or to `file`, above the bar if there is one; it is never held back in a buffer."""
    file = file or sys.stderr
    if sys.stderr.isatty():
        _tqdm().write(line, file=file)
    else:
        print(line, file=file)
    file.flush()


@functools.cache
def _tqdm() -> Any:
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own lock between processes would outlive a worker that is ended
    return tqdm


class Progress:
    """Shows how much of `total` is done, at which rate, and the time left.

    Parameters
    ----------
    total
        What there is to do.
    stage
        What is being done, in a word.
    unit
        What is counted, in the singular.
    done
        What was done before, by an interrupted run for instance.
    shown
        Whether to show anything.
    """

    def __init__(self, total: int, stage: str, unit: str, done: int = 0, shown: bool = True) -> None:
        self.total, self.stage, self.unit, self.done = total, stage, unit, done
        self._before, self._began, self._note = done, time.monotonic(), ""
        self._bar: Any = None
        self._every = _interval_s()
        self._over = threading.Event()
        if shown and sys.stderr.isatty():
            self._bar = _tqdm()(total=total, initial=done, desc=stage, unit=unit, leave=False)
        self._plain = shown and self._bar is None
        if self._plain:
            threading.Thread(target=self._report, name="progress", daemon=True).start()

    @property
    def in_terminal(self) -> bool:
        """Whether a bar is shown, which one line for each step would push away."""
        return self._bar is not None

    def update(self, count: int = 1) -> None:
        """Count what was done since the last call."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)

    def note(self, text: str) -> None:
        """Show `text` behind the figures from now on."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text)

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield `items`, each counted when the next one is asked for."""
        for item in items:
            yield item
            self.update()

    def close(self, finished: bool = True) -> None:
        """End the work; a plain line says so if it `finished`."""
        if self._bar is not None:
            self._bar.close()
        took = time.monotonic() - self._began
        if self._plain and finished and not self._over.is_set() and took >= min(BRIEF_S, self._every):
            self._print(f"done in {duration(took)}")
        self._over.set()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close(kind is None)

    def _report(self) -> None:
        while not self._over.wait(self._every):
            rate = self._rate()
            left = self.total - self.done
            self._print(f"{duration(left / rate)} left" if rate and left >= 0 else "time left unknown")

    def _rate(self) -> float:
        return (self.done - self._before) / max(time.monotonic() - self._began, 1e-6)

    def _print(self, tail: str) -> None:
        figures = f"{self.done:,}/{self.total:,} {self.unit}{'' if self.total == 1 else 's'}"
        parts = [time.strftime("%H:%M:%S"), self.stage, figures, f"{self._rate():,.3g}/s", tail, self._note]
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)


def _interval_s() -> float:
    """Return the seconds between two lines; what is no positive number counts as not set."""
    try:
        wanted = float(os.environ.get("STEMTUNE_PROGRESS_S", ""))
    except ValueError:
        return EVERY_S
    return wanted if 0 < wanted < threading.TIMEOUT_MAX else EVERY_S


def duration(seconds: float) -> str:
    """Write a time in two units: `1 h 20 min`, `3 min 41 s`, `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
