"""The functions that a notebook needs, under names that stay: what `import stemtune` offers.

Each is the command of the same name with Python values instead of text. Whatever cannot be used raises
`stemtune.UserError`, whose message says what to change. Heavy libraries are imported when a function is called.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stemtune.config import Scalar
    from stemtune.crystal_map.orientation_map import OrientationMap
    from stemtune.dataset.beam_store import BeamStore
    from stemtune.dataset.store import Store
    from stemtune.learning.model import OrientationModel
    from stemtune.scan.readers import Scan
    from stemtune.tune.run.sweep import SweepOutcome

    Place = str | os.PathLike[str]


def simulate(
    cif: Place,
    out: Place,
    patterns: int = 10_000,
    *,
    scan: tuple[int, int] | None = None,
    grains: int = 12,
    dynamical: bool = False,
    beam_store: bool = False,
    seed: int = 0,
    workers: int = 1,
    **microscope: Scalar | tuple[float, float],
) -> Store | BeamStore:
    """Simulate diffraction patterns of known orientation and return the store that holds them.

    Parameters
    ----------
    cif
        The crystal: a CIF file, or "linio2", which ships with stemtune.
    out
        The store to write (HDF5). An unfinished one of the same settings is resumed.
    patterns
        How many, at uniformly random orientations.
    scan, grains
        Instead of `patterns`: rows and columns of a scan over a polycrystal of `grains` grains.
    dynamical, beam_store
        Bloch waves instead of kinematic intensities, and kept as beams, for training with `data.source: beams`.
    seed, workers
        The same seed gives the same store; `workers` are processes.
    **microscope
        Any setting `simulate.*` by its own name, a pair to draw from for every pattern: `kv=200`, `scale=0.025`,
        `thickness=(20, 80)`, `precession=0.5`, `dose=3000`. `stemtune simulate --help` lists them with their units.

    Raises
    ------
    UserError
        For what cannot be simulated or written.
    """
    from stemtune.config import Config
    from stemtune.dataset.beam_store import BeamStore, simulate_beams
    from stemtune.dataset.simulate import simulate_polycrystal, simulate_store
    from stemtune.dataset.store import Store
    from stemtune.errors import UserError

    flat: dict[str, object] = {f"simulate.{name}": value for name, value in microscope.items()}
    if dynamical and flat.setdefault("simulate.physics", "bloch") != "bloch":
        raise UserError(f"dynamical=True asks for Bloch waves, but physics is {flat['simulate.physics']!r}")
    settings = Config.from_flat(flat).simulate
    if beam_store:
        if scan is not None or not dynamical:
            raise UserError("beam_store=True keeps beams of Bloch waves to train on: give dynamical=True, and no scan")
        return BeamStore.open(simulate_beams(cif, out, patterns, settings, seed=seed, workers=workers))
    if scan is None:
        simulate_store(cif, out, patterns, settings, seed=seed, workers=workers)
    else:
        simulate_polycrystal(cif, out, scan, grains, settings, seed=seed, workers=workers)
    return Store.open(out)


def load(
    path: Place, *, shape: tuple[int, int] | None = None
) -> Store | BeamStore | Scan | OrientationMap | OrientationModel:
    """Open what lies at `path`: a store, a measured scan, a map or a model.

    Parameters
    ----------
    path
        A file or folder; of a model also an address in MLflow (`models:/NAME@champion`, `runs:/ID/model`), the word
        "champion", or "linio2".
    shape
        Rows and columns of a scan whose file is only a stack of frames.

    Raises
    ------
    UserError
        When nothing is there, or nothing that stemtune reads.
    """
    from stemtune._files import existing, shipped_models
    from stemtune.dataset.schema import kind_of
    from stemtune.errors import UserError
    from stemtune.tracking import resolve_model

    if not Path(path).exists() and (":/" in str(path) or str(path) in ("champion", *shipped_models())):
        path = resolve_model(str(path))
    found = existing(path, "the path")
    kind = kind_of(found)
    if kind in ("store", "beams"):
        from stemtune.dataset import beam_store, store

        return store.Store.open(found) if kind == "store" else beam_store.BeamStore.open(found)
    if kind == "map":
        from stemtune.crystal_map.io import read_map_h5

        return read_map_h5(found)
    if kind == "model":
        from stemtune.learning.checkpoint import load_model

        return load_model(found)
    if kind == "search space":
        raise UserError(f"'{path}' is a search space; stemtune.sweep(...) runs it")
    from stemtune.scan.readers import read_scan

    return read_scan(found, shape)


def ingest(scan: Place, out: Place, **calibration: Any) -> Store:
    """Turn a measured scan into a store: corrected, calibrated, centred.

    Parameters
    ----------
    scan
        The file of the microscope or of another program.
    out
        The store to write.
    **calibration
        What `stemtune ingest` takes: `kv`, `scale`, `centre`, `shape`, `size`, `keep`, `dataset`, `calibrate`,
        `descan`, `ellipse`, `bad_pixels`, `beam_stop`, `background`, `flip`, `scan_rotation`.

    Raises
    ------
    UserError
        For a scan that cannot be read, or misses what is not given.
    """
    from stemtune.dataset.ingest import ingest as run
    from stemtune.dataset.store import Store

    run(scan, out, **calibration)
    return Store.open(out)


def label(
    store: Place,
    cif: Place | Sequence[Place] = (),
    out: Place | None = None,
    *,
    refine: bool = False,
    settings: Mapping[str, object] | None = None,
) -> Store:
    """Label the patterns of a store by template matching.

    Parameters
    ----------
    store
        The store.
    cif
        The phase or phases; left out, those that the store names.
    out
        The labelled store; left out, it takes the place of `store`.
    refine
        Fit the best answers to the patterns.
    settings
        Settings of matching by their dotted names, `{"data.gamma": 0.3}` for instance.

    Raises
    ------
    UserError
        For unusable input, before anything is written.
    """
    from stemtune.dataset.store import Store
    from stemtune.indexing.template_matching import label_by_templates

    cifs = [cif] if isinstance(cif, str | os.PathLike) else list(cif)
    done = label_by_templates(store, [str(each) for each in cifs], out, refine=refine, settings=settings)
    return Store.open(done["store"])


def train(
    store: Place | None, out: Place, settings: Mapping[str, object] | None = None, *, workers: int = 1
) -> dict[str, float]:
    """Train one model, the same code as a trial of the search, and return the figures of its best epoch.

    Parameters
    ----------
    store
        The training store; None with `settings={"data.source": "simulate"}`.
    out
        The model folder to write.
    settings
        Settings by their dotted names: `{"model.name": "cnn", "train.epochs": 10}`.
    workers
        Data-parallel processes on this machine.

    Raises
    ------
    UserError
        For settings or data that do not fit, or training that diverged.
    """
    from stemtune.config import Config
    from stemtune.learning.train import train as run

    flat = dict(settings or {})
    if store is not None:
        flat["data.store"] = str(Path(store).expanduser().absolute())
    return run(Config.from_flat(flat), out, workers)


def sweep(
    space: Place,
    name: str | None = None,
    *,
    settings: Mapping[str, object] | None = None,
    trials: int | None = None,
    local: bool = True,
    resume: bool = False,
    nodes: int = 1,
    study: str = "",
) -> SweepOutcome:
    """Search over a space and return how it ended, with the champion's model folder.

    Parameters
    ----------
    space
        A YAML file, looked up in the working folder and then in the checkout.
    name
        Name of the sweep; the file's name by default.
    settings, trials
        Settings to hold constant, by their dotted names; number of trials, instead of the space's.
    local
        A Ray of our own on this machine; False joins the cluster of RAY_ADDRESS.
    resume
        Go on with the interrupted sweep of this name.
    nodes
        Nodes of the cluster to wait for before trials begin.
    study
        A study to share with other sweeps: another sweep's name, or the address of a database.

    Raises
    ------
    UserError
        For a space with mistakes, a name that is taken, or too few CPUs or GPUs.
    """
    from stemtune.tune.run.replicates import replicated
    from stemtune.tune.run.sweep import resume_sweep, run_sweep
    from stemtune.tune.space.space import find_space, load_space

    if resume:
        return replicated(resume_sweep(name or Path(space).stem, local=local, nodes=nodes), local=local, nodes=nodes)
    loaded = load_space(find_space(str(space))).with_settings(settings or {})
    outcome = run_sweep(loaded, name, local=local, trials=trials, nodes=nodes, study=study)
    return replicated(outcome, local=local, nodes=nodes)


def export(model: Place, out: Place, alternatives: int = 1) -> Path:
    """Write a model as a `torch.export` program, which torch runs without stemtune, and return where.

    Parameters
    ----------
    model
        A model folder, an address in MLflow, "champion" or "linio2".
    out
        The file to write, FILE.pt2.
    alternatives
        How many orientations of each pattern the program returns.

    Raises
    ------
    UserError
        For a model that cannot be exported, or a file that cannot be written.
    """
    from stemtune.learning.export import export_model
    from stemtune.tracking import resolve_model

    return export_model(resolve_model(str(model)), out, alternatives)


def compare(*names: str, out: Place | None = None) -> dict[str, Any]:
    """Return what a sweep found: trials, architectures, importances, Pareto front, seeds, cost.

    Parameters
    ----------
    *names
        The sweeps, of one metric; by default the one that started last.
    out
        A folder for the pictures, the figures as JSON and the page `compare.html`.

    Raises
    ------
    UserError
        When there is no such sweep, or the tracking server does not answer.
    """
    from stemtune.tune.report import compare_trials, write_comparison

    found = compare_trials(names)
    if out is not None:
        write_comparison(found, out)
    return found.figures


def predict(
    scan: Place,
    model: Place | Sequence[Place],
    out: Place,
    *,
    refine: bool = False,
    overlap: bool = False,
    batch: int = 256,
    **calibration: Any,
) -> OrientationMap:
    """Write the orientation map of a scan and return it.

    Parameters
    ----------
    scan
        A store or a scan file.
    model
        A model folder, an address in MLflow, "champion" or "linio2"; several: one for each phase.
    out
        The map folder to write: map.h5, .ang, .ctf, pictures, report.html, summary.json.
    refine
        Fit the model's answers to the patterns.
    overlap
        Look for two crystals in each pattern.
    batch
        Patterns at a time.
    **calibration
        What `ingest` takes, for a scan file.

    Raises
    ------
    UserError
        For unusable input, before anything is written.
    """
    from stemtune.crystal_map.io import read_map_h5
    from stemtune.map_folder.predict import predict as run
    from stemtune.tracking import resolve

    given = [str(model)] if isinstance(model, str | os.PathLike) else [str(each) for each in model]
    models = [resolve(each) for each in given]
    named = [each for each in given if not Path(each).exists()]
    folders, runs = [each.folder for each in models], [each.run for each in models if each.run]
    run(scan, folders, out, batch, refine=refine, overlap=overlap, addresses=named, runs=runs, **calibration)
    return read_map_h5(out)


def evaluate(map: Place, truth: Place, *, png: Place | None = None) -> dict[str, Any]:
    """Judge a map by the truth: disorientation, pseudo-symmetry, calibration of the confidence, boundaries.

    Parameters
    ----------
    map, truth
        The map folder, or its map.h5; a store with known orientations, a map.h5, an .ang or a .ctf.
    png
        Draw the figures into this file.

    Raises
    ------
    UserError
        When the two are not of the same scan.
    """
    from stemtune.analysis.evaluation.evaluate import evaluate as run
    from stemtune.plot.evaluation import draw_evaluation

    figures = dict(run(map, truth))
    if png is not None:
        draw_evaluation(figures, png)
    return figures


def overlay(map: Place, positions: Sequence[tuple[int, int]], *, png: Place | None = None) -> Path:
    """Draw the spots that a map predicts on the measured patterns, and return the picture.

    Parameters
    ----------
    map, positions, png
        The map folder, whose scan or store must still be where it was; rows and columns of the scan; the picture, by
        default `overlay.png` in the map folder.

    Raises
    ------
    UserError
        For a position outside of the scan, or a scan that is gone.
    """
    from stemtune.plot.patterns import overlay_positions

    return Path(overlay_positions(map, list(positions), png))
