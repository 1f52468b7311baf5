"""Bloch waves against py4DSTEM, abTEM, matrix exponentials and textbook formulas; symmetry; averages; bad input."""

import dataclasses
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import expm

from stemtune.config import SimulateConfig, Span
from stemtune.crystal import rotations
from stemtune.crystal.absorption import absorptive_factors
from stemtune.crystal.phase import Phase, linio2
from stemtune.crystal.sampling import random_orientations
from stemtune.diffraction import bloch
from stemtune.diffraction.bloch import BlochSimulator
from stemtune.diffraction.geometry import Geometry, wavelength_angstrom
from stemtune.diffraction.kinematic import KinematicSimulator
from stemtune.diffraction.propagation import propagated
from stemtune.diffraction.simulator import simulator_for
from stemtune.errors import UserError

ORACLES = Path(__file__).parents[1] / "oracles"  # what the files hold: dynamical_py4dstem.py and dynamical_abtem.py
NAMES = ("linio2", "si", "au", "gaas")
SYMBOLS = {3: "Li", 8: "O", 14: "Si", 28: "Ni", 31: "Ga", 33: "As", 79: "Au"}
WAVELENGTH = wavelength_angstrom(200)
GAMMA = 1 + 200 / 510.99895

CIF = """data_oracle
_cell_length_a {}
_cell_length_b {}
_cell_length_c {}
_cell_angle_alpha {}
_cell_angle_beta {}
_cell_angle_gamma {}
_space_group_IT_number 1
loop_
_space_group_symop_operation_xyz
'x,y,z'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_U_iso_or_equiv
{}
"""


@cache
def oracle(name):
    with np.load(ORACLES / f"dynamical_{name}.npz") as held:
        return {key: held[key] for key in held.files}


@cache
def phase_of(name, at_rest=False):
    """Return the oracle's crystal, without any symmetry but translations."""
    held = oracle(name)
    lines = [
        f"{SYMBOLS[int(z)]}{row} {SYMBOLS[int(z)]} {x:.10f} {y:.10f} {z_:.10f} {u}"
        for row, (z, (x, y, z_), u) in enumerate(zip(held["number"], held["fractional"], held["u_iso"], strict=True))
    ]
    phase = Phase.from_cif_text(CIF.format(*held["cell"], "\n".join(lines)))
    return dataclasses.replace(phase, u_iso=torch.zeros_like(phase.u_iso)) if at_rest else phase


def _exact(**settings):
    """Settings whose beams reach exactly to the corner of the pattern."""
    still = {"centre_error": 0.0, "ellipticity": 0.0, "scale_error": 0.0, "physics": "bloch", "beams": 400}
    return SimulateConfig(**{**still, "scale": 0.014, **settings})


@cache
def _made(phase, simulate):
    return BlochSimulator(phase, Geometry.of(simulate), simulate)


def _simulator(phase, **settings):
    return _made(phase, _exact(**settings))


def like_oracle(name, at_rest, absorption):
    """Return a simulator of the oracle's crystal that takes the oracle's beams."""
    held = oracle(name)
    scale = 1.0001 * float(held["reach"]) / (64 * math.sqrt(2))
    return _simulator(phase_of(name, at_rest), scale=scale, beam_error=float(held["error"]), absorption=absorption)


def _beams_by_index(simulator, beams, row):
    """Return {hkl: intensities (T,)} of one pattern."""
    real = beams.reflection[row] > -2
    index = beams.reflection[row][real]
    hkl = torch.where((index >= 0)[:, None], simulator.hkl[index.clamp_min(0)], 0)
    return dict(zip(map(tuple, hkl.tolist()), beams.intensity[row].T[real].numpy(), strict=True))


def _cases(count):
    ends = np.cumsum(count)
    return [slice(end - number, end) for end, number in zip(ends, count, strict=True)]


