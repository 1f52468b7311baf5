"""The patterns of `python -m benchmarks accuracy`: LiNiO2 at 200 kV, beams of known physics drawn as pictures.

Dynamical beams come from two programs: our own Bloch waves, and py4DSTEM's, which ship with the package (200 patterns,
made by `tests/oracles/bloch_py4dstem.py`). Kinematic beams come from our own simulator and from diffsims. One
renderer, in numpy, draws them all: Gaussian spots, counted electrons, an error of centre and scale that no reader
knows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tempfile
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from stemtune._files import whole_file
from stemtune.config import Config, SimulateConfig
from stemtune.crystal.phase import DEFAULT_U_ISO, Phase, linio2
from stemtune.dataset.store import StoreWriter
from stemtune.diffraction.geometry import Geometry

Floats = npt.NDArray[np.float64]

GEOMETRY = Geometry(128, 0.025, 200.0)
"""Size, 1/Å per pixel and kV of every pattern."""

SEED = 2024
"""The default seed; its orientations and thicknesses are those of the patterns from py4DSTEM."""

THICKNESS_NM = (20.0, 80.0)
NOISE_FREE_COUNTS = 3000
"""What the expected counts of a pattern without noise sum up to."""

PRECESSIONS_DEG = (0.0, 0.5)

_SPOT_PX = 1.0  # Gaussian sigma of a drawn spot
_DRAWN = 200  # orientations are drawn as many at a time, so that fewer patterns are the first ones of more
_DIRECT = 0.5  # share of the direct beam in kinematic patterns, whose theory has none
_STEP = 100  # patterns simulated between two lines of progress
_FIFTH_ZERO = 5  # diffsims' sin2c puts its fifth zero at the width it is given


class Beams(NamedTuple):
    """What n crystals diffract.

    `orientation` (n, 4) float64, lab-to-crystal; `thickness_nm` (n,) float32; `beams`, n arrays (k, 3) of x and y in
    1/Å (y up) and intensity, the direct beam among them.
    """

    orientation: Floats
    thickness_nm: npt.NDArray[np.float32]
    beams: list[Floats]

    def first(self, n: int) -> Beams:
        """Return the first `n` patterns."""
        return Beams(self.orientation[:n], self.thickness_nm[:n], self.beams[:n])


@dataclasses.dataclass(frozen=True)
class Condition:
    """How patterns are taken.

    Parameters
    ----------
    precession_deg
        Semi-angle of precession.
    electrons
        Dose per pattern, the direct beam included; 0 is noise-free.
    centre_px
        How far off the middle the direct beam stands, in a random direction.
    scale_error
        Relative error of the scale, in either sense.
    """

    precession_deg: float = 0.0
    electrons: int = 3000
    centre_px: float = 0.0
    scale_error: float = 0.0

    @property
    def name(self) -> str:
        """A name for files and JSON, `p0.5-e3000-c1-s1` for instance."""
        return f"p{self.precession_deg:g}-e{self.electrons}-c{self.centre_px:g}-s{100 * self.scale_error:g}"

    @property
    def ideal(self) -> bool:
        """Whether centre and scale are right."""
        return self.centre_px == 0 and self.scale_error == 0


CONDITIONS = tuple(Condition(*values) for values in product(PRECESSIONS_DEG, (3000, 0), (0.0, 1.0), (0.0, 0.01)))
"""Every combination that is scored."""


def draw(n: int, seed: int = SEED) -> tuple[Floats, npt.NDArray[np.float32]]:
    """Return `n` uniformly random orientations (n, 4) and thicknesses (n,) in nm, as `bloch_py4dstem.py` draws them."""
    rng = np.random.default_rng(seed)
    count = max(n, _DRAWN)
    orientation = rng.normal(size=(count, 4))
    orientation /= np.linalg.norm(orientation, axis=1, keepdims=True)
    return orientation[:n], rng.uniform(*THICKNESS_NM, count).astype(np.float32)[:n]


def read(path: Path | Any) -> Beams:
    """Read a file of beams; `tests/oracles/bloch_py4dstem.py` says what it holds."""
    with path.open("rb") as opened, np.load(opened) as stored:
        columns = np.stack([stored["x"], stored["y"], stored["intensity"]], axis=1).astype(np.float64)
        beams = np.split(columns, np.cumsum(stored["count"])[:-1])
        return Beams(stored["orientation"], stored["thickness_nm"], beams)


def py4dstem(precession_deg: float) -> Beams:
    """Return the 200 patterns of py4DSTEM's Bloch waves without precession, or with 0.5 degrees of it."""
    name = f"bloch_linio2_p{precession_deg:g}.npz".replace("0.5", "05")
    return read(resources.files("benchmarks").joinpath(name))


