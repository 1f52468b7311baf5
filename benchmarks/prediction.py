"""`python -m benchmarks predict` and `spread`: from a file to candidates, beside the forward pass, pyxem and Ray.

All of it sees the same patterns in one run, so that the ratios hold on a machine that others use as well.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import MODELS, linio2_store, peers
from benchmarks.testset import Beams
from stemtune._files import shipped_models, shipped_or
from stemtune._parallel import Spread, map_over_processes
from stemtune.config import Config
from stemtune.dataset.store import Store
from stemtune.indexing.predictor import Predictor
from stemtune.learning.checkpoint import load_model, save_model
from stemtune.learning.model import OrientationModel
from stemtune.learning.models import build

FAST: dict[str, object] = {"model.name": "matched", "model.grid_step": 3, "model.angles": 96, "model.radii": 32}
"""`matched` at two thirds of the time and a point fewer answers within 5 degrees."""

MATCHED_BY_PYXEM = 100
"""Patterns that pyxem is given: it takes seconds for each of its settings."""

ROUNDS = 3
TIMES = 4
"""How often a round goes over the patterns: a few seconds of them tell more of how it begins and ends."""


def run(
    folder: Path, settings: Mapping[str, Mapping[str, object]] = MODELS, pythons: Sequence[str] | None = ()
) -> dict[str, object]:
    """Return the figures of `matched` at both grids, the shipped models and those of `settings`.

    Of each: patterns per second from the file and of the forward pass alone, their ratio by the clock and by processor
    time, and how many times as fast as pyxem it is, from file to candidates.

    Parameters
    ----------
    folder
        Where the store of patterns is, or is made.
    settings
        Settings of further models, by their names.
    pythons
        Where pyxem may be, besides the Python that runs; None leaves it out.
    """
    figures: dict[str, object] = {}
    with Store.open(linio2_store(folder)) as store:
        pyxem = None if pythons is None else _pyxem_throughput(store, pythons)
        for name, model in _models(store, settings).items():
            print(f"predict: {name}", file=sys.stderr, flush=True)
            found = prediction_throughput(store, model, patterns=512)
            if pyxem is not None:
                found["times_pyxem"] = found["patterns_per_second"] / pyxem
            kept = (
                "patterns_per_second",
                "forward_patterns_per_second",
                "ratio",
                "ratio_processor_time",
                "times_pyxem",
            )
            figures |= {f"{name} {key}": found[key] for key in kept if key in found}
    figures["pyxem patterns_per_second"] = "not measured: give --peer-python" if pyxem is None else pyxem
    return figures


def _models(store: Store, settings: Mapping[str, Mapping[str, object]]) -> dict[str, OrientationModel]:
    every: dict[str, Mapping[str, object]] = {"matched": {"model.name": "matched"}, "matched_3deg": FAST, **settings}
    models = {
        name: build(Config.from_flat(dict(each)), store.phases[0], store.geometry).eval()
        for name, each in every.items()
    }
    return models | {name: load_model(shipped_or(name)).eval() for name in shipped_models()}


def _pyxem_throughput(store: Store, pythons: Sequence[str]) -> float | None:
    """Return the patterns per second of the fastest of pyxem's settings, on all cores; None where there is no pyxem."""
    found = peers.find(peers.PYXEM, pythons)
    if found is None:
        return None
    patterns = store.take(np.arange(min(MATCHED_BY_PYXEM, store.n)))
    unknown = Beams(np.empty((0, 4)), np.empty(0, np.float32), [])
    with tempfile.TemporaryDirectory(prefix="stemtune-bench-") as folder:
        return max(
            each.patterns_per_s
            for each in peers.run_pyxem(*found, [(patterns, unknown)], Path(folder), store.phases[0])
        )


