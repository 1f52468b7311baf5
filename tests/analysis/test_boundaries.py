"""Boundaries: textbook relations, planted variants, lengths counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from orix.quaternion import Misorientation
from orix.quaternion.symmetry import O
from sample_maps import NICKEL, blurred, map_of

from stemtune.analysis.boundaries import deviation_deg, equivalents, relations_of, twin
from stemtune.analysis.grain_analysis import analyse
from stemtune.config import GrainsConfig
from stemtune.crystal.phase import Phase, linio2
from stemtune.crystal.pseudo_symmetry import pseudo_variants
from stemtune.crystal.rotations import from_axis_angle_deg, multiply
from stemtune.crystal.sampling import random_orientations
from stemtune.errors import UserError
from stemtune.plot.grains import draw_grains, edge_lines


@pytest.fixture(scope="module")
def nickel() -> Phase:
    return Phase.from_cif_text(NICKEL)


def halves(turn: torch.Tensor, phase: Phase, seed: int = 3, spread: float = 0.2) -> np.ndarray:
    """Return a 10 x 12 map, the right half turned by `turn` against the left, every pixel some equivalent."""
    rng = np.random.default_rng(seed)
    left = random_orientations(1, seed)
    both = torch.cat((left, multiply(turn, left))).numpy()
    given = torch.from_numpy(blurred(both[(np.arange(120) % 12 >= 6).astype(int)], spread, rng))
    some = torch.from_numpy(rng.integers(0, phase.symmetry.order, 120))
    return multiply(phase.symmetry.operations[some], given).numpy()


def classes(turn: torch.Tensor, phase: Phase, twins: tuple[str, ...] = ()) -> dict[str, float]:
    made = map_of((10, 12), halves(turn, phase), [phase])
    boundaries = analyse(made, GrainsConfig(), twins).boundaries
    return {name: part["share"] for name, part in boundaries.shares().items() if part["share"] > 0}


@pytest.mark.parametrize(
    ("angle", "axis"),
    # 60 degrees about <111>, and the other descriptions of Sigma3 in the textbooks: 70.53 <110>, 180 <111>, 180 <112>,
    # 131.81 <210>.
    [
        (60, (1, 1, 1)),
        (60, (1, -1, 1)),
        (70.5288, (1, 1, 0)),
        (180, (1, 1, 1)),
        (180, (1, 1, 2)),
        (131.8103, (2, 1, 0)),
    ],
)
def test_sigma3_by_every_name(angle: float, axis: tuple[int, int, int], nickel: Phase) -> None:
    turn = from_axis_angle_deg(torch.tensor(axis, dtype=torch.float64), angle)
    assert classes(turn, nickel) == {"Sigma3": 1.0}


def test_brandon_and_the_rest(nickel: Phase) -> None:
    axis = torch.ones(3, dtype=torch.float64)
    assert classes(from_axis_angle_deg(axis, 60 - 8.0), nickel) == {"Sigma3": 1.0}  # 15/sqrt(3) = 8.66 degrees
    assert classes(from_axis_angle_deg(axis, 60 - 9.4), nickel) == {"high angle": 1.0}
    assert classes(from_axis_angle_deg(axis, 12.0), nickel) == {"low angle": 1.0}
    other = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    assert classes(from_axis_angle_deg(other, 36.87), nickel) == {"high angle": 1.0}  # Sigma5
    named = classes(from_axis_angle_deg(other, 36.87), nickel, ("36.87,[1 0 0]",))
    assert named == {"twin 36.87,[1 0 0]": 1.0}


def test_deviation_is_that_of_orix(nickel: Phase) -> None:
    """Any pairs: the angle that orix finds between two misorientations, over both symmetries and both orders."""
    first, second = random_orientations(40, 1), random_orientations(40, 2)
    sigma3 = from_axis_angle_deg(torch.ones(3, dtype=torch.float64), 60.0)
    ours = deviation_deg(sigma3, first, second, nickel.symmetry)
    between = multiply(second, torch.cat((first[:, :1], -first[:, 1:]), dim=1))
    group = O.data
    expected = np.full(40, np.inf)
    for one in group:
        for other in group:
            turned = Misorientation(one) * Misorientation(between.numpy()) * Misorientation(other)
            for target in (sigma3, sigma3 * torch.tensor([1.0, -1, -1, -1])):
                off = (~Misorientation(target.numpy()) * turned).angle
                expected = np.minimum(expected, np.rad2deg(np.minimum(off, 2 * np.pi - off)))
    np.testing.assert_allclose(ours, expected, atol=2e-3)
    assert len(equivalents(sigma3, nickel.symmetry)) == 4  # four <111>


def test_layered_oxide_variants() -> None:
    phase = linio2()
    for name, turn in pseudo_variants(phase):
        assert classes(turn, phase) == {f"variant {name.split(' #')[0]}": 1.0}, name
    names = {relation.name for relation in relations_of(phase, GrainsConfig())}
    assert names == {"variant 60 about c", "variant 70.5", "variant 90"}


def test_lengths_and_pairs() -> None:
    one, two, three = random_orientations(3, 3).numpy()
    orientation = np.full((9, 12, 4), one)
    orientation[2:6, 3:8] = two
    orientation[6:, 3:8] = three
    orientation[0, 0] = np.nan
    made = map_of((9, 12), orientation, [linio2()], step=(2.0, 5.0))
    analysis = analyse(made, GrainsConfig())
    table = analysis.orientation_map.tables["boundaries"]
    found = {(a, b): length for a, b, length in zip(table["grain"], table["other"], table["length"], strict=True)}
    assert found == {(0, 1): 5 * 5.0 + 2 * 4 * 2.0, (0, 2): 2 * 3 * 2.0, (1, 2): 5 * 5.0}
    assert table["length"].tolist() == sorted(table["length"], reverse=True)
    boundaries = analysis.boundaries
    lines = edge_lines(boundaries.first, boundaries.second, 12)
    assert len(lines) == 4  # two uprights through both grains, and two level ones
    assert np.abs(lines[:, 1] - lines[:, 0]).sum() == 7 + 7 + 5 + 5
    assert {tuple(line.ravel()) for line in lines} >= {(2.5, 1.5, 2.5, 8.5), (2.5, 5.5, 7.5, 5.5)}


def test_axes_are_read_as_directions_and_planes() -> None:
    phase = linio2()
    for text, axis in (
        ("60,[0 0 1]", (0, 0, 1)),
        ("60, (0 0 3)", (0, 0, 1)),
        ("60,[1,0,0]", (1, 0, 0)),
        ("60,[2 -1 -1 0]", (1, 0, 0)),
        ("60,(1 0 -1 0)", (np.sqrt(0.75), 0.5, 0)),
    ):
        rotation = twin(text, phase, 5.0).rotation
        np.testing.assert_allclose(rotation[1:] / rotation[1:].norm(), axis, atol=1e-9, err_msg=text)
        assert float(rotation[0]) == pytest.approx(np.cos(np.pi / 6))
    assert twin("60,[0 0 1],2.5", phase, 5.0).tolerance_deg == 2.5
    for text in (
        "60",
        "60,[0 0]",
        "60,[0 0 0]",
        "60,[1 1 1 0]",
        "999,[0 0 1]",
        "60,[0 0 1)",
        "60,[a b c]",
        "60,[- - -]",
    ):
        with pytest.raises(UserError, match="--twin") as caught:
            twin(text, phase, 5.0)
        assert "\n" not in str(caught.value)


def test_picture_is_crisp(tmp_path: Path, nickel: Phase) -> None:
    turn = from_axis_angle_deg(torch.ones(3, dtype=torch.float64), 60.0)
    analysis = analyse(map_of((10, 12), halves(turn, nickel), [nickel]), GrainsConfig())
    draw_grains(*analysis, tmp_path / "grains.png")
    picture = imread(tmp_path / "grains.png")[..., :3]
    line = np.abs(picture - np.array([0xD5, 0x5E, 0x00]) / 255).max(axis=2) < 0.02
    assert line.sum() > 100
    columns = np.flatnonzero(line.sum(axis=0) > 0.3 * picture.shape[0])
    assert 0 < len(columns) < 15  # one upright line, all of it in a few columns
