"""Other programs on our patterns: each runs in a Python that has it, as a script of its own, through files.

pyxem and py4DSTEM need not share an environment with stemtune, nor with each other: py4DSTEM 0.14 wants an older numpy.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.testset import GEOMETRY, Beams
from stemtune.crystal.phase import Phase, linio2
from stemtune.crystal.rotations import from_axis_angle_deg, from_matrix, multiply, normalise
from stemtune.errors import UserError

STEP_DEG = 2.0
"""Spacing of the peers' templates."""

POWERS = ((0.25, 0.25), (0.25, 1.0), (0.5, 1.0))
"""Powers that patterns and templates are raised to before pyxem matches them; its manual raises only patterns."""

_NUMBERS = {"Li": 3, "O": 8, "Ni": 28}


class Peer(NamedTuple):
    """Another program: the name of its module, and the script that calls it."""

    name: str
    script: str


PYXEM = Peer("pyxem", "peer_pyxem.py")
PY4DSTEM = Peer("py4DSTEM", "peer_py4dstem.py")


class Answers(NamedTuple):
    """One method's answers to one set: orientations (n, 4), NaN where it has none, and patterns per second."""

    set_number: int
    method: str
    orientation: Tensor
    patterns_per_s: float


def find(peer: Peer, pythons: Sequence[str]) -> tuple[str, str] | None:
    """Return the first of `pythons`, or else the one that runs, that has the peer; and the peer's version.

    Raises
    ------
    UserError
        When one of `pythons` cannot be run.
    """
    module = repr(peer.name)
    ask = f"import importlib.util as u, importlib.metadata as m; print(u.find_spec({module}) and m.version({module}))"
    for python in (*pythons, sys.executable):
        try:
            answer = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True, timeout=120)
        except (OSError, subprocess.SubprocessError):
            raise UserError(f"--peer-python {python}: this is no Python that can be run; give its path") from None
        version = answer.stdout.strip()
        if version != "None":
            return python, version
    return None


def run_pyxem(
    python: str,
    version: str,
    sets: Sequence[tuple[npt.NDArray[Any], Beams]],
    folder: Path,
    phase: Phase | None = None,
) -> Iterator[Answers]:
    """Yield what pyxem answers to each set (patterns, beams), its columns rightly converted, and as it ships.

    The crystal is LiNiO2 by default.
    """
    job: dict[str, Any] = {f"set{number}": patterns for number, (patterns, _) in enumerate(sets)}
    result = _call(PYXEM, python, folder, job | {"cif": (phase or linio2()).cif, "powers": np.array(POWERS)})
    for number, (patterns, _) in enumerate(sets):
        for row, (gamma, of_templates) in enumerate(POWERS):
            key, method = f"set{number}/{row}", f"pyxem {version}, gamma {gamma:g}"
            if of_templates != 1:
                method += f", templates {of_templates:g}"
            rate = len(patterns) / float(result[f"{key}/seconds"])
            converted = from_pyxem_columns(torch.from_numpy(result["grid"]), torch.from_numpy(result[f"{key}/raw"]))
            yield Answers(number, method, converted, rate)
            shipped = from_pyxem_shipped(torch.from_numpy(result[f"{key}/shipped"]))
            yield Answers(number, f"{method}, as shipped", shipped, rate)


def run_py4dstem(
    python: str, version: str, sets: Sequence[tuple[npt.NDArray[Any], Beams]], folder: Path
) -> Iterator[Answers]:
    """Yield what py4DSTEM's ACOM answers to each set: to the peaks that it finds, and to the true beams."""
    phase = linio2()
    lattice = phase.lattice
    job: dict[str, Any] = {
        "fractional": np.asarray(phase.fractional),
        "numbers": np.array([_NUMBERS[element] for element in phase.elements]),
        "cell": np.array([lattice.a, lattice.b, lattice.c, lattice.alpha, lattice.beta, lattice.gamma]),
    }
    for number, (patterns, beams) in enumerate(sets):
        job[f"set{number}"] = patterns
        job[f"set{number}/beams"] = np.concatenate(beams.beams)
        job[f"set{number}/count"] = np.array([len(each) for each in beams.beams])
    result = _call(PY4DSTEM, python, folder, job)
    for number, (patterns, _) in enumerate(sets):
        for kind, suffix in (("found", ""), ("true", ", true beams")):
            key = f"set{number}/{kind}"
            rate = len(patterns) / float(result[f"{key}/seconds"])
            orientation = from_py4dstem_matrix(torch.from_numpy(result[f"{key}/matrix"]))
            yield Answers(number, f"py4DSTEM {version} ACOM{suffix}", orientation, rate)


def from_pyxem_columns(grid: Tensor, columns: Tensor) -> Tensor:
    """Return the orientations (n, 4), lab-to-crystal, that pyxem 0.21 found, from its raw columns.

    pyxem's polar angle is that of x to the right and y up, and its in-plane angle is counted from -180 degrees. A
    template matched as it is stands for `grid * Rz(-angle) * Rz(180)`. A template matched by its mirror image (y turned
    over, the same side of the Ewald sphere) is that of the centrosymmetric crystal turned by 180 degrees about y, and
    stands for `grid * Rz(angle) * R180[100]`. pyxem's own `OrientationMap.to_rotation` does neither in -3m.

    Parameters
    ----------
    grid
        Quaternions (N, 4) of the templates.
    columns
        (n, 4): template, correlation, in-plane angle in degrees, mirror (+1 or -1).
    """
    index, _, angle, mirror = columns.double().unbind(-1)
    axis = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    plain, mirrored = torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    turned = multiply(grid.double()[index.long()], from_axis_angle_deg(axis, -mirror * angle))
    return multiply(turned, torch.where(mirror[:, None] > 0, plain, mirrored))


def from_pyxem_shipped(rotations: Tensor) -> Tensor:
    """Return what pyxem's own `to_rotation` says, (n, 4), in our frame: half a turn about the beam from its own.

    The half turn is the one constant turn with which the answers of templates matched as they are come out right; with
    none are those of mirrored templates right in -3m.
    """
    half = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    return multiply(normalise(rotations.double()), half)


def from_py4dstem_matrix(matrix: Tensor) -> Tensor:
    """Return the orientations (n, 4) of py4DSTEM's matrices (n, 3, 3), whose columns are the lab axes; NaN for zero."""
    known = matrix.double().abs().amax((1, 2)) > 0
    safe = torch.where(known[:, None, None], matrix.double(), torch.eye(3, dtype=torch.float64))
    return torch.where(known[:, None], from_matrix(safe), torch.nan)


def _call(peer: Peer, python: str, folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Run the peer's script on `job` and return what it answers."""
    asked, answered, log = (folder / f"{peer.name}-{what}" for what in ("job.npz", "result.npz", "log.txt"))
    arrays = {"scale": GEOMETRY.scale_inv_angstrom, "kv": GEOMETRY.kv, "step_deg": STEP_DEG, **job}
    np.savez(asked, **arrays)
    script = Path(__file__).with_name(peer.script)
    with log.open("w") as out:
        command = [python, "-W", "ignore", str(script), str(asked), str(answered)]
        done = subprocess.run(command, stdout=out, check=False)  # its progress goes where ours does
    if done.returncode or not answered.is_file():
        raise UserError(f"{peer.name} failed in {python} (see above); leave that --peer-python out, or repair it")
    with np.load(answered) as result:
        return {name: result[name] for name in result.files}
