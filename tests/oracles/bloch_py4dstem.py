"""Make the dynamical reference patterns that matching is judged by, with a program that is not ours: py4DSTEM.

LiNiO2 (12 atoms per hexagonal cell), 200 kV, Bloch waves with absorption (Weickenmeier-Kohl form factors, core and
phonon), uniformly random orientations, thickness uniform over 20-80 nm, optionally averaged over a precession cone.
py4DSTEM 0.14.18 wants an older numpy, so it lives in an environment of its own:

    python3 -m venv /tmp/py4dstem-venv
    /tmp/py4dstem-venv/bin/pip install "py4DSTEM==0.14.18" "numpy<2"
    cd tests/oracles
    OMP_NUM_THREADS=1 /tmp/py4dstem-venv/bin/python bloch_py4dstem.py --seed 2024 --precession 0 \
        --out ../../benchmarks/bloch_linio2_p0.npz
    OMP_NUM_THREADS=1 /tmp/py4dstem-venv/bin/python bloch_py4dstem.py --seed 2024 --precession 0.5 \
        --out ../../benchmarks/bloch_linio2_p05.npz

The two files are read by `python -m benchmarks accuracy` and hold 200 patterns each (a few minutes of one
core). Other seeds give sets to search settings on.

What a file holds
-----------------
`orientation` (n, 4) float64, unit quaternions, scalar first, lab-to-crystal; `thickness_nm` (n,) float32;
`count` (n,) int32, the number of beams of each pattern; `x`, `y` (sum of count,) float32, the beams of all patterns one
after the other, in 1/Å, x to the right and y **up**; `intensity` (sum of count,) float32 relative to the incident beam,
the direct beam included; `settings`, the command line as JSON.

Frame
-----
py4DSTEM's orientation matrix has the laboratory axes, in crystal coordinates, as its columns, and its beam travels
along -z; that is the matrix of our lab-to-crystal rotation, and its (qx, qy) are our (x, y). Only its pictures differ:
it draws x downwards. `test_matched.py` checks every stored beam against the package's own reflections.
"""

from __future__ import annotations

import argparse
import json
from multiprocessing import Pool

import numpy as np

ATOMS = {  # element: (number, fractional coordinates before R-centring, thermal displacement in Å)
    "Ni": (28, [(0.0, 0.0, 0.0)], 0.07),
    "Li": (3, [(0.0, 0.0, 0.5)], 0.10),
    "O": (8, [(0.0, 0.0, 0.2584), (0.0, 0.0, -0.2584)], 0.08),
}
CENTRING = ((0.0, 0.0, 0.0), (2 / 3, 1 / 3, 1 / 3), (1 / 3, 2 / 3, 2 / 3))
CELL = (2.878, 2.878, 14.19, 90.0, 90.0, 120.0)
BEAMS_TO = 2.0  # 1/Å; twice this is needed for the couplings between beams
EXCITATION = 0.10  # 1/Å; beams farther than this from the Ewald sphere are left out
FAINTEST = 1e-5  # of the incident beam; 0.03 electrons of 3,000

_crystal = None


def crystal():
    """Return py4DSTEM's LiNiO2 with dynamical structure factors for 200 kV (made once per process)."""
    global _crystal
    if _crystal is None:
        from py4DSTEM.process.diffraction import Crystal

        positions, numbers = [], []
        for number, sites, _ in ATOMS.values():
            for site in sites:
                for shift in CENTRING:
                    positions.append(np.mod(np.add(site, shift), 1))
                    numbers.append(number)
        _crystal = Crystal(positions=np.array(positions), numbers=np.array(numbers), cell=np.array(CELL))
        _crystal.calculate_dynamical_structure_factors(
            200e3,
            "WK-CP",
            k_max=2 * BEAMS_TO,
            thermal_sigma={number: sigma for number, _, sigma in ATOMS.values()},
            tol_structure_factor=0.0,
            g_vec_precision=4,
        )
    return _crystal


def matrix(q: np.ndarray) -> np.ndarray:
    """Return the rotation matrix (3, 3) of the unit quaternion `q` (4,), v_crystal = matrix @ v_lab."""
    w, x, y, z = q
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def bloch(task: tuple[np.ndarray, float, float, int]) -> np.ndarray:
    """Return the beams (k, 3) = x, y, intensity of one pattern; see the head of the file."""
    from py4DSTEM.process.diffraction.crystal_bloch import DynamicalMatrixCache

    q, thickness_nm, precession_deg, tilts = task
    to_crystal = matrix(q)
    beams = crystal().generate_diffraction_pattern(
        orientation_matrix=to_crystal,
        sigma_excitation_error=EXCITATION,
        tol_excitation_error_mult=1.0,
        tol_intensity=0.0,
        k_max=BEAMS_TO,
    )
    cone = np.deg2rad(precession_deg)
    azimuths = np.arange(tilts) * 2 * np.pi / tilts if precession_deg else np.zeros(1)
    cache, total = DynamicalMatrixCache(), 0.0
    for azimuth in azimuths:
        beam = np.array([np.sin(cone) * np.cos(azimuth), np.sin(cone) * np.sin(azimuth), np.cos(cone)])
        exit_wave = crystal().generate_dynamical_diffraction_pattern(
            beams, thickness=10.0 * thickness_nm, zone_axis_cartesian=to_crystal @ beam, dynamical_matrix_cache=cache
        )
        total = total + exit_wave.data["intensity"]
    kept = total / len(azimuths) > FAINTEST
    return np.stack([beams.data["qx"], beams.data["qy"], total / len(azimuths)], axis=1)[kept]


def main() -> None:
    """Simulate and write one set of patterns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--patterns", type=int, default=200)
    parser.add_argument("--precession", type=float, default=0.0, help="semi-angle of the cone in degrees")
    parser.add_argument("--tilts", type=int, default=16, help="beam tilts on the cone")
    parser.add_argument("--thickness", type=float, nargs=2, default=(20.0, 80.0), help="nm")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    orientation = rng.normal(size=(options.patterns, 4))
    orientation /= np.linalg.norm(orientation, axis=1, keepdims=True)
    thickness = rng.uniform(*options.thickness, options.patterns)
    tasks = [(q, t, options.precession, options.tilts) for q, t in zip(orientation, thickness, strict=True)]
    if options.workers > 1:
        with Pool(options.workers) as pool:
            patterns = pool.map(bloch, tasks, chunksize=5)
    else:
        patterns = [bloch(task) for task in tasks]
    beams = np.concatenate(patterns).astype(np.float32)
    np.savez_compressed(
        options.out,
        orientation=orientation,
        thickness_nm=thickness.astype(np.float32),
        count=np.array([len(pattern) for pattern in patterns], dtype=np.int32),
        x=beams[:, 0],
        y=beams[:, 1],
        intensity=beams[:, 2],
        settings=json.dumps({"program": "py4DSTEM 0.14.18", **vars(options)}),
    )


if __name__ == "__main__":
    main()
