"""Grain boundaries: the edges between pixels of different grains, which of them are special, and how far those of a
map are those of the truth.

A boundary is as long as the edges of the pixels along it; over all directions these come out too long by 4/pi on
average. The disorientation is that of the two pixels at each edge.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stemtune.analysis.grains import Grains
from stemtune.analysis.neighbors import SIDES, Neighbourhood, in_parts, pairs
from stemtune.config import GrainsConfig
from stemtune.crystal.phase import Phase
from stemtune.crystal.pseudo_symmetry import pseudo_variants
from stemtune.crystal.rotations import from_axis_angle_deg, inverse, multiply
from stemtune.crystal.symmetry import Symmetry, closeness, disorientation_deg
from stemtune.crystal_map.orientation_map import NOT_INDEXED, OrientationMap
from stemtune.errors import UserError

LOW, HIGH, PHASE = "low angle", "high angle", "phase boundary"
"""Classes of boundaries that are not special."""

BRANDON_DEG = 15.0
"""A boundary within this angle over the root of Sigma of a coincidence site lattice counts as one (Brandon, Acta
Metall. 14, 1966, 1479)."""

_SAME_DEG = 1e-3
_TWIN = re.compile(r"^\s*([0-9.]+)\s*,?\s*([\[(])\s*([-0-9.,\s]+?)\s*([\])])\s*(?:,\s*([0-9.]+)\s*)?$")


@dataclass(frozen=True)
class Relation:
    """A special relation of two crystals of one phase: `rotation * g` (4,) is the other's, up to symmetry.

    `name` is what the boundary table calls it, `tolerance_deg` how far from it a boundary may be.
    """

    name: str
    rotation: torch.Tensor
    tolerance_deg: float


@dataclass(frozen=True)
class Boundaries:
    """The edges between pixels of different grains, m of them.

    `first`, `second` (m,) flat indices of the pixels on both sides, the second right of or below the first; `angle_deg`
    (m,) disorientation, infinity between two phases; `kind` (m,) index into `names`: low angle, high angle, phase
    boundary and the special relations; `length` (m,) in nm, in pixels where the map's step is not known.
    """

    first: npt.NDArray[np.intp]
    second: npt.NDArray[np.intp]
    angle_deg: npt.NDArray[np.float32]
    kind: npt.NDArray[np.int16]
    names: tuple[str, ...]
    length: npt.NDArray[np.float64]

    def shares(self) -> dict[str, dict[str, float]]:
        """Return for each class its `length` and its `share` of all boundaries; special ones that are absent too."""
        length = np.bincount(self.kind, self.length, minlength=len(self.names))
        total = max(float(length.sum()), 1e-300)
        return {
            name: {"length": float(part), "share": float(part / total)}
            for name, part in zip(self.names, length, strict=True)
        }

    def between(self, number: npt.NDArray[np.int32]) -> dict[str, npt.NDArray[Any]]:
        """Return a table with a row for each pair of touching grains, longest boundary first.

        Columns: `grain`, `other` (the larger number), `length`, `disorientation_deg` (mean, by length; infinity between
        phases), and `kind`, the class of most of it.
        """
        one, other = number[self.first].astype(np.int64), number[self.second].astype(np.int64)
        low, high = np.minimum(one, other), np.maximum(one, other)
        count = int(high.max(initial=-1)) + 1
        both, place = np.unique(low * count + high, return_inverse=True)
        length = np.bincount(place, self.length, minlength=len(both))
        angle = np.bincount(place, self.length * self.angle_deg, minlength=len(both)) / np.maximum(length, 1e-300)
        classes = len(self.names)
        share = np.bincount(place * classes + self.kind, self.length, minlength=len(both) * classes)
        kind = share.reshape(len(both), classes).argmax(axis=1) if len(both) else np.empty(0, dtype=np.intp)
        order = np.argsort(-length, kind="stable")
        return {
            "grain": (both // max(count, 1))[order],
            "other": (both % max(count, 1))[order],
            "length": length[order],
            "disorientation_deg": angle[order],
            "kind": np.array(self.names)[kind][order],
        }


def relations_of(phase: Phase, settings: GrainsConfig, twins: Sequence[str] = ()) -> list[Relation]:
    """Return the special relations of `phase`.

    Sigma3 of the cubic classes, 60 degrees about <111>, by Brandon's criterion; the pseudo-cubic variants of layered
    oxides; and `twins` that the user has named, see `twin`.
    """
    found = [twin(text, phase, settings.tolerance) for text in twins]
    if phase.symmetry.laue in ("m-3", "m-3m"):
        axis = torch.ones(3, dtype=torch.float64)
        found.append(Relation("Sigma3", from_axis_angle_deg(axis, 60.0), BRANDON_DEG / math.sqrt(3)))
    for name, rotation in pseudo_variants(phase):
        found.append(Relation(f"variant {name.split(' #')[0]}", rotation, settings.tolerance))
    return found


def twin(text: str, phase: Phase, tolerance_deg: float) -> Relation:
    """Return the relation written as `60,[0 0 1]`: an angle in degrees and an axis, and perhaps a tolerance.

    The axis is a lattice direction [u v w] ([u v t w] in a hexagonal cell), or a plane's normal (h k l), (h k i l).
    Examples: `60,[0 0 1]`, `180,(1 1 -2 1)`, `86.3,[1 1 -2 0],3`.

    Raises `UserError` when it cannot be read.
    """
    match = _TWIN.match(text)
    numbers = match and [part for part in re.split(r"[,\s]+", match[3]) if part]
    if match is None or (match[2] == "[") != (match[4] == "]") or numbers is None or len(numbers) not in (3, 4):
        raise UserError(f"--twin '{text}': write an angle and an axis, as 60,[0 0 1] or 180,(1 1 -2 1)")
    try:
        index, angle = [float(part) for part in numbers], float(match[1])
        allowed = float(match[5]) if match[5] else tolerance_deg
    except ValueError:
        raise UserError(f"--twin '{text}': the axis '{match[3]}' is no three or four numbers") from None
    direct = match[2] == "["
    if len(index) == 4:
        if abs(index[0] + index[1] + index[2]) > 1e-9:
            raise UserError(f"--twin '{text}': the first three of four indices must add up to 0")
        u, v, t, w = index
        index = [u - t, v - t, w] if direct else [u, v, w]
    rows = phase.lattice.matrix() if direct else phase.reciprocal_matrix
    axis = torch.tensor(index, dtype=torch.float64) @ rows.double()
    if not float(axis.norm()) > 0 or not 0 < angle <= 180 or not 0 < allowed <= 30:
        raise UserError(f"--twin '{text}': the axis must not be zero, the angle in (0, 180], the tolerance in (0, 30]")
    return Relation(f"twin {text.strip()}", from_axis_angle_deg(axis, angle), allowed)


def equivalents(rotation: torch.Tensor, symmetry: Symmetry) -> torch.Tensor:
    """Return the different rotations (k, 4) that relate two crystals as `rotation` does, whichever is the first.

    They are `rotation * s` and `inverse(rotation) * s` for all operations s, without those that are equal up to an
    operation on the left; so the least disorientation of `k * g` from another orientation is the deviation.
    """
    both = torch.stack((rotation, inverse(rotation)))
    every = multiply(both[:, None], symmetry.operations).flatten(0, 1)
    kept = every[:1]
    for candidate in every[1:]:
        if float(disorientation_deg(candidate, kept, symmetry).min()) > _SAME_DEG:
            kept = torch.cat((kept, candidate[None]))
    return kept


def deviation_deg(
    rotation: torch.Tensor, first: torch.Tensor, second: torch.Tensor, symmetry: Symmetry
) -> npt.NDArray[np.float32]:
    """Return how far (m,), in degrees, pairs of orientations (m, 4) are from the relation `rotation`."""
    variants = equivalents(rotation, symmetry)
    found = np.empty(len(first), dtype=np.float32)

    def work(part: slice) -> None:
        one, other = first[part], second[part]
        best = torch.stack([closeness(multiply(v, one), other, symmetry) for v in variants]).amax(0)
        found[part] = (2 * best.clamp(max=1.0).acos()).rad2deg().numpy()

    in_parts(len(first), work)
    return found


def find_boundaries(
    orientation_map: OrientationMap,
    grains: Grains,
    settings: GrainsConfig,
    twins: Sequence[str] = (),
    neighbourhood: Neighbourhood | None = None,
) -> Boundaries:
    """Return the boundaries between `grains`; what borders on a pixel without a grain is none.

    `twins` are relations that the user has named (`twin`); they come before all others. `neighbourhood`, of the same
    map, spares the angles that it knows.
    """
    near = neighbourhood or Neighbourhood(orientation_map)
    dy, dx = orientation_map.step_nm or (1.0, 1.0)
    parts = []
    for step, edge_length in zip(SIDES, (dy, dx), strict=True):
        first, second = pairs(near.shape, step)
        one, other = grains.number[first], grains.number[second]
        edge = np.flatnonzero((one != other) & (one >= 0) & (other >= 0))
        parts.append((first[edge], second[edge], near.at(step)[edge], np.full(len(edge), edge_length)))
    first, second, angle, length = (np.concatenate(column) for column in zip(*parts, strict=True))
    kind = np.where(np.isinf(angle), 2, angle >= settings.low_angle).astype(np.int16)
    names, nearest = [LOW, HIGH, PHASE], np.full(len(first), np.inf)
    orientation = torch.from_numpy(orientation_map.orientation)
    for index, phase in enumerate(orientation_map.crystals):
        own = np.flatnonzero((near.phase[first] == index) & (near.phase[second] == index))
        left, right = orientation[torch.from_numpy(first[own])], orientation[torch.from_numpy(second[own])]
        for relation in relations_of(phase, settings, twins):
            if relation.name not in names:
                names.append(relation.name)
            # Relative to what is allowed: of two that both fit, the nearer one.
            off = deviation_deg(relation.rotation, left, right, phase.symmetry) / relation.tolerance_deg
            better = (off <= 1) & (off < nearest[own])
            kind[own[better]], nearest[own[better]] = names.index(relation.name), off[better]
    return Boundaries(first, second, angle, kind, tuple(names), length)


def boundary_figures(boundaries: Boundaries, unit: str) -> Mapping[str, Any]:
    """Return for `summary.json` the length of all boundaries and of each class."""
    return {"unit": unit, "length": float(boundaries.length.sum()), "classes": boundaries.shares()}


THRESHOLDS_DEG = (2.0, 5.0, 10.0, 15.0)
"""What two neighbours have to differ by."""

TOLERANCE_PX = 1.0
"""How far the middles of two edges may lie apart."""

Edges = npt.NDArray[np.bool_]
"""Flags (2 rows - 1, 2 columns - 1) of edges at their middles, in half pixels: pixel (r, c) is at (2 r, 2 c)."""


def boundary_match(orientation_map: OrientationMap, truth: OrientationMap) -> list[dict[str, Any]]:
    """Return for each threshold how far the map's boundaries are those of the truth.

    A boundary is here the edge between two pixels that differ by more than a threshold, or are of different phases; no
    grains are needed. Precision is the share of the map's edges that have an edge of the truth near them, recall the
    share of the truth's that have one of the map near them (D. R. Martin et al., IEEE Trans. Pattern Anal. 26, 2004,
    530). Only edges between pixels whose orientation the truth knows, both of them, are counted. Edges of the truth
    where the map indexes nothing count as not found.

    Returns
    -------
    list of dict
        `threshold_deg`, `tolerance_px`, `edges` and `edges_of_truth` (numbers), `precision`, `recall` and their
        harmonic mean `f1`; None where there is nothing to divide by.
    """
    ours = _angles(orientation_map)
    right = _angles(as_phases_of(orientation_map, truth))
    rows = []
    for threshold in THRESHOLDS_DEG:
        found, true = (ours > threshold) & ~np.isnan(right), right > threshold
        rows.append({"threshold_deg": threshold, "tolerance_px": TOLERANCE_PX, **match(found, true, TOLERANCE_PX)})
    return rows


def match(found: Edges, true: Edges, tolerance_px: float) -> dict[str, Any]:
    """Return the figures of `boundary_match` for two sets of edges."""
    hits = int((found & near(true, tolerance_px)).sum())
    recalled = int((true & near(found, tolerance_px)).sum())
    edges, edges_of_truth = int(found.sum()), int(true.sum())
    precision = hits / edges if edges else None
    recall = recalled / edges_of_truth if edges_of_truth else None
    f1 = None
    if precision is not None and recall is not None:
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"edges": edges, "edges_of_truth": edges_of_truth, "precision": precision, "recall": recall, "f1": f1}


def near(edges: Edges, tolerance_px: float) -> Edges:
    """Return every place that lies within `tolerance_px` of an edge."""
    reach = int(2 * tolerance_px)
    rows, columns = edges.shape
    padded = np.pad(edges, reach)
    spread = np.zeros_like(edges)
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            if down * down + right * right <= (2 * tolerance_px) ** 2:
                spread |= padded[reach + down : reach + down + rows, reach + right : reach + right + columns]
    return spread


def _angles(orientation_map: OrientationMap) -> npt.NDArray[np.float32]:
    """Return the disorientations of neighbours at the middles of their edges, as `Edges` are laid out; else NaN."""
    rows, columns = orientation_map.shape
    angles = np.full((2 * rows - 1, 2 * columns - 1), np.nan, dtype=np.float32)
    neighbourhood = Neighbourhood(orientation_map)
    for step in SIDES:
        row, column = np.divmod(pairs(orientation_map.shape, step)[0], columns)
        angles[2 * row + step[0], 2 * column + step[1]] = neighbourhood.at(step)
    return angles


def as_phases_of(orientation_map: OrientationMap, truth: OrientationMap) -> OrientationMap:
    """Return the truth as a map of the phases of `orientation_map`; crystals of a Laue class it lacks are unknown.

    Where two phases have one Laue class, the first of them counts for both, unless truth and map list the same ones.
    """
    own, theirs = ([phase.symmetry.laue for phase in some.phases] for some in (orientation_map, truth))
    first = [own.index(laue) if laue in own else NOT_INDEXED for laue in theirs]
    place = np.array([*(range(len(own)) if own == theirs else first), NOT_INDEXED], dtype=np.int16)
    known = np.isfinite(truth.orientation).all(axis=1)
    return dataclasses.replace(
        orientation_map,
        answers=truth.orientation[:, None],
        answer_confidence=truth.answer_confidence[:, :1],
        phase=np.where(known, place[truth.phase], NOT_INDEXED).astype(np.int16),
        layers={},
        ncc=None,
    )
