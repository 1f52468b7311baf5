"""Template matching with pyxem 0.21, run as a script by a Python that has pyxem: `peer_pyxem.py JOB.npz RESULT.npz`.

It stands alone, for that Python need not have stemtune. `peers.py` writes the job and reads the result.

The job holds `cif` (text), `scale` (1/Å per pixel), `kv`, `step_deg`, `powers` (m, 2) that patterns and templates are
raised to, and patterns `set0`, `set1`, ... of (n, size, size). The result holds `grid`, the quaternions (N, 4) of the
templates, and for each set and row of `powers` `set0/0/raw`, pyxem's own columns (n, 4) index, correlation, in-plane
angle in degrees, mirror; `set0/0/shipped`, the quaternions (n, 4) that pyxem makes of them; and `set0/0/seconds`,
without the geometry of the polar grid, which is worked out once per scan.

The settings were chosen on 60 other patterns (`tests/oracles/bloch_py4dstem.py --seed 7`). What matters: the power goes
to the polar image, as pyxem says, and not to the picture before; few electrons are blurred first; many more reflections
are let in than the crystal's thickness would say; templates are raised to a power too.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

EXCITATION = 0.1  # 1/Å; largest excitation error of a template's spot, and pyxem's width of its Lorentzian
BLUR_PX = 1.0  # sigma
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


def polar(patterns: np.ndarray, scale: float) -> Any:
    """Return pyxem's polar images of patterns (n, size, size)."""
    from pyxem.signals import ElectronDiffraction2D
    from scipy.ndimage import gaussian_filter

    signal = ElectronDiffraction2D(gaussian_filter(patterns.astype(np.float32), (0, BLUR_PX, BLUR_PX))[None])
    signal.calibration.center = None  # the middle of the pattern
    signal.calibration.units = "$A^{-1}$"
    signal.calibration.scale = scale
    return signal.get_azimuthal_integral2d(
        npt=RADII,
        npt_azim=ANGLES,
        radial_range=(DIRECT, patterns.shape[-1] / 2 * scale),
        mean=True,
        show_progressbar=False,
    )


def match(image: Any, simulation: Any) -> Any:
    """Return pyxem's orientation map of polar images."""
    return image.get_orientation(simulation, frac_keep=1, n_best=1, normalize_templates=True, show_progressbar=False)


def main(job_path: str, result_path: str) -> None:
    """Match every set of the job with every pair of powers and write the result."""
    logging.disable(logging.WARNING)  # hyperspy warns about the scales of axes at every call
    result: dict[str, Any] = {}
    with np.load(job_path) as job:
        scale = float(job["scale"])
        sets = sorted((name for name in job.files if name.startswith("set")), key=lambda name: int(name[3:]))
        reach = job[sets[0]].shape[-1] / 2 * scale
        simulation = templates(str(job["cif"]), float(job["kv"]), reach, float(job["step_deg"]))
        simulated = [np.array(each.intensity) for each in simulation.coordinates]
        result["grid"] = simulation.rotations.data
        match(polar(job[sets[0]][:WARM_UP], scale), simulation)
        began = time.perf_counter()
        polar(job[sets[0]][:WARM_UP], scale)
        geometry = time.perf_counter() - began
        for number, name in enumerate(sets):
            print(f"pyxem: set {number + 1} of {len(sets)}", file=sys.stderr, flush=True)
            began = time.perf_counter()
            image = polar(job[name], scale)
            integrating = max(time.perf_counter() - began - geometry, 0.0)
            for row, (power, of_templates) in enumerate(job["powers"]):
                for each, intensity in zip(simulation.coordinates, simulated, strict=True):
                    each.intensity = intensity**of_templates
                began = time.perf_counter()
                found = match(image**power, simulation)
                raw = np.asarray(found.data)[0, :, 0]
                result[f"{name}/{row}/seconds"] = integrating + time.perf_counter() - began
                result[f"{name}/{row}/raw"] = raw
                result[f"{name}/{row}/shipped"] = np.asarray(found.to_rotation().data).reshape(len(raw), 4)
    np.savez_compressed(result_path, **result)


if __name__ == "__main__":
    main(*sys.argv[1:])
