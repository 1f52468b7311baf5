"""The main job from end to end on a simulated LiNiO2 polycrystal, as commands that a user could type.

Nothing here is special to the demonstration: each step is a `stemtune` command, printed before it runs.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from stemtune._files import writable_folder
from stemtune.errors import UserError

Command = Callable[[Sequence[str]], int]

MARK = ".stemtune-demo"

MICROSCOPE = "--dynamical --kv 200 --size 64 --scale 0.05 --thickness 20:80 --precession 0 --convergence 0.3:1"
SCAN = "--dose 3000 --centre-error 0.5 --background 0.1"
RIGHT_DEG = 5.0
CHANCE_ERRORS = 2.0  # standard errors below which a difference may be chance


def run(out: Path, command: Command) -> None:
    """Run the demonstration in the folder `out`, which an earlier demonstration may have used.

    `command` runs a `stemtune` command line, given as words, and returns its exit code. A `UserError` says that `out`
    holds files that no demonstration made, or that a step failed.
    """
    out = _fresh(out)
    started = time.monotonic()
    here = Path.cwd()
    os.chdir(out)  # the MLflow file and the sweep's folder belong beside the demonstration's other files
    try:
        _steps(command, started)
    finally:
        os.chdir(here)
    print(f"\nEverything is in {out}. Look at the search in the MLflow UI:")
    mlflow = Path(sys.executable).parent / "mlflow"
    print(f"  cd {out} && {mlflow} ui --backend-store-uri sqlite:///mlflow.db")


def _fresh(out: Path) -> Path:
    out = out.expanduser().absolute()
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARK).exists():
            raise UserError(f"the folder '{out}' holds other files; give the demo a folder of its own with --out")
        shutil.rmtree(out)
    writable_folder(out)
    (out / MARK).touch()
    return out


def _steps(command: Command, started: float) -> None:
    Path("space.yaml").write_text(resources.files("stemtune").joinpath("demo.yaml").read_text())
    beams = f"{MICROSCOPE} --tilts 4 --thicknesses 6 --tilt-groups 1 --workers 2"
    _step(command, f"simulate linio2 --out beams.h5 --beams --patterns 10000 --seed 1 {beams}", started)
    _step(command, f"simulate linio2 --out scan.h5 --scan 40,50 --grains 80 --seed 2 {MICROSCOPE} {SCAN}", started)
    _step(command, "sweep space.yaml --local --name demo", started)
    _step(command, "compare demo --png compare.png --json compare.json", started)
    _step(command, "predict scan.h5 --model champion --out map", started)
    _step(command, "evaluate map/map.h5 --truth scan.h5 --json map.json", started)
    matched = "--set model.name=matched --set model.angles=72 --set model.radii=32"
    _step(command, f"train --store scan.h5 {matched} --out matched", started)
    _step(command, "predict scan.h5 --model matched --out matched_map", started)
    _step(command, "evaluate matched_map/map.h5 --truth scan.h5 --json matched_map.json", started)
    _closing(started)


def _step(command: Command, line: str, started: float) -> None:
    minutes, seconds = divmod(int(time.monotonic() - started), 60)
    step(command, line, "the demo", f"[{minutes:d}:{seconds:02d}] ")


def step(command: Command, line: str, of: str, mark: str = "") -> None:
    """Print a `stemtune` command line and run it as one step of a longer run.

    That it failed is a `UserError`; that it was interrupted, which it has said, a `SystemExit`.
    """
    print(f"\n{mark}$ stemtune {line}", flush=True)
    code = command(shlex.split(line))
    if code in (130, 143):
        raise SystemExit(code)
    if code:
        raise UserError(f"{of} stopped: `stemtune {line}` ended with exit code {code}; its message is above")


def _closing(started: float) -> None:
    minutes = (time.monotonic() - started) / 60
    print(f"\nDone in {minutes:.1f} minutes. Disorientation of the predicted maps to the known truth:")
    for name, file in (("champion", "map.json"), ("matched", "matched_map.json")):
        figures = json.loads(Path(file).read_text())
        strict, twin = figures["disorientation"]["strict"], figures["disorientation"]["beam180"]
        print(
            f"  {name:9s} median {strict['median_deg']:.2f}°, within 5° {strict['within_5deg']:.1%};"
            f" modulo beam-180: median {twin['median_deg']:.2f}°, within 5° {twin['within_5deg']:.1%}"
        )
    print("Pictures:")
    for picture in (*sorted(Path("map").glob("*.png")), Path("compare.png")):
        print(f"  {Path.cwd() / picture}")
    print(_learned())
    print(_won())


def _learned() -> str:
    """Return how far the networks that started from random weights fell, in one line each."""
    from stemtune.tracking import read_sweep

    metric, lines = "val/disorientation_mean_deg", []
    for trial in read_sweep("demo", curves=(metric,)).trials:
        curve = trial.curves.get(metric, [])
        if len(curve) > 1:
            lines.append(
                f"{trial.params['model.name']} ({trial.name}), from random weights, fell from {curve[0][1]:.1f}° to"
                f" {curve[-1][1]:.1f}° on average in {len(curve)} epochs; chance is 67°."
            )
    return "\n".join(lines)


def _won() -> str:
    """Return in plain words which model won, by how much on the scan that none has seen, and whether it is chance.

    Pixels of a grain show the same orientation and are right or wrong together, so it is the grains that are counted.
    """
    import numpy as np

    from stemtune.analysis.evaluation.evaluate import disorientations_deg
    from stemtune.crystal_map.io import read_map_h5
    from stemtune.dataset.store import Store

    with Store.open("scan.h5") as scan:
        grain, crystal, truth = scan.group[scan.labelled], scan.labelled, scan.orientation
    shares = []
    for folder in ("map", "matched_map"):
        found = read_map_h5(folder)
        off = disorientations_deg(truth, found.answers[:, 0], found.phase, found.phases)  # NaN where not indexed
        shares.append(np.bincount(grain, weights=(off <= RIGHT_DEG)[crystal]) / np.maximum(np.bincount(grain), 1))
    gain = 100 * (shares[0] - shares[1])[np.bincount(grain) > 0]
    name = json.loads(Path("map/summary.json").read_text())["architecture"]
    return verdict(name, float(gain.mean()), float(gain.std(ddof=1) / np.sqrt(len(gain))), len(gain))


def verdict(name: str, gain: float, error: float, grains: int) -> str:
    """Return what a `gain` in points over the matched filter, with its standard error over `grains`, says."""
    beside = "the matched filter, which learns nothing"
    if name == "matched":
        return f"The champion is {beside}: no network of this search beat it."
    sure = abs(gain) > CHANCE_ERRORS * error
    verb = ("beats" if gain > 0 else "is beaten by") if sure else "is not told from"
    return (
        f"The champion, {name}, {verb} {beside}, on a scan that neither has seen: over {grains} grains it reads"
        f" {abs(gain):.1f} points {'more' if gain > 0 else 'less'} of the patterns within 5° (standard error"
        f" {error:.1f}), which is {'more than chance' if sure else 'what chance may do'}."
    )
