"""The grid of orientations: labels against a search over all cells with orix, and answers from scores."""

import math

import numpy as np
import pytest
import torch
from orix.quaternion import Orientation
from orix.quaternion import symmetry as orix_symmetry

from stemtune.crystal.point_groups import LAUE_CLASSES
from stemtune.crystal.sampling import orientation_from_beam, random_orientations
from stemtune.crystal.symmetry import Symmetry, beam180, disorientation_deg
from stemtune.learning.grid import Grid, about_beam, from_rotation_vector, rotation_vector
from stemtune.learning.heads import GridReadout

TRIGONAL = Symmetry.of_laue("-3m")


def all_cells(grid: Grid) -> torch.Tensor:
    directions, angles = grid.shape
    return torch.arange(directions * angles)


@pytest.mark.parametrize("laue", LAUE_CLASSES)
def test_the_heaviest_label_is_the_nearest_cell_of_all(laue: str) -> None:
    symmetry = Symmetry.of_laue(laue)
    grid = Grid(symmetry, 20.0)
    truth = random_orientations(40, 1)
    labels = grid.encode(truth)
    brute = disorientation_deg(grid.orientation(all_cells(grid)).double(), truth[:, None], symmetry)
    heaviest = labels.cell.gather(1, labels.weight.argmax(1, keepdim=True))
    torch.testing.assert_close(brute.gather(1, heaviest)[:, 0], brute.amin(1), atol=0.02, rtol=0)
    torch.testing.assert_close(labels.weight.sum(1), torch.ones(40))


def test_label_offsets_lead_from_the_cell_to_an_equal_of_the_truth_according_to_orix() -> None:
    grid = Grid(TRIGONAL, 10.0)
    truth = random_orientations(30, 2)
    labels = grid.encode(truth)
    heavy = labels.weight > 1e-3
    moved = grid.orientation(labels.cell)[heavy].double()
    turn = from_rotation_vector(labels.offset[heavy].double())
    ours = Orientation(moved.numpy(), symmetry=orix_symmetry.D3) * Orientation(turn.numpy())
    wanted = truth[:, None].expand(*heavy.shape, 4)[heavy].numpy()
    for got, true in zip(ours.data, wanted, strict=True):
        pair = Orientation(np.stack([got, true]), symmetry=orix_symmetry.D3)
        assert np.rad2deg(pair[0].angle_with(pair[1])[0]) < 0.05


def test_equal_orientations_get_the_same_label() -> None:
    grid = Grid(TRIGONAL, 12.0)
    truth = random_orientations(8, 3).float()
    dense = [torch.zeros(8, math.prod(grid.shape)) for _ in range(2)]
    equal = Orientation(TRIGONAL.operations[4].numpy()) * Orientation(truth.double().numpy())
    for total, g in zip(dense, (truth, torch.from_numpy(equal.data).float()), strict=True):
        labels = grid.encode(g)
        total.scatter_add_(1, labels.cell, labels.weight)
    torch.testing.assert_close(dense[0], dense[1], atol=1e-3, rtol=0)


