"""Clean-up of a map by what neighbours say: explicit, reversible, and only where the pixel itself could agree.

Two things are corrected. A small patch of pixels that differs from its surroundings takes another answer when most
neighbours agree on it and the pattern could mean it: one of the model's own further answers, the twin turned by half
a turn about the beam, or a pseudo-symmetric variant. And a pixel that is not indexed is filled when nearly all around
it are and the neighbours agree. A patch that is large enough to be a grain is left alone, so are boundaries, and
so is a wrong pixel that has nothing to do with what its neighbours show. What was changed and what was there before
stay in the map, and `undone` brings it back.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

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
among the answers that is now (0: nowhere). Of a refined map also `before_ncc`."""

_PART = 2048  # suspect pixels at a time
_AROUND = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0)]


def cleaned(orientation_map: OrientationMap, settings: CleanConfig) -> OrientationMap:
    """Return a copy of the map with pseudo-symmetric answers corrected and single gaps filled.

    Pixels are judged by the neighbours as they are in the map that is given, all at once, so that no change leads to
    another. The layers `CHANGED` and `BEFORE` tell what was done. A map that has been cleaned is a `UserError`.
    """
    if CHANGED in orientation_map.layers:
        raise UserError("the map has been cleaned already; undo that first (stemtune clean MAP --undo)")
    edit = _Edit(orientation_map)
    # Trusted pixels belong to a patch that is large enough to be a grain; only they vote, and they are never changed.
    near = Neighbourhood(orientation_map)
    patch = patches(near, settings.tolerance)
    large = np.bincount(patch, minlength=len(patch))[patch] > settings.patch
    trusted = large & orientation_map.indexed
    around, exists = _around(orientation_map.shape)
    suspect = np.flatnonzero(orientation_map.indexed & ~trusted)
    # Gaps: measured, not indexed, and nearly all around them is indexed.
    gap = np.flatnonzero(~orientation_map.indexed & orientation_map.measured)
    gap = gap[(orientation_map.indexed[around[gap]] & exists[gap]).sum(1) >= settings.min_indexed]
    fills = []
    for index, phase in enumerate(orientation_map.crystals):
        voters = _Voters(around, exists & (trusted & (orientation_map.phase == index))[around], phase)
        own = suspect[orientation_map.phase[suspect] == index]
        _correct(edit, own, voters, settings)
        if settings.fill:
            fills.append(_fill_of(orientation_map, gap, voters, settings))
    if fills and len(gap):
        # Where neighbours of several phases agree among themselves, the phase with the most of them fills the gap.
        most = np.stack([fill.votes for fill in fills])
        winner = most.argmax(0)
        for index, fill in enumerate(fills):
            edit.fill(gap, np.flatnonzero((winner == index) & (most[index] > 0)), fill, index)
    return edit.result()


def undone(orientation_map: OrientationMap) -> OrientationMap:
    """Return the map as it was before `cleaned`.

    Raises `UserError` when it has not been cleaned.
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


class _Voters(NamedTuple):
    """For every pixel its neighbours (n, 8) and which of them vote (n, 8), all of one phase."""

    around: npt.NDArray[np.intp]
    votes: npt.NDArray[np.bool_]
    phase: Phase


class _Fill(NamedTuple):
    """What neighbours of one phase make of m gaps: agreeing votes (m,), 0 where they do not suffice; their mean (m, 4);
    and which of the pixel's own answers agrees with them (m,), -1 for none."""

    votes: npt.NDArray[np.int64]
    mean: npt.NDArray[np.float64]
    rank: npt.NDArray[np.intp]


class _Edit:
    """A map being cleaned up: the copy that is changed, and the layers that say what was there before."""

    def __init__(self, orientation_map: OrientationMap) -> None:
        self.before_map, n = orientation_map, len(orientation_map.phase)
        copied = {name: values.copy() for name, values in orientation_map.columns().items()}
        self.made = dataclasses.replace(orientation_map, **copied)
        self.changed = np.zeros(n, dtype=np.uint8)
        self.before: dict[str, npt.NDArray[Any]] = {
            "before_orientation": np.full((n, 4), np.nan),
            "before_confidence": np.full(n, np.nan, dtype=np.float32),
            "before_phase": np.full(n, -1, dtype=np.int16),
            "before_rank": np.zeros(n, dtype=np.uint8),
        }
        if orientation_map.ncc is not None:
            self.before["before_ncc"] = np.full(n, np.nan, dtype=np.float32)

    def record(self, rows: npt.NDArray[np.intp], kind: npt.NDArray[np.uint8] | int) -> None:
        """Note what is done to `rows`, and what is there before."""
        self.changed[rows] = kind
        self.before["before_orientation"][rows] = self.before_map.answers[rows, 0]
        self.before["before_confidence"][rows] = self.before_map.answer_confidence[rows, 0]
        self.before["before_phase"][rows] = self.before_map.phase[rows]
        if self.before_map.ncc is not None:
            self.before["before_ncc"][rows] = self.before_map.ncc[rows, 0]

    def promote(self, rows: npt.NDArray[np.intp], rank: npt.NDArray[np.intp]) -> None:
        """Make the model's own answer at `rank` the best of `rows`."""
        self.before["before_rank"][rows] = rank
        _swap(rows, rank, self.made.answers, self.made.answer_confidence, self.made.ncc)

    def put(self, rows: npt.NDArray[np.intp], orientation: npt.NDArray[np.float64]) -> None:
        """Make `orientation` the best answer of `rows`; the model gives it no confidence, and it was not fitted."""
        self.made.answers[rows, 0], self.made.answer_confidence[rows, 0] = orientation, 0
        if self.made.ncc is not None:
            self.made.ncc[rows, 0] = np.nan

    def fill(self, gap: npt.NDArray[np.intp], chosen: npt.NDArray[np.intp], fill: _Fill, index: int) -> None:
        """Fill the gaps `gap[chosen]` with phase `index`: the own answer that agrees, else the neighbours' mean."""
        rows, rank = gap[chosen], fill.rank[chosen]
        self.record(rows, FILLED)
        own = rank >= 0
        self.promote(rows[own], rank[own])
        self.put(rows[~own], fill.mean[chosen][~own])
        self.made.phase[rows] = index

    def result(self) -> OrientationMap:
        layers = {**self.before_map.layers, CHANGED: self.changed, **self.before}
        return dataclasses.replace(self.made, layers=layers)


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


