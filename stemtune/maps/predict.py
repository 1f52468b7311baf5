"""A scan or a store and a model become a map folder: map.h5, map.ang, map.ctf, pictures and a summary."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch

from stemtune import __version__
from stemtune.data.ingest import ingest
from stemtune.data.labels.orix_file import read_with_orix
from stemtune.data.store import Store
from stemtune.errors import UserError
from stemtune.files import existing, replaceable_folder, whole_folder
from stemtune.learning.checkpoint import load_model
from stemtune.learning.model import OrientationModel
from stemtune.maps.calibration import found_calibration
from stemtune.maps.ctf import write_ctf
from stemtune.maps.evaluate import compare
from stemtune.maps.export import check_same, write_ang
from stemtune.maps.figures import draw_scalar
from stemtune.maps.frames import scan_rotation_deg, to_scan_frame
from stemtune.maps.indexing import DIM_SHARE, LEAST_FIT, LEAST_SIGNAL, LEAST_SIGNAL_DIM
from stemtune.maps.inference import Answered, Predictor
from stemtune.maps.ipf import DIRECTIONS, draw_ipf
from stemtune.maps.orientation_map import NOT_INDEXED, OrientationMap
from stemtune.maps.truth import grid_pixel, grid_shape, truth_of_store
from stemtune.processes import Spread

_OURS = ("map.h5", "map.ang", "map.ctf", "ipf_?.png", "confidence.png", "overlay.png", "summary.json")


def predict(
    source: str | os.PathLike[str],
    model_folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    batch: int = 256,
    *,
    alternatives: int = 5,
    device: torch.device | str | None = None,
    refine: bool = False,
    spread: Spread | None = None,
    **calibration: Any,
) -> dict[str, Any]:
    """Write the orientation map of `source` to the folder `out` and return its summary.

    Parameters
    ----------
    source
        A store, or a scan file that `data.ingest` reads. A store that is no scan becomes a map of one row, in the
        order of the store.
    model_folder
        The model.
    out
        The map folder; a map that stands there is replaced, a folder with anything else in it is refused.
    batch
        Patterns at a time.
    alternatives
        How many different answers to keep per pixel.
    device
        Where to work; left out, the GPU if there is one.
    refine
        Fit the model's answers to the patterns; see `maps.refine`.
    spread
        What works on the batches, instead of this process: the nodes of a Ray cluster for instance, which have to see
        the model folder, the store and, of a scan file, the folder beside `out`.
    **calibration
        What `data.ingest.ingest` takes, for a scan file.

    Returns
    -------
    dict
        What `summary.json` holds: `patterns`, `indexed_fraction`, `patterns_per_second` (from reading to answers),
        `seconds` (of the whole command), `model`, `median_confidence`, `notes`, and with a truth in the store
        `disorientation` and the rest of `maps.evaluate.compare`. Refined, also `median_goodness` and `fitted`, see
        `maps.calibration`.

    Raises
    ------
    UserError
        For unusable input, before anything is written.
    """
    begun = time.perf_counter()
    target = replaceable_folder(out, _OURS, "a map")
    model = load_model(model_folder)
    with whole_folder(target) as part, opened(source, target.parent, **calibration) as store:
        if store.n < 2:
            raise UserError(f"'{source}' holds one pattern, but a map needs at least two")
        predictor = Predictor(model, store, batch, alternatives, device, refine)
        for note in predictor.notes:
            print(f"note: {note}", file=sys.stderr)
        started = time.perf_counter()
        answered = predictor.run() if spread is None else predictor.over(spread, Path(model_folder).resolve())
        rate = store.n / (time.perf_counter() - started)
        fitted = found_calibration(answered, store.geometry)
        for note in fitted.notes:
            print(f"note: {note}", file=sys.stderr)
        facts = _facts(source, model_folder, store, model, calibration, predictor)
        orientation_map = as_map(store, answered, model, facts)
        write_map(orientation_map, part)
        summary = {
            "patterns": store.n,
            "indexed_fraction": float(answered.indexed.mean()),
            "patterns_per_second": rate,
            "seconds": 0.0,
            "model": str(model_folder),
            "median_confidence": _median(answered.confidence[answered.indexed, 0]),
            "median_fit": _median(answered.fit[answered.indexed]),
            "scan_shape": list(orientation_map.shape),
            "step_nm": orientation_map.step_nm,
            "notes": [*store.attrs.get("notes", []), *predictor.notes, *fitted.notes],
            **fitted.figures,
            **{name: facts[name] for name in ("architecture", "phase", "source", "geometry", "device", "stemtune")},
        }
        if store.labelled.any():
            summary |= compare(orientation_map, truth_of_store(store))
        summary["seconds"] = time.perf_counter() - begun
        (part / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def write_map(orientation_map: OrientationMap, folder: Path) -> None:
    """Write map.h5, map.ang, map.ctf and the pictures of a map into `folder`, and check what is read back."""
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


def as_map(store: Store, answered: Answered, model: OrientationModel, facts: Mapping[str, Any]) -> OrientationMap:
    """Lay the answers to the patterns of `store` out on its scan, in the scan's frame (`maps.frames`).

    Positions without a pattern are not indexed.
    """
    shape, pixel = grid_shape(store), grid_pixel(store)

    def laid(values: npt.NDArray[Any], empty: float) -> npt.NDArray[Any]:
        grid = np.full((shape[0] * shape[1], *values.shape[1:]), empty, dtype=values.dtype)
        grid[pixel] = values
        return grid

    answers = to_scan_frame(answered.answers, scan_rotation_deg(store.attrs))
    return OrientationMap(
        shape=shape,
        answers=laid(answers, np.nan),
        answer_confidence=laid(answered.confidence, 0),
        phase=laid(np.where(answered.indexed, 0, NOT_INDEXED).astype(np.int16), NOT_INDEXED),
        signal=laid(answered.signal, 0),
        fit=laid(answered.fit, 0),
        phases=[model.phase],
        step_nm=_step(store),
        attrs=facts,
        goodness=None if answered.goodness is None else laid(answered.goodness, np.nan),
    )


@contextmanager
def opened(source: str | os.PathLike[str], room: Path, **calibration: Any) -> Iterator[Store]:
    """Yield `source` as a store; a scan file is ingested into a temporary one in the folder `room` first.

    Raises
    ------
    UserError
        When it is neither, or when a store is given together with options that only a scan file needs.
    """
    path = existing(source, "the scan or store")
    if is_store(path):
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


def _facts(
    source: str | os.PathLike[str],
    model_folder: str | os.PathLike[str],
    store: Store,
    model: OrientationModel,
    calibration: Mapping[str, Any],
    predictor: Predictor,
) -> dict[str, Any]:
    attrs = store.attrs
    return {
        "source": str(Path(source).expanduser().absolute()),
        "origin_sha256": attrs.get("origin_sha256"),
        "origin_window": attrs.get("origin_window"),
        "origin_centre_px": attrs.get("origin_centre_px"),
        "scan_rotation_deg": scan_rotation_deg(attrs),
        "calibration": {name: value for name, value in calibration.items() if value is not None},
        "model": str(Path(model_folder).expanduser().absolute()),
        "architecture": model.config.model.name,
        "phase": model.phase.name,
        "geometry": store.geometry.to_dict(),
        "model_geometry": model.geometry.to_dict(),
        "device": str(predictor.device),
        "not_indexed_below": {
            "fit": LEAST_FIT,
            "signal": LEAST_SIGNAL,
            "signal_dim": LEAST_SIGNAL_DIM,
            "dim": DIM_SHARE,
        },
        "stemtune": __version__,
    }


def _step(store: Store) -> tuple[float, float] | None:
    """Return the scan's step in nm along rows and columns; None where it is not known or the store is no scan."""
    step = store.attrs.get("step_nm")
    if step is None or store.scan_shape is None:
        return None
    dy, dx = (float(value) for value in np.broadcast_to(np.asarray(step, dtype=float).ravel(), 2))
    return (dy, dx) if np.isfinite([dy, dx]).all() and min(dy, dx) > 0 else None


def _median(values: npt.NDArray[Any]) -> float | None:
    return float(np.median(values)) if len(values) else None