def bloch(
    orientation: Floats, thickness_nm: npt.NDArray[np.float32], precession_deg: float, folder: Path
) -> tuple[Beams, Path, bool]:
    """Return our own Bloch-wave patterns, from `folder` if they were built before, with the file and whether it is new.

    The file's name holds a digest of orientations, thicknesses and every setting of the simulation.
    """
    simulate = Config.from_flat({"simulate.physics": "bloch", "simulate.size": GEOMETRY.size}).simulate
    settings = json.dumps([dataclasses.asdict(simulate), GEOMETRY.to_dict(), linio2().cif, precession_deg])
    digest = hashlib.sha256(settings.encode())
    for part in (orientation, thickness_nm):
        digest.update(np.ascontiguousarray(part).tobytes())
    path = folder / f"bloch_linio2_p{precession_deg:g}_n{len(orientation)}_{digest.hexdigest()[:10]}.npz"
    if path.is_file():
        return read(path), path, False
    beams = simulate_bloch(simulate, orientation, thickness_nm, precession_deg)
    columns = np.concatenate(beams).astype(np.float32)
    with whole_file(path) as part_path:
        np.savez_compressed(
            part_path,
            orientation=orientation,
            thickness_nm=thickness_nm,
            count=np.array([len(each) for each in beams], dtype=np.int32),
            x=columns[:, 0],
            y=columns[:, 1],
            intensity=columns[:, 2],
            settings=settings,
        )
    return read(path), path, True


def simulate_bloch(
    simulate: SimulateConfig,
    orientation: Floats,
    thickness_nm: npt.NDArray[np.float32],
    precession_deg: float,
    phase: Phase | None = None,
) -> list[Floats]:
    """Return the beams of our own Bloch waves, an array (k, 3) for each orientation; of LiNiO2 if nothing is said."""
    from stemtune._progress import Progress
    from stemtune.diffraction.bloch import BlochSimulator

    simulator = BlochSimulator(phase or linio2(), GEOMETRY, simulate)
    beams: list[Floats] = []
    with Progress(len(orientation), f"Bloch {precession_deg:g}°", "pattern") as bar:
        for start in range(0, len(orientation), _STEP):
            rows = slice(start, start + _STEP)
            thickness = torch.from_numpy(thickness_nm[rows])[:, None]
            made = simulator.beams(torch.from_numpy(orientation[rows]), thickness, precession_deg)
            table = torch.stack((made.x, made.y, made.intensity[:, 0]), dim=-1).double().numpy()
            beams.extend(each[each[:, 2] > 0] for each in table)
            bar.update(len(table))
    return beams


def kinematic(orientation: Floats, thickness_nm: npt.NDArray[np.float32]) -> Beams:
    """Return our own kinematic patterns, the shape factor that of the thickness; the direct beam is half of each."""
    from stemtune.diffraction.kinematic import KinematicSimulator

    simulator = KinematicSimulator(linio2(), GEOMETRY, SimulateConfig())
    spots = simulator.spots(torch.from_numpy(orientation), torch.from_numpy(thickness_nm.astype(np.float64)))
    table = torch.stack(spots[:3], dim=-1).numpy()
    return Beams(orientation, thickness_nm, [_with_direct(each[each[:, 2] > 0]) for each in table])


