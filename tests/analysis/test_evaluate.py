"""What a map is worth beside its truth: risk-coverage by hand, boundaries by brute force; two maps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from sample_maps import map_of

from stemtune.analysis.boundaries import boundary_match, match
from stemtune.analysis.evaluation.evaluate import SHARES, compare, risk_coverage
from stemtune.analysis.evaluation.evaluate import describe as in_words
from stemtune.cli import main
from stemtune.crystal.phase import linio2
from stemtune.crystal.rotations import from_axis_angle_deg, multiply
from stemtune.crystal.sampling import random_orientations
from stemtune.crystal.symmetry import disorientation_deg
from stemtune.crystal_map.io import read_map_h5, write_map_h5
from stemtune.crystal_map.orientation_map import OrientationMap

Pairs = dict[tuple[tuple[int, int], tuple[int, int]], float]


def truth_of(made: OrientationMap) -> OrientationMap:
    return made


def test_risk_coverage_by_hand() -> None:
    """Four pixels, falling confidence: right, wrong, then a tie of one right and one wrong."""
    told = risk_coverage(np.array([0.4, 0.9, 0.4, 0.7]), np.array([1.0, 2.0, 40.0, 10.0]), 5.0)
    risks = [0, 1 / 2, (0 + 1 + 0.5) / 3, 2 / 4]
    angles = [2, (2 + 10) / 2, (2 + 10 + 20.5) / 3, (2 + 10 + 41) / 4]
    for kept, place in ((0.25, 0), (0.3, 1), (0.5, 1), (0.75, 2), (1.0, 3)):
        at = told["kept"].index(kept)
        assert told["wrong"][at] == pytest.approx(risks[place])
        assert told["mean_deg"][at] == pytest.approx(angles[place])
    assert told["area"] == pytest.approx(sum(risks) / 4)
    assert told["area_of_perfect"] == pytest.approx((0 + 0 + 1 / 3 + 2 / 4) / 4)
    assert told["area_of_chance"] == 0.5
    assert tuple(told["kept"]) == SHARES


def test_a_confidence_that_says_nothing_has_the_area_of_chance() -> None:
    angle = np.random.default_rng(0).random(100) * 10
    told = risk_coverage(np.full(100, 0.3), angle, 5.0)
    assert told["area"] == pytest.approx(told["area_of_chance"])
    assert told["wrong"] == pytest.approx([told["area_of_chance"]] * 20)


def grid_edges(angle_between: Pairs, threshold: float) -> list[np.ndarray]:
    """Return the middles of the pairs that differ by more."""
    return [(np.array(a) + b) / 2 for (a, b), angle in angle_between.items() if angle > threshold]


def all_angles(made: OrientationMap) -> Pairs:
    """Return the disorientation of all neighbours that are indexed, pixel by pixel."""
    rows, columns = made.shape
    found: Pairs = {}
    for row in range(rows):
        for column in range(columns):
            for other in ((row, column + 1), (row + 1, column)):
                if other[0] < rows and other[1] < columns:
                    one, two = row * columns + column, other[0] * columns + other[1]
                    if made.indexed[one] and made.indexed[two]:
                        g1, g2 = (torch.from_numpy(made.orientation[place]) for place in (one, two))
                        found[(row, column), other] = float(disorientation_deg(g1, g2, made.phases[0].symmetry))
    return found


def shifted_grains() -> tuple[OrientationMap, OrientationMap]:
    """Return a map and its truth: three grains, their boundaries 0, 1 and 2 pixels off; some pixels are unknown."""
    rows, columns = 7, 12
    row, column = np.divmod(np.arange(rows * columns), columns)
    right = np.digitize(column, (4, 8))
    shift = np.select([row < 2, row < 4], [0, 1], 2)
    ours = np.digitize(column + shift, (4, 8))
    means = random_orientations(3, 3).numpy()
    axis = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    means[1] = multiply(from_axis_angle_deg(axis, 7.0), torch.from_numpy(means[0])).numpy()
    truth, given = means[right].copy(), means[ours].copy()
    truth[[5, 43]] = np.nan
    given[[20, 66]] = np.nan
    return tuple(map_of((rows, columns), g, [linio2()]) for g in (given, truth))  # type: ignore[return-value]


def test_boundary_precision_and_recall_by_brute_force() -> None:
    made, right = shifted_grains()
    ours, theirs = all_angles(made), all_angles(right)
    known = {pair: angle for pair, angle in ours.items() if pair in theirs}
    seen = set()
    for told in boundary_match(made, truth_of(right)):
        found, true = (grid_edges(angles, told["threshold_deg"]) for angles in (known, theirs))
        hits = [any(np.hypot(*(one - other)) <= 1 for other in true) for one in found]
        recalled = [any(np.hypot(*(one - other)) <= 1 for other in found) for one in true]
        assert (told["edges"], told["edges_of_truth"]) == (len(found), len(true))
        assert told["precision"] == pytest.approx(np.mean(hits))
        assert told["recall"] == pytest.approx(np.mean(recalled))
        seen.add((len(true), told["precision"], told["recall"]))
    assert len(seen) == 2  # 7 degrees between two of the grains
    assert all(0 < share < 1 for _, *shares in seen for share in shares), seen


def test_boundaries_that_are_not_there() -> None:
    none = np.zeros((5, 5), dtype=bool)
    one = none.copy()
    one[0, 1] = True
    assert match(none, none, 1.0) == {"edges": 0, "edges_of_truth": 0, "precision": None, "recall": None, "f1": None}
    assert match(one, none, 1.0)["precision"] == 0.0
    assert match(one, one, 0.0)["f1"] == 1.0
    far = none.copy()
    far[2, 3] = True  # 1.4 pixels away
    assert match(one, far, 1.0)["recall"] == 0.0
    assert match(one, far, 1.5)["recall"] == 1.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two maps: the second is turned by 3 degrees in its left half, and by 40 in one pixel, and lacks another."""
    folder = tmp_path_factory.mktemp("maps")
    made, _ = shifted_grains()
    g = torch.from_numpy(made.answers[:, 0])
    axis = torch.tensor([0.3, 0.2, 1.0], dtype=torch.float64)
    turn = torch.where(torch.arange(len(g)) % 12 < 6, 3.0, 0.0)
    turn[70] = 40.0
    moved = multiply(from_axis_angle_deg(axis.expand(len(g), 3), turn), g).numpy()
    moved[30] = np.nan
    other = map_of(made.shape, moved, [linio2()])
    for name, one in (("a", made), ("b", dataclasses.replace(other, answer_confidence=made.answer_confidence * 0.5))):
        (folder / name).mkdir()
        write_map_h5(one, folder / name / "map.h5")
    return folder / "a", folder / "b"


