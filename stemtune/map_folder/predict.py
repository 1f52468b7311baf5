"""A scan or a store and a model become a map folder: map.h5, map.ang, map.ctf, pictures and a summary."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from stemtune._files import replaceable_folder, whole_folder
from stemtune._parallel import Spread
from stemtune._version import __version__
from stemtune.analysis.cleanup import CHANGED, clean_figures, cleaned
from stemtune.analysis.evaluation.evaluate import compare
from stemtune.analysis.evaluation.ground_truth import grid_pixel, grid_shape, truth_of_store
from stemtune.config import CleanConfig, GrainsConfig
from stemtune.crystal_map.io.ang import check_same, write_ang
from stemtune.crystal_map.io.ctf import write_ctf
from stemtune.crystal_map.io.orix_h5 import read_with_orix
from stemtune.crystal_map.orientation_map import NOT_INDEXED, OrientationMap
from stemtune.crystal_map.scan_rotation import scan_rotation_deg, to_scan_frame
from stemtune.dataset.store import Store
from stemtune.errors import UserError
from stemtune.indexing.calibration import found_calibration
from stemtune.indexing.overlap_layers import SECOND_LAYER, draw_overlaps, overlap_figures, with_overlaps
from stemtune.indexing.phase_choice import FILES as PHASE_FILES
from stemtune.indexing.phase_choice import Chosen, choose, distinct, phase_figures, write_phases
from stemtune.indexing.predictor import Answered, Predictor
from stemtune.indexing.source import name_of, opened
from stemtune.indexing.spot_check import DIM_SHARE, LEAST_FIT, LEAST_SIGNAL, LEAST_SIGNAL_DIM
from stemtune.learning.checkpoint import DESCRIPTION, load_model, read_description
from stemtune.learning.model import OrientationModel
from stemtune.map_folder.grain_files import FILES as GRAIN_FILES
from stemtune.map_folder.grain_files import Analysis, analyse, grain_figures, write_grains
from stemtune.plot.figures import draw_scalar
from stemtune.plot.ipf import DIRECTIONS, draw_ipf
from stemtune.plot.report import write_report
from stemtune.scan.readers import Scan

FILES = (
    *("map.h5", "map.ang", "map.ctf", "ipf_?.png", "confidence.png", "overlap.png", "overlay.png", "summary.json"),
    "report.html",
    *GRAIN_FILES,
    *PHASE_FILES,
)
"""Names of all files that a map folder may hold, * and ? for any letters."""


class Known(Protocol):
    """Answers that a model has given to the patterns of a scan before (`live.watcher`)."""

    model: OrientationModel

    def answers(self, predictor: Predictor) -> tuple[Answered, float]:
        """Return the answers to all patterns of the predictor's store, and the seconds that they took."""
        ...


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
    known: Known | None = None,
    **calibration: Any,
) -> dict[str, Any]:
    """Write the orientation map of `source` to the folder `out` and return its summary.

    Parameters
    ----------
    source
        A store, a scan file that `dataset.ingest` reads, or such a scan opened. A store that is no scan becomes a map
        of one row, in the order of the store.
    model_folder
        The model; or several, one for each phase: see `indexing.phase_choice`.
    out
        The map folder; a map that stands there is replaced, a folder with anything else in it is refused.
    batch
        Patterns at a time.
    alternatives
        How many different answers to keep per pixel.
    device
        Where to work; left out, the GPU if there is one.
    refine
        Fit the model's answers to the patterns; see `indexing.refine`.
    spread
        What works on the batches, instead of this process: the nodes of a Ray cluster for instance, which have to see
        the model folder, the store and, of a scan file, the folder beside `out`.
    grains, twins
        How grains are found, and special boundaries to look for; see `map_folder.grain_files.analyse`.
    clean
        How the map is cleaned up by what neighbours say (`analysis.cleanup`); left out, it is not.
    overlap
        Look for two crystals in every pattern; see `indexing.overlap`.
    addresses
        What the user calls the models, where that is more than their folders: addresses in MLflow.
    runs
        The ids of the MLflow runs that made the models, as far as runs did.
    known
        Answers that were given before.
    **calibration
        What `dataset.ingest.ingest` takes, for a scan file.

    Returns
    -------
    dict
        What `summary.json` holds: `patterns`, `indexed_fraction`, `patterns_per_second` (from reading to answers),
        `seconds` (of the whole command), `model`, `median_confidence`, `notes`, `grains` (`map_folder.grain_files`),
        and with a truth in the store `disorientation` and the rest of `evaluate.compare`. Refined, also
        `median_goodness` and `fitted`, see `indexing.calibration`; cleaned up, `cleaned`; with overlaps, `overlaps`;
        of several models, `phases`.

    Raises
    ------
    UserError
        For unusable input, before anything is written.
    """
    begun = time.perf_counter()
    target = replaceable_folder(out, FILES, "a map")
    folders = [model_folder] if isinstance(model_folder, str | os.PathLike) else list(model_folder)
    models = [load_model(folder) for folder in folders] if known is None else [known.model]
    if not distinct([model.phase for model in models]):
        raise UserError("two of the models are for the same phase; give one --model for each phase")
    with whole_folder(target) as part, opened(source, target.parent, **calibration) as store:
        if store.n < 2:
            raise UserError(f"'{name_of(source)}' holds one pattern, but a map needs at least two")
        predictors = [Predictor(model, store, batch, alternatives, device, refine) for model in models]
        notes = list(dict.fromkeys(note for predictor in predictors for note in predictor.notes))
        _tell(notes)
        timed = [_run(*each, spread, known) for each in zip(predictors, folders, strict=True)]
        chosen = choose([answered for answered, _ in timed])
        rate = store.n / sum(seconds for _, seconds in timed)
        fitted = found_calibration(chosen.answered, store.geometry)
        _tell(fitted.notes)
        facts = _facts(source, folders, store, models, calibration, predictors[0], addresses, runs)
        orientation_map = as_map(store, chosen, models, facts)
        if overlap:
            orientation_map = with_overlaps(orientation_map, predictors, chosen, grid_pixel(store))
        if clean is not None:
            orientation_map = cleaned(orientation_map, clean)
        analysis = analyse(orientation_map, grains or GrainsConfig(), twins)
        write_map(analysis, part)
        summary = {
            "patterns": store.n,
            "indexed_fraction": float(chosen.answered.indexed.mean()),
            "patterns_per_second": rate,
            "seconds": 0.0,
            "notes": [*store.attrs.get("notes", []), *notes, *fitted.notes],
            **_summary(analysis, chosen),
            **fitted.figures,
            **{name: facts[name] for name in _TOLD},
        }
        if store.labelled.any():
            summary |= compare(orientation_map, truth_of_store(store))
        write_report(analysis, part, summary, store)
        summary["seconds"] = time.perf_counter() - begun
        (part / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


_TOLD = ("model", "architecture", "phase", "source", "geometry", "device", "stemtune")


def _run(
    predictor: Predictor, folder: str | os.PathLike[str], spread: Spread | None, known: Known | None
) -> tuple[Answered, float]:
    """Return the answers to all patterns, and the seconds that they took."""
    if known is not None:
        return known.answers(predictor)
    started = time.perf_counter()
    answered = predictor.run() if spread is None else predictor.over(spread, Path(folder).resolve())
    return answered, time.perf_counter() - started


def _tell(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _summary(analysis: Analysis, chosen: Chosen) -> dict[str, Any]:
    """Return what the summary says about the map itself."""
    made, answered = analysis.orientation_map, chosen.answered
    told: dict[str, Any] = {
        "median_confidence": _median(answered.confidence[answered.indexed, 0]),
        "median_fit": _median(answered.fit[answered.indexed]),
        "scan_shape": list(made.shape),
        "step_nm": made.step_nm,
        "grains": grain_figures(analysis),
    }
    if CHANGED in made.layers:
        told["cleaned"] = clean_figures(made)
    if SECOND_LAYER in made.layers:
        told["overlaps"] = overlap_figures(made)
    if len(made.phases) > 1:
        told["phases"] = phase_figures(made)
    return told


def write_map(analysis: Analysis, folder: Path) -> None:
    """Write map.h5, map.ang, map.ctf, tables and pictures of a map into `folder`, and check what is read back."""
    orientation_map = analysis.orientation_map
    (folder / "map.h5").unlink(missing_ok=True)
    orientation_map.write(folder / "map.h5")
    check_same(orientation_map, read_with_orix(folder / "map.h5"), "map.h5")
    write_ang(orientation_map, folder / "map.ang")
    write_ctf(orientation_map, folder / "map.ctf")
    for axis in DIRECTIONS:
        draw_ipf(orientation_map, axis, folder / f"ipf_{axis}.png")
    shown = np.where(orientation_map.indexed, orientation_map.confidence, np.nan)
    draw_scalar(
        shown.reshape(orientation_map.shape),
        folder / "confidence.png",
        step=orientation_map.step_nm,
        title="Confidence of the best answer",
        label="confidence",
        note="Grey: not indexed.",
    )
    write_grains(analysis, folder)
    if len(orientation_map.phases) > 1:
        write_phases(orientation_map, folder)
    if SECOND_LAYER in orientation_map.layers:
        draw_overlaps(orientation_map, folder / "overlap.png")


def as_map(
    store: Store, chosen: Chosen, models: Sequence[OrientationModel], facts: Mapping[str, Any]
) -> OrientationMap:
    """Lay the answers to the patterns of `store` out on its scan, in the scan's frame (`crystal_map.scan_rotation`).

    Positions without a pattern are not indexed.
    """
    shape, pixel = grid_shape(store), grid_pixel(store)
    answered = chosen.answered

    def laid(values: npt.NDArray[Any], empty: float) -> npt.NDArray[Any]:
        grid = np.full((shape[0] * shape[1], *values.shape[1:]), empty, dtype=values.dtype)
        grid[pixel] = values
        return grid

    answers = to_scan_frame(answered.answers, scan_rotation_deg(store.attrs))
    return OrientationMap(
        shape=shape,
        answers=laid(answers, np.nan),
        answer_confidence=laid(answered.confidence, 0),
        phase=laid(chosen.model, NOT_INDEXED),
        signal=laid(answered.signal, 0),
        fit=laid(answered.fit, 0),
        phases=[model.phase for model in models],
        step_nm=_step(store),
        attrs=facts,
        goodness=None if answered.goodness is None else laid(answered.goodness, np.nan),
        layers={} if len(models) == 1 else {"phase_fit": laid(chosen.fit, 0)},
    )


def _facts(
    source: str | os.PathLike[str] | Scan,
    folders: Sequence[str | os.PathLike[str]],
    store: Store,
    models: Sequence[OrientationModel],
    calibration: Mapping[str, Any],
    predictor: Predictor,
    addresses: Sequence[str],
    runs: Sequence[str],
) -> dict[str, Any]:
    """Return how the map is made; of several models what differs from one to the next is a list."""
    attrs = store.attrs
    each = [
        {
            "model": str(Path(folder).expanduser().absolute()),
            "architecture": model.config.model.name,
            "phase": model.phase.name,
            "model_geometry": model.geometry.to_dict(),
            "trained": _trained(folder),
        }
        for folder, model in zip(folders, models, strict=True)
    ]
    return {
        "source": str(Path(name_of(source)).expanduser().absolute()),
        "origin_sha256": attrs.get("origin_sha256"),
        "origin_window": attrs.get("origin_window"),
        "origin_centre_px": attrs.get("origin_centre_px"),
        "scan_rotation_deg": scan_rotation_deg(attrs),
        "calibration": {name: value for name, value in calibration.items() if value is not None},
        **(each[0] if len(each) == 1 else {name: [one[name] for one in each] for name in each[0]}),
        "model_address": list(addresses) or None,
        "model_runs": list(runs),  # an alias may name another run tomorrow
        "geometry": store.geometry.to_dict(),
        "device": str(predictor.device),
        "not_indexed_below": {
            "fit": LEAST_FIT,
            "signal": LEAST_SIGNAL,
            "signal_dim": LEAST_SIGNAL_DIM,
            "dim": DIM_SHARE,
        },
        "stemtune": __version__,
    }


def _trained(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a model folder says of its training: the store, what was reached, with which versions."""
    if not (Path(folder) / DESCRIPTION).is_file():
        return {}
    description = read_description(folder)
    return {name: description[name] for name in ("store_sha256", "metrics", "versions") if name in description}


def _step(store: Store) -> tuple[float, float] | None:
    """Return the scan's step in nm along rows and columns; None where it is not known or the store is no scan."""
    step = store.attrs.get("step_nm")
    if step is None or store.scan_shape is None:
        return None
    dy, dx = (float(value) for value in np.broadcast_to(np.asarray(step, dtype=float).ravel(), 2))
    return (dy, dx) if np.isfinite([dy, dx]).all() and min(dy, dx) > 0 else None


def _median(values: npt.NDArray[Any]) -> float | None:
    return float(np.median(values)) if len(values) else None