@pytest.mark.parametrize("variant", ["elastic", "thermal", "wkcp"])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_couplings_give_the_same_intensities(name, variant):
    """py4DSTEM's beams and Fourier coefficients, our propagation."""
    held = oracle(name)
    factor = dict(zip(map(tuple, held["coupled"].tolist()), held[f"factor_{variant}"], strict=True))
    lattice = phase_of(name).reciprocal_matrix.numpy()
    thickness = torch.from_numpy(held["thickness_nm"]) * 10
    for orientation, rows in zip(held["orientation"], _cases(held["count"]), strict=True):
        hkl = held["hkl"][rows].astype(int)
        first = int((hkl == 0).all(1).argmax())
        order = np.r_[first, np.delete(np.arange(len(hkl)), first)]  # the beam that comes in stands first here
        hkl, theirs = hkl[order], held[f"intensity_{variant}"][rows][order]
        g = torch.from_numpy(hkl @ lattice)
        g = rotations.rotate(rotations.inverse(torch.from_numpy(orientation))[None], g).numpy()
        assert g[:, 0] == pytest.approx(held["x"][rows][order], abs=1e-5)
        assert g[:, 1] == pytest.approx(held["y"][rows][order], abs=1e-5)
        error = (2 * g[:, 2] - WAVELENGTH * (g**2).sum(1)) / 2 / (1 - WAVELENGTH * g[:, 2])  # as py4DSTEM has it
        matrix = np.array([[factor[tuple(column - row)] for column in hkl] for row in hkl]) * WAVELENGTH / 2
        np.fill_diagonal(matrix, 1j * matrix[0, 0].imag)
        ours = propagated(
            torch.from_numpy(matrix).to(torch.complex64)[None],
            torch.from_numpy(error).float()[None, :, None],
            thickness[None],
        )[0].T.numpy()
        assert ours == pytest.approx(theirs, abs=3e-5)
        assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.9999


@pytest.mark.parametrize("variant", ["elastic", "abtem", "thermal"])
@pytest.mark.parametrize("name", NAMES)
def test_our_own_couplings_give_nearly_the_same_intensities(name, variant):
    """From the crystal to the intensities: beams chosen, factors and absorption computed by ourselves."""
    held = oracle(name)
    count, listed, expected = (
        (np.load(ORACLES / "dynamical_abtem.npz")[f"{name}_{key}"] for key in ("count", "hkl", "intensity"))
        if variant == "abtem"
        else (held["count"], held["hkl"], held[f"intensity_{variant}"])
    )
    at_rest = variant != "thermal"
    simulator = like_oracle(name, at_rest, "none" if at_rest else "thermal")
    beams = simulator.beams(torch.from_numpy(held["orientation"]), torch.from_numpy(held["thickness_nm"]))
    for row, rows in enumerate(_cases(count)):
        ours = _beams_by_index(simulator, beams, row)
        hkl = [tuple(index) for index in listed[rows].tolist()]
        common = [index for index in hkl if index in ours]
        assert len(common) >= 0.94 * max(len(hkl), len(ours))
        theirs = dict(zip(hkl, expected[rows], strict=True))
        pair = np.array([[ours[index], theirs[index]] for index in common])
        assert np.corrcoef(pair[:, 0].ravel(), pair[:, 1].ravel())[0, 1] > 0.9998
        assert pair[:, 0] == pytest.approx(pair[:, 1], abs=0.011)  # excitation errors are linearised in three ways
        assert pair[:, 0].sum(0) == pytest.approx(pair[:, 1].sum(0), abs=0.006)


