"""Waves through a crystal: py4DSTEM with the same couplings, matrix exponentials, and absorption however strong."""

import math

import numpy as np
import pytest
import torch
from dynamical_oracles import (
    GAMMA,
    NAMES,
    WAVELENGTH,
    by_index,
    cases,
    like_oracle,
    oracle,
    phase_of,
    simulator_of,
)
from scipy.linalg import expm

from stemtune.crystal import rotations
from stemtune.crystal.phase import linio2
from stemtune.crystal.sampling import random_orientations
from stemtune.crystal.scattering import absorptive_factors
from stemtune.diffraction.propagation import propagate
from stemtune.errors import UserError


@pytest.mark.parametrize("variant", ["elastic", "thermal", "wkcp"])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_couplings_give_the_same_intensities(name, variant):
    """py4DSTEM's beams and Fourier coefficients, our propagation."""
    held = oracle(name)
    factor = dict(zip(map(tuple, held["coupled"].tolist()), held[f"factor_{variant}"], strict=True))
    lattice = phase_of(name).reciprocal_matrix.numpy()
    thickness = torch.from_numpy(held["thickness_nm"]) * 10
    for orientation, rows in zip(held["orientation"], cases(held["count"]), strict=True):
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
        ours = propagate(
            torch.from_numpy(matrix).to(torch.complex64)[None],
            torch.from_numpy(error).float()[None, :, None],
            thickness[None],
        )[0, :, 0].T.numpy()
        assert ours == pytest.approx(theirs, abs=3e-5)
        assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.9999


def test_against_a_matrix_exponential_built_slowly():
    phase, thickness_nm = linio2(), 45.0
    simulator = simulator_of(phase, beam_error=0.025)
    orientation = random_orientations(1, 5)
    ours = by_index(simulator, simulator.beams(orientation, thickness_nm), 0)
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


def test_two_absorbing_beams():
    """At the Bragg condition two waves, damped by U'_0 plus and minus U'_g, swing against each other."""
    coupling, mean, loss, thickness = 1 / 500, 2e-4, 1.5e-4, np.linspace(10, 900, 30)
    matrix = torch.tensor([[1j * mean, coupling + 1j * loss], [coupling + 1j * loss, 1j * mean]]) / 2
    ours = propagate(matrix[None].to(torch.complex64), torch.zeros(1, 2, 1), torch.from_numpy(thickness)[None])[0, :, 0]
    turn, damping = math.pi * thickness * coupling, math.pi * thickness * loss
    fall = np.exp(-2 * math.pi * thickness * mean) / 2
    assert ours[:, 0].numpy() == pytest.approx(fall * (np.cosh(2 * damping) + np.cos(2 * turn)), abs=1e-5)
    assert ours[:, 1].numpy() == pytest.approx(fall * (np.cosh(2 * damping) - np.cos(2 * turn)), abs=1e-5)


def test_single_precision_is_enough():
    simulator, orientation = simulator_of(linio2()), random_orientations(4, 7)
    single = simulator.beams(orientation.float(), 80.0)
    double = simulator.beams(orientation, 80.0)
    for row in range(4):
        one, other = by_index(simulator, single, row), by_index(simulator, double, row)
        common = set(one) & set(other)  # a beam at the very threshold may fall on either side of it
        assert len(common) >= max(len(one), len(other)) - 1
        assert all(abs(one[hkl] - other[hkl]) < 2e-3 for hkl in common)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 30, 30, dtype=torch.complex128, generator=generator) * 1e-3
    matrix = noise + noise.mH
    matrix.diagonal(dim1=1, dim2=2).add_(5e-4j)
    error = torch.randn(2, 30, 3, dtype=torch.float64, generator=generator) * 0.02
    thickness = torch.tensor([[100.0, 900.0]] * 2)
    exact = propagate(matrix, error, thickness)
    assert exact.dtype == torch.float64
    assert torch.allclose(propagate(matrix.to(torch.complex64), error.float(), thickness).double(), exact, atol=2e-5)
    wave = torch.linalg.matrix_exp(2j * math.pi * 900 * (matrix[1] + torch.diag(error[1, :, 2])))[:, 0]
    last = propagate(matrix[1:], error[1:, :, 2:], thickness[1:])[0, 1, 0]
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


def test_a_crystal_that_swallows_everything_is_refused():
    simulator = like_oracle("au", False, "thermal")
    with pytest.raises(UserError, match=r"5000 nm of this crystal absorb too much .* lower `simulate\.thickness`"):
        simulator.beams(torch.from_numpy(oracle("au")["orientation"])[:1], 5000.0)
