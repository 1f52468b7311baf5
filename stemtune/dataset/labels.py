"""Labels into a store: into a copy of it that takes its name at the end, so that a kill at any moment loses nothing.

The patterns are copied too. That costs room for a moment and seconds per gigabyte, little beside what labelling
takes, and whoever has the old file mapped goes on reading it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from stemtune._files import existing, replaceable_file, whole_file
from stemtune._version import __version__
from stemtune.crystal.phase import Phase
from stemtune.crystal_map.frame_rotations import scan_rotation_deg, to_pattern_frame
from stemtune.crystal_map.orientation_map import OrientationMap
from stemtune.dataset.schema import (
    COLUMNS,
    LABELLED,
    OVERLAP,
    SIMULATED,
    disk_is_full,
    replaceable_store,
    set_attribute,
)
from stemtune.dataset.store import Store
from stemtune.errors import UserError


@dataclass(frozen=True)
class Labels:
    """Labels of all n patterns of a store."""

    orientation: npt.NDArray[np.float64]  # unit quaternions (n, 4), scalar first, lab-to-crystal; NaN: not indexed
    confidence: npt.NDArray[np.float32]  # (n,), larger is better; NaN: not indexed
    phase: npt.NDArray[np.int16]  # index (n,) into `phases`; -1: not indexed
    phases: Sequence[Phase]
    scores: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)  # the labeller's own (n,), by its own names
    facts: Mapping[str, Any] = field(default_factory=dict)  # how they were made: the method, every option, the origin

    def __post_init__(self) -> None:
        n = len(self.phase)
        if strange := [name for name in self.scores if not name or "/" in name]:
            raise ValueError(f"a score is called {strange[0]!r}, but HDF5 keeps no such name")
        columns: dict[str, npt.NDArray[Any]] = {"orientation": self.orientation, "confidence": self.confidence}
        for name, values in {**columns, **self.scores}.items():
            if len(values) != n:
                raise ValueError(f"there are {len(values)} values of `{name}`, but {n} of `phase`")
        if n and not -1 <= self.phase.min() <= self.phase.max() < len(self.phases):
            raise ValueError(f"`phase` lies in [{self.phase.min()}, {self.phase.max()}] for {len(self.phases)} phases")


def labels_from_map(store: Store, orientation_map: OrientationMap, facts: Mapping[str, Any]) -> Labels:
    """Return the labels that a map gives the patterns of a store.

    The map is in the frame of the scan (`frame_rotations`). It may cover the scan as it is in the store, or the
    whole scan that the store is a part of (`ingest --keep`). A `UserError` says that the store is no scan, or that the
    shapes do not fit.
    """
    if store.scan_shape is None:
        raise UserError(f"'{store.path}' is no scan, so a map cannot be laid on it; `stemtune ingest` makes one")
    row, column = store.position.T.astype(np.int64)
    if orientation_map.shape != store.scan_shape:
        window = store.attrs.get("origin_window")
        if not window or orientation_map.shape[0] < window[2] or orientation_map.shape[1] < window[3]:
            shapes = ["{} x {}".format(*shape) for shape in (orientation_map.shape, store.scan_shape)]
            raise UserError(f"the map has {shapes[0]} positions, but the scan in '{store.path}' has {shapes[1]}")
        row, column = row + int(window[0]), column + int(window[1])
    pixel = row * orientation_map.shape[1] + column
    indexed = orientation_map.indexed[pixel]
    scores = {**orientation_map.layers, **orientation_map.columns()}
    if orientation_map.ncc is not None:
        scores["ncc"] = orientation_map.score("ncc")
    rotation = scan_rotation_deg(store.attrs)  # a map is in the scan's frame, labels in the patterns'
    return Labels(
        orientation=to_pattern_frame(orientation_map.orientation[pixel], rotation),
        confidence=np.where(indexed, orientation_map.answer_confidence[pixel, 0], np.nan).astype(np.float32),
        phase=orientation_map.phase[pixel].astype(np.int16),
        phases=orientation_map.crystals,
        scores={name: values[pixel] for name, values in scores.items() if values.ndim == 1 and name != "phase"},
        facts=facts,
    )


def label_target(store: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Return where a labelled `store` will be written: `out`, or without it the place of the store itself.

    It is asked before the work that makes the labels, so that this is not done in vain: a `UserError` says that nothing
    can be written there, that there is no room for it, or that exact orientations of a simulation would be lost.
    """
    source = existing(store, "the store").resolve()
    with Store.open(store) as opened:
        exact = opened.attrs.get("origin") == SIMULATED and LABELLED not in opened.attrs
    target = source if out is None else replaceable_file(replaceable_store(out)).resolve()  # a link stays one
    if exact and target == source:
        raise UserError(
            f"'{store}' holds the exact orientations of a simulation, which labels would replace; give --out"
        )
    replaceable_file(target)
    if (needed := source.stat().st_size) > (free := shutil.disk_usage(target.parent).free):
        raise UserError(
            f"the labelled store needs {needed / 1e9:,.1f} GB beside the old one, but {free / 1e9:,.1f} GB are free in"
            f" '{target.parent}'; make room, or choose another --out"
        )
    return target


