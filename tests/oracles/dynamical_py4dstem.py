"""Reference intensities of fixed beams by py4DSTEM's Bloch waves, and absorptive form factors, for the tests.

How to run
----------
py4DSTEM 0.14.18 wants an older numpy, so it lives in an environment of its own (python 3.11):

    python3 -m venv /tmp/py4dstem-venv
    /tmp/py4dstem-venv/bin/pip install "py4DSTEM==0.14.18" "numpy<2"
    cd tests/oracles
    OMP_NUM_THREADS=1 /tmp/py4dstem-venv/bin/python dynamical_py4dstem.py            # writes the files below
    OMP_NUM_THREADS=1 /tmp/py4dstem-venv/bin/python dynamical_py4dstem.py --time     # prints seconds per orientation

What it writes
--------------
`dynamical_{linio2,si,au,gaas}.npz`: 200 kV, three exact zone axes (each turned in the plane at random), then four
random orientations (C = 7 cases).

- `cell` (6,) Å and degrees; `number` (M,) and `fractional` (M, 3), the atoms of the cell; `u_iso` (M,) in Å².
- `zone` (3, 3), lattice indices [uvw] of the zone axes; `orientation` (C, 4), unit quaternions, scalar first,
  lab-to-crystal (v_crystal = q v_lab); `thickness_nm` (T,).
- `count` (C,), the beams of each case; `hkl` (sum of count, 3) int16, the beams of all cases one after the other, the
  direct beam among them: all within `reach` (1/Å) of the origin and `error` (1/Å) of the Ewald sphere that the
  lattice's centring allows, so the reflections that only multiple scattering reaches are there.
- `x`, `y` (sum of count,), their places in 1/Å, x to the right and y **up**.
- `intensity_VARIANT` (sum of count, T) float32, as shares of the incident beam.
- `coupled` (K, 3) int16 and `factor_VARIANT` (K,) complex: py4DSTEM's U_g in 1/Å² of all hkl that are a difference of
  two beams. They have F's sign, exp(+2 pi i hkl·x); the wave exp(2 pi i k·r) wants the coupling U_(h-g) in row g,
  column h.

Variants
--------
`elastic`   Lobato's factors as py4DSTEM has them: atoms at rest, no absorption.
`thermal`   Lobato's factors with the Debye-Waller factor, and as imaginary part the phonon absorption of Weickenmeier
            and Kohl ("WK-P" less "WK"). The sum is made here, the waves are py4DSTEM's.
`wkcp`      "WK-CP" as py4DSTEM has it: Weickenmeier and Kohl's elastic factors, phonon and core absorption. Beware:
            0.14.18 takes two terms of the series of 1 - exp(-b s²) up to b s² = 1, which makes the
            elastic factors up to 12 % too small between 0.2 and 1 1/Å. As input to both sides of a comparison that
            does not matter.

`absorptive_py4dstem.npz`: `element` (E,), `g` (G,) in 1/Å, `u_iso` (U,) in Å²; `phonon` and `core` (E, U, G) in Å at
200 kV: the imaginary part of py4DSTEM's form factors on the scale of first-Born factors (U'_g = gamma f' / (pi V)),
Debye-Waller factor included; `elastic` (E, G) in Å: Lobato's factors of atoms at rest.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

FACE = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
OBVERSE = np.array([[0, 0, 0], [2 / 3, 1 / 3, 1 / 3], [1 / 3, 2 / 3, 2 / 3]])
THICKNESS_NM = np.array([20.0, 40.0, 60.0, 80.0, 100.0])
VARIANTS = ("elastic", "thermal", "wkcp")
VOLTS = 200e3
FILE = "dynamical_{}.npz"

PHASES = {  # edges, angles, centring, {number: (places, mean square displacement)}, zones, reach, largest error
    "linio2": (
        (2.878, 2.878, 14.19, 90.0, 90.0, 120.0),
        OBVERSE,
        {28: ([[0, 0, 0]], 0.005), 3: ([[0, 0, 0.5]], 0.005), 8: ([[0, 0, 0.2584], [0, 0, -0.2584]], 0.005)},
        [[0, 0, 1], [1, 0, 0], [2, 1, 0]],
        1.8,
        0.1,
    ),
    "si": (
        (5.431, 5.431, 5.431, 90.0, 90.0, 90.0),
        FACE,
        {14: ([[0, 0, 0], [0.25, 0.25, 0.25]], 0.006)},
        [[0, 0, 1], [1, 1, 0], [1, 1, 1]],
        1.7,
        0.1,
    ),
    "au": (
        (4.078, 4.078, 4.078, 90.0, 90.0, 90.0),
        FACE,
        {79: ([[0, 0, 0]], 0.008)},
        [[0, 0, 1], [1, 1, 0], [1, 1, 1]],
        2.0,
        0.14,
    ),
    "gaas": (
        (5.653, 5.653, 5.653, 90.0, 90.0, 90.0),
        FACE,
        {31: ([[0, 0, 0]], 0.008), 33: ([[0.25, 0.25, 0.25]], 0.007)},
        [[0, 0, 1], [1, 1, 0], [1, 1, 2]],
        1.6,
        0.1,
    ),
}
ELEMENTS = {"Li": 3, "O": 8, "Si": 14, "Ni": 28, "Ga": 31, "Au": 79}


def matrix(q):
    """Return the rotation matrix (3, 3) of the unit quaternion `q` (4,), v_crystal = matrix @ v_lab."""
    w, x, y, z = q
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def along(direction, turn):
    """Return the quaternion (4,) that looks along the crystal's `direction`, turned by `turn` (rad) in the plane."""
    x, y, z = np.asarray(direction) / np.linalg.norm(direction)
    tilt = np.array([1 + z, -y, x, 0.0])  # the shortest turn of the lab's z to the direction
    w, a, b, _ = tilt / np.linalg.norm(tilt)
    c, s = np.cos(turn / 2), np.sin(turn / 2)
    return np.array([w * c, a * c + b * s, b * c - a * s, w * s])  # tilt times a turn about z


