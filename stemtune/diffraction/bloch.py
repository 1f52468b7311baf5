"""Dynamical diffraction: many beams that scatter into each other all the way through the crystal.

The amplitudes psi of N beams at depth t in a flat crystal across the beam obey

    d psi / dt = 2 pi i A psi,    A_gg = s_g + i U'_0 / 2K,    A_gh = (U_{g-h} + i U'_{g-h}) / 2K,

with K = 1 / wavelength, s the excitation error and U = gamma F / (pi V) the scaled Fourier coefficients of the
crystal's potential, U' those of its absorption. `propagation` carries the incident beam through all of it.

Shape legend: B patterns, N beams (the direct one first), J beam tilts, G groups of them, T thicknesses, R reflections.

References
----------
C. J. Humphreys, Rep. Prog. Phys. 42 (1979) 1825, section 2: the equations above in the high-energy limit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from stemtune._parallel import check_memory, map_over_threads
from stemtune.config import SimulateConfig
from stemtune.crystal import rotations
from stemtune.crystal.phase import Phase
from stemtune.crystal.scattering import absorptive_factors, relativistic_mass_factor
from stemtune.diffraction.conditions import Conditions
from stemtune.diffraction.detector import DiffractedBeams
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator, Spots
from stemtune.diffraction.propagation import propagate
from stemtune.errors import UserError

FAINTEST = 1e-6  # beams with less than this share of the incident electrons are not passed on
_PIECE_BYTES = 1 << 20  # structure matrices worked on at once on a CPU: what fits its second-level cache
_GPU_PIECE_BYTES = 1 << 28


class Beams(NamedTuple):
    """Dynamical beams of B patterns, padded to N each; the first is the direct beam.

    `reflection` (B, N) are rows of the simulator's `hkl`, -1 the direct beam, -2 padding; `x` and `y` (B, N) lab
    coordinates in 1/Å, x right and y up; `intensity` (B, T, N), or (B, T, G, N) of several groups of tilts, shares of
    the incident beam, 0 for padding.
    """

    reflection: Tensor
    x: Tensor
    y: Tensor
    intensity: Tensor


class BlochSimulator(KinematicSimulator):
    """Simulates dynamical patterns of one phase, batched, on any torch device.

    It takes the parameters of `KinematicSimulator` and has its methods. The settings `simulate.beams`, `beam_error`,
    `absorption` and `tilts` are its own. Beams whose excitation error stays below `beam_error` for some direction of
    the beam take part, reflections that only multiple scattering reaches included; where they are more than `beams`,
    those with the largest U_g / (s_g + 0.002 1/Å) are coupled and the others left out. The threshold keeps the
    symmetry of the pattern, the largest number need not: choose it above the number of beams that is met.

    Raises a `UserError` as `KinematicSimulator`, and for couplings or a set of beams too large for the memory.
    """

    def __init__(
        self, phase: Phase, geometry: Geometry, simulate: SimulateConfig, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(phase, geometry, simulate, device)
        self.hkl, self.g = _reachable(phase, self.hkl, float(torch.linalg.vector_norm(self.g, dim=1).max()) + 1e-9)
        self.strength = phase.structure_factors(self.hkl).abs().square()
        extent = 2 * self.hkl.abs().amax(0)
        stride = torch.tensor([(2 * extent[1] + 1) * (2 * extent[2] + 1), 2 * extent[2] + 1, 1])
        self._middle = int((extent * stride).sum())
        self._place = (self.hkl * stride).sum(1).to(self.device)
        self._coupling = _couplings(phase, geometry, extent, simulate.absorption == "thermal").to(self.device)
        self._own = self._coupling[self._place + self._middle].abs()
        self.g, self.strength = self.g.to(self.device), self.strength.to(self.device)

    def _check_memory(self, reach: float) -> None:
        super()._check_memory(reach)
        box = math.prod(4 * int(reach * edge) + 1 for edge in self.phase.lattice[:3])
        lower = "lower `simulate.scale` or `simulate.size`"
        check_memory(f"the couplings of all reflections within {reach:.3g} 1/Å", 64 * box, lower, self.device)
        count = min(self.simulate.beams, int(4 / 3 * math.pi * reach**3 * self.phase.volume) + 1)
        at_once = torch.get_num_threads() if self.device.type == "cpu" else 1
        needed = 64 * count**2 * at_once  # the matrix, where its elements stand, and its two parts
        check_memory(f"structure matrices of {count} beams", needed, "lower `simulate.beams`", self.device)

    def beams(
        self,
        orientation: Tensor,
        thickness_nm: float | Tensor,
        precession_deg: float | Tensor = 0.0,
        convergence_mrad: float | Tensor = 0.0,
    ) -> Beams:
        """Return the dynamical beams of orientations (B, 4), lab-to-crystal, at one or several thicknesses.

        The thickness is one number, (T,) for all patterns, or (B, T), in nm, and above 0 (else a `UserError`); the
        semi-angles over which intensities are averaged are one number, (B,), or (B, G) for G averages at once, which
        share the most expensive part.
        """
        orientation = orientation.to(self.device)
        count, single = len(orientation), orientation.float()
        thickness = torch.as_tensor(thickness_nm, dtype=torch.float64, device=self.device) * 10
        thickness_BT = thickness.expand(count, *(thickness.shape[-1:] or (1,)))
        if not bool((thickness_BT > 0).all()):
            raise UserError("the thickness of a crystal must be above 0")
        tilts = _tilt_groups(single, precession_deg, math.pi / 180), _tilt_groups(single, convergence_mrad, 1e-3)
        tilt_BG2 = torch.stack(torch.broadcast_tensors(*tilts), dim=-1)  # type: ignore[no-untyped-call]

        def work(rows: slice) -> Beams:
            return self._beams(orientation[rows], thickness_BT[rows], tilt_BG2[rows])

        pieces = [slice(start, start + 64) for start in range(0, count, 64)]
        found = _joined(map_over_threads(work, pieces, self.device))
        several = max(torch.as_tensor(tilt).ndim for tilt in (precession_deg, convergence_mrad)) > 1
        return found if several else found._replace(intensity=found.intensity[:, :, 0])

    def spots(
        self,
        orientation: Tensor,
        thickness_nm: float | Tensor = 50.0,
        precession_deg: float | Tensor = 0.0,
        convergence_mrad: float | Tensor = 0.0,
        shape_width: float | Tensor = 0.01,
    ) -> Spots:
        """Return the diffracted beams of each orientation (B, 4); see `KinematicSimulator.spots`.

        The intensity is a share of the incident beam, and `shape_width` plays no part.
        """
        thickness = torch.as_tensor(thickness_nm)
        beams = self.beams(
            orientation, thickness[:, None] if thickness.ndim else thickness, precession_deg, convergence_mrad
        )
        shown = beams.reflection[:, 1:].clamp_min(-1)
        return Spots(beams.x[:, 1:], beams.y[:, 1:], beams.intensity[:, 0, 1:], shown)

    def diffracted(self, orientation: Tensor, conditions: Conditions) -> DiffractedBeams:
        """Return what orientations (B, 4) send to the detector; the direct beam's share is that of the theory."""
        vacuum_B = orientation.isnan().any(dim=1)
        tilt_B12 = torch.stack((conditions.precession_rad, conditions.convergence_rad), dim=1)[:, None]
        known = torch.where(vacuum_B[:, None], torch.eye(4, device=orientation.device)[0].to(orientation), orientation)
        beams = self._beams(known, conditions.thickness_angstrom[:, None], tilt_B12)
        intensity_BN = beams.intensity[:, 0, 0]
        direct_B = intensity_BN[:, 0] / intensity_BN.sum(1)
        pattern, place = ((intensity_BN[:, 1:] > FAINTEST) & ~vacuum_B[:, None]).nonzero(as_tuple=True)
        powered = intensity_BN[pattern, place + 1] ** conditions.intensity_power[pattern]
        x, y = beams.x[pattern, place + 1], beams.y[pattern, place + 1]
        return DiffractedBeams(pattern, x, y, powered, torch.where(vacuum_B, 1.0, direct_B))

    def _beams(self, orientation: Tensor, thickness_BT: Tensor, tilt_BG2: Tensor) -> Beams:
        """Return the beams of a chunk of patterns; thickness in Å, semi-angles of precession and convergence in rad."""
        # Excitation errors of all reflections with the beam straight, and the reflections that take part.
        lab_BRM = self._lab(orientation)
        radius = 1 / self.geometry.wavelength_angstrom
        error_BR = lab_BRM[..., 2] - self.g.square().sum(1).to(lab_BRM) / (2 * radius)
        reflection_BN = self._chosen(error_BR, tilt_BG2.sum(2).amax(1))
        rows = torch.arange(len(orientation), device=self.device)[:, None]
        known_BN = reflection_BN.clamp_min(0)
        xy_BN2 = lab_BRM[rows, known_BN, :2] * (reflection_BN >= 0)[..., None]
        error_BN = error_BR[rows, known_BN] * (reflection_BN >= 0)
        # A tilt of the beam changes the excitation errors only, in proportion to the place on the detector.
        beam_B2J = _tilts(tilt_BG2, self.simulate.tilts)
        error_BNJ = (error_BN[..., None] - xy_BN2 @ beam_B2J.to(xy_BN2)).float()
        # Carry the waves through the crystal, as many patterns at a time as their matrices fit the cache.
        pieces = []
        size = _GPU_PIECE_BYTES if self.device.type != "cpu" else _PIECE_BYTES
        step = max(1, size // (8 * reflection_BN.shape[1] ** 2))
        for start in range(0, len(orientation), step):
            part = slice(start, start + step)
            matrix_BNN = self._matrix(reflection_BN[part])
            pieces.append(propagate(matrix_BNN, error_BNJ[part], thickness_BT[part], tilt_BG2.shape[1]))
        intensity_BTGN = torch.cat(pieces) * (reflection_BN > -2)[:, None, None]
        return Beams(reflection_BN, xy_BN2[..., 0].float(), xy_BN2[..., 1].float(), intensity_BTGN)

    def _lab(self, orientation: Tensor) -> Tensor:
        """Return the reflections' lab coordinates (B, R, 3)."""
        axes = torch.eye(3, dtype=orientation.dtype, device=self.device)
        lab = rotations.rotate(rotations.inverse(orientation)[:, None], axes)
        return self.g.to(orientation.dtype) @ lab

    def _chosen(self, error_BR: Tensor, swing_B: Tensor) -> Tensor:
        """Return the rows (B, N) of the reflections that take part, the strongest first, after the direct beam's -1."""
        # The smallest excitation error that any direction of the beam gives a reflection decides.
        length_R = torch.linalg.vector_norm(self.g, dim=1).to(error_BR)
        least_BR = (error_BR.abs() - torch.outer(swing_B.to(error_BR), length_R)).clamp_min(0)
        weight_BR = (self._own.to(error_BR) / (least_BR + 0.002)).where(least_BR <= self.simulate.beam_error, -1.0)
        number = int((weight_BR >= 0).sum(1).max()) if len(error_BR) else 0
        best = weight_BR.topk(min(number, self.simulate.beams - 1), dim=1)
        chosen_BN = best.indices.where(best.values >= 0, -2)
        return torch.cat((chosen_BN.new_full((len(chosen_BN), 1), -1), chosen_BN), dim=1)

    def _matrix(self, reflection_BN: Tensor) -> Tensor:
        """Return the couplings (B, N, N) complex64 between beams, with the mean absorption on the diagonal."""
        place_BN = self._place[reflection_BN.clamp_min(0)] * (reflection_BN >= 0)
        matrix = self._coupling[place_BN[:, :, None] - place_BN[:, None, :] + self._middle]
        real_BN = reflection_BN > -2
        return matrix * (real_BN[:, :, None] & real_BN[:, None, :])


def _tilt_groups(orientation: Tensor, value: float | Tensor, unit: float) -> Tensor:
    """Return semi-angles times `unit` as (B, G): one number, (B,) or (B, G) of them."""
    tilt = torch.as_tensor(value, dtype=orientation.dtype, device=orientation.device) * unit
    return tilt if tilt.ndim == 2 else tilt.expand(len(orientation))[:, None]


def _tilts(tilt_BG2: Tensor, count: int) -> Tensor:
    """Return beam tilts (B, 2, J) in rad, group after group, `count` in each.

    Even azimuths of the precession cone, points spread over the beam's disk.
    """
    if not bool(tilt_BG2.any()):
        count = 1
    number = torch.arange(count, dtype=tilt_BG2.dtype, device=tilt_BG2.device) + 0.5
    around = 2 * math.pi * number / count
    spread, turn = (number / count).sqrt(), number * (math.pi * (3 - math.sqrt(5)))
    cone_2J = torch.stack((around.cos(), around.sin()))
    disk_2J = torch.stack((spread * turn.cos(), spread * turn.sin())) if count > 1 else torch.zeros_like(cone_2J)
    tilt_BG2J = tilt_BG2[..., :1, None] * cone_2J + tilt_BG2[..., 1:, None] * disk_2J
    return tilt_BG2J.transpose(1, 2).flatten(2)


def _reachable(phase: Phase, present: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """Return hkl (R, 3) and g (R, 3) within `reach` that scattering once or twice leads to, `present` ones included."""
    # A box of hkl, flat, in which every present reflection is marked; differences reach twice as far.
    edge = present.abs().amax(0)
    stride = torch.tensor([(4 * edge[1] + 1) * (4 * edge[2] + 1), 4 * edge[2] + 1, 1])
    middle = int((2 * edge * stride).sum())
    there = torch.zeros(int((4 * edge + 1).prod()), dtype=torch.bool)
    there[(present * stride).sum(1) + middle] = True
    # All hkl within reach; kept are those that are present, or the sum of two that are.
    every = torch.cartesian_prod(*(torch.arange(-int(n), int(n) + 1) for n in edge))
    g = every.to(torch.float64) @ phase.reciprocal_matrix
    length = torch.linalg.vector_norm(g, dim=1)
    inside = (length <= reach) & (length > 0)
    every, g, length = every[inside], g[inside], length[inside]
    twice = torch.zeros(len(every), dtype=torch.bool)
    for first in present[:64]:
        twice |= there[((every - first) * stride).sum(1) + middle] & ((every - first).abs() <= edge).all(1)
    kept = there[(every * stride).sum(1) + middle] | twice
    order = torch.argsort(length[kept], stable=True)
    return every[kept][order], g[kept][order]


def _couplings(phase: Phase, geometry: Geometry, extent: Tensor, absorbing: bool) -> Tensor:
    """Return (U_g + i U'_g) / 2K in 1/Å, complex64, for every hkl in the box up to `extent`, flat; U_0 left out."""
    hkl = torch.cartesian_prod(*(torch.arange(-int(n), int(n) + 1) for n in extent))
    wavelength = geometry.wavelength_angstrom
    scale = relativistic_mass_factor(wavelength) / (math.pi * phase.volume) * wavelength / 2
    potential = phase.structure_factors(hkl).conj()  # the waves here are exp(+2 pi i g·r)
    middle = len(hkl) // 2
    potential[middle] = 0
    if absorbing:
        potential = potential + 1j * _absorption(phase, hkl, wavelength)
    return (potential * scale).to(torch.complex64)


def _absorption(phase: Phase, hkl: Tensor, wavelength: float) -> Tensor:
    """Return the Fourier coefficients (N,) complex128 of the absorption in Å, on the scale of structure factors."""
    # Absorptive form factors on a fine line of |g|, interpolated, then summed over the atoms.
    length = torch.linalg.vector_norm(hkl.to(torch.float64) @ phase.reciprocal_matrix, dim=1)
    line = torch.linspace(0, float(length.max()) + 1e-6, 256, dtype=torch.float64)
    table = absorptive_factors(phase.elements, phase.u_iso, line, wavelength) * phase.occupancy
    spacing = float(line[1])
    left = (length / spacing).long().clamp_max(len(line) - 2)
    part = (length / spacing - left)[:, None]
    sums = []
    for begin in range(0, len(hkl), 4096):
        rows = slice(begin, begin + 4096)
        factor = torch.lerp(table[left[rows]], table[left[rows] + 1], part[rows])
        wave = -2 * math.pi * hkl[rows].to(torch.float64) @ phase.fractional.T
        sums.append(torch.complex((factor * wave.cos()).sum(1), (factor * wave.sin()).sum(1)))
    return torch.cat(sums)


def _joined(parts: list[Beams]) -> Beams:
    """Return the chunks as one, padded to the largest number of beams."""
    width = max(part.x.shape[1] for part in parts)

    columns = [
        torch.cat([functional.pad(value, (0, width - value.shape[-1]), value=empty) for value in values])
        for values, empty in zip(zip(*parts, strict=True), (-2, 0, 0, 0), strict=True)
    ]
    return Beams(*columns)


def simulator_for(
    phase: Phase, geometry: Geometry, simulate: SimulateConfig, device: torch.device | str = "cpu"
) -> KinematicSimulator:
    """Return the simulator that `simulate.physics` names: the kinematic one, or its dynamical kind (Bloch waves).

    Raises a `UserError` for settings that it cannot honour, and when no reflection falls on the detector.
    """
    if simulate.physics == "bloch":
        return BlochSimulator(phase, geometry, simulate, device)
    return KinematicSimulator(phase, geometry, simulate, device)
