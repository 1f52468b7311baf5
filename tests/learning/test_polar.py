"""The polar network: a turn is a shift, its start is the matched filter, and it learns; and the circular network."""

import math
from pathlib import Path

import pytest
import torch

from stemtune.config import Config
from stemtune.crystal.phase import linio2
from stemtune.crystal.sampling import random_orientations
from stemtune.crystal.symmetry import disorientation_deg
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator
from stemtune.errors import UserError
from stemtune.learning.checkpoint import load_model, save_model
from stemtune.learning.models import build
from stemtune.learning.models.matched import Matched
from stemtune.learning.models.polar import SHARPNESS, Polar
from stemtune.learning.models.polar_head import PolarNetwork
from stemtune.learning.models.polar_templates import centred

GEOMETRY = Geometry(64, 0.05, 200.0)
SMALL = {
    "model.name": "polar",
    "model.grid_step": 8,
    "model.angles": 60,
    "model.radii": 24,
    "model.width": 8,
    "model.template_spot": 0.07,
    "simulate.size": 64,
    "simulate.scale": 0.05,
    "simulate.dose": "3000:30000",
}


def made(seed: int = 0, **changes: object) -> Polar:
    torch.manual_seed(seed)
    flat = SMALL | {key.replace("__", "."): value for key, value in changes.items()}
    model = build(Config.from_flat(flat), linio2(), GEOMETRY)
    assert isinstance(model, Polar)
    return model