def _agree(first: torch.Tensor, second: torch.Tensor, phase: Phase, tolerance_deg: float) -> torch.Tensor:
    """Tell (...) which orientations (..., 4) are within the tolerance of each other."""
    return closeness(first, second, phase.symmetry) > math.cos(math.radians(tolerance_deg) / 2)


def _correct(edit: _Edit, suspects: npt.NDArray[np.intp], voters: _Voters, settings: CleanConfig) -> None:
    """Give suspect pixels of one phase the answer that most of their voting neighbours agree on."""
    phase, answers = voters.phase, edit.before_map.answers
    best = torch.from_numpy(answers[:, 0])
    for start in range(0, len(suspects), _PART):
        rows = suspects[start : start + _PART]
        # Votes (m, c): for each candidate of a pixel, the neighbours that agree with it.
        candidates, kinds = _candidates(torch.from_numpy(answers[rows]), phase)
        neighbours = best[torch.from_numpy(voters.around[rows])]
        agrees = _agree(candidates[:, :, None], neighbours[:, None], phase, settings.tolerance)
        votes = (agrees & torch.from_numpy(voters.votes[rows])[:, None]).sum(-1).numpy()
        # Among equals the first: the model's own answers come before what only symmetry suggests.
        chosen = votes.argmax(1)
        most = votes[np.arange(len(rows)), chosen]
        enough = (most >= settings.min_agreeing) & (most > voters.votes[rows].sum(1) / 2)
        rows, chosen, candidates = rows[enough], chosen[enough], candidates[torch.from_numpy(enough)]
        kind = np.array(kinds, dtype=np.uint8)[chosen]
        edit.record(rows, kind)
        # The model's own answers change places with the best one, others are put in its place.
        own = kind == ALTERNATIVE
        edit.promote(rows[own], chosen[own] + 1)
        picked = candidates[torch.from_numpy(np.flatnonzero(~own)), torch.from_numpy(chosen[~own])]
        edit.put(rows[~own], reduce_to_fundamental_zone(picked, phase.symmetry).numpy())


def _fill_of(
    orientation_map: OrientationMap, gap: npt.NDArray[np.intp], voters: _Voters, settings: CleanConfig
) -> _Fill:
    """Return what the voting neighbours of one phase make of the gaps."""
    fill = _Fill(np.zeros(len(gap), dtype=np.int64), np.full((len(gap), 4), np.nan), np.full(len(gap), -1, np.intp))
    phase, votes = voters.phase, voters.votes[gap]
    best = torch.from_numpy(orientation_map.answers[:, 0])
    neighbours, counted = best[torch.from_numpy(voters.around[gap])], torch.from_numpy(votes)
    # The leader is the neighbour with which most others agree.
    agrees = _agree(neighbours[:, :, None], neighbours[:, None], phase, settings.tolerance)
    between = (agrees & counted[:, None]).sum(-1).numpy() * votes
    lead, most = between.argmax(1), between.max(1)
    enough = np.flatnonzero((most >= settings.min_agreeing) & (most > votes.sum(1) / 2))
    if not len(enough):
        return fill
    some = torch.from_numpy(enough)
    leader = neighbours[some, torch.from_numpy(lead[enough])]
    # Their mean is over those that agree with the leader.
    joins = _agree(leader[:, None], neighbours[some], phase, settings.tolerance) & counted[some]
    pixel, place = torch.nonzero(joins, as_tuple=True)
    mean = mean_orientations(neighbours[some][pixel, place], pixel.numpy(), len(enough), phase.symmetry)
    # The pixel's own answer that agrees with the leader is better still.
    own = _agree(torch.from_numpy(orientation_map.answers[gap[enough]]), leader[:, None], phase, settings.tolerance)
    rank = torch.where(own.any(1), own.to(torch.uint8).argmax(1), -1)
    fill.votes[enough], fill.mean[enough], fill.rank[enough] = most[enough], mean.numpy(), rank.numpy()
    return fill


def _swap(rows: npt.NDArray[np.intp], place: npt.NDArray[np.intp], *columns: npt.NDArray[Any] | None) -> None:
    """Let the best answer of `rows` and the one at `place` change places in each of `columns` (n, k, ...)."""
    for values in columns:
        if values is not None:
            values[rows, 0], values[rows, place] = values[rows, place].copy(), values[rows, 0].copy()
