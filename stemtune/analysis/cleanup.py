"""Clean-up of a map by what neighbours say: explicit, reversible, and only where the pixel itself could agree.

Two things are mended. A small patch of pixels that stands alone in its surroundings takes another answer when most
neighbours agree on it and the pattern could mean it: one of the model's own further answers, the twin turned by half
a turn about the beam, or a pseudo-symmetric variant. And a pixel that is not indexed is filled when nearly all around
it are and the neighbours agree. A patch that is large enough to be a grain is left alone, so are boundaries, and
so is a wrong pixel that has nothing to do with what its neighbours show. What was changed and what was there before
stay in the map, and `undone` brings it back.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stemtune.analysis.boundaries import equivalents
from stemtune.analysis.grains import mean_orientations, patches
from stemtune.analysis.neighbors import Neighbourhood
from stemtune.config import CleanConfig
from stemtune.crystal.phase import Phase
from stemtune.crystal.pseudo_symmetry import pseudo_variants
from stemtune.crystal.rotations import multiply
from stemtune.crystal.symmetry import beam180, closeness, reduce_to_fundamental_zone
from stemtune.crystal_map.orientation_map import OrientationMap
from stemtune.errors import UserError

ALTERNATIVE, TWIN, VARIANT, FILLED = 1, 2, 3, 4
"""Values of the layer `changed`, 0 for unchanged: a further answer of the model, the beam-180 twin, a pseudo-symmetric
variant (or its twin); a pixel that was not indexed."""

MEANING = {
    ALTERNATIVE: "another answer of the model",
    TWIN: "the beam-180 twin",
    VARIANT: "a pseudo-symmetric variant",
    FILLED: "filled",
}

CHANGED = "changed"
BEFORE = ("before_orientation", "before_confidence", "before_phase", "before_rank")
"""Layers: what was done to each pixel; what was there before (NaN and -1 where nothing changed), and at which place
among the answers that stands now (0: nowhere). Of a refined map also `before_ncc`."""

_AROUND = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0)]


def cleaned(orientation_map: OrientationMap, settings: CleanConfig) -> OrientationMap:
    """Return a copy of the map with pseudo-symmetric answers mended and single gaps filled.

    Pixels are judged by the neighbours as they are in the map that is given, all at once, so that no change leads to
    another. The layers `CHANGED` and `BEFORE` tell what was done.

    Parameters
    ----------
    orientation_map
        The map.
    settings
        See `config.CleanConfig`.

    Raises
    ------
    UserError
        When the map has been cleaned already.
    """
    if CHANGED in orientation_map.layers:
        raise UserError("the map has been cleaned already; undo that first (stemtune clean MAP --undo)")
    made = dataclasses.replace(
        orientation_map,
        answers=orientation_map.answers.copy(),
        answer_confidence=orientation_map.answer_confidence.copy(),
        phase=orientation_map.phase.copy(),
        ncc=None if orientation_map.ncc is None else orientation_map.ncc.copy(),
    )
    n = len(made.phase)
    changed = np.zeros(n, dtype=np.uint8)
    before: dict[str, npt.NDArray[Any]] = {
        "before_orientation": np.full((n, 4), np.nan),
        "before_confidence": np.full(n, np.nan, dtype=np.float32),
        "before_phase": np.full(n, -1, dtype=np.int16),
        "before_rank": np.zeros(n, dtype=np.uint8),
    }
    if orientation_map.ncc is not None:
        before["before_ncc"] = np.full(n, np.nan, dtype=np.float32)
    near = Neighbourhood(orientation_map)
    patch = patches(near, settings.tolerance)
    trusted = (np.bincount(patch, minlength=n)[patch] > settings.patch) & orientation_map.indexed
    suspect = np.flatnonzero(orientation_map.indexed & ~trusted)
    around, there = _around(orientation_map.shape)
    for index, phase in enumerate(orientation_map.crystals):
        voter = trusted & (orientation_map.phase == index)
        own = suspect[orientation_map.phase[suspect] == index]
        if len(own):
            _mend(orientation_map, made, changed, before, own, (around, there & voter[around]), phase, settings)
        gap = np.flatnonzero(~orientation_map.indexed & orientation_map.measured)
        alone = gap[(~(orientation_map.indexed[around[gap]] & there[gap])).sum(1) <= 8 - settings.surrounded]
        if settings.fill and len(alone):
            _fill(orientation_map, made, changed, before, alone, (around, there & voter[around]), index, settings)
    return dataclasses.replace(made, layers={**orientation_map.layers, CHANGED: changed, **before})


def undone(orientation_map: OrientationMap) -> OrientationMap:
    """Return the map as it was before `cleaned`.

    Raises
    ------
    UserError
        When it has not been cleaned.
    """
    if CHANGED not in orientation_map.layers:
        raise UserError("the map has not been cleaned, so there is nothing to undo")
    layers = dict(orientation_map.layers)
    changed = layers.pop(CHANGED)
    orientation, confidence, phase, rank = (layers.pop(name) for name in BEFORE)
    fitted = layers.pop("before_ncc", None)
    answers, trust = orientation_map.answers.copy(), orientation_map.answer_confidence.copy()
    ncc = None if orientation_map.ncc is None else orientation_map.ncc.copy()
    rows = np.flatnonzero(changed)
    _swap(rows, rank[rows].astype(np.intp), answers, trust, ncc)
    answers[rows, 0], trust[rows, 0] = orientation[rows], confidence[rows]
    if ncc is not None and fitted is not None:
        ncc[rows, 0] = fitted[rows]
    old = orientation_map.phase.copy()
    old[rows] = phase[rows]
    return dataclasses.replace(
        orientation_map, answers=answers, answer_confidence=trust, phase=old, ncc=ncc, layers=layers
    )


def clean_figures(orientation_map: OrientationMap) -> dict[str, int]:
    """Return how many pixels of a cleaned map were changed, by what was done."""
    changed = orientation_map.layers[CHANGED]
    return {meaning: int((changed == code).sum()) for code, meaning in MEANING.items()}


def _around(shape: tuple[int, int]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
    """Return the flat indices (n, 8) of each pixel's neighbours, and which of them exist."""
    rows, columns = shape
    row, column = np.divmod(np.arange(rows * columns), columns)
    down, right = np.array(_AROUND).T
    i, j = row[:, None] + down, column[:, None] + right
    there = (i >= 0) & (i < rows) & (j >= 0) & (j < columns)
    return np.where(there, i * columns + j, 0), there


