"""ACOM matching with py4DSTEM 0.14, run by a Python that has py4DSTEM: `peer_py4dstem.py JOB.npz RESULT.npz`.

It stands alone, for that Python need not have stemtune. `peers.py` writes the job and reads the result.

The job holds the crystal (`fractional` (N, 3), `numbers` (N,), `cell` (6,)), `scale` (1/Å per pixel), `kv`, `step_deg`,
and for each set patterns `set0` (n, size, size) and their true beams, `set0/count` (n,) and `set0/beams` (sum, 3):
x, y in 1/Å (y up), intensity. The result holds for each set `set0/found/matrix` (n, 3, 3), the answers to the peaks
that py4DSTEM finds in the patterns, and `set0/true/matrix`, the answers to the true beams; all zero where there is
none. The columns of a matrix are the lab axes in crystal coordinates. `set0/found/seconds` counts the finding of peaks
too.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

SPOT_PX = 1.0  # sigma of the spots that peaks are looked for with
LEAST = (
    0.15  # height of the weakest peak: about two electrons on one spot, best of 0.1 to 0.6 on other patterns (seed 7)
)
SPACING_PX = 4


def plan(job: Any, reach: float) -> Any:
    """Return the crystal with its orientation plan, over the sector that py4DSTEM itself chooses for -3m."""
    from py4DSTEM.process.diffraction import Crystal

    crystal = Crystal(positions=job["fractional"], numbers=job["numbers"], cell=job["cell"])
    crystal.calculate_structure_factors(reach)
    step = float(job["step_deg"])
    crystal.orientation_plan(
        zone_axis_range="fiber",
        fiber_axis=[0, 0, 1],
        fiber_angles=[90, 60],
        angle_step_zone_axis=step,
        angle_step_in_plane=step,
        accel_voltage=1e3 * float(job["kv"]),
        progress_bar=False,
    )
    return crystal


def peaks(pattern: np.ndarray, scale: float) -> np.ndarray:
    """Return the peaks (k, 3) of a pattern, found by py4DSTEM: x, y in 1/Å (y up), intensity."""
    from py4DSTEM.braggvectors.diskdetection import find_Bragg_disks

    axis = np.arange(len(pattern))
    axis = np.minimum(axis, len(pattern) - axis)  # the kernel's middle stands in the corner
    spot = np.exp(-0.5 * (axis / SPOT_PX) ** 2)
    kernel = np.outer(spot, spot) / np.outer(spot, spot).sum()
    found = find_Bragg_disks(
        pattern,
        kernel,
        corrPower=1,
        sigma_cc=0,
        subpixel="poly",
        minAbsoluteIntensity=LEAST,
        minRelativeIntensity=0,
        minPeakSpacing=SPACING_PX,
        edgeBoundary=2,
        maxNumPeaks=200,
    ).data
    middle = (len(pattern) - 1) / 2
    return np.stack(((found["qy"] - middle) * scale, (middle - found["qx"]) * scale, found["intensity"]), axis=1)


def match(crystal: Any, spots: np.ndarray) -> np.ndarray:
    """Return the orientation matrix (3, 3) of a list of peaks (k, 3); zero where there is no answer."""
    from emdfile import PointList

    table = np.zeros(len(spots), dtype=[("qx", float), ("qy", float), ("intensity", float)])
    table["qx"], table["qy"], table["intensity"] = spots.T
    found: np.ndarray = crystal.match_single_pattern(PointList(data=table)).matrix[0]
    return found


def main(job_path: str, result_path: str) -> None:
    """Match every set of the job and write the result."""
    result: dict[str, Any] = {}
    with np.load(job_path) as job:
        scale = float(job["scale"])
        names = sorted((name for name in job.files if name[3:].isdigit()), key=lambda name: int(name[3:]))
        crystal = plan(job, job[names[0]].shape[-1] / 2 * scale)
        for number, name in enumerate(names):
            beams = np.split(job[f"{name}/beams"], np.cumsum(job[f"{name}/count"])[:-1])
            print(f"py4DSTEM: set {number + 1} of {len(names)}", file=sys.stderr, flush=True)
            began = time.perf_counter()
            found = [match(crystal, peaks(pattern.astype(np.float64), scale)) for pattern in job[name]]
            between = time.perf_counter()
            right = [match(crystal, beam) for beam in beams]
            for kind, matrix, seconds in (
                ("found", found, between - began),
                ("true", right, time.perf_counter() - between),
            ):
                result[f"{name}/{kind}/matrix"] = np.array(matrix)
                result[f"{name}/{kind}/seconds"] = seconds
    np.savez_compressed(result_path, **result)


if __name__ == "__main__":
    main(*sys.argv[1:])