def test_the_crystal_without_centre_breaks_friedels_law_as_py4dstem_has_it():
    held = oracle("gaas")
    simulator = like_oracle("gaas", True, "none")
    rows = _cases(held["count"])[1]  # [110], where the dipoles of the projection stand upright
    theirs = {
        tuple(hkl): intensity
        for hkl, intensity in zip(held["hkl"][rows].tolist(), held["intensity_elastic"][rows], strict=True)
    }
    beams = simulator.beams(torch.from_numpy(held["orientation"])[1:2], torch.from_numpy(held["thickness_nm"]))
    ours = _beams_by_index(simulator, beams, 0)
    apart = {hkl: value - theirs[tuple(-n for n in hkl)] for hkl, value in theirs.items()}
    strongest = max(apart, key=lambda hkl: np.abs(apart[hkl]).max())
    assert np.abs(apart[strongest]).max() > 0.01
    opposite = tuple(-n for n in strongest)
    assert ours[strongest] - ours[opposite] == pytest.approx(apart[strongest], abs=1e-3)
    centred = like_oracle("si", True, "none")
    beams = centred.beams(torch.from_numpy(oracle("si")["orientation"])[1:2], torch.tensor([20.0, 60.0]))
    silicon = _beams_by_index(centred, beams, 0)
    assert all(silicon[hkl] == pytest.approx(silicon[tuple(-n for n in hkl)], abs=1e-5) for hkl in silicon)


def test_against_a_matrix_exponential_built_slowly():
    phase, thickness_nm = linio2(), 45.0
    simulator = _simulator(phase, beam_error=0.025)
    orientation = random_orientations(1, 5)
    ours = _beams_by_index(simulator, simulator.beams(orientation, thickness_nm), 0)
    hkl = torch.tensor(list(ours))
    assert 12 < len(hkl) < 40 and tuple(hkl[0].tolist()) == (0, 0, 0)
    g = hkl.double() @ phase.reciprocal_matrix
    z = rotations.rotate(rotations.inverse(orientation[0])[None], g)[:, 2].numpy()
    lengths = torch.cdist(g, g).flatten().unique()
    losses = absorptive_factors(phase.elements, phase.u_iso, lengths, WAVELENGTH)
    matrix = np.zeros((len(hkl), len(hkl)), dtype=complex)
    for i in range(len(hkl)):
        between = hkl - hkl[i]  # column minus row, F having exp(+2 pi i hkl·x)
        length = (between.double() @ phase.reciprocal_matrix).norm(dim=1)
        wave = torch.exp(2j * math.pi * (between.double() @ phase.fractional.T))
        loss = losses[(lengths[None] - length[:, None]).abs().argmin(1)]
        total = phase.structure_factors(between) + 1j * (loss * wave).sum(1)
        matrix[i] = total.numpy() * GAMMA / (math.pi * phase.volume) * WAVELENGTH / 2
        matrix[i, i] = 1j * matrix[i, i].imag + z[i] - WAVELENGTH / 2 * float(g[i] @ g[i])
    exit_wave = expm(2j * math.pi * thickness_nm * 10 * matrix)[:, 0]
    assert np.array(list(ours.values()))[:, 0] == pytest.approx(np.abs(exit_wave) ** 2, abs=2e-4)


def test_nothing_is_lost_without_absorption_and_ever_more_with_it():
    orientation, thickness = random_orientations(12, 0), torch.tensor([5.0, 20, 60, 120, 300])
    kept = _simulator(linio2(), absorption="none").beams(orientation, thickness).intensity.sum(-1)
    assert kept.numpy() == pytest.approx(np.ones((12, 5)), abs=1e-3)
    left = _simulator(linio2(), absorption="thermal").beams(orientation, thickness).intensity.sum(-1)
    assert (left < 1).all() and (left.diff(dim=1) < 0).all()
    assert 0.02 < left[:, -1].min() < left[:, -1].max() < 0.8