def prediction_throughput(
    store: Store,
    model: OrientationModel,
    *,
    batch: int = 256,
    rounds: int = 5,
    patterns: int = 2048,
    alternatives: int = 5,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Compare the whole prediction with the forward pass alone on patterns that already lie in memory.

    The whole prediction reads from the store, resamples where needed, runs the model and checks the best candidate
    against the pattern. Both give as many candidates for the same patterns, in turns. The processor time is measured
    as well: on a machine that others use, its quotient is the one to believe.

    Parameters
    ----------
    store
        Patterns; the first `patterns` of them are used.
    model
        Any model.
    batch
        Patterns at a time, for both.
    rounds
        Turns; the median of each counts.
    alternatives
        Candidates per pattern, for both.

    Returns
    -------
    dict
        `patterns_per_second` of the whole, `forward_patterns_per_second`, and `ratio`, the median of their quotients
        round by round; `ratio_processor_time`, the same in processor time; `patterns`, `batch`, `alternatives`,
        `model`, `device`.
    """
    predictor = Predictor(model, store, batch, alternatives, device)
    rows = np.arange(min(patterns, store.n))
    ready = torch.cat(list(predictor.resampled(rows, "resample")))

    def forward() -> None:
        for start in range(0, len(rows), batch):
            predictor.forward_only(ready[start : start + batch], alternatives).orientation.cpu()

    def whole() -> None:
        predictor.run(rows, progress=False)

    predictor.forward_only(ready[:batch], alternatives)
    predictor.run(rows[:batch], progress=False)
    seconds: dict[str, list[tuple[float, float]]] = {"whole": [], "forward": []}
    for turn in range(rounds):
        for work in (forward, whole) if turn % 2 else (whole, forward):
            wall, processor = time.perf_counter(), time.process_time()
            work()
            seconds[work.__name__].append((time.perf_counter() - wall, time.process_time() - processor))
    (whole_wall, whole_cpu), (forward_wall, forward_cpu) = (np.array(seconds[name]).T for name in ("whole", "forward"))
    return {
        "patterns_per_second": float(len(rows) / np.median(whole_wall)),
        "forward_patterns_per_second": float(len(rows) / np.median(forward_wall)),
        "ratio": float(np.median(forward_wall / whole_wall)),
        "ratio_processor_time": float(np.median(forward_cpu / whole_cpu)),
        "patterns": len(rows),
        "batch": batch,
        "alternatives": alternatives,
        "model": model.config.model.name,
        "device": str(predictor.device),
    }


def spread(folder: Path, patterns: int = 4096, batch: int = 128) -> dict[str, Any]:
    """Compare a Ray of this machine with as many processes, and with one process of one thread, in turns.

    The clock starts once every worker has prepared and some batches have come, for a cluster prepares once a job.

    Parameters
    ----------
    folder
        Where the store and the model are made.
    patterns
        How many patterns `matched` reads.
    batch
        Patterns at a time.

    Returns
    -------
    dict
        `workers`, and of each the median of the patterns per second: `ray`, `processes`, `one process`;
        `of linear`, the median over the rounds of the quotient of Ray's rate and so many times that of one process,
        and `of processes`, that of Ray's rate and the processes': where others use the machine too, this is the one to
        believe.
    """
    from stemtune.tune.cluster.connect import connect
    from stemtune.tune.cluster.map_tasks import over_ray

    model_folder = folder / "spread-model"
    os.environ.pop("OMP_NUM_THREADS", None)  # Ray gives each worker as many as it has CPUs
    workers = int(connect(local=True)["CPU"])
    with Store.open(linio2_store(folder, patterns)) as store:
        model = build(Config.from_flat({"model.name": "matched"}), store.phases[0], store.geometry).eval()
        save_model(model, model_folder, {}, "")
        predictor = Predictor(model, store, batch, device="cpu")
        spreads = {"ray": over_ray(), "processes": map_over_processes(workers), "one process": map_over_processes(1)}
        throughput: dict[str, list[float]] = {name: [] for name in spreads}
        threads = torch.get_num_threads()
        for turn in range(ROUNDS):
            for name in list(spreads)[:: 1 if turn % 2 else -1]:
                torch.set_num_threads(1 if name == "one process" else workers)
                throughput[name].append(_throughput(predictor, spreads[name], model_folder, 3 * workers))
        torch.set_num_threads(threads)
    ray, processes, one = (np.array(throughput[name]) for name in spreads)
    return {
        "workers": workers,
        **{name: float(np.median(measured)) for name, measured in throughput.items()},
        "of linear": float(np.median(ray / (workers * one))),
        "of processes": float(np.median(ray / processes)),
    }


def _throughput(predictor: Predictor, spread: Spread, model: Path, skipped: int) -> float:
    """Return the patterns per second after the first `skipped` batches."""
    times: list[float] = []

    def timed(
        prepare: Callable[[Any], Any], given: Any, work: Callable[[Any, Any], Any], items: Sequence[Any]
    ) -> Generator[Any]:
        for number, result in enumerate(spread(prepare, given, work, list(items) * TIMES)):
            times.append(time.perf_counter())
            if number < len(items):
                yield result

    count = TIMES * len(predictor.over(timed, model, progress=False).candidates)
    return (count - skipped * predictor.batch) / (times[-1] - times[skipped - 1])
