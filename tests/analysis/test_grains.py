"""Grains: against DREAM.3D's on a real map, against a slow segmentation with orix's angles, against planted truth."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from orix.quaternion import Orientation
from orix.quaternion import symmetry as orix_symmetry
from sample_maps import NICKEL, blurred, map_of, orix_angle_deg

from stemtune.analysis.grain_analysis import analyse, describe_grains, grain_figures
from stemtune.analysis.grains import find_grains, mean_orientations
from stemtune.analysis.neighbors import around, pairs
from stemtune.config import GrainsConfig
from stemtune.crystal.phase import Phase, linio2
from stemtune.crystal.rotations import multiply
from stemtune.crystal.sampling import random_orientations
from stemtune.crystal_map.io import read_map_h5, write_map_h5
from stemtune.crystal_map.orientation_map import OrientationMap


def adjusted_rand(first: np.ndarray, second: np.ndarray) -> float:
    """L. Hubert and P. Arabie, J. Classif. 2 (1985) 193."""
    one, other = (np.unique(labels, return_inverse=True)[1] for labels in (first, second))
    table = np.zeros((one.max() + 1, other.max() + 1))
    np.add.at(table, (one, other), 1)

    def in_pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    rows, columns = in_pairs(table.sum(1)), in_pairs(table.sum(0))
    chance = rows * columns / in_pairs(np.array([table.sum()]))
    return (in_pairs(table) - chance) / ((rows + columns) / 2 - chance)


@pytest.fixture(scope="module")
def nickel() -> Phase:
    return Phase.from_cif_text(NICKEL)


@pytest.fixture(scope="module")
def iron(shared_data: Path) -> Iterator[tuple[OrientationMap, np.ndarray]]:
    """DREAM.3D's map of bcc iron, 75 x 306, and its grain of every pixel."""
    table = np.genfromtxt(
        shared_data / "maps" / "fe_grains" / "fw-ar-IF1-aptr12-corr_CellData.csv", delimiter=",", names=True
    )
    quaternion = np.stack([table[f"FZQuaternions_{place}"] for place in (3, 0, 1, 2)], axis=1)
    quaternion /= np.linalg.norm(quaternion, axis=1, keepdims=True)
    bcc = Phase.from_cif_text(NICKEL.replace("F m -3 m", "I m -3 m").replace("225", "229").replace("3.52", "2.866"))
    yield map_of((75, 306), quaternion, [bcc], step=None), table["FeatureIds"].astype(int)


def test_grains_of_dream3d(iron: tuple[OrientationMap, np.ndarray]) -> None:
    made, theirs = iron
    every = find_grains(made, GrainsConfig(min_size=1))
    assert len(every.table) == 48
    assert adjusted_rand(every.number, theirs) >= 0.97
    np.testing.assert_array_equal(np.sort(every.table.pixels), np.sort(np.bincount(theirs)[1:]))
    usual = find_grains(made, GrainsConfig())  # five of theirs have fewer than four pixels
    assert len(usual.table) == 43
    assert adjusted_rand(usual.number, theirs) >= 0.97


def test_mean_orientation_spread_and_deviation_are_those_of_orix(iron: tuple[OrientationMap, np.ndarray]) -> None:
    made, _ = iron
    grains = find_grains(made, GrainsConfig(min_size=1))
    for number in np.argsort(-grains.table.pixels)[[0, 5, 20]]:
        own = grains.number == number
        given = Orientation(made.orientation[own], symmetry=orix_symmetry.Oh)
        # orix averages quaternions as they are: bring them next to each other first.
        mean = grains.table.orientation[number]
        group = orix_symmetry.Oh.proper_subgroup
        equivalents = np.stack([(s * given).data for s in group])
        nearest = np.abs(equivalents @ mean).argmax(axis=0)
        theirs = Orientation(equivalents[nearest, np.arange(own.sum())]).mean().data[0]
        assert orix_angle_deg(mean[None], theirs[None], made.phases[0])[0] < 0.01
        off = orix_angle_deg(np.repeat(mean[None], own.sum(), axis=0), made.orientation[own], made.phases[0])
        np.testing.assert_allclose(grains.grod_deg[own], off, atol=2e-3)
        assert grains.table.spread_deg[number] == pytest.approx(off.mean(), abs=1e-3)