def test_two_beams_swing_as_the_textbook_says():
    """Pendellösung: Williams and Carter, Transmission Electron Microscopy, eq. 13.47."""
    phase = linio2()
    simulator = _simulator(phase, beams=2, absorption="none", beam_error=0.02)
    orientation, thickness = random_orientations(6, 3), torch.linspace(3, 150, 40)
    beams = simulator.beams(orientation, thickness)
    assert beams.reflection.shape == (6, 2)
    for row in range(6):
        hkl = simulator.hkl[beams.reflection[row, 1]]
        g = hkl.double() @ phase.reciprocal_matrix
        lab = rotations.rotate(rotations.inverse(orientation[row]), g).numpy()
        error = 1 / WAVELENGTH - math.sqrt(1 / WAVELENGTH**2 - lab[0] ** 2 - lab[1] ** 2) - lab[2]
        potential = GAMMA * float(phase.structure_factors(hkl[None]).abs()) / (math.pi * phase.volume)
        extinction = 1 / (WAVELENGTH * potential)  # Å
        effective = math.sqrt(error**2 + extinction**-2)
        expected = (np.sin(math.pi * thickness.numpy() * 10 * effective) / (extinction * effective)) ** 2
        assert beams.intensity[row, :, 1].numpy() == pytest.approx(expected, abs=2e-3)


def test_two_absorbing_beams():
    """At the Bragg condition two waves, damped by U'_0 plus and minus U'_g, swing against each other."""
    coupling, mean, loss, thickness = 1 / 500, 2e-4, 1.5e-4, np.linspace(10, 900, 30)
    matrix = torch.tensor([[1j * mean, coupling + 1j * loss], [coupling + 1j * loss, 1j * mean]]) / 2
    ours = propagated(matrix[None].to(torch.complex64), torch.zeros(1, 2, 1), torch.from_numpy(thickness)[None])[0]
    turn, damping = math.pi * thickness * coupling, math.pi * thickness * loss
    fall = np.exp(-2 * math.pi * thickness * mean) / 2
    assert ours[:, 0].numpy() == pytest.approx(fall * (np.cosh(2 * damping) + np.cos(2 * turn)), abs=1e-5)
    assert ours[:, 1].numpy() == pytest.approx(fall * (np.cosh(2 * damping) - np.cos(2 * turn)), abs=1e-5)


def test_a_thin_crystal_is_kinematic():
    phase, orientation, thickness_nm = linio2(), random_orientations(8, 1), 1.0
    simulator = _simulator(phase, absorption="none", beam_error=0.1)
    kinematic = KinematicSimulator(phase, simulator.geometry, simulator.simulate)
    thin = kinematic.spots(orientation, thickness_nm)
    amplitude = WAVELENGTH * GAMMA / phase.volume * thickness_nm * 10  # of the wave, per Å of structure factor
    beams = simulator.beams(orientation, thickness_nm)
    ours, expected = [], []
    for row in range(8):
        dynamical = _beams_by_index(simulator, beams, row)
        for index, intensity in zip(thin.hkl_index[row].tolist(), thin.intensity[row].tolist(), strict=True):
            hkl = tuple(kinematic.hkl[index].tolist())
            if index >= 0 and hkl in dynamical:
                ours.append(dynamical[hkl][0])
                expected.append(intensity * amplitude**2)
    ours, expected = np.array(ours), np.array(expected)
    assert len(ours) > 200 and expected.max() > 1e-3
    assert np.corrcoef(ours, expected)[0, 1] > 0.999
    assert (ours @ expected) / (expected @ expected) == pytest.approx(1, abs=0.03)


def _sorted(beams, row):
    """Return (N, 3) places and intensities of one pattern, in an order of its own."""
    real = beams.reflection[row] > -2
    table = torch.stack((beams.x[row], beams.y[row], beams.intensity[row, 0]), dim=1)[real].numpy().astype(float)
    return table[np.lexsort(table[:, :2].round(4).T)]


def test_equivalent_orientations_give_the_same_pattern():
    simulator = _simulator(linio2(), beam_error=0.0397)
    orientation = random_orientations(1, 12)[0]
    alike = rotations.multiply(linio2().symmetry.operations, orientation)
    beams = simulator.beams(alike, 60.0)
    assert len(alike) == 6
    for row in range(1, 6):
        assert _sorted(beams, row) == pytest.approx(_sorted(beams, 0), abs=2e-4)
    other = simulator.beams(rotations.multiply(orientation, _about_z(60.0))[None], 60.0)
    assert np.abs(_sorted(other, 0)[:, :2] - _sorted(beams, 0)[:, :2]).max() > 0.1


