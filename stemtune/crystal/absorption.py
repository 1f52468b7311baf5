"""How much of the elastic wave single atoms lose to thermal diffuse scattering (Einstein model)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stemtune.crystal.scattering import scattering_factors

_ANGLES, _RADII = 48, 96  # points of the integral; it is right to 1e-3
_FALL = 0.6  # 1/Å, scale of the radii: half of them lie nearer than this


def absorptive_factors(elements: Sequence[str], u_iso: Tensor, g: Tensor, wavelength_angstrom: float) -> Tensor:
    """Return the absorptive form factors (N, M) in Å of M atoms, by chemical symbol, at N lengths `g` (1/Å), float64.

    They are on the scale of the elastic factors of `scattering`, Debye-Waller factor included: an atom of mean square
    displacement U = `u_iso` (M,) in Å² adds `i f'` to its elastic `f exp(-2 pi² U g²)`.

    Notes
    -----
    Hall and Hirsch's integral over all ways to scatter twice by phonons,

        f'(g) = wavelength gamma / 2 · ∫ f(q) f(|q - g|) [exp(-a g²) - exp(-a q² - a |q - g|²)] d²q,  a = 2 pi² U,

    with gamma the relativistic mass factor. At g = 0 it is the optical theorem for the thermal diffuse cross-section.

    References
    ----------
    C. R. Hall and P. B. Hirsch, Proc. R. Soc. A286 (1965) 158; D. M. Bird and Q. A. King, Acta Cryst. A46 (1990) 202.
    """
    kinds = sorted(set(zip(elements, u_iso.tolist(), strict=True)))
    columns = {kind: _of_kind(*kind, g.double()) for kind in kinds}
    gamma = relativistic_mass_factor(wavelength_angstrom)
    table = torch.stack([columns[kind] for kind in zip(elements, u_iso.tolist(), strict=True)], dim=1)
    return table * (wavelength_angstrom * gamma / 2)


def relativistic_mass_factor(wavelength_angstrom: float) -> float:
    """Return m / m0 of electrons of this wavelength: with p = h / wavelength, gamma² = 1 + (p / m0 c)²."""
    compton_angstrom = 0.0242631024
    return math.sqrt(1 + (compton_angstrom / wavelength_angstrom) ** 2)


def _of_kind(element: str, u_iso: float, g_N: Tensor) -> Tensor:
    """Return the integral (N,) in Å² · 1/Å² for one kind of atom; q is measured from the middle of g."""
    # Gauss-Legendre nodes on the radius, mapped to [0, inf), and even angles over a quarter of the plane.
    node, weight = np.polynomial.legendre.leggauss(_RADII)
    part = torch.from_numpy((node + 1) / 2)
    radius_R = _FALL * part / (1 - part)
    weight_R = torch.from_numpy(weight / 2) * _FALL / (1 - part) ** 2 * radius_R
    angle_A = (torch.arange(_ANGLES, dtype=torch.float64) + 0.5) * (math.pi / 2 / _ANGLES)  # a quarter holds it all
    damping = 2 * math.pi**2 * u_iso
    # Lengths of q - g/2 and q + g/2, the two scattering vectors, and what is lost between them.
    half_N11 = g_N[:, None, None] / 2
    across_RA = (radius_R[:, None] * angle_A.sin()) ** 2
    along_RA = radius_R[:, None] * angle_A.cos()
    near_NRA, far_NRA = (along_RA - half_N11) ** 2 + across_RA, (along_RA + half_N11) ** 2 + across_RA
    factors = [scattering_factors([element], part.flatten())[:, 0].view(part.shape) for part in (near_NRA, far_NRA)]
    lost_NRA = torch.exp(-damping * 4 * half_N11**2) - torch.exp(-damping * (near_NRA + far_NRA))
    mean_NR = (factors[0] * factors[1] * lost_NRA).mean(-1)
    return 2 * math.pi * mean_NR @ weight_R


__all__ = ["absorptive_factors", "relativistic_mass_factor"]
