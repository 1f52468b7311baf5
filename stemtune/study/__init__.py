"""The reference study (Wissel et al., arXiv:2507.01889) measured again where the truth is known: `stemtune study`.

Each step is a `stemtune` command, printed before it runs; what an earlier run has finished is not done again. The
spaces in `search_spaces/reference/` ask one question each, on one data set: a simulated scan of LiNiO2 (Bloch waves,
precession, noise and detector of a real one), labelled by template matching. Labels train, the truth judges.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from stemtune._files import whole_file, writable_folder
from stemtune.demo import Command, step
from stemtune.errors import UserError
from stemtune.study.findings import FINDINGS, SIZES, Finding, Outcome, Size, outcome, sweep_name

STUDIES = ("reference",)
MANIFEST = "study.json"
SPACES = "search_spaces/reference"

MICROSCOPE = (
    "--kv 200 --thickness 20:80 --precession 0.5 --dose 3000 --centre-error 0.5 --background 0.1 --convergence 0.5:2"
)


def run(
    name: str,
    out: Path,
    command: Command,
    small: bool = False,
    only: Sequence[str] = (),
    share: float | None = None,
    seeds: int | None = None,
) -> Path:
    """Run the study `name` in the folder `out`, or go on with it, and return its report.

    `command` runs a `stemtune` command line, given as words, and returns its exit code; the rest is as `stemtune study`
    takes it. A `UserError` tells of an unknown study or finding, a folder of another size or budget, or a failed step.
    """
    if name not in STUDIES:
        raise UserError(f"there is no study '{name}'; there is {', '.join(STUDIES)}")
    chosen = [finding for finding in FINDINGS if not only or finding.name in only]
    if strange := [word for word in only if word not in [finding.name for finding in FINDINGS]]:
        raise UserError(f"the study has no finding '{strange[0]}'; it has {', '.join(f.name for f in FINDINGS)}")
    from stemtune.study.report import write_report
    from stemtune.tune.space.space import find_space

    texts = {finding.name: find_space(f"{SPACES}/{finding.name}.yaml").read_text() for finding in chosen}
    kind = "small" if small else "full"
    if share is not None and not 0 < share <= 1:
        raise UserError(f"--share is {share:g}, but must be above 0 and at most 1, all of the spaces' epochs")
    out = out.expanduser().absolute()
    writable_folder(out)
    size = _claim(out, kind, share, seeds)
    here, began = Path.cwd(), time.monotonic()
    os.chdir(out)  # sweeps and the MLflow file belong beside the data
    try:
        _data(size, command)
        for finding in chosen:
            _sweep(finding, sized(texts[finding.name], size, out), command)
        found = [outcome(finding) for finding in FINDINGS if (out / "sweeps" / sweep_name(finding)).is_dir()]
        return write_report(found, out, kind, size, time.monotonic() - began)
    finally:
        os.chdir(here)


def _claim(out: Path, kind: str, share: float | None, seeds: int | None) -> Size:
    """Note size and budget in the folder, or read them there; a folder of other ones is refused."""
    manifest, size = out / MANIFEST, SIZES[kind]
    if not manifest.exists():
        if any(out.iterdir()):
            raise UserError(f"the folder '{out}' holds other files; give the study a folder of its own with --out")
        size = replace(size, share=share or size.share, seeds=seeds or size.seeds)
        with whole_file(manifest) as part:
            part.write_text(json.dumps({"study": "reference", "size": kind, **_budget(size)}) + "\n")
        return size
    before = json.loads(manifest.read_text())
    if before["size"] != kind:
        raise UserError(f"'{out}' holds the {before['size']} study; give the {kind} one a folder of its own with --out")
    size = replace(size, **{key: before[key] for key in _budget(size) if key in before})
    if replace(size, share=share or size.share, seeds=seeds or size.seeds) != size:
        raise UserError(
            f"the study in '{out}' began with --share {size.share:g} --seeds {size.seeds}; leave both out to go on with"
            " it, or give another one a folder of its own with --out"
        )
    return size


def _budget(size: Size) -> dict[str, float]:
    return {key: value for key, value in asdict(size).items() if key in ("share", "seeds")}


def sized(text: str, size: Size, folder: Path) -> str:
    """Return the text of a space for this size of the study, with STUDY replaced by its folder."""
    space = yaml.safe_load(text.replace("STUDY/", f"{folder}/"))
    space["fixed"] |= size.settings
    space["search"]["train.seed"] = list(range(size.seeds))
    if not size.gpu:
        space["resources"] = {"workers": 1, "cpus_per_worker": 1}
    _fit(space, size)
    return yaml.safe_dump(space, sort_keys=False, width=120)


def _fit(part: dict[Any, Any], size: Size) -> None:
    """Scale the epochs in a part of a space, in place; give architectures their size, without weights of the hub."""
    for key in {"epochs", "train.epochs"} & part.keys():
        part[key] = max(1, round(part[key] * size.share))
    if isinstance(name := part.get("model.name"), str):
        part |= size.models.get(name, {})
    for key, inside in part.items():
        if isinstance(inside, dict):
            _fit(inside, size)
            if key == "one_of":
                for name, settings in inside.items():
                    settings |= size.models.get(name, {})
                    if not size.gpu and "model.pretrained" in settings:
                        settings["model.pretrained"] = [False]


def _data(size: Size, command: Command) -> None:
    """Simulate, label, and write the two stores that differ in their splits; pretrain."""
    microscope = f"{MICROSCOPE} --size {size.pixels} --scale {size.scale}"
    scan = f"--scan {size.scan},{size.scan} --grains {size.grains}"
    _step(command, f"simulate linio2 --out truth.h5 {scan} --seed 71 --dynamical {microscope}", "truth.h5")
    _step(command, "label truth.h5 --cif linio2 --out labels.h5", "labels.h5")
    _stores()
    simulated = f"simulate linio2 --patterns {size.pretraining} --seed 72 {microscope}"
    for name, share in (("pretrained-less", 4), ("pretrained", 1)):
        part = simulated.replace(f"--patterns {size.pretraining}", f"--patterns {size.pretraining // share}")
        _step(command, f"{part} --out {name}.h5", f"{name}.h5")
        settings = {**size.settings, **size.models.get("cnn", {}), "model.name": "cnn", "optim.lr": 0.002}
        settings |= {"train.epochs": size.passes, "train.batch_size": 32}
        words = " ".join(f"--set {key}={value}" for key, value in settings.items())
        _step(command, f"train --store {name}.h5 {words} --out {name}", name)


def _stores() -> None:
    import numpy as np

    from stemtune.dataset.labels import with_truth
    from stemtune.dataset.store import Store

    with Store.open("labels.h5") as store:
        dealt = np.random.default_rng(73).choice(3, store.n, p=(0.8, 0.1, 0.1)).astype(np.int8)
    for name, split in (("random.h5", dealt), ("grains.h5", None)):
        if not Path(name).exists():
            print(f"\n{name}: labels train, the truth validates; {'pixels' if name == 'random.h5' else 'grains'} dealt")
            with_truth("labels.h5", "truth.h5", name, split)


def _sweep(finding: Finding, text: str, command: Command) -> None:
    name = sweep_name(finding)
    manifest = Path("sweeps") / name / "sweep.json"
    status = json.loads(manifest.read_text())["status"] if manifest.exists() else ""
    if status == "finished":
        return
    space = Path("spaces") / f"{finding.name}.yaml"
    writable_folder(space.parent)
    with whole_file(space) as part:
        part.write_text(text)
    _step(command, f"sweep --resume {name} --local" if status else f"sweep {space} --local --name {name}")


def _step(command: Command, line: str, made: str = "") -> None:
    if made and Path(made).exists():
        return
    step(command, line, "the study")


__all__ = ["FINDINGS", "SIZES", "Finding", "Outcome", "Size", "outcome", "run", "sized"]