def test_the_label_wraps_round_the_full_turn() -> None:
    grid = Grid(TRIGONAL, 10.0)
    angles = grid.shape[1]
    middle = grid.directions[grid.shape[0] // 2].double()
    truth = orientation_from_beam(middle[None], torch.tensor([359.0], dtype=torch.float64))[0]
    labels = grid.encode(truth)
    used = set((labels.cell[labels.weight > 0.01] % angles).tolist())
    assert {0, angles - 1} <= used


def test_a_cell_is_the_pattern_turned_by_its_angle() -> None:
    grid = Grid(TRIGONAL, 15.0)
    table = orientation_from_beam(grid.directions.double(), torch.rad2deg(grid.angle.double()))
    cells = grid.orientation(all_cells(grid)).view(*grid.shape, 4).double()
    assert disorientation_deg(table, cells, Symmetry.of_laue("-1")).max() < 1e-3


@pytest.mark.parametrize(("step", "angles"), [(10.0, None), (5.0, 72), (20.0, None)])
def test_decoding_a_label_gives_back_the_orientation(step: float, angles: int | None) -> None:
    grid = Grid(TRIGONAL, step, angles)
    truth = random_orientations(50, 4)
    labels = grid.encode(truth)
    logits = torch.full((50, math.prod(grid.shape)), -30.0)
    logits.scatter_reduce_(1, labels.cell, labels.weight.clamp_min(1e-9).log(), "amax")
    answers = grid.decode(logits.view(50, *grid.shape))
    error = disorientation_deg(answers.orientation[:, 0].double(), truth, TRIGONAL)
    assert error.median() < 0.2 * step
    assert error.max() < 0.6 * step


def test_answers_are_different_and_ordered_and_their_confidence_is_their_probability() -> None:
    grid = Grid(TRIGONAL, 5.0)
    truth = random_orientations(20, 5)
    logits = torch.full((20, math.prod(grid.shape)), -30.0)
    for g, share in ((truth, 0.7), (beam180(truth), 0.3)):
        labels = grid.encode(g, 0.25)
        logits.scatter_reduce_(1, labels.cell, (share * labels.weight).clamp_min(1e-9).log(), "amax")
    answers = grid.decode(logits.view(20, *grid.shape), n=4)
    best, second = answers.orientation[:, 0].double(), answers.orientation[:, 1].double()
    apart = disorientation_deg(truth, beam180(truth), TRIGONAL) > 15
    assert disorientation_deg(best, truth, TRIGONAL)[apart].max() < 3
    assert disorientation_deg(second, beam180(truth), TRIGONAL)[apart].max() < 3
    assert (answers.confidence[apart, 0] - 0.7).abs().max() < 0.1
    assert (answers.confidence[:, :-1] >= answers.confidence[:, 1:] - 1e-5).all()
    assert (answers.confidence >= 0).all() and (answers.confidence <= 1).all()
    pairs = disorientation_deg(
        answers.orientation[:, :, None].double(), answers.orientation[:, None].double(), TRIGONAL
    )
    pairs = pairs[:, ~torch.eye(4, dtype=torch.bool)]
    assert pairs[pairs.isfinite()].min() > 5.0


def test_an_offset_moves_the_answer() -> None:
    grid = Grid(TRIGONAL, 10.0)
    cell = torch.tensor([[700]])
    logits = torch.zeros(1, math.prod(grid.shape)).scatter(1, cell, 50.0).view(1, *grid.shape)
    turn = torch.tensor([0.03, -0.02, 0.05])
    answers = grid.decode(logits, offset=lambda cells: turn.expand(*cells.shape, 3))
    still = grid.decode(logits)
    moved = disorientation_deg(answers.orientation[0, 0], still.orientation[0, 0], TRIGONAL)
    assert float(moved) == pytest.approx(math.degrees(turn.norm()), abs=0.01)


def test_rotation_vectors_go_there_and_back_and_are_smooth_at_zero() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(50, 3, dtype=torch.float64), dim=1)
    vectors = vectors * torch.linspace(0, 3.1, 50, dtype=torch.float64)[:, None]
    torch.testing.assert_close(rotation_vector(from_rotation_vector(vectors)), vectors)
    zero = torch.zeros(2, 3, requires_grad=True)
    from_rotation_vector(zero).sum().backward()
    assert zero.grad is not None and torch.isfinite(zero.grad).all()
    torch.testing.assert_close(about_beam(torch.tensor(math.pi)), torch.tensor([0.0, 0, 0, 1]), atol=1e-6, rtol=0)


def test_a_readout_takes_ready_made_logits_and_learns_from_them() -> None:
    grid = Grid(TRIGONAL, 20.0)
    readout = GridReadout(grid)
    truth = random_orientations(16, 6).float()
    logits = torch.zeros(16, *grid.shape, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=0.5)
    losses = []
    for _ in range(40):
        loss = readout.loss(readout(logits), truth)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(math.prod(grid.shape)), abs=1e-3)
    error = disorientation_deg(readout.candidates(readout(logits)).orientation[:, 0], truth, TRIGONAL)
    assert error.median() < 5


def test_the_loss_is_the_cross_entropy_however_the_logits_lie_in_memory() -> None:
    grid = Grid(TRIGONAL, 20)
    labels = grid.encode(random_orientations(5, 3).float())
    logits = torch.randn(5, *grid.shape)
    share = torch.zeros(5, math.prod(grid.shape)).scatter_add(1, labels.cell, labels.weight)
    expected = -(share * logits.flatten(1).log_softmax(1)).sum(1).mean()
    for order in ((0, 1, 2), (0, 2, 1), (2, 1, 0)):
        back = torch.tensor(order).argsort().tolist()
        torch.testing.assert_close(
            grid.cross_entropy(logits.permute(order).contiguous().permute(back), labels), expected
        )
