"""Work spread over processes, in order and within bounded memory; workers that leave Ctrl-C to their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any, Protocol

from stemtune.errors import UserError


class Spread(Protocol):
    """Does `work(state, item)` for every item on some workers, where `state` is `prepare(given)`, made once on each.

    All four travel to the workers by pickle, so `prepare` and `work` are functions of a module. Results come in the
    order of the items, and no more are under way than a few per worker: a slow reader holds the workers up instead of
    filling the memory. `processes.over_processes` and `tune.cluster.map_tasks.over_ray` make such functions.
    """

    def __call__(
        self, prepare: Callable[[Any], Any], given: Any, work: Callable[[Any, Any], Any], items: Sequence[Any]
    ) -> Generator[Any]:
        """Yield the results."""
        ...


def over_processes(workers: int) -> Spread:
    """Return what spreads work over `workers` processes of this machine, which share torch's threads.

    Raises
    ------
    UserError
        From the spread itself, when a worker dies.
    """

    def spread(
        prepare: Callable[[Any], Any], given: Any, work: Callable[[Any, Any], Any], items: Sequence[Any]
    ) -> Generator[Any]:
        count = min(workers, len(items))
        if count <= 1:
            state = prepare(given) if items else None
            for item in items:
                yield work(state, item)
            return
        import torch

        threads = max(1, torch.get_num_threads() // count)
        pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _start, (prepare, given, threads))
        waiting: deque[Future[Any]] = deque()
        try:
            for item in items:
                with deaf_to_interrupts():  # a worker may be started here
                    waiting.append(pool.submit(_work, work, item))
                if len(waiting) > 2 * count:  # no more than this waits in memory to be written
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError("a worker process died, perhaps for lack of memory; try fewer --workers") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    return spread


_own: dict[str, Any] = {}
"""What this worker process prepared."""


def _start(prepare: Callable[[Any], Any], given: Any, threads: int) -> None:
    import torch

    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _own["state"] = prepare(given)


def _leave_with_parent() -> None:
    """End this process when its parent is gone, killed perhaps: nobody else would tell it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(work: Callable[[Any, Any], Any], item: Any) -> Any:
    return work(_own["state"], item)


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Let processes that are started in the block never hear SIGINT and SIGTERM; the parent hears them when it ends.

    A terminal sends Ctrl-C to every process of a command, a batch system SIGTERM, and a worker that is still importing
    would answer with a traceback before it gets as far as ignoring the signal. A blocked signal stays blocked in the
    processes started.
    """
    resource_tracker.ensure_running()  # its own start would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
