"""How fast `predict` is over the workers of a Ray, beside as many plain processes and beside one process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stemtune._parallel import Spread, map_over_processes
from stemtune.config import Config
from stemtune.dataset.store import Store
from stemtune.indexing.predictor import Predictor
from stemtune.learning.checkpoint import save_model
from stemtune.learning.models import build

ROUNDS = 3
TIMES = 4
"""How often a round goes over the patterns: a few seconds of them tell more of how it begins and ends."""


def spread_rate(path: Path, folder: Path, batch: int = 128) -> dict[str, Any]:
    """Compare a Ray of this machine with as many processes, and with one process of one thread, in turns.

    The clock starts once every worker has prepared and some batches have come, for a cluster prepares once a job.

    Parameters
    ----------
    path
        A store; all of its patterns are answered by `matched`.
    folder
        Where the model goes.
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
    with Store.open(path) as store:
        model = build(Config.from_flat({"model.name": "matched"}), store.phases[0], store.geometry).eval()
        save_model(model, model_folder, {}, "")
        predictor = Predictor(model, store, batch, device="cpu")
        spreads = {"ray": over_ray(), "processes": map_over_processes(workers), "one process": map_over_processes(1)}
        rates: dict[str, list[float]] = {name: [] for name in spreads}
        threads = torch.get_num_threads()
        for turn in range(ROUNDS):
            for name in list(spreads)[:: 1 if turn % 2 else -1]:
                torch.set_num_threads(1 if name == "one process" else workers)
                rates[name].append(_rate(predictor, spreads[name], model_folder, 3 * workers))
        torch.set_num_threads(threads)
    ray, processes, one = (np.array(rates[name]) for name in spreads)
    return {
        "workers": workers,
        **{name: float(np.median(measured)) for name, measured in rates.items()},
        "of linear": float(np.median(ray / (workers * one))),
        "of processes": float(np.median(ray / processes)),
    }


def _rate(predictor: Predictor, spread: Spread, model: Path, skipped: int) -> float:
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
