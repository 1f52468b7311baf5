"""A store or scan and one or several models become an orientation map in memory; no result is written.

Also the calibration that all refined candidates agree on: the fit of one pattern is noisy, that of a hundred is not.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import h5py
import numpy as np
import numpy.typing as npt
import torch

from stemtune._files import existing
from stemtune._parallel import Spread
from stemtune._version import __version__
from stemtune.crystal_map.frame_rotations import scan_rotation_deg, to_scan_frame
from stemtune.crystal_map.orientation_map import NOT_INDEXED, OrientationMap
from stemtune.dataset.ingest import ingest
from stemtune.dataset.store import Store
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError
from stemtune.indexing.phase_choice import PhaseChoice, check_distinct, choose
from stemtune.indexing.predictor import Predictions, Predictor
from stemtune.indexing.spot_check import LIMITS
from stemtune.learning.checkpoint import DESCRIPTION, read_description
from stemtune.learning.model import OrientationModel
from stemtune.scan.readers import Scan


class EarlierPredictions(Protocol):
    """Predictions that a model has made for the patterns of a scan before (`live.session`)."""

    model: OrientationModel

    def predictions(self, predictor: Predictor) -> tuple[Predictions, float]:
        """Return the predictions for all patterns of the predictor's store, and the seconds that they took."""
        ...


class MapPrediction(NamedTuple):
    """A predicted map and how it came about: the `predictors`, one for each model; the `choice` among their predictions
    for the patterns of the store; what refinement says about the calibration; `patterns_per_second` from reading to
    candidates; and notes for the user, one sentence each.
    """

    orientation_map: OrientationMap
    predictors: list[Predictor]
    choice: PhaseChoice
    geometry_fit: GeometryFit
    patterns_per_second: float
    notes: list[str]


def predict_map(
    store: Store,
    models: Sequence[OrientationModel],
    batch: int = 256,
    *,
    alternatives: int = 5,
    device: torch.device | str | None = None,
    refine: bool = False,
    spread: Spread | None = None,
    folders: Sequence[str | os.PathLike[str]] = (),
    earlier: EarlierPredictions | None = None,
    facts: Mapping[str, Any] | None = None,
) -> MapPrediction:
    """Return the orientation map of the scan in `store`; notes for the user go to stderr as soon as they are known.

    The store has at least two patterns; one that is no scan becomes a map of one row, in the order of the store. The
    models are one for each phase, see `indexing.phase_choice`; their `folders`, named in the map's `attrs`, are needed
    for a `spread` that works on the batches instead of this process. `facts` are further entries of `attrs`.

    Raises a `UserError` for a store of one pattern, for two models of one phase, and when the patterns do not reach far
    enough.
    """
    check_distinct([model.phase for model in models])
    if store.n < 2:
        source = (facts or {}).get("source", store.path)
        raise UserError(f"'{source}' holds one pattern, but a map needs at least two")
    predictors = [Predictor(model, store, batch, alternatives, device, refine) for model in models]
    notes = list(dict.fromkeys(note for predictor in predictors for note in predictor.notes))
    _print_notes(notes)
    places = folders or [""] * len(models)
    timed = [_timed(each, folder, spread, earlier) for each, folder in zip(predictors, places, strict=True)]
    choice = choose([predictions for predictions, _ in timed])
    geometry_fit = fit_geometry(choice.predictions, store.geometry)
    _print_notes(geometry_fit.notes)
    attrs = {**(facts or {}), **_facts(store, predictors, folders)}
    return MapPrediction(
        as_map(store, choice, models, attrs),
        predictors,
        choice,
        geometry_fit,
        store.n / sum(seconds for _, seconds in timed),
        [*notes, *geometry_fit.notes],
    )