def diffsims(orientation: Floats, thickness_nm: npt.NDArray[np.float32], phase: Phase | None = None) -> Beams:
    """Return the same patterns as `kinematic` from diffsims' `SimulationGenerator`; of LiNiO2 by default."""
    from diffsims.generators.simulation_generator import SimulationGenerator
    from orix.crystal_map import Phase as OrixPhase
    from orix.quaternion import Rotation

    crystal = phase or linio2()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "phase.cif"
        path.write_text(crystal.cif, encoding="utf-8")
        theirs = OrixPhase.from_cif(path)
    theirs.expand_asymmetric_unit()  # or most of the intensity goes to forbidden reflections
    generator = SimulationGenerator(accelerating_voltage=GEOMETRY.kv, shape_factor_model="sin2c")
    beams = []
    for g, thickness in zip(orientation, thickness_nm, strict=True):
        vectors = generator.calculate_diffraction2d(
            theirs,
            Rotation(g),
            reciprocal_radius=GEOMETRY.corner_inv_angstrom,
            with_direct_beam=False,
            max_excitation_error=0.3,
            shape_factor_width=_FIFTH_ZERO / (10 * float(thickness)),
            debye_waller_factors=dict.fromkeys(set(crystal.elements), 8 * math.pi**2 * DEFAULT_U_ISO),
        ).coordinates
        beams.append(_with_direct(np.column_stack((np.asarray(vectors.data)[:, :2], vectors.intensity))))
    return Beams(orientation, thickness_nm, beams)


def _with_direct(diffracted: Floats) -> Floats:
    """Return the beams that reach the detector (k, 3), with a direct beam that is `_DIRECT` of all of them."""
    shown = diffracted[np.abs(diffracted[:, :2]).max(axis=1) < GEOMETRY.radius_inv_angstrom]
    direct = np.array([[0.0, 0.0, shown[:, 2].sum() * _DIRECT / (1 - _DIRECT)]])
    return np.concatenate((direct, shown))


def pictures(beams: Beams, condition: Condition, seed: int = 0) -> npt.NDArray[Any]:
    """Return patterns (n, 128, 128) of Gaussian spots: uint16 counts, or float32 expected counts where noise-free.

    Parameters
    ----------
    beams
        What is diffracted; the precession is already in it.
    condition
        Dose, which includes the direct beam, and errors of centre and scale.
    seed
        Of the counting and of the errors.
    """
    errors = np.random.default_rng((seed, 1))
    azimuth = errors.uniform(0, 2 * np.pi, len(beams.beams))
    stretch = 1 + condition.scale_error * errors.choice((-1.0, 1.0), len(beams.beams))
    axis = np.arange(GEOMETRY.size) - (GEOMETRY.size - 1) / 2
    drawn = np.empty((len(beams.beams), GEOMETRY.size, GEOMETRY.size))
    for picture, beam, angle, factor in zip(drawn, beams.beams, azimuth, stretch, strict=True):
        place = beam[:, :2] * factor / GEOMETRY.scale_inv_angstrom
        place = place + condition.centre_px * np.array([np.cos(angle), np.sin(angle)])
        across = np.exp(-0.5 * ((axis - place[:, :1]) / _SPOT_PX) ** 2)
        down = np.exp(-0.5 * ((-axis - place[:, 1:]) / _SPOT_PX) ** 2)
        picture[:] = np.einsum("k,ki,kj->ij", beam[:, 2], down, across)
    drawn *= (condition.electrons or NOISE_FREE_COUNTS) / drawn.sum(axis=(1, 2), keepdims=True)
    if not condition.electrons:
        return drawn.astype(np.float32)
    return np.random.default_rng(seed).poisson(drawn).astype(np.uint16)


def write_store(path: Path, patterns: npt.NDArray[Any], beams: Beams, phase: Phase | None = None) -> Path:
    """Write patterns and their true orientations as a store, for whatever reads stores."""
    n = len(patterns)
    crystal = phase or linio2()
    with StoreWriter(path, n, GEOMETRY, [crystal], str(patterns.dtype), {"origin": "benchmarks"}) as out:
        out.write(0, patterns, orientation=beams.orientation, confidence=np.ones(n), phase=np.zeros(n))
    return path
