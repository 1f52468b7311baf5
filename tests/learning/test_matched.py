"""The matched filter: judged by dynamical patterns of py4DSTEM, and its shortcuts by a comparison done the slow way."""

import math

import numpy as np
import pytest
import torch
from bloch_patterns import KV, SCALE, SIZE, load, pictures

from stemtune.config import Config
from stemtune.crystal.phase import Phase, linio2
from stemtune.crystal.point_groups import LAUE_CLASSES
from stemtune.crystal.rotations import from_axis_angle_deg, inverse, multiply, rotate
from stemtune.crystal.sampling import random_orientations
from stemtune.crystal.symmetry import Symmetry, disorientation_deg
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator
from stemtune.errors import UserError
from stemtune.learning.grid import Grid
from stemtune.learning.models.matched import Matched
from stemtune.learning.models.peaks import parabola_fit, top_of_parabola
from stemtune.learning.models.polar_templates import PolarView, neighbours, polar_grid, turned

GEOMETRY = Geometry(SIZE, SCALE, KV)
CLEAN = {
    "simulate.shape": "gaussian",
    "simulate.shape_width": 0.02,
    "simulate.intensity_power": 0.4,
    "simulate.precession": 0,
    "simulate.convergence": 0.5,
    "simulate.dose": 0,
    "simulate.background": 0,
    "simulate.centre_error": 0,
    "simulate.ellipticity": 0,
    "simulate.scale_error": 0,
    "simulate.dead_pixels": 0,
}


@pytest.fixture(scope="module")
def matched() -> Matched:
    return Matched(Config(), linio2(), GEOMETRY)


@pytest.fixture(scope="module")
def coarse() -> Matched:
    return Matched(Config.from_flat({"model.grid_step": 6}), linio2(), GEOMETRY)


def simulated(count: int, seed: int, phase: Phase | None = None, **changes: object) -> tuple[torch.Tensor, ...]:
    flat = CLEAN | {key.replace("__", "."): value for key, value in changes.items()}
    simulator = KinematicSimulator(phase or linio2(), GEOMETRY, Config.from_flat(flat).simulate)
    orientation = random_orientations(count, seed)
    return orientation, simulator.patterns(orientation, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["p0", "p05"])
def test_the_stored_beams_stand_where_our_frame_puts_them(name: str) -> None:
    """The frame of the reference: positions and the side of the Ewald sphere, beam by beam."""
    bloch = load(name)
    g = linio2().reflections(2.01).g
    wavelength, right, wrong = GEOMETRY.wavelength_angstrom, 0.0, 0.0
    for orientation, beams in zip(bloch.orientation[:60], bloch.beams[:60], strict=True):
        lab = rotate(inverse(orientation), g).numpy()
        thickness_of_sphere = wavelength * (lab**2).sum(1) / 2
        near = np.abs(lab[:, 2] - thickness_of_sphere) < 0.11
        lab, bend = lab[near], thickness_of_sphere[near]
        diffracted = beams[np.hypot(beams[:, 0], beams[:, 1]) > 0.05]
        distance = np.hypot(*(diffracted[:, None, :2] - lab[None, :, :2]).transpose(2, 0, 1))
        assert distance.min(1).max() < 2e-5
        found = distance.argmin(1)
        right += float((diffracted[:, 2] * np.abs(lab[found, 2] - bend[found])).sum())
        wrong += float((diffracted[:, 2] * np.abs(lab[found, 2] + bend[found])).sum())
    assert right < 0.5 * wrong


@pytest.mark.parametrize(("name", "median", "two", "five"), [("p0", 0.7, 0.85, 0.89), ("p05", 0.5, 0.90, 0.93)])
def test_dynamical_patterns_of_py4dstem_are_indexed(
    matched: Matched, name: str, median: float, two: float, five: float
) -> None:
    """Measured: p0 0.62 deg, 0.855, 0.895; p05 0.38 deg, 0.92, 0.945, at 3,000 electrons, direct beam included."""
    bloch = load(name)
    answers = matched.candidates(matched(pictures(bloch)), 10)
    error = disorientation_deg(answers.orientation.double(), bloch.orientation[:, None], matched.phase.symmetry)
    best = error[:, 0]
    assert best.median() < median
    assert (best < 2).double().mean() > two
    assert (best < 5).double().mean() > five
    assert (error.nan_to_num(180).amin(1) < 5).double().mean() >= 0.99
    confidence = answers.confidence[:, 0]
    assert confidence[best < 5].mean() > confidence[best > 5].mean() + 0.2
    assert abs(float(confidence.mean()) - float((best < 5).double().mean())) < 0.08


def test_n_answers_are_different_reduced_and_fall_in_confidence(matched: Matched) -> None:
    _, patterns = simulated(24, 5)
    answers = matched.candidates(matched(patterns), 6)
    pairs = disorientation_deg(answers.orientation[:, :, None], answers.orientation[:, None], matched.phase.symmetry)
    apart = pairs[~torch.eye(6, dtype=torch.bool).expand(24, -1, -1)]
    assert apart[~apart.isnan()].min() > 5.0
    assert (answers.confidence.diff(dim=1) <= 0).all()
    assert ((answers.confidence >= 0) & (answers.confidence <= 1)).all()
    first = matched.candidates(matched(patterns), 1)
    torch.testing.assert_close(first.confidence[:, 0], answers.confidence[:, 0])
    torch.testing.assert_close(first.orientation[:, 0], answers.orientation[:, 0])