def simulated(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    simulator = KinematicSimulator(linio2(), GEOMETRY, Config.from_flat(SMALL).simulate)
    orientation = random_orientations(count, seed)
    return orientation.float(), simulator.patterns(orientation, torch.Generator().manual_seed(seed))


def disturbed(model: Polar) -> Polar:
    """Give every parameter, the zeros of the start included, a value that matters."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_a_turn_of_the_pattern_shifts_the_logits_exactly(kernel: int) -> None:
    model = disturbed(made(model__kernel_size=kernel))
    view = torch.randn(2, *model.view.shape)
    logits = model.from_view(view)["logits"].detach()
    assert logits.std() > 0.1
    for shift in (1, 17, 59):
        turned = model.from_view(view.roll(shift, -1))["logits"]
        torch.testing.assert_close(turned, logits.roll(shift, -1), atol=2e-4 * float(logits.abs().max()), rtol=0)


@pytest.mark.parametrize("centring", [False, True])
def test_a_quarter_turn_of_the_image_shifts_the_logits_by_a_quarter(centring: bool) -> None:
    model = disturbed(made(model__centring=centring))
    _, patterns = simulated(3, 1)
    logits = model(patterns)["logits"].detach()
    turned = model(torch.rot90(patterns, 1, (1, 2)))["logits"]
    torch.testing.assert_close(turned, logits.roll(15, -1), atol=1e-3 * float(logits.abs().max()), rtol=0)


def test_before_training_the_network_is_the_matched_filter() -> None:
    model = made().eval()
    _, patterns = simulated(6, 2)
    scores = Matched(model.config, model.phase, GEOMETRY).scores(patterns)
    logits = model(patterns)["logits"] * SHARPNESS
    together = torch.corrcoef(torch.stack((logits.flatten(), scores.flatten())))[0, 1]
    assert together > 0.99  # the highest angular frequencies are left out
    assert (logits - scores).abs().mean() < 0.02


def test_before_training_the_answers_are_as_sharp_as_those_of_matching() -> None:
    truth, patterns = simulated(48, 11)
    model = made(model__grid_step=4, model__angles=90).eval()
    matched = Matched(model.config, model.phase, GEOMETRY)
    with torch.no_grad():
        answers, known = model.candidates(model(patterns), 2), matched.candidates(matched(patterns))
    error, least = (
        disorientation_deg(some.orientation[:, 0].double(), truth.double(), model.phase.symmetry)
        for some in (answers, known)
    )
    assert error.median() < least.median() + 0.15
    model.head.peaks.refined = False
    with torch.no_grad():
        cells = model.candidates(model(patterns)).orientation[:, 0]
    rough = disorientation_deg(cells.double(), truth.double(), model.phase.symmetry)
    assert error[rough < 5].median() < 0.8 * rough[rough < 5].median()
    assert (answers.confidence[:, 0] >= answers.confidence[:, 1]).all()
    assert (answers.confidence >= 0).all() and (answers.confidence.sum(1) <= 1.001).all()


def test_without_residual_answers_are_cells() -> None:
    model = made(head__residual=False).eval()
    _, patterns = simulated(4, 12)
    with torch.no_grad():
        answer = model.candidates(model(patterns)).orientation[:, 0]
    cells = model.grid.orientation(torch.arange(model.grid.base.shape[0] * 60))
    for one in answer:
        assert disorientation_deg(one.double(), cells.double(), model.phase.symmetry).min() < 0.05


def test_an_empty_pattern_gets_no_confidence() -> None:
    model = made().eval()
    with torch.no_grad():
        assert (model.candidates(model(torch.zeros(2, 64, 64))).confidence < 0.05).all()


def test_centring_undoes_a_move_of_the_pattern() -> None:
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")

    def picture(down: float, right: float, beam: float = 1.0) -> torch.Tensor:
        spots = ((31.5, 31.5, beam), (20.5, 45.0, 0.2), (50.0, 40.5, 0.3))
        parts = [b * torch.exp(-((y - i - down) ** 2 + (x - j - right) ** 2) / 4) for i, j, b in spots]
        return 100 * torch.stack(parts).sum(0)[None]

    still = centred(picture(0, 0), GEOMETRY, 4.0)
    assert (centred(picture(1.4, -0.8), GEOMETRY, 4.0) - still).abs().max() < 10  # what the interpolation blurs
    assert (picture(1.4, -0.8) - still).abs().max() > 30
    hidden = picture(1.4, -0.8, beam=0.0)
    torch.testing.assert_close(centred(hidden, GEOMETRY, 4.0), hidden, atol=1e-2, rtol=0)


def test_the_start_is_better_than_chance_and_random_filters_are_not() -> None:
    truth, patterns = simulated(64, 3)
    hits = {}
    for start in ("matched", "random"):
        model = made(model__start=start, model__grid_step=4, model__angles=90).eval()
        with torch.no_grad():
            answer = model.candidates(model(patterns)).orientation[:, 0]
        error = disorientation_deg(answer.double(), truth.double(), model.phase.symmetry)
        hits[start] = float((error < 5).double().mean())
    assert hits["matched"] > 0.4
    assert hits["random"] < 0.1


@pytest.mark.parametrize("start", ["matched", "random"])
def test_training_lowers_the_loss_on_patterns_not_seen(start: str) -> None:
    model = made(model__start=start)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    truth, patterns = simulated(512, 4)
    held_truth, held = simulated(64, 5)
    with torch.no_grad():
        before = float(model.loss(model(held), held_truth))
    for _ in range(3):
        for part_g, part in zip(truth.split(64), patterns.split(64), strict=True):
            loss = model.loss(model(part), part_g)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        after = float(model.loss(model(held), held_truth))
    assert after < before - 0.05
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_training_is_repeatable() -> None:
    weights = []
    for _ in range(2):
        model = made(3, model__dropout=0.2)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
        truth, patterns = simulated(16, 6)
        torch.manual_seed(1)
        for _ in range(2):
            optimiser.zero_grad()
            model.loss(model(patterns), truth).backward()
            optimiser.step()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(*weights)


def test_half_precision_changes_little() -> None:
    model = made().eval()
    _, patterns = simulated(8, 7)
    with torch.no_grad():
        exact = model(patterns)["logits"]
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(patterns)["logits"]
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().max() < 0.02 * exact.abs().max()


def test_weights_go_to_a_file_and_the_bank_of_the_start_is_among_them() -> None:
    model = disturbed(made(1))
    other = made(2, model__start="random")
    other.load_state_dict(model.state_dict())
    other.eval()
    # The scale of the filters belongs to the start, so that a saved model is built with its own setting.
    again = made(2)
    again.load_state_dict(model.state_dict())
    _, patterns = simulated(4, 8)
    torch.testing.assert_close(again.eval()(patterns)["logits"], model(patterns)["logits"])
    assert {"bank", "log_scale"} <= set(model.state_dict())
    assert not torch.allclose(other(patterns)["logits"], model(patterns)["logits"])


def test_depth_one_leaves_out_the_convolutions() -> None:
    model = made(model__depth=1)
    assert not list(model.convolutions.parameters())
    _, patterns = simulated(2, 8)
    assert model(patterns)["logits"].shape == (2, *model.grid.shape)


CIRCULAR = SMALL | {"model.name": "circular", "model.width": 32, "model.depth": 2}


def circular(**changes: object) -> PolarNetwork:
    torch.manual_seed(0)
    flat = CIRCULAR | {key.replace("__", "."): value for key, value in changes.items()}
    model = build(Config.from_flat(flat), linio2(), GEOMETRY)
    assert isinstance(model, PolarNetwork)
    return model


def test_a_turn_shifts_the_logits_of_the_circular_network_exactly() -> None:
    model = disturbed(circular())
    view = torch.randn(2, 1, 24, 60)
    logits = model.from_view(view)["logits"].detach()
    assert logits.shape == (2, *model.head.grid.shape) and logits.std() > 0.1
    for shift in (1, 17, 59):
        torch.testing.assert_close(model.from_view(view.roll(shift, -1))["logits"], logits.roll(shift, -1))


def test_the_circular_network_learns_patterns_by_heart_in_seconds() -> None:
    model = circular(model__width=64).train()
    truth, patterns = simulated(32, 5)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = model.loss(model(patterns), truth)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    cells = math.prod(model.head.grid.shape)
    assert losses[0] == pytest.approx(math.log(cells), abs=0.5)  # chance
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        answer = model.eval().candidates(model(patterns)).orientation[:, 0]
    assert disorientation_deg(answer.double(), truth.double(), model.phase.symmetry).median() < 4


def test_the_tops_of_the_logits_are_the_orientations_of_their_cells() -> None:
    head = circular().head
    directions, angles = head.grid.shape
    cell = torch.tensor([0, 7 * angles + 13, (directions - 1) * angles + angles - 1])
    known = head.grid.orientation(cell)
    labels = head.grid.encode(known, 1.0)
    logits = torch.full((3, directions * angles), -20.0).scatter(1, labels.cell, labels.weight.log().clamp_min(-20))
    found = head.candidates({"logits": logits.view(3, directions, angles)}, 2)
    assert disorientation_deg(found.orientation[:, 0].double(), known.double(), head.grid.symmetry).max() < 1.5
    assert (found.confidence[:, 0] > 0.5).all()


def test_the_circular_network_comes_back_from_its_folder_with_any_head(tmp_path: Path) -> None:
    _, patterns = simulated(4, 8)
    for head in ("grid", "sixd"):
        model = disturbed(circular(head__name=head))
        save_model(model, tmp_path / head, {}, "")
        again = load_model(tmp_path / head)
        with torch.no_grad():
            torch.testing.assert_close(again(patterns), model(patterns))
            torch.testing.assert_close(again.candidates(again(patterns)), model.candidates(model(patterns)))


def test_stochastic_depth_acts_in_training_only_and_kernels_take_turns() -> None:
    model = circular(model__drop_path=0.5)
    disturbed(model)
    view = torch.randn(8, 1, 24, 60)
    with torch.no_grad():
        torch.testing.assert_close(model.from_view(view), model.from_view(view))
        model.train()
        assert not torch.allclose(model.from_view(view)["logits"], model.from_view(view)["logits"])
    assert [block.kernel_size for block in model.backbone.blocks] == [9, 13]
    assert [block.kernel_size for block in circular(model__kernel_size=5).backbone.blocks] == [5, 5]


@pytest.mark.parametrize("name", ["circular", "polar"])
def test_a_grid_too_fine_for_memory_is_a_one_line_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stemtune._parallel.free_bytes", lambda device: 5 * 2**20)
    build(
        Config.from_flat(SMALL | {"model.name": name, "model.start": "random", "train.batch_size": 1}),
        linio2(),
        GEOMETRY,
    )
    with pytest.raises(UserError, match=r"need .* GB are free; raise `model.grid_step`") as caught:
        build(Config.from_flat(SMALL | {"model.name": name, "model.start": "random"}), linio2(), GEOMETRY)
    assert "\n" not in str(caught.value)
