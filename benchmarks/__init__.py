"""How fast and how accurate stemtune is, each figure measured beside its peer or its limit in one run.

Machines are shared and noisy: the ratio of two figures of one run can be trusted, a single figure less. One module for
each benchmark; `python -m benchmarks NAME` runs it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

Figures = Mapping[str, object]

MODELS: dict[str, dict[str, object]] = {
    "cnn": {"model.name": "cnn", "model.input_size": 64},
    "polar": {"model.name": "polar"},
}
"""The settings whose training and prediction are measured: models of the size that two cores can train."""


def linio2_store(folder: Path, patterns: int = 4096) -> Path:
    """Return a store of simulated LiNiO2 patterns in `folder`, made if it is not there."""
    from stemtune.config import SimulateConfig
    from stemtune.dataset.simulate import simulate_store

    path = folder / "linio2.h5"
    if not path.exists():
        simulate_store("linio2", path, patterns, SimulateConfig(), seed=0)
    return path


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds on the clock, and the processor seconds of this process, that `work` takes."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def report(figures: Figures, file: str | None = None) -> None:
    """Print each figure, and write all to a JSON file where one is given."""
    for key, value in figures.items():
        shown = f"{value:,.4g}" if isinstance(value, float) else value
        print(f"  {key:40s} {shown}", flush=True)
    if file:
        Path(file).write_text(json.dumps(dict(figures), indent=1) + "\n", encoding="utf-8")