def test_the_scores_are_the_correlations_of_turned_templates(coarse: Matched) -> None:
    """Against numpy: a template drawn as a spot pattern, turned by hand, multiplied cell by cell."""
    _, patterns = simulated(3, 8)
    scores = coarse.scores(patterns).numpy()
    view = coarse.view(patterns).numpy()
    radius, angle = coarse.view.radius.numpy(), coarse.view.angle.numpy()
    settings = Config().model
    simulator = KinematicSimulator(linio2(), GEOMETRY, Config().simulate)
    for cell in torch.randint(0, scores[0].size, (5,), generator=torch.Generator().manual_seed(1)).tolist():
        g = coarse.grid.orientation(torch.tensor([cell]))
        spots = simulator.template_spots(g, settings.template_width, faintest=1e-4)
        template = np.zeros((len(radius), len(angle)))
        for x, y, intensity in zip(*(part[0].numpy() for part in spots[:3]), strict=True):
            rho, phi = math.hypot(x, y), math.atan2(y, x)
            chord = 2 * rho**2 * (1 - np.cos(angle - phi))
            square = (radius[:, None] - rho) ** 2 + chord
            template += intensity**settings.template_power * np.exp(-square / (2 * settings.template_spot**2))
        template = (template - template.mean(1, keepdims=True)) * np.sqrt(radius)[:, None]
        template /= np.linalg.norm(template)
        for number in range(3):
            assert scores[number].flat[cell] == pytest.approx(float((template * view[number]).sum()), abs=1e-3)


def test_the_quick_first_stage_agrees_with_the_exact_scores(coarse: Matched) -> None:
    _, patterns = simulated(6, 3)
    exact = coarse.scores(patterns).amax(-1)
    quick = coarse(patterns)["peak"]
    assert torch.corrcoef(torch.stack((quick.flatten(), exact.flatten())))[0, 1] > 0.99
    shortlist = coarse.peaks.shortlist(quick, 12)
    assert (exact.gather(1, shortlist).amax(1) > exact.amax(1) - 0.02).all()


def test_polar_cells_hold_the_mean_of_the_pattern() -> None:
    view = PolarView(Config(), linio2(), GEOMETRY)
    axis = (np.arange(SIZE) - (SIZE - 1) / 2) * SCALE
    x, y = np.meshgrid(axis, -axis)
    plane = torch.tensor(5 + 2 * x - y, dtype=torch.float32)[None]
    inside = view.radius < GEOMETRY.radius_inv_angstrom - SCALE
    expected = 5 + view.radius[:, None] * (2 * view.angle.cos() - view.angle.sin())
    torch.testing.assert_close(view.cells(plane)[0][inside], expected[inside], atol=0.01, rtol=0)
    assert view.cells(plane)[0][-1].amin() == 0  # beyond the edges of the detector


