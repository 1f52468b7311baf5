"""How far a map is from the truth, and whether its confidence can be believed.

Orientations are compared pair by pair, each pair by the symmetry of its phase, by one loop over phases for all figures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stemtune.analysis.boundaries import boundary_match
from stemtune.analysis.evaluation.ground_truth import map_or_labels, read_truth
from stemtune.crystal.phase import Phase
from stemtune.crystal.pseudo_symmetry import pseudo_variants
from stemtune.crystal.rotations import multiply
from stemtune.crystal.symmetry import beam180, disorientation_beam180_deg, disorientation_deg
from stemtune.crystal_map.orientation_map import NOT_INDEXED, OrientationMap, PhaseDescription
from stemtune.errors import UserError
from stemtune.learning import calibration

COMPARED = (
    "crystal",
    "no_crystal",
    "indexed_of_crystal",
    "indexed_of_no_crystal",
    "other_phase",
    "disorientation",
    "within_5deg_of_best",
    "pseudo_symmetry",
    "reliability",
    "risk_coverage",
    "boundaries",
)
"""What `compare` says about a map and its truth."""

_HISTOGRAM = 20


def evaluate(map: str | os.PathLike[str], truth: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the figures of a map, or of a store's labels, against a ground truth, both by path; see `compare`."""
    return compare(map_or_labels(map), read_truth(truth))


def describe(figures: Mapping[str, Any]) -> str:
    """Return the figures of `compare` as a few lines of text."""
    lines = [
        f"{figures['pixels']:,} pixels, {figures['crystal']:,} of them crystal by the truth",
        f"indexed         {in_percent(figures['indexed_of_crystal'])} of the crystal,"
        f" {in_percent(figures['indexed_of_no_crystal'])} of the rest",
    ]
    if "disorientation" not in figures:
        return "\n".join([*lines, "no pixel is indexed as the phase that the truth has there"])
    for key, name in (("strict", "disorientation"), ("beam180", "modulo beam-180")):
        part = figures["disorientation"][key]
        lines.append(
            f"{name:15s} median {part['median_deg']:.2f}°, mean {part['mean_deg']:.2f}°,"
            f" within 2° {in_percent(part['within_2deg'])}, within 5° {in_percent(part['within_5deg'])}"
        )
    confused = ", ".join(f"{name} {in_percent(share)}" for name, share in figures["pseudo_symmetry"].items())
    lines.append(f"taken for       {confused}")
    best = ", ".join(f"{count}: {in_percent(share)}" for count, share in figures["within_5deg_of_best"].items())
    lines.append(f"among the best  {best} (within 5° modulo beam-180)")
    trust = figures["reliability"]
    lines.append(
        f"confidence      expected calibration error {trust['calibration_error']:.3f}"
        f" ({trust['calibration_error_by_chance']:.3f} by chance alone)"
    )
    risk = figures["risk_coverage"]
    half = risk["wrong"][risk["kept"].index(0.5)]
    lines.append(
        f"risk-coverage   area {risk['area']:.4f} (perfect {risk['area_of_perfect']:.4f}, chance"
        f" {risk['area_of_chance']:.4f}); {in_percent(half)} of the more confident half are more than 5° off"
    )
    lines += [
        f"boundaries      above {RIGHT_DEG:g}°, to within a pixel: precision {in_percent(entry['precision'])},"
        f" recall {in_percent(entry['recall'])}"
        for entry in figures.get("boundaries", ())
        if entry["threshold_deg"] == RIGHT_DEG
    ]
    return "\n".join(lines)


def in_percent(share: float | None) -> str:
    """Return a share as text, a dash for None."""
    return "-" if share is None else f"{share:.1%}"


