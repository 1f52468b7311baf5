"""Stores of diffracted beams: what Bloch waves cost, kept once, before a detector makes patterns of it.

The waves take milliseconds, the detector a fraction of one. So for every orientation the beams are kept (reflection,
and intensity at several thicknesses and under several tilts of the beam), and `fresh_patterns` draws from them as many
patterns as are wanted, each with a turn, a dose, an error of the centre and so on of its own.

Shape legend: n orientations, M beams of all together, T thicknesses, G tilt groups (a precession and a convergence
angle each), R reflections.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import sys
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch

from stemtune._files import existing, replaceable_file, whole_file
from stemtune._parallel import Spread, map_over_processes
from stemtune._progress import Progress
from stemtune._version import __version__
from stemtune.config import SimulateConfig, Span
from stemtune.crystal.phase import Phase, phase_from
from stemtune.crystal.sampling import random_orientations
from stemtune.dataset.schema import SIMULATED, attribute_form, disk_is_full, open_hdf5, plain, set_attribute
from stemtune.dataset.simulate import chosen_device, seeded_generator
from stemtune.diffraction.bloch import FAINTEST, BlochSimulator
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import reach_of
from stemtune.errors import Interrupted, UserError

SCHEMA = 1  # version of the layout of a beam store
BLOCK = 256  # orientations that are simulated and written at once
SCALE = 2.0**12  # intensities are kept as float16 of this times the share of the incident beam
_COLUMNS = ("orientation", "thickness_nm", "precession_deg", "convergence_mrad", "direct_beam")
_RANGES = ("thickness", "precession", "convergence")
_SETTINGS = "settings.json"


class BeamStore:
    """A store of beams, opened for reading; use `BeamStore.open`.

    `orientation` (n, 4) float64, lab-to-crystal; `thickness_nm` (n, T), `precession_deg` and `convergence_mrad` (n, G),
    and `direct_beam` (n, G, T), the direct beam's share of what is scattered elastically, float32. Beams `first[i]` to
    before `first[i + 1]` are those of orientation i: `reflection` (M,), rows of `hkl` (R, 3), and `intensity` (M, G, T)
    float16, `SCALE` times the share of the incident beam. The large arrays are memory-mapped.
    """

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self.attrs: dict[str, Any] = {name: plain(value) for name, value in file.attrs.items()}
        for name in (*_COLUMNS, "first", "hkl"):
            setattr(self, name, file[name][()])
        self.n, self.kv, self.reach = len(self.orientation), float(self.attrs["kv"]), float(self.attrs["reach"])
        with path.open("rb") as raw:
            whole = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
        self.reflection, self.intensity = (_mapped(file[name], whole) for name in ("reflection", "intensity"))

    orientation: npt.NDArray[np.float64]
    thickness_nm: npt.NDArray[np.float32]
    precession_deg: npt.NDArray[np.float32]
    convergence_mrad: npt.NDArray[np.float32]
    direct_beam: npt.NDArray[np.float32]
    first: npt.NDArray[np.int64]
    hkl: npt.NDArray[np.int16]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> BeamStore:
        """Open the store of beams at `path`; a `UserError` says that it is absent, damaged, or another kind of file."""
        found = existing(path, "the store of beams")
        with open_hdf5(found) as file:
            missing = [name for name in (*_COLUMNS, "first", "hkl", "reflection", "intensity") if name not in file]
            if missing:
                raise UserError(
                    f"'{path}' is not a store of beams ({missing[0]} is missing); `stemtune simulate --beams` makes one"
                )
            if plain(file.attrs.get("schema")) != SCHEMA:
                raise UserError(f"'{path}' was written by a later stemtune; update this one, or simulate it again")
            return cls(found, file)

    @cached_property
    def phase(self) -> Phase:
        """The crystal."""
        return Phase.from_cif_text(str(self.attrs["phase_cif"]), f"the CIF in '{self.path}'")

    @property
    def sha256(self) -> str:
        """Hash of all arrays and of the crystal."""
        return str(self.attrs["content_sha256"])

    def span(self, name: str) -> Span:
        """Return the range of `simulate.thickness`, `.precession` or `.convergence` that was stored, by its name."""
        low, high = (float(end) for end in self.attrs[name])
        return Span(low, high)

    def __len__(self) -> int:
        return self.n

    def __str__(self) -> str:
        groups, thicknesses = self.intensity.shape[1:]
        return f"a store of beams of {self.n:,} orientations, {thicknesses} thicknesses x {groups} tilt groups each"

    def describe(self) -> tuple[str, dict[str, str]]:
        """Return a title, and what the store holds by topic, for people."""
        ranges = (("thickness", "nm"), ("precession", "deg"), ("convergence", "mrad"))
        facts = {
            "phase": str(self.phase),
            "beams": f"{len(self.reflection):,}, {len(self.reflection) / self.n:.0f} per orientation, up to "
            f"{self.reach:.3g} 1/Å, at {self.kv:g} kV",
            "ranges": ", ".join(f"{name} {self.span(name)} {unit}" for name, unit in ranges),
            "options": ", ".join(f"{key} {value}" for key, value in json.loads(self.attrs["options"]).items()),
            "content": f"sha256 {self.sha256[:16]}, written by stemtune {self.attrs.get('stemtune_version', '?')}",
            "next": f"training draws patterns from it: data.source=beams, data.store={self.path}",
        }
        return str(self), facts


def _mapped(data: h5py.Dataset, whole: mmap.mmap) -> npt.NDArray[Any]:
    offset = data.id.get_offset()
    if offset is None:  # somebody else's copy, in chunks
        return np.asarray(data[()])
    return np.frombuffer(whole, data.dtype, data.size, offset).reshape(data.shape)


def simulate_beams(
    cif: str | os.PathLike[str],
    out: str | os.PathLike[str],
    orientations: int,
    simulate: SimulateConfig,
    thicknesses: int = 6,
    tilt_groups: int = 2,
    seed: int = 0,
    workers: int = 1,
    device: str = "cpu",
    restart: bool = False,
    spread: Spread | None = None,
) -> Path:
    """Write a store of the dynamical beams of random orientations, or resume an unfinished one.

    Parameters are those of `simulate_store`, and: `thicknesses` and `tilt_groups`, how many values of
    `simulate.thickness`, and pairs of `simulate.precession` and `simulate.convergence`, each orientation gets. They are
    drawn at random, one from each of so many equal parts of the range; an average over a tilt group takes
    `simulate.tilts` directions of the beam.

    Blocks that are done lie in the folder `OUT.part` until the store is complete; the same call resumes, and
    `Interrupted` after Ctrl-C says so. A `UserError` is for what cannot be simulated or written, and for an unfinished
    store that was made with other settings.
    """
    for name, value in (("orientations", orientations), ("thicknesses", thicknesses), ("tilt groups", tilt_groups)):
        if value < 1:
            raise UserError(f"{value} {name} are asked for, but it must be at least 1")
    phase, geometry = phase_from(cif), Geometry.of(simulate)
    device = device if spread else chosen_device(device)
    simulator = BlochSimulator(phase, geometry, simulate, "cpu" if spread else device)
    options = {"cif": str(cif), "orientations": orientations, "thicknesses": thicknesses, "tilt_groups": tilt_groups}
    options |= {"seed": seed, "device": device}
    options |= {f"simulate.{name}": attribute_form(_plain(value)) for name, value in vars(simulate).items()}
    target = replaceable_file(_replaceable(out))
    part = _unfinished(target, {**options, "phase_cif": phase.cif}, restart)
    spread = spread or map_over_processes(workers if device == "cpu" else 1)
    given = ((phase.cif, simulate, device), seed, orientations, thicknesses, tilt_groups)
    try:
        _fill(part, spread, given)
        _assemble(part, target, simulator, options)
    except OSError as problem:
        if not disk_is_full(problem):
            raise
        raise UserError(
            f"the disk is full; what is done of '{target}' is kept: make room, then repeat the command"
        ) from None
    except KeyboardInterrupt:
        kept = BLOCK * len(list(part.glob("*.npz")))
        if not kept:
            raise
        raise Interrupted(
            f"interrupted; {min(kept, orientations):,} of {orientations:,} orientations are kept in '{part}', and the "
            "same command goes on from there"
        ) from None
    shutil.rmtree(part)
    return target


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Span) else value


def _replaceable(out: str | os.PathLike[str]) -> Path:
    """Return `out` if a store of beams may be written there: nothing is, or such a store."""
    target = Path(out).expanduser()
    if target.is_file() and target.stat().st_size:
        try:
            BeamStore.open(target)
        except UserError:
            raise UserError(
                f"the file '{out}' is no store of beams, so it is not replaced; choose another --out or remove it"
            ) from None
    return target


def _unfinished(target: Path, settings: dict[str, Any], restart: bool) -> Path:
    """Return the folder of finished blocks; a `UserError` says that one of other settings is there."""
    part, text = target.with_name(target.name + ".part"), json.dumps(settings, indent=1)
    if part.exists() and not (part.is_dir() and (part / _SETTINGS).is_file()):
        raise UserError(f"'{part}' is no unfinished store of beams; remove it, or choose another --out")
    if restart and part.exists():
        shutil.rmtree(part)
    if part.exists():
        before = json.loads((part / _SETTINGS).read_text())
        for name, value in settings.items():
            if before.get(name) != value:
                was = f"`{name}` is {before.get(name)} there and {value} here"
                was = "another crystal" if name == "phase_cif" else was
                raise UserError(
                    f"'{part}' was begun with other settings ({was}); repeat its command to resume it, give --restart "
                    "to begin anew, or choose another --out"
                )
        return part
    part.mkdir(parents=True)
    with whole_file(part / _SETTINGS) as new:
        new.write_text(text)
    return part


def _fill(part: Path, spread: Spread, given: tuple[Any, ...]) -> None:
    """Simulate the blocks that are not there yet; show rate and time left."""
    total = given[2]
    numbers = [number for number in range(-(-total // BLOCK)) if not (part / f"{number:06d}.npz").is_file()]
    done = total - sum(min(BLOCK, total - number * BLOCK) for number in numbers)
    if done:
        print(f"resuming '{part}': {done:,} of {total:,} orientations are there", file=sys.stderr)
    with (
        closing(spread(_prepare, given, _block, numbers)) as blocks,
        Progress(total, "simulate", "orientation", done) as progress,
    ):
        for number, block in zip(numbers, blocks, strict=True):
            with whole_file(part / f"{number:06d}.npz") as new, new.open("wb") as raw:
                np.savez(raw, **block)
            progress.update(len(block["orientation"]))


def _prepare(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what a worker needs: its simulator, made from (cif, simulate, device), and the rest of what is given."""
    cif, simulate, device = given[0]
    return (BlochSimulator(Phase.from_cif_text(cif), Geometry.of(simulate), simulate, device), *given[1:])


