"""Bloch waves from the crystal to the beams: other programs, textbook formulas, symmetry, averages, bad input."""

import math

import numpy as np
import pytest
import torch
from dynamical_oracles import (
    GAMMA,
    NAMES,
    ORACLES,
    WAVELENGTH,
    by_index,
    cases,
    exact,
    like_oracle,
    oracle,
    simulator_of,
)

from stemtune.config import SimulateConfig, Span
from stemtune.crystal import rotations
from stemtune.crystal.phase import linio2
from stemtune.crystal.sampling import random_orientations
from stemtune.diffraction import bloch
from stemtune.diffraction.bloch import BlochSimulator, simulator_for
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator
from stemtune.errors import UserError


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
    for row, rows in enumerate(cases(count)):
        ours = by_index(simulator, beams, row)
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
    rows = cases(held["count"])[1]  # [110], where the dipoles of the projection stand upright
    theirs = {
        tuple(hkl): intensity
        for hkl, intensity in zip(held["hkl"][rows].tolist(), held["intensity_elastic"][rows], strict=True)
    }
    beams = simulator.beams(torch.from_numpy(held["orientation"])[1:2], torch.from_numpy(held["thickness_nm"]))
    ours = by_index(simulator, beams, 0)
    apart = {hkl: value - theirs[tuple(-n for n in hkl)] for hkl, value in theirs.items()}
    strongest = max(apart, key=lambda hkl: np.abs(apart[hkl]).max())
    assert np.abs(apart[strongest]).max() > 0.01
    opposite = tuple(-n for n in strongest)
    assert ours[strongest] - ours[opposite] == pytest.approx(apart[strongest], abs=1e-3)
    centred = like_oracle("si", True, "none")
    beams = centred.beams(torch.from_numpy(oracle("si")["orientation"])[1:2], torch.tensor([20.0, 60.0]))
    silicon = by_index(centred, beams, 0)
    assert all(silicon[hkl] == pytest.approx(silicon[tuple(-n for n in hkl)], abs=1e-5) for hkl in silicon)


def test_nothing_is_lost_without_absorption_and_ever_more_with_it():
    orientation, thickness = random_orientations(12, 0), torch.tensor([5.0, 20, 60, 120, 300])
    kept = simulator_of(linio2(), absorption="none").beams(orientation, thickness).intensity.sum(-1)
    assert kept.numpy() == pytest.approx(np.ones((12, 5)), abs=1e-3)
    left = simulator_of(linio2(), absorption="thermal").beams(orientation, thickness).intensity.sum(-1)
    assert (left < 1).all() and (left.diff(dim=1) < 0).all()
    assert 0.02 < left[:, -1].min() < left[:, -1].max() < 0.8


def test_two_beams_swing_as_the_textbook_says():
    """Pendellösung: Williams and Carter, Transmission Electron Microscopy, eq. 13.47."""
    phase = linio2()
    simulator = simulator_of(phase, beams=2, absorption="none", beam_error=0.02)
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


def test_a_thin_crystal_is_kinematic():
    phase, orientation, thickness_nm = linio2(), random_orientations(8, 1), 1.0
    simulator = simulator_of(phase, absorption="none", beam_error=0.1)
    kinematic = KinematicSimulator(phase, simulator.geometry, simulator.simulate)
    thin = kinematic.spots(orientation, thickness_nm)
    amplitude = WAVELENGTH * GAMMA / phase.volume * thickness_nm * 10  # of the wave, per Å of structure factor
    beams = simulator.beams(orientation, thickness_nm)
    ours, expected = [], []
    for row in range(8):
        dynamical = by_index(simulator, beams, row)
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
    simulator = simulator_of(linio2(), beam_error=0.0397)
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
    simulator = simulator_of(linio2(), beam_error=0.0397)
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
    simulator, orientation = simulator_of(linio2()), random_orientations(5, 6)
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


@pytest.mark.parametrize(("precession_deg", "convergence_mrad"), [(0.5, 0.0), (0.0, 1.5), (0.3, 1.0)])
def test_averages_are_means_over_single_tilts(precession_deg, convergence_mrad):
    """A beam that tilts one way is a crystal that turns the other way."""
    simulator = simulator_of(linio2(), tilts=6, beam_error=0.08)
    orientation = random_orientations(2, 5)
    mean = simulator.beams(orientation, 30.0, precession_deg, convergence_mrad)
    tilts = bloch._tilts(torch.tensor([[[math.radians(precession_deg), convergence_mrad * 1e-3]]]), 6)[0].T.double()
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
            for hkl, intensity in by_index(simulator, single, row).items():
                sums[row][hkl] = sums[row].get(hkl, 0) + intensity / 6
    plain = simulator.beams(orientation, 30.0)
    for row in range(2):
        ours = by_index(simulator, mean, row)
        assert set(sums[row]) <= set(ours)
        assert all(ours[hkl] == pytest.approx(sums[row].get(hkl, 0), abs=4e-3) for hkl in ours)
        single = by_index(simulator, plain, row)
        assert max(abs(ours[hkl] - single[hkl])[0] for hkl in single) > 0.01


def test_the_strongest_beams_are_enough():
    """What the default number and width of beams leave out, at the conditions that patterns are made for."""
    orientation, thickness = random_orientations(6, 2), torch.tensor([20.0, 60.0])
    few = simulator_of(linio2(), scale=0.025, beams=SimulateConfig().beams, beam_error=SimulateConfig().beam_error)
    many = simulator_of(linio2(), scale=0.025, beams=400, beam_error=0.12)
    chosen, every = few.beams(orientation, thickness), many.beams(orientation, thickness)
    for row in range(6):
        one, other = by_index(few, chosen, row), by_index(many, every, row)
        assert set(one) <= set(other)
        table = np.array([[one.get(hkl, np.zeros(2)), value] for hkl, value in other.items() if hkl != (0, 0, 0)])
        assert np.corrcoef(table[:, 0].ravel(), table[:, 1].ravel())[0, 1] > 0.98


def test_spots_and_patterns_show_the_beams():
    simulate = exact(
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
        simulator_of(linio2()).beams(random_orientations(1, 0), torch.tensor(thickness_nm))


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
