"""What can be said of a map where nobody knows the truth: coherence, fit to the patterns, agreement with another map.

None of these is an accuracy. Two maps of one method share its mistakes, a map can be coherent and wrong all over a
grain, and a pseudo-symmetric variant explains nearly as much of a pattern. Together they tell a map that follows the
specimen from one that follows the noise, and how much two maps can be relied on where they differ.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stemtune.analysis.evaluation.evaluate import RIGHT_DEG, families, in_percent, write_figures
from stemtune.analysis.evaluation.ground_truth import Truth, grid_pixel, grid_shape, map_or_labels, read_truth
from stemtune.crystal.symmetry import disorientation_beam180_deg, disorientation_deg
from stemtune.crystal_map.orientation_map import OrientationMap
from stemtune.crystal_map.scan_rotation import scan_rotation_deg, to_pattern_frame
from stemtune.dataset.store import Store
from stemtune.errors import UserError
from stemtune.indexing.spot_check import SpotCheck

_BATCH = 512  # patterns that are compared with their spots at a time


def judge(
    map: str | os.PathLike[str],
    store: str | os.PathLike[str],
    other: str | os.PathLike[str] | None = None,
    json: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Judge the map (or the labels of the store) at `map` by the patterns of `store`; see `against_patterns`.

    Parameters
    ----------
    map
        A `map.h5` of stemtune, or its folder, or a labelled store.
    store
        The store with the patterns.
    other
        Another map, as `analysis.evaluation.ground_truth.read_truth` takes it.
    json
        File for the figures.
    """
    result = against_patterns(map_or_labels(map), store, None if other is None else read_truth(other))
    write_figures(result, json)
    return result


def against_patterns(
    orientation_map: OrientationMap, store: str | os.PathLike[str], other: Truth | None = None
) -> dict[str, Any]:
    """Return how coherent a map is, how well it explains the patterns of `store`, and how far it agrees with another.

    Parameters
    ----------
    orientation_map
        The map.
    store
        The store with the patterns of every pixel; its labels, if it has any, are not looked at.
    other
        Another map of the same pixels.

    Returns
    -------
    dict
        - `pixels`, `indexed`: pixels of the map, and the share that it indexes;
        - `coherence`: of the `pairs` of neighbours (right and below) that are both indexed as the same phase, the
          share `within_5deg` of each other, the mean disorientation inside grains, that is of those pairs,
          `mean_inside_deg`, and the share modulo beam-180, `within_5deg_beam180`; `alone`, the share of indexed pixels
          that have such neighbours, but none within 5 degrees;
        - `fit`: medians of `fit` and `signal` over the indexed pixels (`indexing.spot_check`);
        - with another map `agreement` over the pixels that `both` index as the same Laue class (a share of the map):
          `median_deg`, `within_5deg`, and that share `beam180`, modulo half a turn about the beam, and `pseudo`, modulo
          pseudo-symmetric variants as well; `families`, what the other map has there, as shares; and `fit_here` and
          `fit_other`, the median fit of both on the same pixels.

    Raises
    ------
    UserError
        When map, patterns and the other map do not fit together, or nothing is indexed.
    """
    with Store.open(store) as opened:
        if grid_shape(opened) != orientation_map.shape:
            raise UserError(
                f"the map has {_by(orientation_map.shape)} pixels, but '{store}' {_by(grid_shape(opened))} patterns"
            )
        indexed = orientation_map.indexed
        if not indexed.any():
            raise UserError("the map indexes no pixel, so there is nothing to judge")
        fit, signal = spot_fit(orientation_map.orientation, orientation_map, opened)
        result: dict[str, Any] = {
            "pixels": len(indexed),
            "indexed": float(indexed.mean()),
            "coherence": coherence(orientation_map),
            "fit": {"fit": float(np.nanmedian(fit)), "signal": float(np.nanmedian(signal))},
        }
        if other is None:
            return result
        result["agreement"] = agreement(orientation_map, other)
        both = shared(orientation_map, other)
        theirs, _ = spot_fit(np.where(both[:, None], other.orientation, np.nan), orientation_map, opened)
        result["agreement"] |= {
            "fit_here": float(np.nanmedian(fit[both])) if both.any() else None,
            "fit_other": float(np.nanmedian(theirs[both])) if both.any() else None,
        }
    return result


