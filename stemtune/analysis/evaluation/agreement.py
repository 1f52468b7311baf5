"""How good a map is where the truth is not known: coherence, fit to the patterns, agreement with another map.

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

from stemtune.analysis.evaluation.evaluate import RIGHT_DEG, confusion, disorientations_deg, in_percent, same_laue
from stemtune.analysis.evaluation.ground_truth import map_or_labels, read_truth
from stemtune.crystal_map.frame_rotations import scan_rotation_deg, to_pattern_frame
from stemtune.crystal_map.orientation_map import NOT_INDEXED, OrientationMap
from stemtune.dataset.store import Store
from stemtune.errors import UserError
from stemtune.indexing.spot_check import SpotCheck

_BATCH = 512  # patterns that are compared with their spots at a time


def against_patterns(
    orientation_map: OrientationMap, store: str | os.PathLike[str], other: OrientationMap | None = None
) -> dict[str, Any]:
    """Return how coherent a map is, how well it explains the patterns of `store`, and how far it agrees with another.

    - `orientation_map`: the map.
    - `store`: the store with the patterns of every pixel; its labels, if it has any, are not looked at.
    - `other`: another map of the same pixels.

    Returns
    -------
    dict
        - `pixels`, `indexed`: pixels of the map, and the share that it indexes;
        - `coherence`: of the `pairs` of neighbours (right and below) that are both indexed as the same phase, the
          share `within_5deg` of each other, the mean disorientation inside grains, that is of those pairs,
          `mean_inside_deg`, and the share modulo beam-180, `within_5deg_beam180`; `alone`, the share of indexed pixels
          that have such neighbours, but none within 5 degrees;
        - `spots`: medians of `explained_intensity` and `spot_z_score` over the indexed pixels (`indexing.spot_check`);
        - with another map `agreement` over the pixels that `both` index as the same Laue class (a share of the map):
          `median_deg`, `within_5deg`, and that share `beam180`, modulo half a turn about the beam, and `pseudo`, modulo
          pseudo-symmetric variants as well; `families`, what the other map has there, as shares; `explained_here` and
          `explained_by_other`, the median explained intensity of both on the same pixels.

    Raises `UserError` when map, patterns and the other map do not fit together, or nothing is indexed.
    """
    with Store.open(store) as opened:
        if opened.grid_shape != orientation_map.shape:
            raise UserError(
                f"the map has {_by(orientation_map.shape)} pixels, but '{store}' {_by(opened.grid_shape)} patterns"
            )
        indexed = orientation_map.indexed
        if not indexed.any():
            raise UserError("the map indexes no pixel, so there is nothing to judge")
        fit, signal = spot_fit(orientation_map.orientation, orientation_map, opened)
        result: dict[str, Any] = {
            "pixels": len(indexed),
            "indexed": float(indexed.mean()),
            "coherence": coherence(orientation_map),
            "spots": {"explained_intensity": float(np.nanmedian(fit)), "spot_z_score": float(np.nanmedian(signal))},
        }
        if other is None:
            return result
        result["agreement"] = agreement(orientation_map, other)
        both = same_laue(orientation_map, other)
        theirs, _ = spot_fit(np.where(both[:, None], other.orientation, np.nan), orientation_map, opened)
        result["agreement"] |= {
            "explained_here": float(np.nanmedian(fit[both])) if both.any() else None,
            "explained_by_other": float(np.nanmedian(theirs[both])) if both.any() else None,
        }
    return result


def spot_fit(
    orientation: npt.NDArray[np.float64], orientation_map: OrientationMap, store: Store
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return fit and signal (n,) of `orientation` (n, 4), of the map's phases, to the patterns; NaN where it is NaN."""
    fit, signal = (np.full(len(orientation), np.nan) for _ in range(2))
    orientation = to_pattern_frame(orientation, scan_rotation_deg(store.attrs))
    pixel = store.grid_pixel()
    for number, phase in enumerate(orientation_map.crystals):
        asked = np.isfinite(orientation).all(axis=1) & (orientation_map.phase == number)
        rows = np.flatnonzero(asked[pixel])
        if not len(rows):
            continue
        check = SpotCheck(phase, store.geometry)
        for start in range(0, len(rows), _BATCH):
            some = rows[start : start + _BATCH]
            scores = check(torch.from_numpy(store.take(some)), torch.from_numpy(orientation[pixel[some]]))
            fit[pixel[some]], signal[pixel[some]] = scores.explained_intensity.numpy(), scores.spot_z_score.numpy()
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
    g = orientation_map.orientation
    pairs = (g[first], g[second], phase[first], orientation_map.phases)
    strict, modulo = disorientations_deg(*pairs), disorientations_deg(*pairs, modulo_beam180=True)
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


