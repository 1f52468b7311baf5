"""Whether there is memory enough for what is about to be computed: asked first, answered with the remedy."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from stemtune.errors import UserError


def free_bytes(device: torch.device) -> int:
    """Return the memory that can be had on `device`; where the system does not say, all there is."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(what: str, needed_bytes: float, remedy: str, device: torch.device) -> None:
    """Raise a one-line `UserError` if `what` needs more memory than can be had."""
    free = free_bytes(device)
    if needed_bytes > free:
        gigabyte = 2**30
        raise UserError(
            f"{what} need {needed_bytes / gigabyte:,.1f} GB of memory, but {free / gigabyte:,.1f} GB are free; {remedy}"
        )