def atoms(name):
    """Return numbers (M,), places in the cell (M, 3) and mean square displacements (M,) of a phase."""
    _, centring, kinds, *_ = PHASES[name]
    rows = [(z, np.mod(np.add(p, shift), 1), u) for z, (sites, u) in kinds.items() for p in sites for shift in centring]
    numbers, places, displacement = zip(*rows, strict=True)
    return np.array(numbers), np.array(places), np.array(displacement)


def crystal(name, variant):
    """Return py4DSTEM's crystal with the structure factors of a variant."""
    from py4DSTEM.process.diffraction import Crystal

    cell, _, kinds, _, reach, _ = PHASES[name]
    numbers, places, _ = atoms(name)
    sigma = {z: float(np.sqrt(u)) for z, (_, u) in kinds.items()}

    def made(method, factors=numbers, **occupancy):
        result = Crystal(positions=places, numbers=factors, cell=np.array(cell), **occupancy)
        result.calculate_dynamical_structure_factors(
            VOLTS, method, k_max=2 * reach + 1e-6, thermal_sigma=sigma, tol_structure_factor=0.0
        )
        return result

    if variant != "thermal":
        return made({"elastic": "Lobato", "wkcp": "WK-CP"}[variant])
    whole, rest = made("WK-P"), made("WK").Ug_dict
    lost = {hkl: factor - rest[hkl] for hkl, factor in whole.Ug_dict.items()}
    whole.Ug_dict = lost
    for z, (_, u) in kinds.items():  # one kind of atom at a time, since each is damped differently
        alone = made("Lobato", occupancy=(numbers == z).astype(float))
        lengths = np.linalg.norm(np.array(list(lost)) @ alone.lat_inv, axis=1)
        for hkl, length in zip(lost, lengths, strict=True):
            lost[hkl] = lost[hkl] + alone.Ug_dict[hkl] * np.exp(-2 * np.pi**2 * u * length**2)
    return whole


def listed(of, name, orientation):
    """Return py4DSTEM's list of the beams of one case."""
    _, centring, *_, reach, error = PHASES[name]
    beams = of.generate_diffraction_pattern(
        orientation_matrix=matrix(orientation),
        sigma_excitation_error=error,
        tol_excitation_error_mult=1.0,
        tol_intensity=-1.0,
        k_max=reach,
    )
    hkl = np.stack([beams.data[axis] for axis in "hkl"], axis=1)
    beams.remove(np.abs(np.exp(2j * np.pi * hkl @ centring.T).sum(1)) < 1e-3)
    return beams


def orientations(name, seed):
    """Return the orientations (C, 4): the zone axes, then four at random."""
    from py4DSTEM.process.diffraction import Crystal

    rng = np.random.default_rng(seed)
    cell, _, _, zones, *_ = PHASES[name]
    numbers, places, _ = atoms(name)
    edges = Crystal(positions=places, numbers=numbers, cell=np.array(cell)).lat_real
    exact = [along(np.array(zone) @ edges, rng.uniform(0, 2 * np.pi)) for zone in zones]
    chance = rng.normal(size=(4, 4))
    return np.concatenate([exact, chance / np.linalg.norm(chance, axis=1, keepdims=True)])