def compare(orientation_map: OrientationMap, truth: OrientationMap) -> dict[str, Any]:
    """Return the figures of `orientation_map` against `truth`.

    Returns
    -------
    dict
        - `pixels`, `crystal`, `no_crystal`: pixels of the map; of the truth with and without an orientation;
        - `indexed_of_crystal`, `indexed_of_no_crystal`: shares that the map indexes, the second one wrongly;
        - `other_phase`: share of the crystal's indexed pixels to which the map gives another Laue class;
        - `disorientation`: `strict` and `beam180` (modulo half a turn about the beam), each with `median_deg`,
          `mean_deg`, `within_2deg`, `within_5deg` over pixels indexed in both, and `within_5deg_of_crystal` where
          pixels of the crystal that the map does not index count as wrong;
        - `within_5deg_of_best`: the same share (beam180) when any of the best 1, 2, ... answers may be right;
        - `pseudo_symmetry`: shares of right, of each family of pseudo-symmetric variants, and of other answers;
        - `reliability`: `bins` of pixels of like confidence with their mean confidence and the share that is right
          (strictly), the mean difference of the two, `calibration_error`, and what it would be if every confidence
          were a true probability, `calibration_error_by_chance`; `histogram`, pixels per 0.05 of confidence;
        - `risk_coverage`: how wrong the most confident pixels are, see `analysis.evaluation.coverage` (strictly);
        - `boundaries`: their precision and recall at several thresholds, see `boundary_match`; not of one row.
    """
    if orientation_map.shape != truth.shape:
        rows, columns = orientation_map.shape
        raise UserError(f"the map has {rows} x {columns} pixels, but the truth {truth.shape[0]} x {truth.shape[1]}")
    known = np.isfinite(truth.orientation).all(axis=1)
    empty = (truth.phase < 0) & orientation_map.measured
    if not known.any():
        raise UserError("the truth holds no orientation to compare with")
    known &= orientation_map.measured
    same = known & same_laue(orientation_map, truth)
    both = known & orientation_map.indexed
    result: dict[str, Any] = {
        "pixels": len(known),
        "crystal": int(known.sum()),
        "no_crystal": int(empty.sum()),
        "indexed_of_crystal": _share(orientation_map.indexed[known]),
        "indexed_of_no_crystal": _share(orientation_map.indexed[empty]),
        "other_phase": _share(~same[both]),
    }
    if not same.any():
        return result
    phase, phases = np.where(same, orientation_map.phase, NOT_INDEXED), orientation_map.phases
    answers = orientation_map.answers
    strict = _wrong_if_nan(disorientations_deg(truth.orientation, answers[:, 0], phase, phases))
    every = [
        disorientations_deg(truth.orientation, answers[:, rank], phase, phases, modulo_beam180=True)
        for rank in range(answers.shape[1])
    ]
    best = _wrong_if_nan(np.stack(every, axis=1))
    modulo = best[:, 0]
    result["disorientation"] = {
        "strict": {**angle_figures(strict[same]), "within_5deg_of_crystal": float((strict[known] < RIGHT_DEG).mean())},
        "beam180": {**angle_figures(modulo[same]), "within_5deg_of_crystal": float((modulo[known] < RIGHT_DEG).mean())},
    }
    result["within_5deg_of_best"] = {
        str(n): float((best[same, :n].min(axis=1) < RIGHT_DEG).mean()) for n in range(1, best.shape[1] + 1)
    }
    result["pseudo_symmetry"] = confusion(truth.orientation, answers[:, 0], phase, phases)
    result["reliability"] = reliability(orientation_map.confidence[same], strict[same] < RIGHT_DEG)
    result["risk_coverage"] = risk_coverage(orientation_map.confidence[same], strict[same], RIGHT_DEG)
    if min(truth.shape) > 1:
        result["boundaries"] = boundary_match(orientation_map, truth)
    return result


def angle_figures(angles: npt.NDArray[np.float64]) -> dict[str, float]:
    """Return `median_deg`, `mean_deg`, `within_2deg` and `within_5deg` of disorientations (n,) in degrees."""
    return {
        "median_deg": float(np.median(angles)),
        "mean_deg": float(angles.mean()),
        "within_2deg": float((angles < 2).mean()),
        "within_5deg": float((angles < 5).mean()),
    }


