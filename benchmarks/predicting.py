"""`python -m benchmarks predict`: from a file to answers, beside the bare model and beside pyxem's template matching.

All of it sees the same patterns in one run, so that the ratios hold on a machine that others use as well.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks import peers
from benchmarks.map_rates import predict_rate
from benchmarks.testset import Beams
from stemtune._files import shipped_models, shipped_or
from stemtune.config import Config
from stemtune.dataset.store import Store
from stemtune.learning.checkpoint import load_model
from stemtune.learning.model import OrientationModel
from stemtune.learning.models import build

FAST: dict[str, object] = {"model.name": "matched", "model.grid_step": 3, "model.angles": 96, "model.radii": 32}
"""`matched` at two thirds of the time and a point fewer answers within 5 degrees."""

MATCHED_BY_PYXEM = 100
"""Patterns that pyxem is given: it takes seconds for each of its settings."""


def run(
    path: Path, settings: Mapping[str, Mapping[str, object]], pythons: Sequence[str] | None = ()
) -> dict[str, object]:
    """Return the figures of `matched` at both grids, the shipped models and those of `settings`, on the store `path`.

    Of each: patterns per second from the file and of the bare model, their ratio by the clock and by processor time,
    and how many times as fast as pyxem it is, from file to answers.

    Parameters
    ----------
    path
        A store of LiNiO2 at the shipped model's calibration.
    settings
        Settings of further models, by their names.
    pythons
        Where pyxem may be, besides the Python that runs; None leaves it out.
    """
    figures: dict[str, object] = {}
    with Store.open(path) as store:
        pyxem = None if pythons is None else _pyxem_rate(store, pythons)
        for name, model in _models(store, settings).items():
            print(f"predict: {name}", file=sys.stderr, flush=True)
            found = predict_rate(store, model, patterns=512)
            if pyxem is not None:
                found["times_pyxem"] = found["patterns_per_second"] / pyxem
            kept = ("patterns_per_second", "bare_patterns_per_second", "ratio", "ratio_processor_time", "times_pyxem")
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


def _pyxem_rate(store: Store, pythons: Sequence[str]) -> float | None:
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


__all__ = ["FAST", "run"]