def write(name, folder, seed):
    """Write the reference file of one phase."""
    _, _, _, zones, reach, error = PHASES[name]
    orientation = orientations(name, seed)
    numbers, places, displacement = atoms(name)
    held = {}
    for variant in VARIANTS:
        of = crystal(name, variant)
        beams = [listed(of, name, q) for q in orientation]
        hkl = [np.stack([one.data[axis] for axis in "hkl"], axis=1).astype(np.int16) for one in beams]
        waves = [
            of.generate_dynamical_diffraction_pattern(
                one, thickness=10 * THICKNESS_NM, zone_axis_cartesian=matrix(q)[:, 2]
            )
            for one, q in zip(beams, orientation, strict=True)
        ]
        intensity = [np.stack([one.data["intensity"] for one in series], axis=1) for series in waves]
        held[f"intensity_{variant}"] = np.concatenate(intensity).astype(np.float32)
        differences = np.concatenate([(one[:, None] - one[None]).reshape(-1, 3) for one in hkl])
        coupled = np.unique(differences, axis=0)
        coupled = coupled[np.argsort(np.linalg.norm(coupled @ of.lat_inv, axis=1).round(6), kind="stable")]
        factor = np.array([of.Ug_dict.get(tuple(row), 0) for row in coupled.astype(float).tolist()])
        held[f"factor_{variant}"] = factor.astype(np.complex64)
    np.savez_compressed(
        folder / FILE.format(name),
        cell=np.array(PHASES[name][0]),
        number=numbers,
        fractional=places,
        u_iso=displacement,
        zone=np.array(zones),
        orientation=orientation,
        thickness_nm=THICKNESS_NM,
        reach=reach,
        error=error,
        count=np.array([len(one) for one in hkl]),
        hkl=np.concatenate(hkl),
        x=np.concatenate([one.data["qx"] for one in beams]).astype(np.float32),
        y=np.concatenate([one.data["qy"] for one in beams]).astype(np.float32),
        coupled=coupled,
        **held,
    )
    print(name, [len(one) for one in hkl], held["intensity_thermal"].shape, (folder / FILE.format(name)).stat().st_size)


def write_factors(path):
    """Write the absorptive form factors."""
    from py4DSTEM.process.diffraction.WK_scattering_factors import compute_WK_factor
    from py4DSTEM.process.utils import single_atom_scatter

    g, u_iso = np.array([0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0]), np.array([0.0025, 0.005, 0.010])
    back = np.pi / (1 + VOLTS / 511e3)
    lobato = single_atom_scatter()
    phonon, core, elastic = [], [], []
    for z in ELEMENTS.values():
        parts = [
            [compute_WK_factor(g, z, VOLTS, np.sqrt(u), core, not core).imag * back for u in u_iso]
            for core in (False, True)
        ]
        phonon.append(parts[0])
        core.append(parts[1])
        lobato.get_scattering_factor([z], [1.0], g, units="A")
        elastic.append(np.array(lobato.fe))
    np.savez_compressed(
        path, element=np.array(list(ELEMENTS)), g=g, u_iso=u_iso, phonon=phonon, core=core, elastic=elastic
    )


def measure(rounds=10):
    """Print py4DSTEM's seconds per orientation of LiNiO2: about 100 beams, four thicknesses, with absorption."""
    of = crystal("linio2", "wkcp")
    orientation = along(np.random.default_rng(3).normal(size=3), 0.3)
    beams = of.generate_diffraction_pattern(
        orientation_matrix=matrix(orientation),
        sigma_excitation_error=0.166,
        tol_excitation_error_mult=1.0,
        tol_intensity=1e-9,
        k_max=1.7,
    )
    began = time.perf_counter()
    for _ in range(rounds):
        of.generate_dynamical_diffraction_pattern(
            beams, thickness=[200.0, 400.0, 600.0, 800.0], zone_axis_cartesian=matrix(orientation)[:, 2]
        )
    print(f"{len(beams.data)} beams: {(time.perf_counter() - began) / rounds:.4f} s per orientation")


def main():
    """Write every file, or measure the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--time", action="store_true")
    options = parser.parse_args()
    if options.time:
        measure()
        return
    write_factors(options.out / "absorptive_py4dstem.npz")
    for name in PHASES:
        write(name, options.out, options.seed)


if __name__ == "__main__":
    main()