def _candidates(answers: torch.Tensor, phase: Phase) -> tuple[torch.Tensor, list[int]]:
    """Return what pixels with these answers (m, k, 4) could be instead (m, c, 4), and the kind of each."""
    best = answers[:, 0]
    twin = beam180(best)
    parts, kinds = [answers[:, 1:], twin[:, None]], [ALTERNATIVE] * (answers.shape[1] - 1) + [TWIN]
    for _, turn in pseudo_variants(phase):
        # Both ways: what the truth is taken for is `turn * truth`, and back goes its inverse, which may be no variant.
        for variant in equivalents(turn, phase.symmetry):
            parts += [multiply(variant, best)[:, None], multiply(variant, twin)[:, None]]
            kinds += [VARIANT, VARIANT]
    return torch.cat(parts, dim=1), kinds


def _votes(
    candidates: torch.Tensor, voters: torch.Tensor, counted: torch.Tensor, phase: Phase, tolerance: float
) -> torch.Tensor:
    """Return how many of the voters (m, 8, 4), of those that count, agree with each candidate (m, c, 4): (m, c)."""
    apart = closeness(candidates[:, :, None], voters[:, None], phase.symmetry)
    return ((apart > float(np.cos(np.deg2rad(tolerance) / 2))) & counted[:, None]).sum(-1)


_PART = 2048


def _mend(
    orientation_map: OrientationMap,
    made: OrientationMap,
    changed: npt.NDArray[np.uint8],
    before: dict[str, npt.NDArray[Any]],
    suspects: npt.NDArray[np.intp],
    neighbours: tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]],
    phase: Phase,
    settings: CleanConfig,
) -> None:
    around, counts = neighbours
    best = torch.from_numpy(orientation_map.answers[:, 0])
    for start in range(0, len(suspects), _PART):
        rows = suspects[start : start + _PART]
        candidates, kinds = _candidates(torch.from_numpy(orientation_map.answers[rows]), phase)
        counted = torch.from_numpy(counts[rows])
        votes = _votes(candidates, best[torch.from_numpy(around[rows])], counted, phase, settings.tolerance).numpy()
        # Among equals the first: the model's own answers come before what only symmetry suggests.
        chosen = votes.argmax(1)
        most = votes[np.arange(len(rows)), chosen]
        enough = (most >= settings.agree) & (most > counts[rows].sum(1) / 2)
        rows, chosen, found = rows[enough], chosen[enough], candidates[enough]
        kind = np.array(kinds, dtype=np.uint8)[chosen]
        _note(orientation_map, changed, before, rows, kind)
        given = kind == ALTERNATIVE
        before["before_rank"][rows[given]] = chosen[given] + 1
        _swap(rows[given], chosen[given] + 1, made.answers, made.answer_confidence, made.ncc)
        other = rows[~given]
        picked = found[torch.from_numpy(np.flatnonzero(~given)), torch.from_numpy(chosen[~given])]
        _put(made, other, reduce_to_fundamental_zone(picked, phase.symmetry).numpy())


