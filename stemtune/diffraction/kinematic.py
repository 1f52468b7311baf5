"""Kinematic diffraction: which reflections are near the Ewald sphere, how strong, and where on the detector.

A reflection g_hkl stands in the lab at `inverse(orientation) * g_hkl`. Its excitation error is measured along the
beam, `s = z_sphere - z`, and its intensity is |F|² times a shape factor of s, averaged over the directions that
convergence and precession let the beam take. Dynamical scattering is left out: intensities of thick crystals are
only roughly right, positions are exact.

References
----------
L. Palatinus et al., Acta Cryst. B75 (2019) 512-522, eq. 8: excitation error of a precessed beam.
D. B. Williams and C. B. Carter, Transmission Electron Microscopy, ch. 12: shape factor of a thin foil.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from stemtune._parallel import check_memory
from stemtune.config import SimulateConfig
from stemtune.crystal import rotations
from stemtune.crystal.phase import Phase
from stemtune.diffraction.conditions import Conditions, draw_conditions
from stemtune.diffraction.detector import Detector, DiffractedBeams
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError

_BEAMS = 32  # beam directions that precession and convergence are averaged over
_FAINTEST = 1e-5  # reflections weaker than this share of the strongest possible one are left out


class Spots(NamedTuple):
    """Spots of B patterns, padded to K each.

    `x` and `y` (B, K) are lab coordinates in 1/Å, x right and y up; `intensity` (B, K), 0 for padding; `hkl_index` (B,
    K) the row of each reflection in the simulator's `hkl`, -1 for padding.
    """

    x: Tensor
    y: Tensor
    intensity: Tensor
    hkl_index: Tensor


class _ExcitedReflections(NamedTuple):
    """Reflections near the Ewald sphere, one flat list (M,) over a batch, ordered by pattern."""

    pattern: Tensor
    reflection: Tensor
    x: Tensor
    y: Tensor
    error: Tensor


class KinematicSimulator(Detector):
    """Simulates patterns of one phase, batched, on any torch device.

    The geometry takes precedence over `simulate`, which has the ranges of everything else. Of the reflections that can
    reach the detector, forbidden ones left out, `hkl` (N, 3) are the Miller indices, `g` (N, 3) the reciprocal vectors
    in the crystal frame in 1/Å, and `strength` (N,) is |F|², float64.

    Raises a `UserError` for settings out of range, when no reflection falls on the detector, and for more than the
    memory holds.
    """

    def __init__(
        self, phase: Phase, geometry: Geometry, simulate: SimulateConfig, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(geometry, simulate, device)
        self.phase = phase
        reach = reach_of(geometry, simulate)
        self._check_memory(reach)
        self.hkl, self.g, factor = phase.reflections(reach)
        self.strength = factor.abs().square()
        if not len(self.hkl):
            raise UserError(
                f"no reflection of {phase.name} falls on a pattern of {geometry.size} px at "
                f"{geometry.scale_inv_angstrom:g} 1/Å per pixel; raise `simulate.scale` or `simulate.size`"
            )
        self.g, self.strength = self.g.to(self.device), self.strength.to(self.device)

    def _check_memory(self, reach: float) -> None:
        """Refuse a reach (1/Å) whose reflections are too many, before they are listed."""
        box = math.prod(2 * int(reach * edge) + 1 for edge in self.phase.lattice[:3])
        number = 4 / 3 * math.pi * reach**3 * self.phase.volume
        needed, lower = 64 * box + 16 * self.chunk * number, "lower `simulate.scale` or `simulate.size`"
        check_memory(f"the reflections within {reach:.3g} 1/Å", needed, lower, self.device)

    def spots(
        self,
        orientation: Tensor,
        thickness_nm: float | Tensor = 50.0,
        precession_deg: float | Tensor = 0.0,
        convergence_mrad: float | Tensor = 0.0,
        shape_width: float | Tensor = 0.01,
    ) -> Spots:
        """Return the spots of orientations (B, 4), lab-to-crystal, before the detector does anything to them.

        Thickness, semi-angles and `shape_width` (1/Å; of a gaussian `simulate.shape`, where the thickness does not
        matter) are one number, or one per pattern (B,). The type of the orientations (float64, float32) is that of the
        spots.
        """
        orientation = orientation.to(self.device)
        thickness, width = per_pattern(orientation, thickness_nm, 10.0), per_pattern(orientation, shape_width)
        if not bool((thickness > 0).all() and (width > 0).all()):
            raise UserError("the thickness and the width of the shape factor must be above 0")
        inverse_width = thickness if self.simulate.shape == "sinc2" else 1 / width
        tilts = (
            per_pattern(orientation, precession_deg, math.pi / 180),
            per_pattern(orientation, convergence_mrad, 1e-3),
        )
        excited = self._excited(orientation, inverse_width, *tilts)
        return self._padded(excited, self._intensity(excited, inverse_width, *tilts), len(orientation))

    def template_spots(
        self, orientation: Tensor, width: float, max_inv_angstrom: float | None = None, faintest: float = 1e-5
    ) -> Spots:
        """Return the spots (B, K) of templates: intensity |F|² exp(-(s / width)²), no microscope in between.

        `width`, that of the shape factor in 1/Å, matches dynamical patterns best when broad (0.02 to 0.03). Reflections
        beyond `max_inv_angstrom` from the direct beam and those weaker than a share `faintest` of the strongest
        possible one are left out.
        """
        orientation = orientation.to(self.device)
        inverse_width = torch.full_like(orientation[:, 0], 1 / width)
        still = torch.zeros_like(inverse_width)
        excited = self._excited(orientation, inverse_width, still, still, "gaussian", faintest)
        intensity = self.strength.to(orientation.dtype)[excited.reflection]
        intensity = intensity * torch.exp(-((excited.error / width) ** 2))
        if max_inv_angstrom is not None:
            inside = torch.hypot(excited.x, excited.y) <= max_inv_angstrom
            excited, intensity = _ExcitedReflections(*(part[inside] for part in excited)), intensity[inside]
        return self._padded(excited, intensity, len(orientation))

    def patterns(self, orientation: Tensor, generator: torch.Generator | None = None, noise: bool = True) -> Tensor:
        """Return simulated patterns (B, size, size), float32, with everything else drawn from `simulate`'s ranges.

        Electron counts, or noise-free expected intensities: of the drawn dose if `noise` is off, of sum 1 if
        `simulate.dose` is 0. Equal generator states give equal patterns; on a CPU, how the patterns are cut into
        batches makes no difference as long as these are multiples of `CHUNK`. A generator that lives on the simulator's
        device is fastest.
        """
        orientation = orientation.to(self.device, torch.float32)

        def make(rows: slice, own: torch.Generator) -> Tensor:
            part = orientation[rows]
            conditions = draw_conditions(self.simulate, self.geometry, len(part), own, self.device)
            return self.expose(part, conditions, own, noise)

        return self.in_chunks(len(orientation), generator, make)

    def expose(
        self, orientation: Tensor, conditions: Conditions, generator: torch.Generator | None, noise: bool = True
    ) -> Tensor:
        """Return patterns (B, size, size) of orientations (B, 4), float32, under given conditions (B,).

        An orientation of NaN stands for vacuum: it has no spots.
        """
        return self.detect(self.diffracted(orientation, conditions), conditions, generator, noise)

    def diffracted(self, orientation: Tensor, conditions: Conditions) -> DiffractedBeams:
        """Return what orientations (B, 4) send to the detector under given conditions (B,); see `DiffractedBeams`."""
        inverse_width = conditions.thickness_angstrom if self.simulate.shape == "sinc2" else 1 / conditions.shape_width
        tilts = conditions.precession_rad, conditions.convergence_rad
        excited = self._excited(orientation, inverse_width, *tilts)
        intensity = self._intensity(excited, inverse_width, *tilts)
        powered = intensity ** conditions.intensity_power[excited.pattern]
        return DiffractedBeams(excited.pattern, excited.x, excited.y, powered, conditions.direct_beam)

    def _excited(
        self,
        orientation: Tensor,
        inverse_width: Tensor,
        precession: Tensor,
        convergence: Tensor,
        shape: str | None = None,
        faintest: float = _FAINTEST,
    ) -> _ExcitedReflections:
        """Find the reflections whose intensity can exceed `faintest` of the strongest; (B,) settings in 1/Å, rad."""
        # Crystal axes in the lab, and how high each reflection stands along the beam.
        g, strength = self.g.to(orientation.dtype), self.strength.to(orientation.dtype)
        axes = torch.eye(3, dtype=orientation.dtype, device=self.device)
        lab = rotations.rotate(rotations.inverse(orientation)[:, None], axes)  # (B, 3, 3)
        length_squared = (g**2).sum(1)
        z = lab[:, :, 2] @ g.T
        # Excitation error: the distance to the Ewald sphere along the beam.
        radius = 1 / self.geometry.wavelength_angstrom
        across = (length_squared - z**2).clamp_min_(0)
        error = across / (radius + (radius**2 - across).clamp_min_(0).sqrt_()) - z
        # How far off a reflection may stand before its intensity, for the best tilt of the beam, is below `faintest`.
        above = (strength / (faintest * strength.max())).clamp_min_(1)
        if (shape or self.simulate.shape) == "sinc2":
            extent = above.sqrt() / math.pi
        else:
            extent = above.log().sqrt()
        allowed = torch.outer(1 / inverse_width, extent)
        allowed.addr_(precession + convergence, length_squared.sqrt())
        pattern, reflection = (error.abs() < allowed).nonzero(as_tuple=True)
        place = torch.einsum("mi,mij->mj", g[reflection], lab[pattern][:, :, :2])
        return _ExcitedReflections(pattern, reflection, place[:, 0], place[:, 1], error[pattern, reflection])

    def _intensity(
        self, excited: _ExcitedReflections, inverse_width: Tensor, precession: Tensor, convergence: Tensor
    ) -> Tensor:
        """Return |F|² times the shape factor (M,), averaged over the beam's directions."""
        around, aside = (part.to(excited.error) for part in _beams(_BEAMS))
        across = torch.hypot(excited.x, excited.y)
        swing = (precession[excited.pattern] * across)[:, None] * around
        swing = swing.addcmul_((convergence[excited.pattern] * across)[:, None], aside)
        reduced = (excited.error[:, None] + swing).mul_(inverse_width[excited.pattern, None])
        if self.simulate.shape == "sinc2":
            factor = torch.sinc(reduced).square_().mean(1)
        else:
            factor = reduced.square_().neg_().exp_().mean(1)
        return self.strength.to(factor.dtype)[excited.reflection] * factor

    def _padded(self, excited: _ExcitedReflections, intensity: Tensor, count: int) -> Spots:
        number = torch.bincount(excited.pattern, minlength=count)
        first = torch.cumsum(number, 0) - number
        slot = torch.arange(len(excited.pattern), device=self.device) - first[excited.pattern]
        shape = (count, int(number.max()) if count else 0)

        def padded(values: Tensor, empty: float) -> Tensor:
            table = torch.full(shape, empty, dtype=values.dtype, device=self.device)
            table[excited.pattern, slot] = values
            return table

        return Spots(padded(excited.x, 0), padded(excited.y, 0), padded(intensity, 0), padded(excited.reflection, -1))


