"""How coupled beams travel through a crystal: a Chebyshev expansion of the exponential of their structure matrix.

The exit wave is exp(2 pi i A t) on the incident beam, A the structure matrix (see `bloch`) and t the thickness. Rather
than diagonalise A, the exponential is expanded in Chebyshev polynomials of A: the same polynomials serve every
thickness and, because beam tilts change the diagonal only, one matrix product per term serves every tilt of precession
and convergence. Absorption is exact, and no step is more than a matrix product, on CPU and GPU alike.

Shape legend: B patterns, N beams, J beam tilts, G groups of them, T thicknesses, W different ones of them, K terms.

References
----------
H. Tal-Ezer and R. Kosloff, J. Chem. Phys. 81 (1984) 3967: the Chebyshev expansion of a propagator.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stemtune.errors import UserError

_GROWTH = 5.0  # logarithm of how far single terms of the expansion may exceed the wave
_LARGEST_SINGLE, _LARGEST = 80.0, 600.0  # logarithms of what single and double precision can hold


def propagate(matrix_BNN: Tensor, error_BNJ: Tensor, thickness_BT: Tensor, groups: int = 1) -> Tensor:
    """Return the intensities (B, T, G, N), averaged over each of G `groups` of tilts, of beams behind a crystal.

    Beam 0 comes in. The J tilts are those of group after group, as many in each.

    The matrix holds the couplings in 1/Å, complex: a Hermitian matrix, and i times the one of the absorption. To its
    diagonal the excitation errors in 1/Å of each tilt are added. Thicknesses are in Å.
    """
    # The expansion: an ellipse around all eigenvalues says how many terms the longest way through the crystal needs.
    way_BT = 2 * math.pi * thickness_BT.double()
    way_W, place_BT = torch.unique(way_BT, return_inverse=True)  # patterns often share them
    middle_B, focus, vertex, growth = _ellipse(matrix_BNN, error_BNJ, float(way_W.max()))
    term_KW = _coefficients(focus * way_W, vertex * way_W) * torch.exp(-middle_B.imag.max() * way_W)
    if len(term_KW) * growth > _LARGEST:
        raise UserError(
            f"{float(thickness_BT.max()) / 10:g} nm of this crystal absorb too much to be simulated; lower "
            "`simulate.thickness`, or set `simulate.absorption` to none"
        )
    kind = matrix_BNN.dtype if len(term_KW) * growth < _LARGEST_SINGLE else torch.complex128
    # Map the ellipse to the unit one and start with the incident wave: polynomials 0 and 1 of the matrix on it.
    # Waves are rows: a product of few rows with a matrix is several times as fast on a CPU as one with few columns.
    scaled_BNN, term_KBT = (matrix_BNN.mT / focus).to(kind).contiguous(), term_KW.to(kind)[:, place_BT]
    error_BJN = ((error_BNJ - middle_B[:, None, None]) / focus).to(kind).mT.contiguous()
    before = torch.zeros_like(error_BJN)
    before[:, :, 0] = 1
    now = torch.baddbmm(error_BJN * before, before, scaled_BNN)
    wave_BTJN = term_KBT[0, :, :, None, None] * before[:, None] + term_KBT[1, :, :, None, None] * now[:, None]
    # The recurrence T(k + 1) = 2 A T(k) - T(k - 1), each term added with the coefficients of every thickness.
    for term_BT in term_KBT[2:]:
        after = torch.baddbmm(before, now, scaled_BNN, beta=-1, alpha=2).addcmul_(error_BJN, now, value=2)
        wave_BTJN.addcmul_(term_BT[:, :, None, None], after[:, None])
        before, now = now, after
    intensity_BTJN = torch.view_as_real(wave_BTJN).square().sum(-1)
    intensity_BTGN: Tensor = torch.stack(intensity_BTJN.chunk(groups, dim=2), dim=2).mean(3).to(matrix_BNN.real.dtype)
    return intensity_BTGN


def _ellipse(matrix_BNN: Tensor, error_BNJ: Tensor, way: float) -> tuple[Tensor, float, float, float]:
    """Return middles (B,) complex128, foci, long half axis (1/Å) and growth per term of ellipses around eigenvalues.

    Absorption moves the eigenvalues off the real line, and Chebyshev polynomials grow fast beside it, at its ends most
    of all. From the middle of the absorption, on foci far enough apart, the terms exceed the wave by no more than
    exp(`_GROWTH`) on the longest `way`, 2 pi times the thickness, which single precision bears. One size serves all
    patterns, for all get the same number of terms.
    """
    held_BNN, lost_BNN = (matrix_BNN + matrix_BNN.mH) / 2, (matrix_BNN - matrix_BNN.mH) / 2j
    own_BN, mean_BN = (part.diagonal(dim1=1, dim2=2).real for part in (held_BNN, lost_BNN))
    reach_BN = held_BNN.abs().sum(2) - own_BN.abs()  # of the eigenvalues from the diagonal (Gershgorin)
    low_B = (error_BNJ.amin(2) + own_BN - reach_BN).amin(1).double()
    high_B = (error_BNJ.amax(2) + own_BN + reach_BN).amax(1).double()
    along = float((high_B - low_B).max()) / 2 + 1e-9
    across = max(0.0, float((lost_BNN.abs().sum(2) - mean_BN.abs() + mean_BN).max())) / 2
    short = across + _GROWTH / way
    focus = math.sqrt(max(along**2, along**2 / (1 - (across / short) ** 2) - short**2))
    vertex = (math.hypot(along + focus, across) + math.hypot(along - focus, across)) / 2
    middle_B = torch.complex((low_B + high_B) / 2, torch.full_like(low_B, across))
    return middle_B, focus, vertex, math.acosh(max(1.0, vertex / focus))


def _coefficients(phase_W: Tensor, vertex_W: Tensor) -> Tensor:
    """Return the Chebyshev coefficients (K, W) complex128 of exp(i z x) on [-1, 1]: (2 - delta) i^k J_k(z).

    They are the Fourier coefficients of exp(i z cos theta). Beyond `vertex_W`, which is z or for polynomials that
    grow more, plus a few times its cube root, they no longer matter and are left out: there they are but rounding.
    """
    needed_W = vertex_W + 8 * vertex_W ** (1 / 3) + 8
    terms = math.ceil(float(needed_W.max()))
    points = 1 << (2 * terms).bit_length()
    angle = torch.arange(points, dtype=torch.float64, device=phase_W.device) * (2 * math.pi / points)
    wave_WP = torch.polar(torch.ones((), dtype=torch.float64, device=angle.device), phase_W[..., None] * angle.cos())
    series_KW: Tensor = torch.fft.fft(wave_WP, dim=-1)[..., :terms].movedim(-1, 0) * (2 / points)
    series_KW[0] /= 2
    return series_KW * (torch.arange(terms, device=angle.device)[:, None] <= needed_W)
