"""Absorptive form factors against py4DSTEM's (Weickenmeier and Kohl), and the optical theorem."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from stemtune.crystal.scattering import absorptive_factors, relativistic_mass_factor, scattering_factors
from stemtune.diffraction.geometry import wavelength_angstrom

ORACLE = Path(__file__).parents[1] / "oracles" / "absorptive_py4dstem.npz"  # see dynamical_py4dstem.py
WAVELENGTH = wavelength_angstrom(200)


def test_factors_agree_with_weickenmeier_and_kohl():
    """Their elastic factors are other fits than ours, hence the per cent."""
    with np.load(ORACLE) as oracle:
        elements, g, u_iso, phonon = (oracle[key] for key in ("element", "g", "u_iso", "phonon"))
    for row, element in enumerate(elements.tolist()):
        names, displacements = [element] * len(u_iso), torch.from_numpy(u_iso)
        ours = absorptive_factors(names, displacements, torch.from_numpy(g), WAVELENGTH).T.numpy()
        near = g <= 2
        assert ours[:, near] == pytest.approx(phonon[row][:, near], rel=0.02)
        assert ours == pytest.approx(phonon[row], abs=0.006 * phonon[row].max())


def test_forward_factor_is_the_optical_theorem():
    """f'(0) is the cross-section of thermal diffuse scattering over twice the wavelength."""
    u_iso = 0.0063

    def lost(q):
        factor = float(scattering_factors(["Ni"], torch.tensor([q**2], dtype=torch.float64)))
        return factor**2 * (1 - math.exp(-4 * math.pi**2 * u_iso * q**2)) * 2 * math.pi * q

    integral = quad(lost, 0, 5, limit=200)[0] + quad(lost, 5, np.inf, limit=200)[0]
    gamma = 1 + 200 / 510.99895
    ours = absorptive_factors(["Ni"], torch.tensor([u_iso]), torch.zeros(1), WAVELENGTH)
    assert float(ours) == pytest.approx(WAVELENGTH * gamma / 2 * integral, rel=2e-3)


def test_atoms_keep_their_order():
    names, displacements = ["O", "Ni", "O", "O"], torch.tensor([0.004, 0.005, 0.008, 0.004])
    g = torch.tensor([0.0, 0.6])
    together = absorptive_factors(names, displacements, g, WAVELENGTH)
    for column, (name, u_iso) in enumerate(zip(names, displacements, strict=True)):
        alone = absorptive_factors([name], u_iso[None], g, WAVELENGTH)[:, 0]
        assert torch.equal(together[:, column], alone)
    assert together[0, 0] != together[0, 2] and together.dtype == torch.float64


def test_relativistic_mass():
    assert relativistic_mass_factor(WAVELENGTH) == pytest.approx(1 + 200 / 510.99895, rel=1e-6)
