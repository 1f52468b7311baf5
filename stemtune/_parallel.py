"""Work on other processes and threads, in order and within bounded memory; workers leave Ctrl-C to their parent.

torch is imported inside functions, because the command line imports this module before it knows what is asked for.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from stemtune.errors import UserError

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_MALLOPT = ((-3, 32 * 2**20), (-1, 2**30), (-2, 16 * 2**20))
"""M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD of glibc's mallopt(3), and what they are set to, in bytes."""


class Spread(Protocol):
    """Does `work(state, item)` for every item on some workers, where `state` is `prepare(given)`, made once on each.

    All four travel to the workers by pickle, so `prepare` and `work` are functions of a module. Results come in the
    order of the items, and no more are under way than a few per worker: a slow reader holds the workers up instead of
    filling the memory. `map_over_processes` and `tune.cluster.map_tasks.over_ray` make such functions.
    """

    def __call__(
        self, prepare: Callable[[Any], Any], given: Any, work: Callable[[Any, Any], Any], items: Sequence[Any]
    ) -> Generator[Any]:
        """Yield the results."""
        ...


def prefetch(items: Iterable[Item], depth: int = 2) -> Generator[Item]:
    """Yield `items`, which one other thread makes up to `depth` ahead of their use."""
    source, end = iter(items), object()
    executor = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    waiting: deque[Future[Any]] = deque(executor.submit(next, source, end) for _ in range(depth))
    try:
        while (item := waiting.popleft().result()) is not end:
            waiting.append(executor.submit(next, source, end))
            yield item
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def map_over_processes(workers: int) -> Spread:
    """Return what spreads work over `workers` processes of this machine, which share torch's threads.

    The spread raises a `UserError` when a worker dies.
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
                with interrupts_blocked():  # a worker may be started here
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


_state: dict[str, Any] = {}  # what this worker process prepared


def _start(prepare: Callable[[Any], Any], given: Any, threads: int) -> None:
    import torch

    def exit_with_parent() -> None:  # which was killed perhaps: nobody else would end this process
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _state["state"] = prepare(given)


def _work(work: Callable[[Any, Any], Any], item: Any) -> Any:
    return work(_state["state"], item)


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Let processes that are started in the block never receive SIGINT and SIGTERM; the parent does when it ends.

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


def map_over_threads(
    work: Callable[[Item], Result], items: Sequence[Item], device: torch.device | None = None
) -> list[Result]:
    """Return `work` of each of `items`, in their order, on as many threads as torch may use.

    torch shares out every single operation and waits for all threads after each, which costs more than it gains for
    the small pieces of one chunk of patterns, and many times more on a busy machine. Here a thread works on whole
    chunks alone. Gradients are not recorded: torch keeps track of them per thread. `work` must not call this function.
    What lies on another `device` than the CPU is worked on item by item.
    """
    import torch

    if device is not None and device.type != "cpu":
        return [work(item) for item in items]

    _keep_freed_memory()

    def alone(item: Item) -> Result:
        with torch.no_grad():
            return work(item)

    return list(_pool(torch.get_num_threads()).map(alone, items))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return the one pool of so many threads; a pool made and dropped per call can swallow a Ctrl-C as it goes."""
    return ThreadPoolExecutor(threads, thread_name_prefix="chunk", initializer=_set_up_thread)


def _set_up_thread() -> None:
    """Let a thread work alone, and take numbers too small for normal float32 as 0: they cost ten times the time."""
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


@cache
def _keep_freed_memory() -> None:
    """Let glibc keep what one chunk frees for the next: the kernel clears every page it gets back and forth.

    Simulation runs at 1.4 to 2 times the speed with it. Other C libraries have no such options and need none.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    for option, value in _MALLOPT:
        mallopt(option, value)
