"""Work on a CPU shared out in whole chunks, one thread each, rather than operation by operation.

torch shares out every single operation and waits for all threads after each. For the small pieces of one chunk of
patterns that costs more than it gains, and on a busy machine many times more.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

# Options of glibc's mallopt(3), and what they are set to, in bytes.
_MALLOPT = {"M_MMAP_THRESHOLD": (-3, 32 * 2**20), "M_TRIM_THRESHOLD": (-1, 2**30), "M_TOP_PAD": (-2, 16 * 2**20)}


def map_chunks(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return `work` of each of `items`, in their order, on as many threads as torch may use.

    Gradients are not recorded: torch keeps track of them per thread. `work` must not call this function itself.
    """

    _keep_freed_memory()

    def alone(item: Item) -> Result:
        with torch.no_grad():
            return work(item)

    return list(_pool(torch.get_num_threads()).map(alone, items))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return the one pool of so many threads; a pool made and dropped per call can swallow a Ctrl-C as it goes."""
    return ThreadPoolExecutor(threads, thread_name_prefix="chunk", initializer=_set_up)


def _set_up() -> None:
    """Let a thread work alone, and take numbers too small for normal float32 as 0: they cost ten times the time."""
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
    for option, value in _MALLOPT.values():
        mallopt(option, value)