def test_two_maps_are_compared_and_their_difference_is_drawn(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from stemtune.analysis.evaluation.agreement import difference_deg
    from stemtune.analysis.evaluation.ground_truth import read_truth

    one, other = folders
    png, figures = tmp_path / "difference.png", tmp_path / "figures.json"
    command = ["evaluate", str(one), "--other", str(other), "--difference", str(png), "--json", str(figures)]
    assert main(command) == 0
    assert "within 5° 98.8%" in capsys.readouterr().out  # all but one of 81
    assert imread(png).shape[0] > 400
    told = json.loads(figures.read_text())
    assert told["both"] == pytest.approx(81 / 84)
    angles = difference_deg(read_map_h5(one), read_truth(other))
    assert np.flatnonzero(np.isnan(angles)).tolist() == [20, 30, 66]
    left = (np.arange(84) % 12 < 6) & np.isfinite(angles)
    np.testing.assert_allclose(angles[left], 3, atol=1e-4)


def test_evaluate_draws_and_says_all_of_it(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = folders
    png, drawn = tmp_path / "figures.png", tmp_path / "difference.png"
    assert main(["evaluate", str(other), "--truth", str(one), "--png", str(png), "--difference", str(drawn)]) == 0
    words = capsys.readouterr().out
    assert "risk-coverage" in words and "precision" in words
    assert imread(png).shape[:2] == (1680, 1920)
    assert drawn.exists()
    figures = compare(read_map_h5(other), truth_of(read_map_h5(one)))
    assert in_words(figures) == words.rstrip("\n")
    assert figures["risk_coverage"]["area_of_chance"] == pytest.approx(1 / 81)


def test_what_evaluate_refuses(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (str(folder) for folder in folders)
    for words, said in (
        ([], "--other MAP to compare with"),
        (["--truth", other, "--against-patterns", other], "give either --truth"),
        (["--other", other, "--png", "x.png"], "--png draws what is known of the truth"),
        (["--against-patterns", other, "--difference", "x.png"], "--difference draws two maps"),
        (["--truth", other, "--difference", "x.png", "--risk", "y.png"], "give one of them"),
    ):
        assert main(["evaluate", one, *words]) == 2
        assert said in capsys.readouterr().err
