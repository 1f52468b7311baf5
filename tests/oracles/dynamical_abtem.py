"""Reference intensities by abTEM's Bloch waves, for the tests: the cases of `dynamical_py4dstem.py`, a second program.

How to run (abTEM 1.0.11, in an environment of its own; the files of `dynamical_py4dstem.py` must be there):

    python3 -m venv /tmp/abtem-venv
    /tmp/abtem-venv/bin/pip install "abtem==1.0.11"
    cd tests/oracles
    OMP_NUM_THREADS=1 /tmp/abtem-venv/bin/python dynamical_abtem.py

It writes `dynamical_abtem.npz`. For NAME in linio2, si, au, gaas, at the orientations and thicknesses of
`dynamical_NAME.npz`: `NAME_count` (C,), `NAME_hkl` (sum of count, 3) int16 and `NAME_intensity` (sum of count, T)
float32, shares of the incident beam. The atoms are at rest, nothing is absorbed, and the form factors are Lobato's, so
that `factor_elastic` of `dynamical_NAME.npz` holds the same couplings; the largest difference is printed. abTEM chooses
the beams itself, by the same bounds `reach` and `error`; lattice-forbidden ones are dropped.

abTEM's beam travels along +z: its crystal is turned by 180 degrees about x here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

NAMES = ("linio2", "si", "au", "gaas")
VOLTS = 200e3


def cases(name):
    """Return counts, hkl and intensities of one phase."""
    import ase
    from abtem.bloch import BlochWaves, StructureFactor
    from abtem.core.constants import kappa
    from abtem.core.energy import energy2sigma, energy2wavelength
    from dynamical_py4dstem import matrix

    held = np.load(f"dynamical_{name}.npz")
    atoms = ase.Atoms(numbers=held["number"], cell=held["cell"], scaled_positions=held["fractional"], pbc=True)
    factors = StructureFactor(
        atoms, 2 * float(held["reach"]) + 1e-3, parametrization="lobato", cutoff="hard", centering="P"
    )
    table = factors.build(lazy=False)
    scale = energy2sigma(VOLTS) / (kappa * energy2wavelength(VOLTS) * np.pi)
    theirs = dict(zip(map(tuple, table.hkl.tolist()), np.asarray(table.array) * scale, strict=True))
    pairs = zip(map(tuple, held["coupled"].tolist()), held["factor_elastic"], strict=True)
    far = max(abs(theirs.get(hkl, 0) - value) for hkl, value in pairs if any(hkl))
    print(name, f"largest difference of U_g from py4DSTEM's: {far:.2e} of {abs(held['factor_elastic']).max():.2e} 1/Å²")
    allowed = {hkl for hkl, value in theirs.items() if abs(value) > 1e-7}
    allowed |= {tuple(np.add(one, other)) for one in list(allowed)[:60] for other in allowed}
    count, hkl, intensity = [], [], []
    for orientation in held["orientation"]:
        turned = np.diag([1.0, -1.0, -1.0]) @ matrix(orientation).T
        waves = BlochWaves(table, VOLTS, float(held["error"]), float(held["reach"]), turned, centering="P")
        spots = waves.calculate_diffraction_patterns(10 * held["thickness_nm"], lazy=False)
        kept = np.array([tuple(row) in allowed for row in waves.hkl.tolist()])
        count.append(kept.sum())
        hkl.append(waves.hkl[kept].astype(np.int16))
        intensity.append(np.asarray(spots.array)[:, kept].T.astype(np.float32))
    return np.array(count), np.concatenate(hkl), np.concatenate(intensity)


def main():
    """Write the file."""
    import abtem

    abtem.config.set({"precision": "float64"})
    written = {}
    for name in NAMES:
        for key, value in zip(("count", "hkl", "intensity"), cases(name), strict=True):
            written[f"{name}_{key}"] = value
        print(name, written[f"{name}_count"], written[f"{name}_intensity"].sum(0))
    np.savez_compressed("dynamical_abtem.npz", **written)
    print(Path("dynamical_abtem.npz").stat().st_size, "bytes")


if __name__ == "__main__":
    main()
