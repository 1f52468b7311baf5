"""`python -m benchmarks refine` and `map`: refinement, and the grains of a large map."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import Figures, linio2_store, timed
from stemtune.analysis.grain_analysis import analyse
from stemtune.config import Config, GrainsConfig
from stemtune.crystal.phase import Phase
from stemtune.crystal_map.orientation_map import NOT_INDEXED, OrientationMap
from stemtune.dataset.store import Store
from stemtune.indexing.predictor import Predictor
from stemtune.indexing.refine import Refiner
from stemtune.learning.model import OrientationModel
from stemtune.learning.models import build


def refinement(folder: Path) -> Figures:
    """Measure the refinement of what `matched` gives."""
    with Store.open(linio2_store(folder)) as store:
        model = build(Config.from_flat({"model.name": "matched"}), store.phases[0], store.geometry).eval()
        return refinement_throughput(store, model)


def refinement_throughput(
    store: Store,
    model: OrientationModel,
    *,
    batch: int = 256,
    rounds: int = 3,
    patterns: int = 1024,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """Measure refinement alone, and prediction from file to refined candidates, in turns.

    Returns
    -------
    dict
        `patterns_per_second` of the fit of the model's candidates (of five those that are likely), and
        `whole_patterns_per_second` with reading, the model and the check; medians of `rounds`. And `fits_per_pattern`;
        `processor_ms` and `whole_processor_ms`, what a pattern takes of one core: to believe on a busy machine.
    """
    predictor = Predictor(model, store, batch, device=device, refine=True)
    refiner = Refiner(model.config, model.phase, store.geometry, predictor.device, model.spread_deg)
    rows = np.arange(min(patterns, store.n))
    ready = torch.from_numpy(store.take(rows)).to(predictor.device)
    batches = [ready[start : start + batch] for start in range(0, len(rows), batch)]
    parts = [(patterns, predictor.forward_only(patterns, predictor.alternatives)) for patterns in batches]
    fitted = [refiner.refine(*part).ncc.isfinite().sum() for part in parts]  # warms up as well
    predictor.run(rows, progress=False)
    turns = [
        (
            *timed(lambda: [refiner.refine(*part).ncc.cpu() for part in parts]),
            *timed(lambda: predictor.run(rows, progress=False)),
        )
        for _ in range(rounds)
    ]
    alone, processor, whole, whole_processor = np.median(turns, axis=0)
    return {
        "patterns_per_second": float(len(rows) / alone),
        "whole_patterns_per_second": float(len(rows) / whole),
        "fits_per_pattern": int(sum(fitted)) / len(rows),
        "processor_ms": float(1e3 * processor / len(rows)),
        "whole_processor_ms": float(1e3 * whole_processor / len(rows)),
    }


def grains(_: Path | None = None, size: int = 1000) -> dict[str, float]:
    """Measure grains, KAM, GROD and boundaries of a cubic map of `size` x `size` pixels, Sigma3 looked for.

    The grains are squares of 25 pixels; a hundredth of the pixels are wrong and another is not indexed.

    Returns
    -------
    dict
        `seconds` and `processor_seconds` for all of it, and the number of `grains` found.
    """
    rng = np.random.default_rng(0)
    row, column = np.divmod(np.arange(size * size), size)
    across = -(-size // 25)
    turned = rng.normal(size=(across * across, 4))
    orientation = turned[(row // 25) * across + column // 25]
    orientation /= np.linalg.norm(orientation, axis=1, keepdims=True)
    orientation += 0.003 * rng.normal(size=orientation.shape)
    wrong = rng.random(len(orientation)) < 0.01
    orientation[wrong] = rng.normal(size=(int(wrong.sum()), 4))
    orientation /= np.linalg.norm(orientation, axis=1, keepdims=True)
    number, count = np.where(rng.random(len(row)) < 0.01, NOT_INDEXED, 0).astype(np.int16), len(row)
    plain = np.ones(count, dtype=np.float32)
    made = OrientationMap(
        (size, size), orientation[:, None], plain[:, None], number, [Phase.from_cif_text(_CUBIC)], plain, plain
    )
    wall, processor = time.perf_counter(), time.process_time()
    found = analyse(made, GrainsConfig()).grains
    return {
        "seconds": time.perf_counter() - wall,
        "processor_seconds": time.process_time() - processor,
        "grains": len(found.table),
    }


_CUBIC = """data_Ni
_cell_length_a 3.52
_cell_length_b 3.52
_cell_length_c 3.52
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M 'F m -3 m'
_space_group_IT_number 225
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
Ni1 Ni 0 0 0
"""