def spot_fit(
    orientation: npt.NDArray[np.float64], orientation_map: OrientationMap, store: Store
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return fit and signal (n,) of `orientation` (n, 4), of the map's phases, to the patterns; NaN where it is NaN."""
    fit, signal = (np.full(len(orientation), np.nan) for _ in range(2))
    orientation = to_pattern_frame(orientation, scan_rotation_deg(store.attrs))
    pixel = grid_pixel(store)
    for number, phase in enumerate(orientation_map.phases):
        asked = np.isfinite(orientation).all(axis=1) & (orientation_map.phase == number)
        rows = np.flatnonzero(asked[pixel])
        if not len(rows):
            continue
        check = SpotCheck(phase, store.geometry)
        for start in range(0, len(rows), _BATCH):
            some = rows[start : start + _BATCH]
            scores = check(torch.from_numpy(store.take(some)), torch.from_numpy(orientation[pixel[some]]))
            fit[pixel[some]], signal[pixel[some]] = scores.fit.numpy(), scores.signal.numpy()
    return fit, signal


def coherence(orientation_map: OrientationMap) -> dict[str, Any]:
    """Return how far neighbouring pixels of a map have the same orientation; see `against_patterns`."""
    grid = np.arange(len(orientation_map.phase)).reshape(orientation_map.shape)
    first = np.concatenate((grid[:, :-1].ravel(), grid[:-1].ravel()))
    second = np.concatenate((grid[:, 1:].ravel(), grid[1:].ravel()))
    phase = orientation_map.phase
    together = (phase[first] >= 0) & (phase[first] == phase[second])
    first, second = first[together], second[together]
    if not len(first):
        return {"pairs": 0}
    strict, modulo = np.empty(len(first)), np.empty(len(first))
    for number, crystal in enumerate(orientation_map.phases):
        own = phase[first] == number
        g1, g2 = (torch.from_numpy(orientation_map.orientation[some[own]]) for some in (first, second))
        strict[own] = disorientation_deg(g1, g2, crystal.symmetry).numpy()
        modulo[own] = disorientation_beam180_deg(g1, g2, crystal.symmetry).numpy()
    near = strict < RIGHT_DEG
    beside, company = np.zeros(len(phase), dtype=bool), np.zeros(len(phase), dtype=bool)
    for some in (first, second):
        beside[some] = True
        company[some[near]] = True
    return {
        "pairs": len(first),
        "within_5deg": float(near.mean()),
        "within_5deg_beam180": float((modulo < RIGHT_DEG).mean()),
        "mean_inside_deg": float(strict[near].mean()) if near.any() else None,
        "alone": float((~company[beside]).mean()),
    }


def shared(orientation_map: OrientationMap, other: Truth) -> npt.NDArray[np.bool_]:
    """Return the pixels (n,) that both maps index as the same Laue class."""
    own = np.array([phase.symmetry.laue for phase in orientation_map.phases])
    both = orientation_map.indexed & (other.phase >= 0) & np.isfinite(other.orientation).all(axis=1)
    both[both] = own[orientation_map.phase[both]] == np.array(other.laue)[other.phase[both]]
    return both


def agreement(orientation_map: OrientationMap, other: Truth) -> dict[str, Any]:
    """Return how far two maps agree on the pixels that both index; see `against_patterns`."""
    if other.shape != orientation_map.shape:
        raise UserError(f"the map has {_by(orientation_map.shape)} pixels, but the other map {_by(other.shape)}")
    both = shared(orientation_map, other)
    result: dict[str, Any] = {"both": float(both.mean())}
    if not both.any():
        return result
    angles, counts = [], dict[str, int]()
    for number, phase in enumerate(orientation_map.phases):
        own = both & (orientation_map.phase == number)
        here, there = (torch.from_numpy(some[own]) for some in (orientation_map.orientation, other.orientation))
        angles.append(disorientation_deg(here, there, phase.symmetry).numpy())
        for name, count in families(here, there, phase).items():
            counts[name] = counts.get(name, 0) + count
    strict, total = np.concatenate(angles), int(both.sum())
    shares = {name: count / total for name, count in counts.items()}
    return {
        **result,
        "median_deg": float(np.median(strict)),
        "within_5deg": float((strict < RIGHT_DEG).mean()),
        "beam180": shares["right"] + shares["beam180"],
        "pseudo": sum(shares.values()),
        "families": {**shares, "other": 1 - sum(shares.values())},
    }


def agreement_in_words(figures: Mapping[str, Any]) -> str:
    """Return the figures of `against_patterns` as a few lines of text."""
    near, fit = figures["coherence"], figures["fit"]
    lines = [
        f"{figures['pixels']:,} pixels, {in_percent(figures['indexed'])} of them indexed",
        f"fit         median {fit['fit']:.3f} of the scattered intensity on predicted spots beyond chance,"
        f" signal {fit['signal']:.1f}",
    ]
    if near["pairs"]:
        inside = near["mean_inside_deg"]
        lines.append(
            f"coherence   {in_percent(near['within_5deg'])} of neighbours within 5°"
            f" ({in_percent(near['within_5deg_beam180'])} modulo beam-180),"
            f" {'-' if inside is None else f'{inside:.2f}°'} apart inside grains (mean);"
            f" {in_percent(near['alone'])} of the pixels have no neighbour within 5°"
        )
    shared = figures.get("agreement")
    if shared is None:
        return "\n".join(lines)
    lines.append(f"other map   {in_percent(shared['both'])} of the pixels are indexed in both")
    if "within_5deg" in shared:
        lines += [
            f"agreement   within 5° {in_percent(shared['within_5deg'])}, modulo beam-180"
            f" {in_percent(shared['beam180'])}, modulo pseudo-symmetry {in_percent(shared['pseudo'])};"
            f" median {shared['median_deg']:.2f}°",
            f"fit there   median {shared['fit_here']:.3f} here, {shared['fit_other']:.3f} by the other map",
        ]
    return "\n".join(lines)


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"
