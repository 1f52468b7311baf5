"""How strongly single atoms scatter electrons: Lobato and Van Dyck's parameters, as tabulated in diffsims.

And how much of the elastic wave they lose to thermal diffuse scattering (Einstein model).
"""

from __future__ import annotations

import importlib.util
import math
import runpy
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stemtune.errors import UserError


@cache
def _table() -> dict[str, Any]:
    """Read diffsims' table from its file; importing diffsims would load orix and matplotlib (1.5 s) for it."""
    package = importlib.util.find_spec("diffsims")
    if package is None or not package.submodule_search_locations:
        raise ImportError("diffsims is not installed")
    path = Path(package.submodule_search_locations[0]) / "utils" / "lobato_scattering_params.py"
    return dict(runpy.run_path(str(path))["ATOMIC_SCATTERING_PARAMS_LOBATO"])


def is_known(element: str) -> bool:
    """Say whether there is a scattering factor for the chemical symbol `element`."""
    return element in _table()


def scattering_factors(elements: Sequence[str], g_squared: Tensor) -> Tensor:
    """Return the electron scattering factors (N, M) in Å of M neutral atoms at rest, by chemical symbol.

    First Born approximation, without the relativistic mass factor, at N squared lengths of the scattering vector in
    1/Å² (g = 1/d = 2 sin(theta)/wavelength).

    Source: I. Lobato and D. Van Dyck, Acta Cryst. A70 (2014) 636.
    """
    unknown = sorted({element for element in elements if not is_known(element)})
    if unknown:
        raise UserError(f"there is no electron scattering factor for '{unknown[0]}'; write a chemical symbol, H to Lr")
    kinds = sorted(set(elements))
    table = torch.tensor([_table()[kind] for kind in kinds], dtype=g_squared.dtype, device=g_squared.device)
    amplitude, width = table.unbind(-1)
    spread = g_squared[:, None, None] * width
    factors = (amplitude * (2 + spread) / (1 + spread) ** 2).sum(-1)
    return factors[:, [kinds.index(element) for element in elements]]


_ANGLES, _RADII = 48, 96  # points of the integral; it is right to 1e-3
_FALL = 0.6  # 1/Å, scale of the radii: half of them lie nearer than this


def absorptive_factors(elements: Sequence[str], u_iso: Tensor, g: Tensor, wavelength_angstrom: float) -> Tensor:
    """Return the absorptive form factors (N, M) in Å of M atoms, by chemical symbol, at N lengths `g` (1/Å), float64.

    They are on the scale of `scattering_factors`, Debye-Waller factor included: an atom of mean square
    displacement U = `u_iso` (M,) in Å² adds `i f'` to its elastic `f exp(-2 pi² U g²)`.

    Notes
    -----
    Hall and Hirsch's integral over all ways to scatter twice by phonons,

        f'(g) = wavelength gamma / 2 · ∫ f(q) f(|q - g|) [exp(-a g²) - exp(-a q² - a |q - g|²)] d²q,  a = 2 pi² U,

    with gamma the relativistic mass factor. At g = 0 it is the optical theorem for the thermal diffuse cross-section.

    Source: C. R. Hall and P. B. Hirsch, Proc. R. Soc. A286 (1965) 158; D. M. Bird and Q. A. King, Acta Cryst. A46
    (1990) 202.
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