def _about_z(angle_deg):
    return rotations.from_axis_angle_deg(torch.tensor([0.0, 0, 1], dtype=torch.float64), angle_deg)


@pytest.mark.parametrize(("name", "fold", "not_fold"), [("linio2", 3, 4), ("si", 4, 3), ("au", 4, 3), ("gaas", 2, 3)])
def test_a_zone_axis_shows_its_symmetry(name, fold, not_fold):
    """Along [001]; gallium arsenide has a four-fold inversion axis there, which leaves the pattern two-fold."""
    simulator = like_oracle(name, False, "thermal")
    upright = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64)
    pattern = _sorted(simulator.beams(upright, 50.0), 0)
    assert len(pattern) > 40

    def turned(angle):
        cos, sin = math.cos(angle), math.sin(angle)
        table = np.column_stack((pattern[:, :2] @ np.array([[cos, sin], [-sin, cos]]), pattern[:, 2]))
        distance = np.linalg.norm(table[:, None, :2] - pattern[None, :, :2], axis=2)
        near = distance.argmin(1)
        return distance.min(1).max(), np.abs(pattern[near, 2] - table[:, 2]).max()

    place, intensity = turned(2 * math.pi / fold)
    assert place < 1e-4 and intensity < 1e-4
    assert turned(2 * math.pi / not_fold)[0] > 0.01


def test_turning_the_crystal_in_the_plane_turns_the_pattern():
    simulator = _simulator(linio2(), beam_error=0.0397)
    orientation, angle = random_orientations(4, 4), 27.0
    plain = simulator.beams(orientation, 40.0, 0.4, 1.0)
    turned = simulator.beams(rotations.multiply(orientation, _about_z(-angle)), 40.0)
    still = simulator.beams(orientation, 40.0)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    assert turned.reflection.equal(still.reflection)
    assert torch.allclose(turned.x, cos * still.x - sin * still.y, atol=1e-5)
    assert torch.allclose(turned.y, sin * still.x + cos * still.y, atol=1e-5)
    assert torch.allclose(turned.intensity, still.intensity, atol=1e-4)
    assert (plain.intensity[:, :, 0] - still.intensity[:, :, 0]).abs().max() > 0.01


def test_a_series_of_thicknesses_is_the_single_ones():
    simulator, orientation = _simulator(linio2()), random_orientations(5, 6)
    thickness = torch.tensor([90.0, 20.0, 55.0])
    series = simulator.beams(orientation, thickness)
    for column, single in enumerate(thickness):
        alone = simulator.beams(orientation, float(single))
        assert alone.intensity.shape[1] == 1
        assert torch.allclose(alone.intensity[:, 0], series.intensity[:, column], atol=2e-5)
    own = simulator.beams(orientation[:3], torch.stack((thickness, thickness + 5, thickness + 10)))
    assert torch.allclose(own.intensity[0], series.intensity[0, :, : own.intensity.shape[2]], atol=2e-5)
    moved = simulator.beams(orientation[2:3], thickness + 10)
    width = min(moved.intensity.shape[2], own.intensity.shape[2])
    assert torch.allclose(own.intensity[2, :, :width], moved.intensity[0, :, :width], atol=2e-5)