def _timed(
    predictor: Predictor, folder: str | os.PathLike[str], spread: Spread | None, earlier: EarlierPredictions | None
) -> tuple[Predictions, float]:
    """Return the predictions for all patterns, and the seconds that they took."""
    if earlier is not None:
        return earlier.predictions(predictor)
    started = time.perf_counter()
    predictions = predictor.run() if spread is None else predictor.over(spread, Path(folder).resolve())
    return predictions, time.perf_counter() - started


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def as_map(
    store: Store, choice: PhaseChoice, models: Sequence[OrientationModel], attrs: Mapping[str, Any]
) -> OrientationMap:
    """Lay the predictions for the patterns of `store` out on its scan, in the scan's frame (`frame_rotations`).

    Positions without a pattern are not indexed.
    """
    shape, pixel = store.grid_shape, store.grid_pixel()
    predictions = choice.predictions

    def on_grid(values: npt.NDArray[Any], empty: float) -> npt.NDArray[Any]:
        grid = np.full((shape[0] * shape[1], *values.shape[1:]), empty, dtype=values.dtype)
        grid[pixel] = values
        return grid

    return OrientationMap(
        shape=shape,
        answers=on_grid(to_scan_frame(predictions.candidates, scan_rotation_deg(store.attrs)), np.nan),
        answer_confidence=on_grid(predictions.confidence, 0),
        phase=on_grid(choice.model, NOT_INDEXED),
        spot_z_score=on_grid(predictions.spot_z_score, 0),
        explained_intensity=on_grid(predictions.explained_intensity, 0),
        phases=[model.phase for model in models],
        step_nm=_step(store),
        attrs=attrs,
        ncc=None if predictions.ncc is None else on_grid(predictions.ncc, np.nan),
        layers={} if len(models) == 1 else {"phase_explained_intensity": on_grid(choice.explained_intensity, 0)},
    )


def _facts(store: Store, predictors: Sequence[Predictor], folders: Sequence[str | os.PathLike[str]]) -> dict[str, Any]:
    """Return how the map is made; of several models what differs from one to the next is a list."""
    attrs = store.attrs
    places: Sequence[str | os.PathLike[str] | None] = folders or [None] * len(predictors)
    each = [
        {
            "model": None if folder is None else str(Path(folder).expanduser().absolute()),
            "architecture": model.config.model.name,
            "phase": model.phase.name,
            "model_geometry": model.geometry.to_dict(),
            "trained": {} if folder is None else _training_facts(folder),
        }
        for folder, model in zip(places, (predictor.model for predictor in predictors), strict=True)
    ]
    return {
        "origin_sha256": attrs.get("origin_sha256"),
        "origin_window": attrs.get("origin_window"),
        "origin_centre_px": attrs.get("origin_centre_px"),
        "scan_rotation_deg": scan_rotation_deg(attrs),
        **(each[0] if len(each) == 1 else {name: [one[name] for one in each] for name in each[0]}),
        "geometry": store.geometry.to_dict(),
        "device": str(predictors[0].device),
        "not_indexed_below": LIMITS,
        "stemtune": __version__,
    }


def _training_facts(folder: str | os.PathLike[str]) -> dict[str, Any]:
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


def name_of(source: str | os.PathLike[str] | Scan) -> str:
    """Return the path of a store, scan file or opened scan."""
    return str(source.path if isinstance(source, Scan) else source)


@contextmanager
def opened(source: str | os.PathLike[str] | Scan, room: Path, **calibration: Any) -> Iterator[Store]:
    """Yield `source` as a store; a scan file is ingested into a temporary one in the folder `room` first.

    Raises a `UserError` when it is neither, or when a store is given together with options that only a scan file needs.
    """
    path = source if isinstance(source, Scan) else existing(source, "the scan or store")
    if not isinstance(path, Scan) and is_store(path):
        given = [name for name, value in calibration.items() if value is not None and (name, value) != _AUTO]
        if given:
            flag = given[0].replace("_", "-")
            raise UserError(f"'{source}' is a store with its own calibration; leave out --{flag}")
        with Store.open(path) as store:
            yield store
        return
    with tempfile.TemporaryDirectory(dir=room, prefix=".scan.", suffix=".part") as folder:
        temporary = Path(folder) / "scan.h5"
        ingest(path, temporary, **calibration)
        with Store.open(temporary) as store:
            yield store


