"""Work on other processes and threads, in order and within bounded memory, and how much memory there is.

Workers leave Ctrl-C to their parent.

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
from contextlib import contextmanager, suppress
from functools import cache
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from stemtune.errors import UserError

if TYPE_CHECKING:
    import torch

_POOL = "chunk"  # what the threads of `map_over_threads` are called
Item = TypeVar("Item")
Result = TypeVar("Result")

_MALLOPT = ((-3, 32 * 2**20), (-1, 2**30), (-2, 16 * 2**20))
"""M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD of glibc's mallopt(3), and what they are set to, in bytes."""
_MEMBERSHIP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


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


def exit_with_parent() -> None:
    """End this process when the one that started it has ended, killed perhaps: nobody else would."""
    if parent := multiprocessing.parent_process():
        threading.Thread(target=lambda: wait([parent.sentinel]) and os._exit(1), daemon=True).start()


_state: dict[str, Any] = {}  # what this worker process prepared


def _start(prepare: Callable[[Any], Any], given: Any, threads: int) -> None:
    import torch

    exit_with_parent()
    torch.set_num_threads(threads)
    _state["state"] = prepare(given)


def _work(work: Callable[[Any, Any], Any], item: Any) -> Any:
    return work(_state["state"], item)


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Let processes that start in the block never receive SIGINT, SIGTERM and SIGHUP; the parent does when it ends.

    A terminal sends Ctrl-C to every process of a command, a batch system SIGTERM, and a worker that is still importing
    would answer with a traceback before it gets as far as ignoring the signal. A blocked signal stays blocked in the
    processes started.
    """
    resource_tracker.ensure_running()  # its own start would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
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
    chunks alone. Gradients are not recorded: torch keeps track of them per thread. What lies on another `device` than
    the CPU is worked on item by item, and so is what `work` itself asks of this function.
    """
    import torch

    if (device is not None and device.type != "cpu") or threading.current_thread().name.startswith(_POOL):
        return [work(item) for item in items]

    _keep_freed_memory()

    def alone(item: Item) -> Result:
        with torch.no_grad():
            return work(item)

    return list(_pool(torch.get_num_threads()).map(alone, items))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return the one pool of so many threads; a pool made and dropped per call can swallow a Ctrl-C as it goes."""
    return ThreadPoolExecutor(threads, thread_name_prefix=_POOL, initializer=_set_up_thread)


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


def memory_bytes() -> int:
    """Return the memory that this process may use: all there is, or what a container or a batch job is limited to."""
    return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *(limit for limit, _ in _limits()), 2**62)


def free_bytes(device: torch.device) -> int:
    """Return the memory that can be had on `device`; where the system does not say, all there is."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = memory_bytes()
    return max(0, min(free, *(limit - used for limit, used in _limits()), 2**62))


def _limits() -> Iterator[tuple[int, int]]:
    """Yield limit and use in bytes of the control groups (of version 1 or 2) of this process, and of those above.

    Containers and Slurm limit memory by them. The page cache that a group may drop does not count as used.
    """
    try:
        groups = [line.split(":", 2) for line in _MEMBERSHIP.read_text().splitlines()]
    except OSError:  # another system
        return
    for _, controllers, place in groups:
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _CGROUPS / "memory" if controllers else _CGROUPS
        limit, usage = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        own = root / place.strip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(root):
                with suppress(OSError, ValueError):  # "max" is no limit
                    bound, used = (int((folder / f"memory.{name}").read_text()) for name in (limit, usage))
                    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    yield bound, used - int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def check_memory(what: str, needed_bytes: float, remedy: str, device: torch.device) -> None:
    """Raise a one-line `UserError` if `what` needs more memory than can be had."""
    free = free_bytes(device)
    if needed_bytes > free:
        gigabyte = 2**30
        raise UserError(
            f"{what} need {needed_bytes / gigabyte:,.1f} GB of memory, but {free / gigabyte:,.1f} GB are free; {remedy}"
        )