def test_single_precision_is_enough():
    simulator, orientation = _simulator(linio2()), random_orientations(4, 7)
    single = simulator.beams(orientation.float(), 80.0)
    double = simulator.beams(orientation, 80.0)
    for row in range(4):
        one, other = _beams_by_index(simulator, single, row), _beams_by_index(simulator, double, row)
        common = set(one) & set(other)  # a beam at the very threshold may fall on either side of it
        assert len(common) >= max(len(one), len(other)) - 1
        assert all(abs(one[hkl] - other[hkl]) < 2e-3 for hkl in common)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 30, 30, dtype=torch.complex128, generator=generator) * 1e-3
    matrix = noise + noise.mH
    matrix.diagonal(dim1=1, dim2=2).add_(5e-4j)
    error = torch.randn(2, 30, 3, dtype=torch.float64, generator=generator) * 0.02
    thickness = torch.tensor([[100.0, 900.0]] * 2)
    exact = propagated(matrix, error, thickness)
    assert exact.dtype == torch.float64
    assert torch.allclose(propagated(matrix.to(torch.complex64), error.float(), thickness).double(), exact, atol=2e-5)
    wave = torch.linalg.matrix_exp(2j * math.pi * 900 * (matrix[1] + torch.diag(error[1, :, 2])))[:, 0]
    last = propagated(matrix[1:], error[1:, :, 2:], thickness[1:])[0, 1]
    assert torch.allclose(last, wave.abs().square(), atol=1e-9)


@pytest.mark.parametrize("thickness_nm", [100.0, 400.0, 900.0])
def test_strong_absorption_is_exact(thickness_nm):
    """Gold: single terms of the expansion would grow without bound. A thin crystal of the same series is exact too."""
    simulator = like_oracle("au", False, "thermal")
    orientation = torch.from_numpy(oracle("au")["orientation"])[:2]
    beams = simulator.beams(orientation, torch.tensor([3.0, thickness_nm]))
    error = simulator._lab(orientation)[..., 2] - simulator.g.square().sum(1) * WAVELENGTH / 2
    for row in range(2):
        chosen = beams.reflection[row][beams.reflection[row] > -2]
        matrix = simulator._matrix(chosen[None])[0].to(torch.complex128)
        matrix += torch.diag(torch.where(chosen >= 0, error[row][chosen.clamp_min(0)], 0.0))
        for column, depth in enumerate((3.0, thickness_nm)):
            wave = torch.linalg.matrix_exp(2j * math.pi * 10 * depth * matrix)[:, 0]
            ours = beams.intensity[row, column, : len(chosen)].double()
            assert torch.allclose(ours, wave.abs().square(), atol=1e-4)


@pytest.mark.parametrize(("precession_deg", "convergence_mrad"), [(0.5, 0.0), (0.0, 1.5), (0.3, 1.0)])
def test_averages_are_means_over_single_tilts(precession_deg, convergence_mrad):
    """A beam that tilts one way is a crystal that turns the other way."""
    simulator = _simulator(linio2(), tilts=6, beam_error=0.08)
    orientation = random_orientations(2, 5)
    mean = simulator.beams(orientation, 30.0, precession_deg, convergence_mrad)
    tilts = bloch._tilts(torch.tensor([[math.radians(precession_deg), convergence_mrad * 1e-3]]), 6)[0].T.double()
    assert tilts.shape == (6, 2)
    reached = tilts.norm(dim=1).max()
    assert 0.8 * max(math.radians(precession_deg), convergence_mrad * 1e-3) < reached
    assert reached < math.radians(precession_deg) + convergence_mrad * 1e-3 + 1e-9
    sums: list[dict] = [{}, {}]
    for across, up in tilts.tolist():
        axis = torch.tensor([up, -across, 0.0], dtype=torch.float64)
        turn = rotations.from_axis_angle_deg(axis / axis.norm(), math.degrees(float(axis.norm())))
        single = simulator.beams(rotations.multiply(orientation, turn), 30.0)
        for row in range(2):
            for hkl, intensity in _beams_by_index(simulator, single, row).items():
                sums[row][hkl] = sums[row].get(hkl, 0) + intensity / 6
    plain = simulator.beams(orientation, 30.0)
    for row in range(2):
        ours = _beams_by_index(simulator, mean, row)
        assert set(sums[row]) <= set(ours)
        assert all(ours[hkl] == pytest.approx(sums[row].get(hkl, 0), abs=4e-3) for hkl in ours)
        single = _beams_by_index(simulator, plain, row)
        assert max(abs(ours[hkl] - single[hkl])[0] for hkl in single) > 0.01