def _wrong_if_nan(angles: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.nan_to_num(angles, nan=np.inf)


def _share(flags: npt.NDArray[np.bool_]) -> float | None:
    return float(flags.mean()) if len(flags) else None


def reliability(confidence: npt.NDArray[np.float32], right: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Return a table over bins of equally many pixels, the expected calibration error, and what of it is chance."""
    table = calibration.reliability(confidence, right)
    columns = (table.patterns.tolist(), table.confidence.tolist(), table.right.tolist())
    bins = [
        {"pixels": pixels, "mean_confidence": stated, "within_5deg": found}
        for pixels, stated, found in zip(*columns, strict=True)
    ]
    return {
        "bins": bins,
        "calibration_error": table.error,
        "calibration_error_by_chance": table.by_chance,
        "histogram": np.histogram(confidence, _HISTOGRAM, (0.0, 1.0))[0].tolist(),
    }


SHARES = tuple(round(0.05 * step, 2) for step in range(1, 21))
"""Shares of the pixels at which the curve is given."""


def risk_coverage(confidence: npt.NDArray[Any], angle_deg: npt.NDArray[np.float64], right_deg: float) -> dict[str, Any]:
    """Return the error of the most confident pixels against the share of pixels that is kept.

    `confidence` and disorientation `angle_deg` are (n,), n at least 1; from `right_deg` on an orientation is wrong.
    Pixels of equal confidence are in no order; each of them counts with the mean of all of them.

    Returns
    -------
    dict
        Lists `kept`, shares of the pixels (rounded up to whole ones); `wrong`, the share of those that is wrong; and
        `mean_deg`, their mean disorientation. `area` is the mean of `wrong` over keeping 1, 2, ... n pixels (the area
        under the curve, AURC; Geifman and El-Yaniv, NIPS 2017), `area_of_perfect` what it would be if every wrong
        pixel were less confident than every right one, `area_of_chance` if the confidence were of no use.
    """
    n = len(confidence)
    wrong = (angle_deg >= right_deg).astype(np.float64)
    risk = running_mean(confidence, wrong)
    angle = running_mean(confidence, angle_deg)
    last = np.ceil(np.array(SHARES) * n - 1e-9).astype(int) - 1
    return {
        "kept": list(SHARES),
        "wrong": risk[last].tolist(),
        "mean_deg": angle[last].tolist(),
        "area": float(risk.mean()),
        "area_of_perfect": float(running_mean(-wrong, wrong).mean()),
        "area_of_chance": float(wrong.mean()),
    }


def running_mean(score: npt.NDArray[Any], values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the mean (n,) of `values` over the 1, 2, ... n entries of the best score; ties share their mean."""
    order = np.argsort(-score.astype(np.float64), kind="stable")
    ranked = values[order]
    _, group, size = np.unique(-score[order].astype(np.float64), return_inverse=True, return_counts=True)
    shared = (np.bincount(group, ranked) / size)[group]
    mean: npt.NDArray[np.float64] = np.cumsum(shared) / np.arange(1, len(values) + 1)
    return mean


RIGHT_DEG = 5.0
"""An orientation within this angle of the truth counts as right in the tables."""

Phases = Sequence[Phase | PhaseDescription]


def same_laue(orientation_map: OrientationMap, other: OrientationMap) -> npt.NDArray[np.bool_]:
    """Return the pixels (n,) that both maps index as the same Laue class."""
    known = orientation_map.indexed & np.isfinite(other.orientation).all(axis=1)
    return np.asarray(known & (orientation_map.laue == other.laue))


def disorientations_deg(
    first: npt.NDArray[np.float64],
    second: npt.NDArray[np.float64],
    phase: npt.NDArray[np.integer],
    phases: Phases,
    *,
    modulo_beam180: bool = False,
) -> npt.NDArray[np.float64]:
    """Return the disorientation (n,) of `first` and `second` (n, 4), pixels of `phase` (n,); NaN where that is -1."""
    measure = disorientation_beam180_deg if modulo_beam180 else disorientation_deg
    angles = np.full(len(phase), np.nan)
    for number, own in _by_phase(phase, phases):
        one, other = (torch.from_numpy(np.ascontiguousarray(values[own])) for values in (first, second))
        angles[own] = measure(one, other, phases[number].symmetry).numpy()
    return angles


def confusion(
    right: npt.NDArray[np.float64], given: npt.NDArray[np.float64], phase: npt.NDArray[np.integer], phases: Phases
) -> dict[str, float]:
    """Return the shares of right answers, of beam-180 twins, of each family of pseudo-symmetric variants, and `other`.

    `right`, `given` (n, 4) are the orientations of the truth and of the answers, `phase` (n,) indexes `phases`; pixels
    of phase -1 are left out.
    """
    counts: dict[str, int] = {"right": 0, "beam180": 0}
    for number, own in _by_phase(phase, phases):
        one, other = (torch.from_numpy(np.ascontiguousarray(values[own])) for values in (right, given))
        for name, count in count_families(one, other, phases[number]).items():
            counts[name] = counts.get(name, 0) + count
    total = int((phase >= 0).sum())
    counts["other"] = total - sum(counts.values())
    return {name: count / total for name, count in counts.items()}


def count_families(right: torch.Tensor, given: torch.Tensor, phase: Phase | PhaseDescription) -> dict[str, int]:
    """Count, among answers (n, 4), the right ones, the twins and each family of variants, every answer once."""
    symmetry = phase.symmetry
    left = torch.ones(len(given), dtype=torch.bool)
    counts: dict[str, int] = {}

    def count(name: str, expected: torch.Tensor) -> None:
        hit = left & (disorientation_deg(expected, given, symmetry) < RIGHT_DEG)
        counts[name] = counts.get(name, 0) + int(hit.sum())
        left[hit] = False

    count("right", right)
    count("beam180", beam180(right))
    for name, variant in pseudo_variants(phase):
        family = name.split(" #")[0]
        for start in (right, beam180(right)):
            count(family, multiply(variant.to(start), start))
    return counts


def _by_phase(phase: npt.NDArray[np.integer], phases: Phases) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
    """Yield each phase that pixels have, with those pixels."""
    for number in range(len(phases)):
        own = phase == number
        if own.any():
            yield number, own
