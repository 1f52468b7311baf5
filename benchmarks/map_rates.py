"""How fast a map is made, beside the bare model: measured in turns in one run, so that both see the same machine."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from stemtune.analysis.grain_analysis import analyse
from stemtune.config import GrainsConfig
from stemtune.crystal.phase import Phase
from stemtune.crystal_map.orientation_map import NOT_INDEXED, OrientationMap
from stemtune.dataset.store import Store
from stemtune.indexing.predictor import Predictor
from stemtune.indexing.refine import Refiner
from stemtune.learning.model import Answers, OrientationModel


def predict_rate(
    store: Store,
    model: OrientationModel,
    *,
    batch: int = 256,
    rounds: int = 5,
    patterns: int = 2048,
    alternatives: int = 5,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Compare the whole prediction with the bare model on patterns that already lie in memory.

    The whole prediction reads from the store, resamples where needed, has the model answer and checks the best answer
    against the pattern; the bare model answers and nothing else. Both give the same number of answers to the same
    patterns, in turns. The processor time is measured as well: on a machine that others use, its quotient is the one
    to believe.

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
        Answers per pattern, for both.

    Returns
    -------
    dict
        `patterns_per_second` of the whole, `bare_patterns_per_second`, and `ratio`, the median of their quotients
        round by round; `ratio_processor_time`, the same in processor time; `patterns`, `batch`, `alternatives`,
        `model`, `device`.
    """
    predictor = Predictor(model, store, batch, alternatives, device)
    rows = np.arange(min(patterns, store.n))
    ready = torch.from_numpy(store.take(rows)).to(predictor.device)

    def bare() -> None:
        for start in range(0, len(rows), batch):
            predictor.forward_only(ready[start : start + batch], alternatives)[0].cpu()

    def whole() -> None:
        predictor.run(rows, progress=False)

    predictor.forward_only(ready[:batch], alternatives)
    predictor.run(rows[:batch], progress=False)
    seconds: dict[str, list[tuple[float, float]]] = {"whole": [], "bare": []}
    for turn in range(rounds):
        for work in (bare, whole) if turn % 2 else (whole, bare):
            wall, processor = time.perf_counter(), time.process_time()
            work()
            seconds[work.__name__].append((time.perf_counter() - wall, time.process_time() - processor))
    (whole_wall, whole_cpu), (bare_wall, bare_cpu) = (np.array(seconds[name]).T for name in ("whole", "bare"))
    return {
        "patterns_per_second": float(len(rows) / np.median(whole_wall)),
        "bare_patterns_per_second": float(len(rows) / np.median(bare_wall)),
        "ratio": float(np.median(bare_wall / whole_wall)),
        "ratio_processor_time": float(np.median(bare_cpu / whole_cpu)),
        "patterns": len(rows),
        "batch": batch,
        "alternatives": alternatives,
        "model": model.config.model.name,
        "device": str(predictor.device),
    }


def refine_rate(
    store: Store,
    model: OrientationModel,
    *,
    batch: int = 256,
    rounds: int = 3,
    patterns: int = 1024,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """Measure refinement alone, and prediction from file to refined answers, in turns.

    Returns
    -------
    dict
        `patterns_per_second` of the fit of what the model answers (five answers, those that are worth it), and
        `whole_patterns_per_second` with reading, the model and the check; medians of `rounds`. And `fits_per_pattern`;
        `processor_ms` and `whole_processor_ms`, what a pattern takes of one core: to believe on a busy machine.
    """
    predictor = Predictor(model, store, batch, device=device, refine=True)
    refiner = Refiner(model.config, model.phase, store.geometry, predictor.device, model.spread_deg)
    rows = np.arange(min(patterns, store.n))
    ready = torch.from_numpy(store.take(rows)).to(predictor.device)
    parts = [
        (
            ready[start : start + batch],
            Answers(*predictor.forward_only(ready[start : start + batch], predictor.alternatives)),
        )
        for start in range(0, len(rows), batch)
    ]
    fits = 0
    alone, processor, whole, whole_processor = [], [], [], []
    for turn in range(rounds + 1):
        wall, work = time.perf_counter(), time.process_time()
        ncc = torch.cat([refiner.refine(*part).ncc.cpu() for part in parts])
        if turn:  # the first one warms up
            alone.append(time.perf_counter() - wall)
            processor.append(time.process_time() - work)
        fits = int(ncc.isfinite().sum())
        wall, work = time.perf_counter(), time.process_time()
        predictor.run(rows, progress=False)
        if turn:
            whole.append(time.perf_counter() - wall)
            whole_processor.append(time.process_time() - work)
    return {
        "patterns_per_second": float(len(rows) / np.median(alone)),
        "whole_patterns_per_second": float(len(rows) / np.median(whole)),
        "fits_per_pattern": fits / len(rows),
        "processor_ms": float(1e3 * np.median(processor) / len(rows)),
        "whole_processor_ms": float(1e3 * np.median(whole_processor) / len(rows)),
    }


def grains_rate(size: int = 1000) -> dict[str, float]:
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
    grains = analyse(made, GrainsConfig()).grains
    return {
        "seconds": time.perf_counter() - wall,
        "processor_seconds": time.process_time() - processor,
        "grains": len(grains.table),
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