def test_the_strongest_beams_are_enough():
    """What the default number and width of beams leave out, at the conditions that patterns are made for."""
    orientation, thickness = random_orientations(6, 2), torch.tensor([20.0, 60.0])
    few = _simulator(linio2(), scale=0.025, beams=SimulateConfig().beams, beam_error=SimulateConfig().beam_error)
    many = _simulator(linio2(), scale=0.025, beams=400, beam_error=0.12)
    chosen, every = few.beams(orientation, thickness), many.beams(orientation, thickness)
    for row in range(6):
        one, other = _beams_by_index(few, chosen, row), _beams_by_index(many, every, row)
        assert set(one) <= set(other)
        table = np.array([[one.get(hkl, np.zeros(2)), value] for hkl, value in other.items() if hkl != (0, 0, 0)])
        assert np.corrcoef(table[:, 0].ravel(), table[:, 1].ravel())[0, 1] > 0.98


def test_spots_and_patterns_show_the_beams():
    simulate = _exact(
        dose=Span(0, 0), thickness=Span(40, 40), precession=Span(0, 0), convergence=Span(1, 1), background=Span(0, 0),
        blur=Span(0.6, 0.6), dead_pixels=0.0, scale=0.02,
    )  # fmt: skip
    simulator = simulator_for(linio2(), Geometry.of(simulate), simulate)
    assert isinstance(simulator, BlochSimulator)
    orientation = random_orientations(3, 9)
    beams = simulator.beams(orientation, 40.0, 0.0, 1.0)
    spots = simulator.spots(orientation, 40.0, 0.0, 1.0)
    assert spots.intensity.equal(beams.intensity[:, 0, 1:]) and spots.x.equal(beams.x[:, 1:])
    images = simulator.patterns(orientation, torch.Generator().manual_seed(1), noise=False).numpy()
    assert images.shape == (3, 128, 128) and np.isfinite(images).all()
    down, right = np.mgrid[:128, :128]
    for row in range(3):
        at_row, at_column = simulator.geometry.pixel_of(spots.x[row].numpy(), spots.y[row].numpy())
        inside = (at_row > 5) & (at_row < 122) & (at_column > 5) & (at_column < 122)
        strongest = np.where(inside, spots.intensity[row].numpy(), 0).argmax()
        near = np.hypot(down - at_row[strongest], right - at_column[strongest]) < 4
        share = float(spots.intensity[row, strongest] / beams.intensity[row].sum())
        assert images[row][near].sum() == pytest.approx(share, rel=0.03)


@pytest.mark.parametrize("thickness_nm", [0.0, -3.0, [20.0, 0.0]])
def test_a_thickness_of_nought_is_refused(thickness_nm):
    with pytest.raises(UserError, match="thickness"):
        _simulator(linio2()).beams(random_orientations(1, 0), torch.tensor(thickness_nm))


@pytest.mark.parametrize("physics", ["kinematic", "bloch"])
def test_a_pattern_without_reflections_is_refused(physics):
    simulate = SimulateConfig(physics=physics, scale=1e-4)
    with pytest.raises(UserError, match=r"no reflection of LiNiO2 falls on a pattern of 128 px at 0\.0001 1/Å.*raise"):
        simulator_for(linio2(), Geometry.of(simulate), simulate)


@pytest.mark.parametrize("physics", ["kinematic", "bloch"])
def test_more_reflections_than_the_memory_holds_are_refused_at_once(physics):
    simulate = SimulateConfig(physics=physics, kv=1500, size=1024, scale=1.0)  # terabytes
    with pytest.raises(UserError, match=r"the reflections within .* need .* GB .* free; lower `simulate\.scale`"):
        simulator_for(linio2(), Geometry.of(simulate), simulate)


def test_a_crystal_that_swallows_everything_is_refused():
    simulator = like_oracle("au", False, "thermal")
    with pytest.raises(UserError, match=r"5000 nm of this crystal absorb too much .* lower `simulate\.thickness`"):
        simulator.beams(torch.from_numpy(oracle("au")["orientation"])[:1], 5000.0)
