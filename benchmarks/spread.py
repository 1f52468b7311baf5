"""`python -m benchmarks spread`: prediction over the workers of a Ray, beside as many processes and one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import linio2_store
from stemtune._parallel import Spread, map_over_processes
from stemtune.config import Config
from stemtune.dataset.store import Store
from stemtune.indexing.predictor import Predictor
from stemtune.learning.checkpoint import save_model
from stemtune.learning.models import build

ROUNDS = 3
TIMES = 4
"""How often a round goes over the patterns: a few seconds of them tell more of how it begins and ends."""


def run(folder: Path, patterns: int = 4096, batch: int = 128) -> dict[str, Any]:
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
