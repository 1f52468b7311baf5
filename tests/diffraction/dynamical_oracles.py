"""Other programs' dynamical intensities, and our simulator set up to take the same beams."""

import dataclasses
import math
from functools import cache
from pathlib import Path

import numpy as np
import torch

from stemtune.config import SimulateConfig
from stemtune.crystal.phase import Phase
from stemtune.diffraction.bloch import BlochSimulator
from stemtune.diffraction.geometry import Geometry, wavelength_angstrom

ORACLES = Path(__file__).parents[1] / "oracles"  # what the files hold: dynamical_py4dstem.py and dynamical_abtem.py
NAMES = ("linio2", "si", "au", "gaas")
SYMBOLS = {3: "Li", 8: "O", 14: "Si", 28: "Ni", 31: "Ga", 33: "As", 79: "Au"}
WAVELENGTH = wavelength_angstrom(200)
GAMMA = 1 + 200 / 510.99895

CIF = """data_oracle
_cell_length_a {}
_cell_length_b {}
_cell_length_c {}
_cell_angle_alpha {}
_cell_angle_beta {}
_cell_angle_gamma {}
_space_group_IT_number 1
loop_
_space_group_symop_operation_xyz
'x,y,z'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_U_iso_or_equiv
{}
"""


@cache
def oracle(name):
    with np.load(ORACLES / f"dynamical_{name}.npz") as held:
        return {key: held[key] for key in held.files}


@cache
def phase_of(name, at_rest=False):
    """Return the oracle's crystal, without any symmetry but translations."""
    held = oracle(name)
    lines = [
        f"{SYMBOLS[int(z)]}{row} {SYMBOLS[int(z)]} {x:.10f} {y:.10f} {z_:.10f} {u}"
        for row, (z, (x, y, z_), u) in enumerate(zip(held["number"], held["fractional"], held["u_iso"], strict=True))
    ]
    phase = Phase.from_cif_text(CIF.format(*held["cell"], "\n".join(lines)))
    return dataclasses.replace(phase, u_iso=torch.zeros_like(phase.u_iso)) if at_rest else phase


def exact(**settings):
    """Settings whose beams reach exactly to the corner of the pattern."""
    still = {"centre_error": 0.0, "ellipticity": 0.0, "scale_error": 0.0, "physics": "bloch", "beams": 400}
    return SimulateConfig(**{**still, "scale": 0.014, **settings})


@cache
def made(phase, simulate):
    return BlochSimulator(phase, Geometry.of(simulate), simulate)


def simulator_of(phase, **settings):
    return made(phase, exact(**settings))


def like_oracle(name, at_rest, absorption):
    """Return a simulator of the oracle's crystal that takes the oracle's beams."""
    held = oracle(name)
    scale = 1.0001 * float(held["reach"]) / (64 * math.sqrt(2))
    return simulator_of(phase_of(name, at_rest), scale=scale, beam_error=float(held["error"]), absorption=absorption)


def by_index(simulator, beams, row):
    """Return {hkl: intensities (T,)} of one pattern."""
    real = beams.reflection[row] > -2
    index = beams.reflection[row][real]
    hkl = torch.where((index >= 0)[:, None], simulator.hkl[index.clamp_min(0)], 0)
    return dict(zip(map(tuple, hkl.tolist()), beams.intensity[row].T[real].numpy(), strict=True))


def cases(count):
    ends = np.cumsum(count)
    return [slice(end - number, end) for end, number in zip(ends, count, strict=True)]
