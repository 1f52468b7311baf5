"""Other programs' answers in our convention: against rotation matrices in numpy, and against what pyxem really said."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from benchmarks import peers, testset
from stemtune.crystal.phase import linio2
from stemtune.crystal.sampling import random_orientations
from stemtune.crystal.symmetry import disorientation_beam180_deg, disorientation_deg
from stemtune.errors import UserError

RECORDED = Path(__file__).parents[1] / "oracles" / "pyxem_columns.npz"


def in_the_lab(quaternion: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Reciprocal vectors (n, 3) of a lab-to-crystal orientation in the lab, by scipy's matrix."""
    to_crystal = Rotation.from_quat(np.roll(quaternion, -1)).as_matrix()
    return g @ to_crystal  # the transposed matrix, applied to rows


@pytest.mark.parametrize("mirror", [1, -1])
def test_pyxem_columns_mean_a_turned_or_mirrored_template(mirror: int) -> None:
    """The spots of the converted orientation are the template's, mirrored in y if need be, turned by the angle.

    Heights above the plane (which side of the Ewald sphere) must agree too: that is where +g and -g differ.
    """
    g = np.asarray(linio2().reflections(0.9).g)
    grid = random_orientations(5, 3)
    for index, angle in ((0, -180.0), (1, -77.0), (4, 33.0), (2, 179.0)):
        columns = torch.tensor([[index, 1.0, angle, mirror]])
        found = in_the_lab(peers.from_pyxem_columns(grid, columns)[0].numpy(), g)
        expected = in_the_lab(grid[index].numpy(), g)
        expected[:, 1] *= mirror
        turn = np.deg2rad(angle + 180)  # pyxem's first in-plane angle is -180
        matrix = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
        expected = expected @ matrix.T
        apart = np.linalg.norm(found[:, None] - expected[None], axis=2)
        assert apart.min(0).max() < 1e-9 and apart.min(1).max() < 1e-9


def test_what_pyxem_answered_to_shipped_patterns() -> None:
    """Recorded (`oracles/pyxem_columns.py`): rightly converted most patterns are read, as pyxem ships it few are."""
    with np.load(RECORDED) as recorded:
        columns, grid = torch.from_numpy(recorded["raw"]), torch.from_numpy(recorded["grid"])
        shipped = peers.from_pyxem_shipped(torch.from_numpy(recorded["shipped"]))
    truth = torch.from_numpy(testset.py4dstem(0.5).orientation[: len(columns)])
    symmetry = linio2().symmetry
    found = peers.from_pyxem_columns(grid, columns)
    for mirror in (1, -1):
        chosen = columns[:, 3] == mirror
        right = disorientation_beam180_deg(found[chosen], truth[chosen], symmetry) < 5
        assert chosen.sum() > 10 and right.double().mean() > 0.5
    assert (disorientation_deg(found, truth, symmetry) < 5).double().mean() > 0.6
    of_shipped = disorientation_deg(shipped, truth, symmetry) < 5
    assert of_shipped[columns[:, 3] == 1].double().mean() > 0.5
    assert not of_shipped[columns[:, 3] == -1].any()


def test_py4dstem_matrices_have_the_lab_axes_as_columns() -> None:
    g = random_orientations(4, 1)
    matrix = np.stack([Rotation.from_quat(np.roll(q, -1)).as_matrix() for q in g.numpy()])
    matrix[3] = 0
    found = peers.from_py4dstem_matrix(torch.from_numpy(matrix))
    assert disorientation_deg(found[:3], g[:3], linio2().symmetry).max() < 1e-6
    assert found[3].isnan().all()


def test_a_peer_is_looked_for_in_each_python() -> None:
    assert peers.find(peers.Peer("numpy", ""), []) == (sys.executable, np.__version__)
    assert peers.find(peers.Peer("no_such_module", ""), [sys.executable]) is None


def test_a_peer_that_fails_is_named(tmp_path: Path) -> None:
    broken = peers.Peer("broken", "no_such_script.py")
    with pytest.raises(UserError, match="broken failed in .*leave that --peer-python out"):
        peers._call(broken, sys.executable, tmp_path, {})
