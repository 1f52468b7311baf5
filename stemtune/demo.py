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

MICROSCOPE = "--kv 200 --scale 0.025 --size 128 --thickness 20:80 --precession 0.5 --dose 3000 --centre-error 0.5"


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
    _step(command, f"simulate linio2 --out train.h5 --patterns 6000 --seed 1 {MICROSCOPE}", started)
    _step(command, f"simulate linio2 --out scan.h5 --scan 30,40 --grains 10 --seed 2 {MICROSCOPE}", started)
    _step(command, "sweep space.yaml --local --name demo", started)
    _step(command, "compare demo --png compare.png --json compare.json", started)
    _step(command, "predict scan.h5 --model champion --out map", started)
    _step(command, "evaluate map/map.h5 --truth scan.h5 --json map.json", started)
    _step(command, "train --store train.h5 --set model.name=matched --out matched", started)
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
    print(f"\nDone in {minutes:.1f} minutes. Disorientation of the predicted map to the known truth:")
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
    print(
        "These are small networks after a few minutes on a few cores and kinematic patterns: they show that the\n"
        "road is whole, not what a network can do. Full-size networks need a GPU and hours of it: that is what\n"
        "search_spaces/architectures.yaml is for."
    )
