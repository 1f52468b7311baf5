"""How strongly single atoms scatter electrons: Lobato and Van Dyck's parameters, as tabulated in diffsims."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

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
    spec = importlib.util.spec_from_file_location("_stemtune_lobato_table", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"diffsims has no table at {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dict(module.ATOMIC_SCATTERING_PARAMS_LOBATO)


def is_known(element: str) -> bool:
    """Say whether there is a scattering factor for the chemical symbol `element`."""
    return element in _table()


def scattering_factors(elements: Sequence[str], g_squared: Tensor) -> Tensor:
    """Return the electron scattering factors (N, M) in Å of M neutral atoms at rest, by chemical symbol.

    First Born approximation, without the relativistic mass factor, at N squared lengths of the scattering vector in
    1/Å² (g = 1/d = 2 sin(theta)/wavelength).

    References
    ----------
    I. Lobato and D. Van Dyck, Acta Cryst. A70 (2014) 636.
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