def _block(state: tuple[Any, ...], number: int) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of block `number`; `length` is the number of beams of each orientation."""
    simulator: BlochSimulator
    simulator, seed, total, thicknesses, groups = state
    count, generator = min(BLOCK, total - number * BLOCK), seeded_generator(seed, number)
    settings = simulator.simulate
    # Orientations, and stratified values of what the beams depend on.
    orientation = random_orientations(count, generator)
    thickness_BT = _stratified(settings.thickness, count, thicknesses, generator)
    precession_BG = _stratified(settings.precession, count, groups, generator)
    convergence_BG = _stratified(settings.convergence, count, groups, generator)
    found = simulator.beams(orientation, thickness_BT, precession_BG, convergence_BG)
    # The direct beam's share, and the beams that the kinematic list would have too, in order of strength.
    intensity_BNGT = found.intensity.permute(0, 3, 2, 1).cpu()
    direct_BGT = intensity_BNGT[:, 0] / intensity_BNGT.sum(1)
    kept_BN = (intensity_BNGT[:, 1:] > FAINTEST).flatten(2).any(2)
    return {
        "orientation": orientation.numpy(),
        "thickness_nm": thickness_BT.numpy().astype(np.float32),
        "precession_deg": precession_BG.numpy().astype(np.float32),
        "convergence_mrad": convergence_BG.numpy().astype(np.float32),
        "direct_beam": direct_BGT.numpy().astype(np.float32),
        "length": kept_BN.sum(1).numpy().astype(np.int64),
        "reflection": found.reflection[:, 1:].cpu()[kept_BN].numpy().astype(_row_type(simulator)),
        "intensity": (intensity_BNGT[:, 1:][kept_BN] * SCALE).numpy().astype(np.float16),
    }


def _row_type(simulator: BlochSimulator) -> type[np.unsignedinteger[Any]]:
    """Return what holds the number of every reflection: large cells have more than 65,536 within reach."""
    return np.uint16 if len(simulator.hkl) <= 2**16 else np.uint32


def _stratified(span: Span, count: int, parts: int, generator: torch.Generator) -> torch.Tensor:
    """Return (count, parts) values: one from each of `parts` equal parts of the range, in random order."""
    order = torch.rand(count, parts, generator=generator).argsort(dim=1)
    place = (order + torch.rand(count, parts, generator=generator)) / parts
    return span.low + (span.high - span.low) * place


def _assemble(part: Path, target: Path, simulator: BlochSimulator, options: dict[str, Any]) -> None:
    """Write the store from its blocks."""
    files = sorted(part.glob("*.npz"))
    lengths = []
    for file in files:
        with np.load(file) as block:
            lengths.append(block["length"])
    first = np.concatenate(([0], np.cumsum(np.concatenate(lengths))))
    digest, shape = hashlib.sha256(), (options["tilt_groups"], options["thicknesses"])
    with whole_file(target) as new, h5py.File(new, "w") as store:
        store["first"], store["hkl"] = first, simulator.hkl.numpy().astype(np.int16)
        beams = {
            "reflection": store.create_dataset("reflection", (int(first[-1]),), _row_type(simulator)),
            "intensity": store.create_dataset("intensity", (int(first[-1]), *shape), np.float16),
        }
        columns: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in _COLUMNS}
        at = 0
        for file in files:
            with np.load(file) as block:
                for name, values in columns.items():
                    values.append(block[name])
                for name, data in beams.items():
                    data[at : at + len(block[name])] = block[name]
                    digest.update(block[name].tobytes())
                at += len(block["reflection"])
        for name, values in columns.items():
            store[name] = np.concatenate(values)
            digest.update(store[name][()].tobytes())
        digest.update(simulator.phase.cif.encode())
        settings = simulator.simulate
        attrs: dict[str, Any] = {name: [getattr(settings, name).low, getattr(settings, name).high] for name in _RANGES}
        attrs |= {"schema": SCHEMA, "origin": SIMULATED, "stemtune_version": __version__, "options": options}
        attrs |= {"phase_cif": simulator.phase.cif, "phase_name": simulator.phase.name, "kv": simulator.geometry.kv}
        attrs |= {"reach": reach_of(simulator.geometry, settings), "content_sha256": digest.hexdigest()}
        for name, value in attrs.items():
            set_attribute(store, name, value)
