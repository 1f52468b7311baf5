"""Which patterns of a store are trained on, and which validate: splits, guard band, cuts on the labels' scores.

Neighbours of a scan show nearly the same pattern. A model that was trained on one is not tested by the other, so a
split takes whole groups, and a band of patterns around those of validation and test is left out of training.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from stemtune.config import DataConfig, read_cuts
from stemtune.crystal.phase import Phase
from stemtune.dataset.store import SPLITS, Store
from stemtune.errors import UserError, did_you_mean

Rows = npt.NDArray[np.intp]

CONFIDENCE = "confidence"  # the score that every store has; others have the names that the labeller gave them
_RANDOM_SHARES = (0.8, 0.9)  # where, of labels in random order, training ends and validation ends
_LATTICE_TOLERANCE = 0.03  # relative difference of two lattices below which they may be the same crystal


def split_rows(
    store: Store, learnable: npt.NDArray[np.bool_], data: DataConfig, verbose: bool = True
) -> tuple[Rows, Rows]:
    """Return the rows of `store` to train on and to validate on.

    `learnable` (n,) says which patterns have a label to learn from. Where `data.split` goes by groups, patterns of a
    scan that are at most `data.guard` rows and columns away from a labelled one of validation or test are not trained
    on. A random split is warned of on stderr if `verbose`. A `UserError` says that a split has no labelled patterns, or
    that the guard band leaves none.
    """
    if data.split == "random":
        if verbose:
            near = "neighbours in the scan stand on both sides, so validation flatters the model"
            print(f"warning: `data.split` is random: {near}", file=sys.stderr)
        rows = np.flatnonzero(learnable)
        train, validation, _ = _random_parts(learnable)
        if not len(validation):
            raise UserError(f"'{store.path}' has {len(rows)} labelled patterns, too few for a validation split")
        return train, validation
    train, validation = (_rows_of_split(store, learnable, split) for split in (0, 1))
    kept = train[~guarded(store, learnable & (store.split > 0), data.guard)[train]]
    if not len(kept):
        raise UserError(
            f"`data.guard` is {data.guard}, and every training pattern of '{store.path}' is that near to one of"
            " validation or test; lower it, or use a store with larger groups"
        )
    return kept, validation


def _random_parts(learnable: npt.NDArray[np.bool_]) -> list[Rows]:
    """Return the rows of training, validation and test of a random split."""
    rows = np.random.default_rng(0).permutation(np.flatnonzero(learnable))
    return [np.sort(part) for part in np.split(rows, [math.ceil(share * len(rows)) for share in _RANDOM_SHARES])]


def held_out_rows(store: Store, learnable: npt.NDArray[np.bool_], data: DataConfig) -> Rows:
    """Return the rows of `store` that are neither trained nor validated on; a `UserError` says that there are none."""
    rows = _random_parts(learnable)[2] if data.split == "random" else _rows_of_split(store, learnable, 2)
    if not len(rows):
        raise UserError(f"'{store.path}' has {learnable.sum()} labelled patterns, too few for a test split")
    return rows


def guarded(store: Store, held: npt.NDArray[np.bool_], guard: int) -> npt.NDArray[np.bool_]:
    """Return (n,) which patterns of a scan are at most `guard` rows and columns away from one of those in `held` (n,).

    None where `guard` is 0 or the store is no scan.
    """
    row, column = store.position.astype(np.intp).T
    placed = (row >= 0) & (column >= 0)
    if not guard or store.scan_shape is None or not (held & placed).any():
        return np.zeros(store.n, dtype=bool)
    near = np.zeros((row.max() + 1, column.max() + 1), dtype=np.uint8)
    near[row[held & placed], column[held & placed]] = 1
    near = ndimage.maximum_filter(near, size=2 * guard + 1, mode="constant")
    return np.asarray(placed & (near[row, column] > 0))


def score_of(store: Store, name: str, setting: str) -> npt.NDArray[np.float64]:
    """Return the score (n,) of the labels that is called `name`, larger is better; -inf where there is none.

    `name` is "confidence" or one of the store's `scores`; where it is neither, a `UserError` about the setting called
    `setting` lists them.
    """
    score = store.confidence if name == CONFIDENCE else store.score(name)
    if score is None:
        known = (CONFIDENCE, *store.scores)
        raise UserError(
            f"`{setting}` asks for the score '{name}', but the labels of '{store.path}' have {', '.join(known)}"
            f"{did_you_mean(name, known)}"
        )
    return np.nan_to_num(np.asarray(score, dtype=np.float64), nan=-np.inf)


def confident_rows(store: Store, rows: Rows, data: DataConfig) -> Rows:
    """Return the rows whose labels pass `data.cut`, `data.min_confidence` and `data.keep_fraction`.

    The last two go by the score `data.score`. `data.keep_fraction` is a share of what the other two leave. The rows
    come in the order of use: by falling score where `data.order` is "confidence", else by row. A label without a
    score counts as the least confident. A `UserError` names a score that the store does not have, or says that no
    label passes.
    """
    for cut in read_cuts(data.cut) or []:
        score = score_of(store, cut.score, "data.cut")[rows]
        rows = rows[score >= cut.limit if cut.equal else score > cut.limit]
    if not len(rows):
        raise UserError(f"`data.cut` is '{data.cut}', but no training label of '{store.path}' passes")
    score = score_of(store, data.score, "data.score")[rows]
    if data.min_confidence > 0:
        rows, score = rows[score >= data.min_confidence], score[score >= data.min_confidence]
        if not len(rows):
            raise UserError(
                f"`data.min_confidence` is {data.min_confidence:g}, but no training label of '{store.path}' reaches it"
                + (f" ({data.score})" if data.score != CONFIDENCE else "")
            )
    best_first = rows[np.argsort(-score, kind="stable")]
    kept = best_first[: math.ceil(data.keep_fraction * len(rows))]
    return kept if data.order == "confidence" else np.sort(kept)


def phase_of(store: Store) -> tuple[int, Phase]:
    """Return number and crystal of the phase that most labelled patterns have; the others are not trained on."""
    if not store.labelled.any():
        raise UserError(
            f"'{store.path}' has no labelled patterns; `stemtune label` labels measured ones, `stemtune simulate` makes"
            " labelled ones"
        )
    number = int(np.bincount(store.phase[store.labelled]).argmax())
    if number >= len(store.phases):
        raise UserError(f"'{store.path}' labels patterns as phase {number}, but holds {len(store.phases)} phases")
    return number, store.phases[number]


def rows_of_crystal(store: Store, phase: Phase, setting: str) -> Rows:
    """Return the labelled rows of a further store, which the setting called `setting` names.

    A `UserError` says that its crystal is not `phase`: another Laue class, or a lattice that differs by more than 3 %.
    """
    number, found = phase_of(store)
    if not same_crystal(found, phase):
        raise UserError(
            f"`{setting}` is '{store.path}', whose labels are orientations of {found.name}, not of {phase.name}"
        )
    return np.flatnonzero(store.labelled & (store.phase == number))


def check_crystal(phases: Sequence[Phase], store: Store) -> None:
    """Refuse the champion, of one of the `phases`, for a store that is said to hold other crystals only."""
    if store.phases and not any(same_crystal(phase, known) for phase in phases for known in store.phases):
        raise UserError(
            f"the champion reads {phases[0].name}, but '{store.path}' holds"
            f" {', '.join(phase.name for phase in store.phases)}; give a model of that crystal, the champion of another"
            " sweep for instance (stemtune champions lists them)"
        )


def same_crystal(one: Phase, other: Phase) -> bool:
    """Return whether two phases may be the same crystal: of one Laue class, and lattices that differ by 3 % at most."""
    lengths = [np.array(crystal.lattice[:3]) for crystal in (one, other)]
    alike = (abs(lengths[0] / lengths[1] - 1) <= _LATTICE_TOLERANCE).all()
    return bool(one.symmetry.proper == other.symmetry.proper and alike)


def _rows_of_split(store: Store, learnable: npt.NDArray[np.bool_], split: int) -> Rows:
    rows = np.flatnonzero(learnable & (store.split == split))
    if not len(rows):
        groups = len(np.unique(store.group[learnable]))
        raise UserError(
            f"the {SPLITS[split]} split of '{store.path}' has no labelled patterns (it has {groups} groups, "
            "and a split takes whole groups); use a store with more of them"
        )
    return rows
