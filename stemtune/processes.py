"""Worker processes that leave Ctrl-C to their parent, from their first instruction on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Let processes that are started in the block never hear SIGINT; the parent hears it when the block ends.

    A terminal sends Ctrl-C to every process of a command, and a worker that is still importing would answer with a
    traceback before it gets as far as ignoring the signal. A blocked signal stays blocked in the processes started.
    """
    resource_tracker.ensure_running()  # its own start would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
