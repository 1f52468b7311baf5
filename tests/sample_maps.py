"""Small orientation maps and phases that several tests use."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from orix.quaternion import Misorientation, Orientation

from stemtune.config import SimulateConfig, Span
from stemtune.crystal.phase import Phase
from stemtune.crystal.rotations import from_axis_angle_deg, multiply
from stemtune.crystal_map.orientation_map import OrientationMap

NICKEL = """data_Ni
_cell_length_a 3.52
_cell_length_b 3.52
_cell_length_c 3.52
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M 'F m -3 m'
_space_group_IT_number 225
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
Ni1 Ni 0 0 0
"""


def random_map(
    shape: tuple[int, int],
    phases: list[Phase],
    answers: int = 3,
    step: tuple[float, float] | None = (2.5, 2.5),
    indexed: float = 0.7,
) -> OrientationMap:
    rng = np.random.default_rng(3)
    n = shape[0] * shape[1]
    quaternions = rng.normal(size=(n, answers, 4))
    quaternions /= np.linalg.norm(quaternions, axis=-1, keepdims=True)
    phase = rng.integers(0, len(phases), n)
    phase[rng.random(n) > indexed] = -1
    return OrientationMap(
        shape=shape,
        answers=quaternions,
        answer_confidence=rng.random((n, answers)).astype(np.float32),
        phase=phase.astype(np.int16),
        spot_z_score=(20 * rng.random(n)).astype(np.float32),
        explained_intensity=rng.random(n).astype(np.float32),
        phases=phases,
        step_nm=step,
        attrs={"model": "stand-in", "kv": 200.0},
    )


def orix_angle_deg(first: np.ndarray, second: np.ndarray, phase: Phase) -> np.ndarray:
    """Disorientation as orix computes it, from scalar-first quaternions."""
    group = phase.symmetry.to_orix()
    misorientation = Misorientation(
        (Orientation(second) * ~Orientation(first)).data, symmetry=(group.proper_subgroup, group.proper_subgroup)
    )
    return np.rad2deg(misorientation.reduce().angle)


def map_of(
    shape: tuple[int, int],
    orientation: np.ndarray,
    phases: list[Phase],
    phase: np.ndarray | None = None,
    step: tuple[float, float] | None = (2.0, 2.0),
) -> OrientationMap:
    """Return a map with one answer per pixel; pixels whose orientation is NaN are not indexed."""
    n = shape[0] * shape[1]
    known = np.isfinite(orientation).all(axis=-1).ravel()
    return OrientationMap(
        shape=shape,
        answers=orientation.reshape(n, 1, 4),
        answer_confidence=np.ones((n, 1), np.float32),
        phase=np.where(known, 0 if phase is None else phase.ravel(), -1).astype(np.int16),
        spot_z_score=np.ones(n, np.float32),
        explained_intensity=np.ones(n, np.float32),
        phases=phases,
        step_nm=step,
    )


def blurred(mean: np.ndarray, spread_deg: float, rng: np.random.Generator) -> np.ndarray:
    """Return orientations (n, 4) turned away from `mean` (n, 4) by about `spread_deg` about random axes."""
    axis = torch.from_numpy(rng.normal(size=(len(mean), 3)))
    turn = from_axis_angle_deg(axis, torch.from_numpy(np.abs(rng.normal(size=len(mean))) * spread_deg))
    return multiply(torch.from_numpy(mean), turn).numpy()


MICROSCOPE = dataclasses.replace(
    SimulateConfig(),
    size=64,
    scale=0.05,
    dose=Span(20_000, 20_000),
    precession=Span(0.7, 0.7),
    background=Span(0.05, 0.1),
    centre_error=0.3,
    ellipticity=0.01,
)