def reach_of(geometry: Geometry, simulate: SimulateConfig) -> float:
    """Return how far out (1/Å) reflections can fall on the detector, whatever is drawn from the ranges."""
    slack = 1 + simulate.ellipticity / 2 + simulate.scale_error
    reach = (geometry.corner_inv_angstrom + simulate.centre_error * geometry.scale_inv_angstrom) * slack
    return min(reach, 1.99 / geometry.wavelength_angstrom)


def per_pattern(orientation: Tensor, value: float | Tensor, unit: float = 1.0) -> Tensor:
    """Return one number, or one per pattern, times `unit` for each orientation (B, 4), in its type."""
    return (torch.as_tensor(value, dtype=orientation.dtype, device=orientation.device) * unit).expand(len(orientation))


@cache
@torch.inference_mode(False)  # kept for training too, whoever asks first
def _beams(count: int) -> tuple[Tensor, Tensor]:
    """Return `count` beam directions as shares of the precession and convergence semi-angles along one axis.

    The first (count,) is the cosine law of a cone, at even azimuths; the second the projection of a filled disk,
    at even quantiles, in an order (golden ratio) that spreads each over the other.
    """
    around = torch.cos(math.pi * (torch.arange(count, dtype=torch.float64) + 0.5) / count)
    fine = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    law = 0.5 + (fine * (1 - fine**2).sqrt() + torch.asin(fine)) / math.pi
    quantile = (torch.arange(count, dtype=torch.float64) * (math.sqrt(5) - 1) / 2) % 1
    ranked = (torch.argsort(torch.argsort(quantile)) + 0.5) / count
    aside = fine[torch.searchsorted(law, ranked.to(law.dtype)).clamp_max_(len(fine) - 1)]
    return around, aside