def _fill(
    orientation_map: OrientationMap,
    made: OrientationMap,
    changed: npt.NDArray[np.uint8],
    before: dict[str, npt.NDArray[Any]],
    gaps: npt.NDArray[np.intp],
    neighbours: tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]],
    index: int,
    settings: CleanConfig,
) -> None:
    """Fill single gaps with the model's answer that the neighbours share, or with the neighbours' mean."""
    around, counts = neighbours
    phase, best = orientation_map.crystals[index], torch.from_numpy(orientation_map.answers[:, 0])
    voters, counted = best[torch.from_numpy(around[gaps])], torch.from_numpy(counts[gaps])
    between = _votes(voters, voters, counted, phase, settings.tolerance).numpy() * counts[gaps]
    lead, most = between.argmax(1), between.max(1)
    enough = (most >= settings.agree) & (most > counts[gaps].sum(1) / 2)
    gaps, lead = gaps[enough], lead[enough]
    if not len(gaps):
        return
    voters, counted = voters[torch.from_numpy(enough)], counted[torch.from_numpy(enough)]
    leader = voters[torch.arange(len(gaps)), torch.from_numpy(lead)]
    joins = closeness(leader[:, None], voters, phase.symmetry) > float(np.cos(np.deg2rad(settings.tolerance) / 2))
    pixel, place = torch.nonzero(joins & counted, as_tuple=True)
    mean = mean_orientations(voters[pixel, place], pixel.numpy(), len(gaps), phase.symmetry)
    own = torch.from_numpy(orientation_map.answers[gaps])
    agrees = closeness(own, leader[:, None], phase.symmetry) > float(np.cos(np.deg2rad(settings.tolerance) / 2))
    _note(orientation_map, changed, before, gaps, np.full(len(gaps), FILLED, dtype=np.uint8))
    said = agrees.any(1).numpy()
    rank = agrees.to(torch.uint8).argmax(1).numpy()[said]
    before["before_rank"][gaps[said]] = rank
    _swap(gaps[said], rank, made.answers, made.answer_confidence, made.ncc)
    _put(made, gaps[~said], mean.numpy()[~said])
    made.phase[gaps] = index


def _put(made: OrientationMap, rows: npt.NDArray[np.intp], orientation: npt.NDArray[np.float64]) -> None:
    """Make `orientation` the best answer of `rows`; the model has not said how far it believes this, nor fitted it."""
    made.answers[rows, 0], made.answer_confidence[rows, 0] = orientation, 0
    if made.ncc is not None:
        made.ncc[rows, 0] = np.nan


def _note(
    orientation_map: OrientationMap,
    changed: npt.NDArray[np.uint8],
    before: dict[str, npt.NDArray[Any]],
    rows: npt.NDArray[np.intp],
    kind: npt.NDArray[np.uint8],
) -> None:
    changed[rows] = kind
    before["before_orientation"][rows] = orientation_map.answers[rows, 0]
    before["before_confidence"][rows] = orientation_map.answer_confidence[rows, 0]
    before["before_phase"][rows] = orientation_map.phase[rows]
    if orientation_map.ncc is not None:
        before["before_ncc"][rows] = orientation_map.ncc[rows, 0]


def _swap(rows: npt.NDArray[np.intp], place: npt.NDArray[np.intp], *columns: npt.NDArray[Any] | None) -> None:
    """Let the best answer of `rows` and the one at `place` change places in each of `columns` (n, k, ...)."""
    for values in columns:
        if values is not None:
            values[rows, 0], values[rows, place] = values[rows, place].copy(), values[rows, 0].copy()


__all__ = ["BEFORE", "CHANGED", "MEANING", "clean_figures", "cleaned", "undone"]