def slow_grains(made: OrientationMap, settings: GrainsConfig) -> np.ndarray:
    """The same definition written down pixel by pixel, with orix's disorientations and a flood fill."""
    rows, columns = made.shape
    everyone = np.arange(rows * columns)
    first, second = (grid.ravel() for grid in np.meshgrid(everyone, everyone, indexing="ij"))
    filled = np.nan_to_num(made.orientation, nan=0.5)
    angle = orix_angle_deg(filled[first], filled[second], made.phases[0]).reshape(len(everyone), -1)
    reach = [(0, 1), (1, 0), (0, -1), (-1, 0)]
    corners = [(1, 1), (1, -1), (-1, 1), (-1, -1)] if settings.connectivity == 8 else []

    def flood(usable: np.ndarray, joinable: np.ndarray) -> np.ndarray:
        label, count = np.full(rows * columns, -1), 0
        for seed in everyone:
            if label[seed] >= 0 or not usable[seed]:
                continue
            label[seed], stack = count, [seed]
            while stack:
                here = stack.pop()
                row, column = divmod(int(here), columns)
                for down, right in reach + corners:
                    for far in range(1, settings.max_gap + 2 if (down, right) in reach else 2):
                        i, j = row + far * down, column + far * right
                        if not (0 <= i < rows and 0 <= j < columns):
                            break
                        there = i * columns + j
                        if usable[there]:
                            if angle[here, there] < settings.threshold and label[there] < 0:
                                label[there] = count
                                stack.append(there)
                            break
            count += 1
        return label

    usable = made.indexed.copy()
    for _ in range(2):
        label = flood(usable, angle)
        for number in range(label.max() + 1):
            if (label == number).sum() < settings.min_size:
                usable &= label != number
        label[~usable] = -1
    return label


@pytest.mark.parametrize(
    "settings",
    [
        GrainsConfig(),
        GrainsConfig(max_gap=0),
        GrainsConfig(connectivity=8, min_size=2, max_gap=1),
        GrainsConfig(max_gap=3),
    ],
)
def test_grains_as_the_definition_says(settings: GrainsConfig) -> None:
    rng = np.random.default_rng(11)
    shape, bases = (13, 11), random_orientations(4, 5).numpy()
    patch = np.kron(rng.integers(0, 4, (5, 4)), np.ones((3, 3), int))[: shape[0], : shape[1]].ravel()
    orientation = blurred(bases[patch], 0.8, rng)
    wrong = rng.random(len(patch)) < 0.15
    orientation[wrong] = random_orientations(int(wrong.sum()), 6).numpy()
    orientation[rng.random(len(patch)) < 0.15] = np.nan
    made = map_of(shape, orientation, [linio2()])
    ours, slow = find_grains(made, settings).number, slow_grains(made, settings)
    np.testing.assert_array_equal(ours < 0, slow < 0)
    assert adjusted_rand(ours, slow) == pytest.approx(1.0)
    seen = ours[ours >= 0]
    assert list(dict.fromkeys(seen)) == list(range(seen.max() + 1))


def test_a_wrong_pixel_neither_splits_nor_counts() -> None:
    """A grain one pixel wide at its neck, the neck's pixel wrong, then missing; and one missing too widely."""
    here, there = random_orientations(2, 9).numpy()
    orientation = np.full((7, 15, 4), here)
    orientation[:, 7] = np.nan
    orientation[3, 7] = there
    made = map_of((7, 15), orientation, [linio2()])
    assert len(find_grains(made, GrainsConfig()).table) == 1
    assert find_grains(made, GrainsConfig()).number[3 * 15 + 7] == -1
    orientation[:, 6:9] = np.nan
    assert len(find_grains(map_of((7, 15), orientation, [linio2()]), GrainsConfig()).table) == 2
    assert len(find_grains(map_of((7, 15), orientation, [linio2()]), GrainsConfig(max_gap=3)).table) == 1


def test_kernel_average_as_the_definition_says() -> None:
    rng = np.random.default_rng(4)
    shape, bases = (6, 7), random_orientations(2, 5).numpy()
    orientation = blurred(bases[(np.arange(42) % 7 > 3).astype(int)], 1.5, rng)
    orientation[[3, 17, 18]] = np.nan
    made = map_of(shape, orientation, [linio2()])
    for radius in (1, 2):
        kam = find_grains(made, GrainsConfig(kam_radius=radius, kam_limit=4.0)).kam_deg.reshape(shape)
        grid = orientation.reshape(*shape, 4)
        for row in range(6):
            for column in range(7):
                if not np.isfinite(grid[row, column]).all():
                    assert np.isnan(kam[row, column])
                    continue
                block = grid[max(row - radius, 0) : row + radius + 1, max(column - radius, 0) : column + radius + 1]
                near = block.reshape(-1, 4)
                near = near[np.isfinite(near).all(axis=1)]
                angle = orix_angle_deg(np.repeat(grid[row, column][None], len(near), 0), near, linio2())
                kept = np.sort(angle)[1:]  # without the pixel itself
                kept = kept[kept < 4.0]
                expected = kept.mean() if len(kept) else np.nan
                assert kam[row, column] == pytest.approx(expected, abs=2e-3, nan_ok=True)