def test_scale_background_rings_and_number_type_do_not_matter(coarse: Matched) -> None:
    _, patterns = simulated(4, 6, simulate__dose=20_000)
    view = coarse.view(patterns)
    torch.testing.assert_close(coarse.view(patterns * 1000), view, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(coarse.view(patterns.to(torch.uint16)), view)
    spoilt = patterns.clone()
    spoilt[patterns == 0] = torch.nan
    torch.testing.assert_close(coarse.view(spoilt), view)
    ring = coarse.view(torch.ones(1, SIZE, SIZE))[0][coarse.view.radius < GEOMETRY.radius_inv_angstrom - SCALE]
    assert ring.abs().max() < 1e-3


@pytest.mark.parametrize("pattern", [torch.zeros(2, SIZE, SIZE), torch.full((2, SIZE, SIZE), 7.0)])
def test_an_empty_pattern_gets_no_confidence(coarse: Matched, pattern: torch.Tensor) -> None:
    answers = coarse.candidates(coarse(pattern), 3)
    assert (answers.confidence < 0.1).all()


def test_vacuum_noise_is_told_from_a_crystal(matched: Matched) -> None:
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    square = axis[:, None] ** 2 + axis**2
    vacuum = torch.exp(-0.5 * square) / 6.3 + 2e-4 * torch.exp(-square.sqrt() / 20)
    noise = torch.poisson(3000 * vacuum.expand(20, -1, -1), generator=torch.Generator().manual_seed(0))
    _, crystal = simulated(20, 4, simulate__dose=3000)
    empty = matched.candidates(matched(noise)).confidence
    assert empty.max() < 0.2
    assert matched.candidates(matched(crystal)).confidence.median() > 0.6


def test_a_pattern_of_another_size_is_refused(coarse: Matched) -> None:
    with pytest.raises(UserError, match="64 x 64 px, but the model is made for 128 x 128"):
        coarse(torch.zeros(1, 64, 64))


@pytest.mark.parametrize("laue", LAUE_CLASSES)
def test_neighbours_of_a_direction_are_the_nearest_of_all(laue: str) -> None:
    grid = Grid(Symmetry.of_laue(laue), 12.0, 30)
    near = neighbours(grid, 7)
    step = torch.arange(len(grid.base))
    assert (near.direction[:, 0] == step).all()
    cells = near.direction
    here = turned(grid.base[:, None], near.tilt, torch.zeros_like(near.turn))
    there = turned(grid.base[cells], torch.zeros_like(near.tilt), -near.turn)
    assert disorientation_deg(here.double(), there.double(), grid.symmetry).max() < 0.01
    length = torch.rad2deg(torch.linalg.vector_norm(near.tilt, dim=-1))
    beams = rotate(grid.symmetry.operations[:, None], grid.directions.double()).flatten(0, 1)
    brute = torch.rad2deg(torch.acos((grid.directions.double() @ beams.T).clamp(-1, 1))).topk(7, largest=False).values
    torch.testing.assert_close(length.double().sort(dim=1).values, brute, atol=0.05, rtol=0)


CUBIC = """data_rocksalt
_symmetry_Int_Tables_number 225
_symmetry_space_group_name_H-M 'F m -3 m'
_cell_length_a 4.18
_cell_length_b 4.18
_cell_length_c 4.18
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
Ni1 Ni 0 0 0
O1 O 0.5 0.5 0.5
"""
TRICLINIC = """data_triclinic
_symmetry_Int_Tables_number 2
_symmetry_space_group_name_H-M 'P -1'
_cell_length_a 3.9
_cell_length_b 4.7
_cell_length_c 5.6
_cell_angle_alpha 84
_cell_angle_beta 97
_cell_angle_gamma 108
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
Ni1 Ni 0.13 0.24 0.31
O1 O 0.55 0.71 0.88
"""


@pytest.mark.parametrize(("cif", "step", "limit"), [(CUBIC, 3.0, 0.9), (TRICLINIC, 6.0, 0.6)])
def test_other_crystal_systems_are_indexed(cif: str, step: float, limit: float) -> None:
    phase = Phase.from_cif_text(cif)
    model = Matched(Config.from_flat({"model.grid_step": step}), phase, GEOMETRY)
    orientation, patterns = simulated(48, 9, phase)
    found = model.candidates(model(patterns), 3).orientation.double()
    error = disorientation_deg(found, orientation[:, None], phase.symmetry).nan_to_num(180).amin(1)
    assert (error < 2.5).double().mean() > limit


def test_answers_fall_between_the_cells(matched: Matched) -> None:
    """At 2 degrees a cell is 1.3 degrees away from the truth in the median; the parabola is not."""
    orientation, patterns = simulated(100, 2)
    error = disorientation_deg(
        matched.candidates(matched(patterns)).orientation[:, 0].double(), orientation, matched.phase.symmetry
    )
    assert error.median() < 0.6


def test_the_top_of_a_parabola_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 40, 3, generator=generator)
    top = 0.3 * torch.randn(5, 3, generator=generator)
    off = x - top[:, None]
    y = 0.5 - 0.2 * off.square().sum(-1) - 0.1 * off[..., 0] * off[..., 1]
    found, height = top_of_parabola(parabola_fit(x), y)
    torch.testing.assert_close(found, top, atol=5e-3, rtol=0)
    torch.testing.assert_close(height, torch.full((5,), 0.5), atol=2e-3, rtol=0)


def test_turning_the_pattern_turns_the_answer(matched: Matched) -> None:
    """A quarter turn of the image, anticlockwise, is the orientation times Rz(-90)."""
    _, patterns = simulated(20, 12)
    before = matched.candidates(matched(patterns))
    after = matched.candidates(matched(torch.rot90(patterns, 1, (1, 2))))
    quarter = from_axis_angle_deg(torch.tensor([0.0, 0.0, 1.0]), -90.0)
    sure = before.confidence[:, 0] > 0.6
    expected = multiply(before.orientation[:, 0], quarter)
    apart = disorientation_deg(after.orientation[:, 0].double(), expected.double(), matched.phase.symmetry)
    assert sure.sum() > 10
    assert apart[sure].median() < 0.01
    assert apart[sure].max() < 1.0


def test_the_loss_prefers_the_truth_and_nothing_is_trainable(coarse: Matched) -> None:
    orientation, patterns = simulated(16, 14)
    output = coarse(patterns)
    assert coarse.loss(output, orientation.float()) < coarse.loss(output, orientation.float().flip(0)) - 1
    assert not coarse.trainable
    assert not list(coarse.parameters())
    assert not coarse.state_dict()


def test_grid_step_too_fine_names_the_setting() -> None:
    with pytest.raises(UserError, match=r"`model.grid_step` is 0.2, but must be 0"):
        polar_grid(Config.from_flat({"model.grid_step": 0.2}), linio2(), 2.0)
