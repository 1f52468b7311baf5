"""Template matching with pyxem 0.21, run as a script by a Python that has pyxem: `peer_pyxem.py JOB.npz RESULT.npz`.

It stands alone, for that Python need not have stemtune. `peers.py` writes the job and reads the result.

The job holds `cif` (text), `scale` (1/Å per pixel), `kv`, `step_deg`, `gammas`, and patterns `set0`, `set1`, ... of
(n, size, size). The result holds `grid`, the quaternions (N, 4) of the templates, and for each set and power
`set0/0.25/raw`, pyxem's own columns (n, 4) index, correlation, in-plane angle in degrees, mirror; `set0/0.25/shipped`,
the quaternions (n, 4) that pyxem makes of them; and `set0/0.25/seconds`.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

EXCITATION = 0.03  # 1/Å; largest excitation error of a template's spot; 0.01 to 0.05 were tried
RADII, ANGLES = 128, 360  # of the polar pattern; pyxem labels a radius by its inner edge, so many make the error small
DIRECT = 0.08  # 1/Å; the direct beam inside is left out
WARM_UP = 4  # patterns matched before the clock starts, for numba compiles on the first


def templates(cif: str, kv: float, reach: float, step_deg: float) -> Any:
    """Return the simulated templates on pyxem's own grid of the Laue group's sector."""
    from diffsims.generators.simulation_generator import SimulationGenerator
    from orix.crystal_map import Phase
    from orix.sampling import get_sample_reduced_fundamental

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "phase.cif"
        path.write_text(cif, encoding="utf-8")
        phase = Phase.from_cif(path)
    phase.expand_asymmetric_unit()  # or most of the intensity goes to forbidden reflections
    rotations = get_sample_reduced_fundamental(resolution=step_deg, point_group=phase.point_group)
    return SimulationGenerator(kv).calculate_diffraction2d(
        phase, rotation=rotations, reciprocal_radius=reach, max_excitation_error=EXCITATION, with_direct_beam=False
    )


def match(patterns: np.ndarray, scale: float, simulation: Any) -> Any:
    """Return pyxem's orientation map of patterns (n, size, size)."""
    from pyxem.signals import ElectronDiffraction2D

    signal = ElectronDiffraction2D(patterns[None])
    signal.calibration.center = None  # the middle of the pattern
    signal.calibration.units = "$A^{-1}$"
    signal.calibration.scale = scale
    reach = patterns.shape[-1] / 2 * scale
    polar = signal.get_azimuthal_integral2d(
        npt=RADII, npt_azim=ANGLES, radial_range=(DIRECT, reach), mean=True, show_progressbar=False
    )
    return polar.get_orientation(simulation, frac_keep=1, n_best=1, normalize_templates=True, show_progressbar=False)


def main(job_path: str, result_path: str) -> None:
    """Match every set of the job at every power and write the result."""
    logging.disable(logging.WARNING)  # hyperspy warns about the scales of axes at every call
    result: dict[str, Any] = {}
    with np.load(job_path) as job:
        scale, gammas = float(job["scale"]), job["gammas"]
        sets = sorted((name for name in job.files if name.startswith("set")), key=lambda name: int(name[3:]))
        reach = job[sets[0]].shape[-1] / 2 * scale
        simulation = templates(str(job["cif"]), float(job["kv"]), reach, float(job["step_deg"]))
        result["grid"] = simulation.rotations.data
        match(job[sets[0]][:WARM_UP].astype(np.float32), scale, simulation)
        for number, name in enumerate(sets):
            for gamma in gammas:
                print(f"pyxem: set {number + 1} of {len(sets)}, gamma {gamma:g}", file=sys.stderr, flush=True)
                began = time.perf_counter()
                found = match(job[name].astype(np.float32) ** np.float32(gamma), scale, simulation)
                raw = np.asarray(found.data)[0, :, 0]
                result[f"{name}/{gamma:g}/seconds"] = time.perf_counter() - began
                result[f"{name}/{gamma:g}/raw"] = raw
                result[f"{name}/{gamma:g}/shipped"] = np.asarray(found.to_rotation().data).reshape(len(raw), 4)
    np.savez_compressed(result_path, **result)


if __name__ == "__main__":
    main(*sys.argv[1:])