def write_labels(store: str | os.PathLike[str], labels: Labels, out: str | os.PathLike[str] | None = None) -> Path:
    """Write a copy of `store` with these labels to `out`, or without it in the place of the store itself.

    Patterns, positions, groups, splits and the calibration stay; orientation, confidence, phase, scores, the phases'
    CIF text and what is known of overlapping grains are replaced. Returns where the labelled store is; errors are those
    of `label_target`, and that the disk is full.
    """
    source, target = existing(store, "the store").resolve(), label_target(store, out)
    with Store.open(source) as opened:
        if opened.n != len(labels.phase):
            raise ValueError(f"there are labels for {len(labels.phase)} patterns, but '{store}' holds {opened.n}")
    try:
        with whole_file(target) as part:
            shutil.copyfile(source, part)
            shutil.copymode(source, part)
            with h5py.File(part, "r+") as file:
                _replace(file, labels)
                file.flush()
                os.fsync(file.id.get_vfd_handle())
    except OSError as problem:
        if not disk_is_full(problem):
            raise
        raise UserError(
            f"the disk is full, so '{target}' was not written; make room, or choose another --out"
        ) from None
    return target


def with_truth(
    labelled: str | os.PathLike[str],
    truth: str | os.PathLike[str],
    out: str | os.PathLike[str],
    split: npt.NDArray[np.int8] | None = None,
) -> Path:
    """Write a copy of a labelled store whose validation and test patterns carry their true orientations.

    So that what is learned from labels is judged by what is known: labels train, the truth validates. `truth` is the
    store with the same patterns and their exact orientations; `split` (n,) are new splits in the place of those of
    `labelled`. A `UserError` says that the two differ in their number of patterns, or that `out` cannot be written.
    """
    target = label_target(labelled, out)
    with Store.open(labelled) as ours, Store.open(truth) as exact:
        if ours.n != exact.n:
            raise UserError(
                f"'{labelled}' holds {ours.n} patterns, but '{truth}' {exact.n}; give the scan it came from"
            )
        dealt = ours.split if split is None else np.asarray(split, dtype=COLUMNS["split"][1])
        held = (dealt > 0) & (exact.phase >= 0)
        columns = {"split": np.where((dealt > 0) & (exact.phase < 0), 0, dealt).astype(dealt.dtype)}
        for name, values in (("orientation", exact.orientation), ("confidence", 1.0), ("phase", exact.phase)):
            mine = np.array(getattr(ours, name))
            mine[held] = values[held] if isinstance(values, np.ndarray) else values
            columns[name] = mine
    with whole_file(target) as part:
        shutil.copyfile(labelled, part)
        with h5py.File(part, "r+") as file:
            for name, values in columns.items():
                _put(file, name, np.asarray(values, dtype=COLUMNS[name][1]))
    return target


def _replace(file: h5py.File, labels: Labels) -> None:
    """Put the labels into an open store, in the place of those it has."""
    for name in ("orientation", "confidence", "phase"):
        _put(file, name, np.asarray(getattr(labels, name), dtype=COLUMNS[name][1]))
    for name in (*OVERLAP, "scores"):
        if name in file:
            del file[name]
    for name, values in labels.scores.items():
        file[f"scores/{name}"] = np.asarray(values, dtype=np.float32)
    set_attribute(file, "phases_name", [phase.name for phase in labels.phases])
    set_attribute(file, "phases_cif", [phase.cif for phase in labels.phases])
    set_attribute(file, LABELLED, {**labels.facts, "stemtune": __version__})


def _put(file: h5py.File, name: str, values: npt.NDArray[Any]) -> None:
    """Write a column into its place in the file, or anew where it has another type."""
    if file[name].dtype == values.dtype:
        file[name][...] = values
    else:
        del file[name]
        file[name] = values
