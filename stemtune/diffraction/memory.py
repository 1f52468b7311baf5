"""Whether there is memory enough for what is about to be computed: asked first, answered with the remedy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from stemtune.errors import UserError

_MEMBERSHIP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def memory_bytes() -> int:
    """Return the memory that this process may use: all there is, or what a container or a batch job is limited to."""
    return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *(limit for limit, _ in _limits()), 2**62)


def free_bytes(device: torch.device) -> int:
    """Return the memory that can be had on `device`; where the system does not say, all there is."""
    if device.type == "cuda":
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