def test_pairs_meet_every_neighbour_once() -> None:
    for radius in (1, 2):
        met = [
            pair for step in around(radius) for pair in zip(*(end.tolist() for end in pairs((5, 4), step)), strict=True)
        ]
        expected = {
            (a, b)
            for a in range(20)
            for b in range(a + 1, 20)
            if abs(a // 4 - b // 4) <= radius and abs(a % 4 - b % 4) <= radius
        }
        assert len(met) == len(set(met))
        assert {tuple(sorted(pair)) for pair in met} == expected


def test_mean_ignores_sign_and_representative(nickel: Phase) -> None:
    rng = np.random.default_rng(2)
    mean = random_orientations(3, 8).numpy()
    member = np.repeat(np.arange(3), 400)
    given = torch.from_numpy(blurred(mean[member], 1.5, rng))
    operations = nickel.symmetry.operations
    given = multiply(operations[torch.from_numpy(rng.integers(0, 24, 1200))], given)
    given = given * torch.from_numpy(rng.choice([-1.0, 1.0], 1200))[:, None]
    found = mean_orientations(given, member, 3, nickel.symmetry).numpy()
    assert orix_angle_deg(found, mean, nickel).max() < 0.2


def test_table_in_nanometres_and_two_phases(nickel: Phase) -> None:
    one, other = random_orientations(2, 3).numpy()
    orientation = np.full((8, 10, 4), one)
    orientation[2:6, 3:7] = one
    phase = np.zeros((8, 10), dtype=int)
    phase[2:6, 3:7] = 1
    orientation[6:, :2] = other
    analysis = analyse(map_of((8, 10), orientation, [linio2(), nickel], phase, (2.0, 3.0)), GrainsConfig())
    table = analysis.grains.table
    assert table.phase.tolist() == [0, 1, 0]
    assert table.pixels.tolist() == [60, 16, 4]
    assert table.area.tolist() == [360.0, 96.0, 24.0]
    assert table.diameter[1] == pytest.approx(2 * math.sqrt(96 / math.pi))
    assert table.at_edge.tolist() == [True, False, True]
    assert (table.row[1], table.column[1]) == (3.5, 4.5)
    figures = grain_figures(analysis)
    assert figures["boundaries"]["classes"]["phase boundary"]["length"] == 4 * 2 * 2.0 + 4 * 2 * 3.0
    assert figures["median_diameter"] == pytest.approx(table.diameter[1])
    assert "3 grains" in describe_grains(figures)


def test_nothing_indexed_has_no_grains(tmp_path: Path) -> None:
    from stemtune.map_folder.files import write_grains

    analysis = analyse(map_of((5, 6), np.full((30, 4), np.nan), [linio2()]), GrainsConfig())
    assert len(analysis.grains.table) == 0
    write_grains(analysis, tmp_path)
    assert grain_figures(analysis)["median_diameter"] is None
    assert "0 grains" in describe_grains(grain_figures(analysis))
    assert (tmp_path / "grains.csv").read_text().count("\n") == 1


def test_layers_and_tables_are_kept_in_the_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    orientation = blurred(random_orientations(2, 4).numpy()[(np.arange(60) % 10 > 4).astype(int)], 0.5, rng)
    made = analyse(map_of((6, 10), orientation, [linio2()]), GrainsConfig()).orientation_map
    write_map_h5(made, tmp_path / "map.h5")
    read = read_map_h5(tmp_path / "map.h5")
    assert set(read.layers) == {"grain", "kam_deg", "grod_deg"}
    for name, values in made.layers.items():
        np.testing.assert_array_equal(read.layers[name], values)
    assert read.tables["boundaries"]["kind"].tolist() == ["high angle"]
    np.testing.assert_array_equal(read.tables["grains"]["pixels"], [30, 30])
    np.testing.assert_array_equal(read.to_orix().prop["grain"], made.layers["grain"])
    again = analyse(read, dataclasses.replace(GrainsConfig(), min_size=40)).orientation_map
    assert len(again.tables["grains"]["pixels"]) == 0