_AUTO = ("centre", "auto")


def is_store(path: Path) -> bool:
    """Say whether `path` is to be opened as a store rather than read as a scan.

    Anything called .h5 that does not open as HDF5 counts as a store too, so that the message says what is wrong.
    """
    if not path.is_file():
        return False
    if not h5py.is_hdf5(path):
        return path.suffix == ".h5"
    try:
        with h5py.File(path) as file:
            return "patterns" in file and "schema" in file.attrs
    except OSError:
        return path.suffix == ".h5"


MIN_PATTERNS = 30  # indexed patterns below which nothing is said about the calibration
MIN_SCALE_ERROR, MIN_CENTRE_ERROR_PX = 0.004, 0.5
"""Smallest error of the scale (relative) and of the centre that a note is made of."""

MIN_SAME_SIDE = 0.8  # share of the patterns that must see the error on the same side


class GeometryFit(NamedTuple):
    """`figures` for the summary, empty where nothing was refined; and `notes` for the user, one sentence each."""

    figures: dict[str, Any]
    notes: list[str]


def fit_geometry(predictions: Predictions, geometry: Geometry) -> GeometryFit:
    """Return what the refined candidates of the indexed patterns say about the calibration `geometry`.

    Figures are `median_ncc` of the best candidates, and `fitted` with `scale_inv_angstrom` per pixel (median, and half
    the distance of the 16th and 84th percentile as `scale_spread`), and the same of the direct beam's place,
    `centre_px` and `centre_spread_px`; these are None without indexed patterns.
    """
    if predictions.ncc is None or predictions.scale is None or predictions.centre_px is None:
        return GeometryFit({}, [])
    seen = predictions.indexed & np.isfinite(predictions.scale)
    if not seen.any():
        return GeometryFit({"median_ncc": None, "fitted": None}, [])
    scale, centre = predictions.scale[seen].astype(np.float64), predictions.centre_px[seen].astype(np.float64)
    found, place = float(np.median(scale)), np.median(centre, axis=0)
    fitted = {
        "scale_inv_angstrom": found * geometry.scale_inv_angstrom,
        "scale_spread": _spread(scale) * geometry.scale_inv_angstrom,
        "centre_px": place.tolist(),
        "centre_spread_px": [_spread(column) for column in centre.T],
    }
    figures = {"median_ncc": float(np.median(predictions.ncc[seen, 0])), "fitted": fitted}
    notes = []
    if int(seen.sum()) >= MIN_PATTERNS:
        if abs(found - 1) > MIN_SCALE_ERROR and np.mean((scale > 1) == (found > 1)) >= MIN_SAME_SIDE:
            notes.append(
                f"the patterns' scale is {abs(found - 1):.1%} {'larger' if found > 1 else 'smaller'} than their"
                f" calibration says: {fitted['scale_inv_angstrom']:.5g} instead of"
                f" {geometry.scale_inv_angstrom:.5g} 1/Å per pixel"
            )
        stated = np.asarray(geometry.centre_px)
        alike = ((centre > stated) == (place > stated)).mean(axis=0)
        if ((abs(place - stated) > MIN_CENTRE_ERROR_PX) & (alike >= MIN_SAME_SIDE)).any():
            notes.append(
                f"the direct beam is at row {place[0]:.1f}, column {place[1]:.1f}, but the calibration says"
                f" {stated[0]:.1f}, {stated[1]:.1f}"
            )
    return GeometryFit(figures, notes)


def _spread(values: np.ndarray[Any, Any]) -> float:
    low, high = np.percentile(values, (16, 84))
    return float(high - low) / 2
