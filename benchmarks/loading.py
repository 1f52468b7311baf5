"""`python -m benchmarks loading`: batches per second out of a store, and the memory of its readers."""

from __future__ import annotations

import math
import multiprocessing
import os
import queue
import re
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import Figures, linio2_store
from stemtune.crystal.phase import linio2
from stemtune.dataset.loaders import StoreLoader
from stemtune.dataset.store import Store
from stemtune.errors import UserError

_MIB = 2**20
_LARGEST = 2**30  # bytes of patterns that are also held in memory for the comparison
_PATIENCE = 300.0  # seconds that processes wait for each other


def run(folder: Path) -> Figures:
    """Measure both on a store of 512 MiB."""
    store = linio2_store(folder, 16384)
    return loading_throughput(store) | sharing(store)


def loading_throughput(store: str | os.PathLike[str], batch_size: int = 64, rounds: int = 15) -> dict[str, float]:
    """Measure shuffled batches out of a store against the same batches out of an array in memory, in the same run.

    Both loaders are the training loader and differ only in where `take` finds the patterns. Epochs alternate
    between the two and the medians are compared, so that a busy machine slows both.

    Parameters
    ----------
    store
        Path of the store; at most 1 GiB of its patterns are used.
    batch_size
        Patterns per batch.
    rounds
        Epochs of each.

    Returns
    -------
    figures
        `patterns`, `store_mib`; `mapped_patterns_per_s` and `memory_patterns_per_s`, medians with a warm page cache;
        `ratio`, the median over the rounds of one by the other, and `cpu_ratio`, the same of patterns per second of
        processor time, which other work on the machine disturbs less; `cold_patterns_per_s`, the first epoch after
        the file was dropped from the page cache.
    """
    with Store.open(store) as opened:
        if not opened.is_mapped:
            raise UserError(f"'{opened.path}' is stored in chunks, so it cannot be mapped; write it again by stemtune")
        pattern_bytes = opened.patterns.nbytes // opened.n
        rows = np.arange(min(opened.n, _LARGEST // pattern_bytes))
        if len(rows) < batch_size:
            raise UserError(f"'{opened.path}' holds {len(rows)} patterns, fewer than one batch of {batch_size}")
        descriptor = os.open(opened.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        mapped = StoreLoader(opened, rows, batch_size, linio2())
        cold, _ = _speed(mapped, 0)
        in_memory = np.array(opened.patterns[rows])
        memory = StoreLoader(opened, rows, batch_size, linio2())
        memory.take = lambda chosen: np.take(in_memory, chosen, axis=0)
        _speed(memory, 0)
        speeds = []
        for number in range(1, rounds + 1):
            order = (mapped, memory) if number % 2 else (memory, mapped)
            speed = {id(loader): _speed(loader, number) for loader in order}
            speeds.append((*speed[id(mapped)], *speed[id(memory)]))
    return {
        "patterns": len(rows),
        "store_mib": len(rows) * pattern_bytes / _MIB,
        "mapped_patterns_per_s": statistics.median(rate[0] for rate in speeds),
        "memory_patterns_per_s": statistics.median(rate[2] for rate in speeds),
        "ratio": statistics.median(rate[0] / rate[2] for rate in speeds),
        "cpu_ratio": statistics.median(rate[1] / rate[3] for rate in speeds),
        "cold_patterns_per_s": cold,
    }


def sharing(store: str | os.PathLike[str], processes: int = 4) -> dict[str, float]:
    """Measure how many copies of a store several processes hold in memory that each read an epoch of it, shuffled.

    The kernel keeps account: a page that four processes map counts to each of them in full in the resident size
    (RSS) and with a quarter in the proportional size (PSS), so the sum of the PSS is the memory really used.

    Returns
    -------
    figures
        `processes`, `store_mib`, `resident_mib_each` (mean RSS of the mapped file), `proportional_mib_total` (sum of
        PSS), `copies` (that sum by the mean RSS: 1 is one shared copy, `processes` is none shared) and
        `private_mib_each` (memory of its own that a process took in while it read).
    """
    path = str(Path(store).expanduser().resolve())
    with Store.open(path) as opened:
        store_mib = opened.n * opened.size**2 * opened.patterns.dtype.itemsize / _MIB
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(processes), context.Queue()
    started = [context.Process(target=_read_epoch, args=(path, seed, barrier, answers)) for seed in range(processes)]
    try:
        for process in started:
            process.start()
        found = _collect(started, answers)
    finally:
        for process in started:
            process.kill()
    resident = statistics.mean(entry["Rss"] for entry in found)
    proportional = math.fsum(entry["Pss"] for entry in found)
    return {
        "processes": processes,
        "store_mib": store_mib,
        "resident_mib_each": resident,
        "proportional_mib_total": proportional,
        "copies": proportional / max(resident, 1e-9),
        "private_mib_each": statistics.mean(entry["private"] for entry in found),
    }


def _collect(started: list[Any], answers: Any) -> list[dict[str, float]]:
    """Return one answer per process, or raise when one of them died or took too long."""
    found: list[dict[str, float]] = []
    end = time.monotonic() + _PATIENCE
    while len(found) < len(started):
        try:
            found.append(answers.get(timeout=1.0))
        except queue.Empty:
            dead = [process.exitcode for process in started if process.exitcode]
            if dead or time.monotonic() > end:
                raise RuntimeError(f"reading processes ended with {dead or 'no answer'}") from None
    for process in started:
        process.join(_PATIENCE)
    return found


def _speed(loader: StoreLoader, epoch: int) -> tuple[float, float]:
    """Return patterns per second, and per second of processor time, over one epoch."""
    wall, processor, count = time.perf_counter(), time.process_time(), 0
    for batch in loader.epoch(epoch):
        count += len(batch.patterns)
    return count / (time.perf_counter() - wall), count / (time.process_time() - processor)


def _read_epoch(path: str, seed: int, barrier: Any, answers: Any) -> None:
    """Read one epoch, wait for the others to have done so too, and answer how much memory that took (MiB)."""
    store = Store.open(path)
    loader = StoreLoader(store, np.arange(store.n), min(64, store.n), linio2(), seed=seed)
    before = _memory(Path("/proc/self/smaps_rollup"), "")["private"]
    for _ in loader.epoch(0):
        pass
    after = _memory(Path("/proc/self/smaps_rollup"), "")["private"]
    barrier.wait(_PATIENCE)
    found = _memory(Path("/proc/self/smaps"), path)
    barrier.wait(_PATIENCE)
    answers.put({**found, "private": after - before})


def _memory(account: Path, mapping: str) -> dict[str, float]:
    """Return Rss, Pss and private (anonymous) MiB of the mappings whose first line ends with `mapping`."""
    total, wanted = {"Rss": 0.0, "Pss": 0.0, "private": 0.0}, False
    for line in account.read_text().splitlines():
        entry = re.match(r"(\w+):\s+(\d+) kB", line)
        if entry is None and re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            wanted = line.endswith(mapping)
        elif entry is not None and wanted:
            name = {"Private_Dirty": "private"}.get(entry[1], entry[1])
            if name in total:
                total[name] += int(entry[2]) / 1024
    return total