def agreement(orientation_map: OrientationMap, other: OrientationMap) -> dict[str, Any]:
    """Return how far two maps agree on the pixels that both index; see `against_patterns`."""
    if other.shape != orientation_map.shape:
        raise UserError(f"the map has {_by(orientation_map.shape)} pixels, but the other map {_by(other.shape)}")
    both = same_laue(orientation_map, other)
    result: dict[str, Any] = {"both": float(both.mean())}
    if not both.any():
        return result
    phase = np.where(both, orientation_map.phase, NOT_INDEXED)
    pair = (orientation_map.orientation, other.orientation, phase, orientation_map.phases)
    strict = disorientations_deg(*pair)[both]
    families = confusion(*pair)
    return {
        **result,
        "median_deg": float(np.median(strict)),
        "within_5deg": float((strict < RIGHT_DEG).mean()),
        "beam180": families["right"] + families["beam180"],
        "pseudo": 1 - families["other"],
        "families": families,
    }


def describe_agreement(figures: Mapping[str, Any]) -> str:
    """Return the figures of `against_patterns` as a few lines of text."""
    near, spots = figures["coherence"], figures["spots"]
    lines = [
        f"{figures['pixels']:,} pixels, {in_percent(figures['indexed'])} of them indexed",
        f"explained   median {spots['explained_intensity']:.3f} of the scattered intensity, beyond chance,"
        f" spot z-score {spots['spot_z_score']:.1f}",
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
            f"explained   median {shared['explained_here']:.3f} here, {shared['explained_by_other']:.3f} by the other",
        ]
    return "\n".join(lines)


def differ(map: str | os.PathLike[str], other: str | os.PathLike[str]) -> dict[str, Any]:
    """Return how far two maps agree (`agreement`): a `map.h5` or labelled store, and what `read_truth` takes.

    Raises `UserError` when their shapes differ, or there is no pixel that both index as one Laue class.
    """
    figures = agreement(map_or_labels(map), read_truth(other))
    if "median_deg" not in figures:
        raise UserError("no pixel is indexed as the same Laue class in both maps, so there is nothing to compare")
    return figures


def describe_difference(figures: dict[str, Any]) -> str:
    """Return the figures of `differ` as a few lines of text."""
    kinds = ", ".join(f"{name} {in_percent(share)}" for name, share in figures["families"].items())
    return (
        f"indexed in both  {in_percent(figures['both'])} of the pixels\n"
        f"apart            median {figures['median_deg']:.2f}°, within 5° {in_percent(figures['within_5deg'])},"
        f" modulo beam-180 {in_percent(figures['beam180'])}\n"
        f"the other has    {kinds}"
    )


def difference_deg(orientation_map: OrientationMap, other: OrientationMap) -> npt.NDArray[np.float64]:
    """Return the disorientation (n,) of two maps; NaN where not both are indexed, as the same Laue class."""
    phase = np.where(same_laue(orientation_map, other), orientation_map.phase, NOT_INDEXED)
    return disorientations_deg(orientation_map.orientation, other.orientation, phase, orientation_map.phases)


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"
