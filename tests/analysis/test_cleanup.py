"""Clean-up: planted errors go, what is right stays, boundaries and small grains stay, and all of it can be undone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sample_maps import NICKEL, map_of

from stemtune.analysis.cleanup import ALTERNATIVE, FILLED, TWIN, VARIANT, cleaned, undone
from stemtune.analysis.grain_analysis import analyse
from stemtune.config import CleanConfig, GrainsConfig
from stemtune.crystal.phase import Phase, linio2
from stemtune.crystal.pseudo_symmetry import pseudo_variants
from stemtune.crystal.rotations import multiply
from stemtune.crystal.sampling import random_orientations
from stemtune.crystal.symmetry import beam180, disorientation_deg
from stemtune.crystal_map.io import read_map_h5, write_map_h5
from stemtune.crystal_map.orientation_map import OrientationMap
from stemtune.dataset.polycrystal import VACUUM, Lattices, grain_map
from stemtune.errors import UserError
from stemtune.map_folder.files import clean_map, write_map

VARIANTS = torch.stack([turn for _, turn in pseudo_variants(linio2())])


def polycrystal(
    shape: tuple[int, int] = (50, 60), grains: int = 9, seed: int = 4
) -> tuple[OrientationMap, np.ndarray, np.ndarray]:
    """Return a map of a polycrystal in vacuum with planted errors, the truth, and where errors were planted.

    Of the crystal's pixels 5 % are a pseudo-symmetric variant, 3 % the beam-180 twin, 3 % wrong with the truth among
    the model's further answers, 3 % wrong at random, and 3 % are not indexed.
    """
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    grain, seeds = grain_map(shape, grains, generator)
    truth = Lattices.draw(grain, seeds, generator).over(grain)
    n = grain.size
    answers = torch.stack((truth, random_orientations(n, 7), random_orientations(n, 8)), dim=1).numpy()
    dice = np.where(grain.ravel() == VACUUM, 1.0, rng.random(n))
    kinds = np.searchsorted([0.05, 0.08, 0.11, 0.14, 0.17], dice, side="right")
    variant = multiply(VARIANTS[torch.from_numpy(rng.integers(0, 7, n))], truth).numpy()
    answers[kinds == 0, 0] = variant[kinds == 0]
    answers[kinds == 1, 0] = beam180(truth).numpy()[kinds == 1]
    answers[kinds == 2] = answers[kinds == 2][:, [1, 0, 2]]
    answers[kinds == 3, 0] = answers[kinds == 3, 2]
    vacuum = grain.ravel() == VACUUM
    answers[vacuum] = random_orientations(3 * int(vacuum.sum()), 9).view(-1, 3, 4).numpy()
    plain = map_of(shape, np.nan_to_num(truth.numpy(), nan=0.5), [linio2()])
    phase = np.where(vacuum | (kinds == 4), -1, 0).astype(np.int16)
    confidence = np.repeat(np.array([[0.6, 0.3, 0.1]], np.float32), n, axis=0)
    made = dataclasses.replace(plain, answers=answers, answer_confidence=confidence, phase=phase)
    return made, truth.numpy(), np.where(vacuum, -1, kinds)


def right(made: OrientationMap, truth: np.ndarray) -> np.ndarray:
    off = disorientation_deg(torch.from_numpy(made.orientation), torch.from_numpy(truth), linio2().symmetry)
    return off.numpy() < 2


def test_planted_errors_go_and_nothing_right_does() -> None:
    made, truth, kinds = polycrystal()
    after = cleaned(made, CleanConfig())
    was, now = right(made, truth), right(after, truth)
    crystal = kinds >= 0
    assert was[crystal].mean() < 0.85
    assert now[crystal].mean() > was[crystal].mean() + 0.08
    assert (was & ~now).sum() == 0
    assert not after.indexed[~crystal].any()
    changed = after.layers["changed"]
    assert (changed[~crystal] == 0).all()
    for kind, code in ((0, VARIANT), (1, TWIN), (2, ALTERNATIVE), (4, FILLED)):
        mended = (kinds == kind) & now & (changed == code)
        assert mended.sum() > 0.6 * (kinds == kind).sum(), code
    # What neighbours show is no reason to overwrite a pattern that cannot mean it.
    assert (changed[(kinds == 3) & ~was] == 0).mean() > 0.9
    assert len(analyse(after, GrainsConfig()).grains.table) <= len(analyse(made, GrainsConfig()).grains.table)


def test_a_variant_boundary_and_a_small_grain_stay() -> None:
    """Two grains that are variants of each other, and an island of six pixels of a third, keep every pixel."""
    one = random_orientations(1, 2)
    left, across, island = torch.cat((one, multiply(VARIANTS[[0, 4]], one))).numpy()
    orientation = np.full((12, 14, 4), left)
    orientation[:, 7:] = across
    orientation[4:6, 2:5] = island
    made = map_of((12, 14), orientation, [linio2()])
    after = cleaned(made, CleanConfig())
    assert (after.layers["changed"] == 0).all()
    np.testing.assert_array_equal(after.answers, made.answers)
    orientation[9, 3] = across
    orientation[3, 11] = np.nan
    orientation[8:10, 11:13] = np.nan
    spoilt = map_of((12, 14), orientation, [linio2()])
    # map_of takes NaN for "no pattern": give the unindexed pixels a pattern that means nothing.
    spoilt.answers[~spoilt.measured] = random_orientations(1, 77).numpy()
    after = cleaned(spoilt, CleanConfig())
    changed = after.layers["changed"].reshape(12, 14)
    assert changed[9, 3] == VARIANT and changed[3, 11] == FILLED
    assert (changed > 0).sum() == 2  # the gap of four pixels is too large
    assert float(disorientation_deg(*torch.from_numpy(after.orientation)[[3 * 14 + 11, 13]], linio2().symmetry)) < 0.01
    off = cleaned(spoilt, CleanConfig(fill=False))
    assert (off.layers["changed"] > 0).sum() == 1


def test_undo_brings_everything_back(tmp_path: Path) -> None:
    made, _, _ = polycrystal()
    made = dataclasses.replace(made, ncc=np.random.default_rng(0).random((len(made.phase), 3)).astype(np.float32))
    after = cleaned(made, CleanConfig())
    write_map_h5(after, tmp_path / "map.h5")
    back = undone(read_map_h5(tmp_path / "map.h5"))
    for name in ("answers", "answer_confidence", "phase", "ncc"):
        np.testing.assert_array_equal(getattr(back, name), getattr(made, name), err_msg=name)
    assert dict(back.layers) == {}
    with pytest.raises(UserError, match="already"):
        cleaned(after, CleanConfig())
    with pytest.raises(UserError, match="nothing to undo"):
        undone(made)


@pytest.mark.parametrize("agreeing", [3, 4])
def test_a_gap_between_two_phases_is_filled_once_and_given_back(agreeing: int) -> None:
    """Both phases have enough neighbours to fill the gap; one of them does, and undoing it leaves nothing behind."""
    rows, columns = 9, 9
    g = random_orientations(2, 5).numpy()
    phase = np.zeros((rows, columns), dtype=np.int16)
    phase[:, 4:] = 1
    phase[5:, 4] = 0  # the gap at (4, 4) has four neighbours of either phase
    orientation = g[phase].copy()
    made = map_of((rows, columns), orientation, [linio2(), Phase.from_cif_text(NICKEL)], phase)
    rng = np.random.default_rng(1)
    answers = np.concatenate((made.answers, rng.normal(size=(rows * columns, 2, 4))), axis=1)
    answers /= np.linalg.norm(answers, axis=-1, keepdims=True)
    gap = 4 * columns + 4
    answers[gap] = np.stack((answers[gap, 1], g[0], g[1]))  # the pattern could be either
    confidence = rng.random((rows * columns, 3)).astype(np.float32)
    number = made.phase.copy()
    number[gap] = -1
    made = dataclasses.replace(made, answers=answers, answer_confidence=confidence, phase=number)
    after = cleaned(made, CleanConfig(min_agreeing=agreeing))
    assert after.layers["changed"][gap] == FILLED and after.phase[gap] in (0, 1)
    assert (
        disorientation_deg(
            torch.from_numpy(after.orientation[gap]), torch.from_numpy(g[after.phase[gap]]), after.phases[0].symmetry
        )
        < 0.1
    )
    back = undone(after)
    for name in ("answers", "answer_confidence", "phase"):
        np.testing.assert_array_equal(getattr(back, name), getattr(made, name), err_msg=name)


def test_the_command_rewrites_the_folder(tmp_path: Path) -> None:
    made, _, _ = polycrystal((20, 24), 3)
    folder = tmp_path / "map"
    folder.mkdir()
    write_map(analyse(made, GrainsConfig()), folder)
    (folder / "summary.json").write_text(json.dumps({"patterns": 480, "disorientation": {"strict": {}}}))
    figures = clean_map(folder, tmp_path / "cleaned", CleanConfig(), GrainsConfig())
    assert sum(figures["cleaned"].values()) > 10
    read = read_map_h5(tmp_path / "cleaned")
    assert (read.layers["changed"] > 0).sum() == sum(figures["cleaned"].values())
    summary = json.loads((tmp_path / "cleaned" / "summary.json").read_text())
    assert summary["patterns"] == 480 and summary["cleaned"] == figures["cleaned"]
    assert "disorientation" not in summary  # it was that of the map before
    assert summary["median_confidence"] == pytest.approx(np.median(read.confidence[read.indexed]))
    assert summary["indexed_fraction"] == read.indexed.mean()
    assert "not indexed" in (tmp_path / "cleaned" / "report.html").read_text(encoding="utf-8")
    clean_map(tmp_path / "cleaned", None, None, GrainsConfig())
    back = read_map_h5(tmp_path / "cleaned")
    np.testing.assert_array_equal(back.answers, made.answers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cleaned", "map"]
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="thesis.tex"):
        clean_map(folder, None, CleanConfig(), GrainsConfig())
