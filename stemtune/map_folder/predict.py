"""A scan or a store and a model become a map folder: map.h5, map.ang, map.ctf, pictures and a summary."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stemtune._files import replaceable_folder, whole_folder
from stemtune._parallel import Spread
from stemtune.analysis.cleanup import cleaned
from stemtune.analysis.evaluation.evaluate import compare
from stemtune.analysis.evaluation.ground_truth import map_of_labels
from stemtune.analysis.grain_analysis import analyse
from stemtune.config import CleanConfig, GrainsConfig
from stemtune.dataset.selection import check_crystal
from stemtune.indexing.overlap import with_overlaps
from stemtune.indexing.phase_choice import check_distinct
from stemtune.indexing.predict import EarlierPredictions, name_of, opened, predict_map
from stemtune.learning.checkpoint import load_model
from stemtune.map_folder.files import FILES, map_summary, write_map
from stemtune.plot.report import write_report
from stemtune.scan.readers import Scan


def predict(
    source: str | os.PathLike[str] | Scan,
    model_folder: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    batch: int = 256,
    *,
    alternatives: int = 5,
    device: torch.device | str | None = None,
    refine: bool = False,
    spread: Spread | None = None,
    grains: GrainsConfig | None = None,
    twins: Sequence[str] = (),
    clean: CleanConfig | None = None,
    overlap: bool = False,
    addresses: Sequence[str] = (),
    runs: Sequence[str] = (),
    earlier: EarlierPredictions | None = None,
    **calibration: Any,
) -> dict[str, Any]:
    """Write the orientation map of `source` to the folder `out` and return its summary.

    - `source`: a store, a scan file that `dataset.ingest` reads, or such a scan opened. A store that is no scan becomes
      a map of one row, in the order of the store.
    - `model_folder`: the model; or several, one for each phase: see `indexing.phase_choice`.
    - `out`: the map folder; an existing map is replaced, a folder with anything else in it is refused.
    - `batch`, `alternatives`, `device`, `refine`: see `indexing.predict.predict_map`.
    - `spread`: what works on the batches, instead of this process: the nodes of a Ray cluster for instance, which have
      to see the model folder, the store and, of a scan file, the folder beside `out`.
    - `grains`, `twins`, `clean`, `overlap`: see `analysis.grain_analysis.analyse`, `analysis.cleanup` and
      `indexing.overlap`.
    - `addresses`, `runs`: what the user calls the models where that is an address in MLflow, and the ids of the runs
      that made them.
    - `earlier`: predictions that were made before.
    - `**calibration`: what `dataset.ingest.ingest` takes, for a scan file.

    Returns
    -------
    dict
        What `summary.json` holds: `patterns`, `patterns_per_second` (from reading to answers), `seconds` (of the whole
        command), `notes`, what `files.map_summary` says, with a truth in the store what `evaluate.compare` says;
        refined, also `median_ncc` and `fitted`.

    Raises `UserError` for unusable input, before anything is written.
    """
    start = time.perf_counter()
    target = replaceable_folder(out, FILES, "a map")
    folders = [model_folder] if isinstance(model_folder, str | os.PathLike) else list(model_folder)
    models = [load_model(folder) for folder in folders] if earlier is None else [earlier.model]
    check_distinct([model.phase for model in models])
    facts = {
        "source": str(Path(name_of(source)).expanduser().absolute()),
        "calibration": {name: value for name, value in calibration.items() if value is not None},
        "model_address": list(addresses) or None,
        "model_runs": list(runs),  # an alias may name another run tomorrow
    }
    with whole_folder(target) as part, opened(source, target.parent, **calibration) as store:
        if "champion" in addresses:
            check_crystal([model.phase for model in models], store)
        truth = map_of_labels(store) if store.labelled.any() else None  # before the work, so that bad labels cost none
        how: dict[str, Any] = {"alternatives": alternatives, "device": device, "refine": refine, "spread": spread}
        predicted = predict_map(store, models, batch, folders=folders, earlier=earlier, facts=facts, **how)
        orientation_map = predicted.orientation_map
        if overlap:
            pixel = store.grid_pixel()
            orientation_map = with_overlaps(orientation_map, predicted.predictors, predicted.choice, pixel)
        if clean is not None:
            orientation_map = cleaned(orientation_map, clean)
        analysis = analyse(orientation_map, grains or GrainsConfig(), twins)
        write_map(analysis, part)
        summary = {
            "patterns": store.n,
            "patterns_per_second": predicted.patterns_per_second,
            "notes": [*store.attrs.get("notes", []), *predicted.notes],
            **map_summary(analysis),
            **predicted.geometry_fit.figures,
            **{name: orientation_map.attrs[name] for name in _SUMMARY_FACTS},
        }
        if truth is not None:
            summary |= compare(orientation_map, truth)
        write_report(analysis, part, summary, store)
        summary["seconds"] = time.perf_counter() - start
        (part / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


_SUMMARY_FACTS = ("model", "architecture", "phase", "source", "geometry", "device", "stemtune")
