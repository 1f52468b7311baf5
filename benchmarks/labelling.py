"""`python -m benchmarks label`: template matching beside pyxem, one crystal per Laue class, on patterns of known truth.

The patterns are diffsims' kinematic ones, pyxem's home ground, and our own Bloch waves, drawn alike (`testset`).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks import crystals, peers, testset
from benchmarks.table import markdown
from benchmarks.testset import Beams, Condition
from stemtune._files import replaceable_file, whole_file
from stemtune.config import Config
from stemtune.crystal.phase import Phase
from stemtune.crystal.symmetry import disorientation_beam180_deg, disorientation_deg
from stemtune.dataset.store import Store
from stemtune.errors import UserError, did_you_mean
from stemtune.indexing.template_matching import TemplateLabeller

OWN = "stemtune label"

_ROWS = ("Laue class", "crystal", "patterns of", "method", "median", "< 2°", "< 5°", "median*", "< 5°*", "patterns/s")
_NOTE = "* modulo half a turn about the beam; no answer counts as 180°"


@dataclass(frozen=True)
class Options:
    """What `python -m benchmarks label` is asked for; the command line's help says what each means."""

    patterns: int = 200
    seed: int = testset.SEED
    classes: tuple[str, ...] = ()
    peers: bool = True
    peer_pythons: tuple[str, ...] = ()
    json: str | None = None


class MethodLabels(NamedTuple):
    """What a method answers to a set: orientations (n, 4), NaN where it has none, and patterns per second."""

    method: str
    orientation: Tensor
    patterns_per_s: float


def run(options: Options) -> list[dict[str, Any]]:
    """Measure every Laue class that is asked for, print the table and return its rows.

    Raises
    ------
    UserError
        For a Laue class that does not exist, and a file that cannot be written.
    """
    classes = options.classes or crystals.MEASURED
    for laue in classes:
        if laue not in crystals.CLASSES:
            known = ", ".join(crystals.CLASSES)
            raise UserError(
                f"no Laue class is called '{laue}'{did_you_mean(laue, crystals.CLASSES)}; there are {known}"
            )
    if options.json:
        replaceable_file(options.json)
    pyxem = peers.find(peers.PYXEM, options.peer_pythons) if options.peers else None
    rows = [row for laue in classes for row in _measured(laue, options, pyxem)]
    print("\n".join((markdown(_ROWS, [_line(row) for row in rows]), "", _NOTE)))
    if options.peers and pyxem is None:
        print("pyxem is left out: no Python that was named has it; give --peer-python")
    if options.json:
        with whole_file(options.json) as part:
            part.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return rows


def _measured(laue: str, options: Options, pyxem: tuple[str, str] | None) -> Iterator[dict[str, Any]]:
    """Yield the figures of every method on every set of one Laue class."""
    phase = crystals.crystal(laue)
    print(f"{laue}: {phase.name}", file=sys.stderr, flush=True)
    sets = patterns_of(phase, options.patterns, options.seed)
    for source, (patterns, beams) in sets.items():
        truth = torch.from_numpy(beams.orientation)
        for labels in label(phase, patterns, beams):
            yield {"laue": laue, "crystal": phase.name, "source": source, **figures(labels, truth, phase)}
    if pyxem is None:
        return
    names = list(sets)
    with tempfile.TemporaryDirectory(prefix="stemtune-bench-") as folder:
        for each in peers.run_pyxem(*pyxem, list(sets.values()), Path(folder), phase):
            source = names[each.set_number]
            labels = MethodLabels(each.method, each.orientation, each.patterns_per_s)
            truth = torch.from_numpy(sets[source][1].orientation)
            yield {"laue": laue, "crystal": phase.name, "source": source, **figures(labels, truth, phase)}


def patterns_of(phase: Phase, n: int, seed: int) -> dict[str, tuple[npt.NDArray[Any], Beams]]:
    """Return `n` patterns of a crystal and their beams by whose they are: diffsims' and our Bloch waves'."""
    orientation, thickness = testset.draw(n, seed)
    waves = testset.simulate_bloch(Config().simulate, orientation, thickness, 0.0, phase)
    made = {
        "diffsims": testset.diffsims(orientation, thickness, phase),
        "Bloch waves": Beams(orientation, thickness, waves),
    }
    return {source: (testset.pictures(beams, Condition(), seed), beams) for source, beams in made.items()}


def label(phase: Phase, patterns: npt.NDArray[Any], beams: Beams) -> Iterator[MethodLabels]:
    """Yield the labels of `stemtune label`, plain and refined, every answer counted whether indexed or not."""
    with tempfile.TemporaryDirectory(prefix="stemtune-bench-") as folder:
        path = testset.write_store(Path(folder) / "set.h5", patterns, beams, phase)
        with Store.open(path) as store:
            counts = torch.from_numpy(store.take(np.arange(store.n)))
            for refine, name in ((False, OWN), (True, f"{OWN} --refine")):
                labeller = TemplateLabeller([phase], store, refine=refine)
                labeller(counts[:4])
                began = time.perf_counter()
                parts = [labeller(part).orientation for part in counts.split(256)]  # type: ignore[no-untyped-call]
                yield MethodLabels(name, torch.cat(parts).double().cpu(), store.n / (time.perf_counter() - began))


def figures(labels: MethodLabels, truth: Tensor, phase: Phase) -> dict[str, Any]:
    """Return how far from the truth (n, 4) a method's answers are."""
    angles = {
        "": disorientation_deg(labels.orientation, truth, phase.symmetry),
        "_beam180": disorientation_beam180_deg(labels.orientation, truth, phase.symmetry),
    }
    found: dict[str, Any] = {"method": labels.method, "n": len(truth), "patterns_per_s": labels.patterns_per_s}
    for kind, angle in angles.items():
        angle = angle.nan_to_num(nan=180.0)
        found[f"median_deg{kind}"] = float(angle.median())
        for within in (2, 5):
            found[f"within_{within}deg{kind}"] = float((angle < within).double().mean())
    return found


def _line(row: dict[str, Any]) -> Sequence[str]:
    return (
        row["laue"],
        row["crystal"],
        row["source"],
        row["method"],
        f"{row['median_deg']:.2f}°",
        f"{row['within_2deg']:.1%}",
        f"{row['within_5deg']:.1%}",
        f"{row['median_deg_beam180']:.2f}°",
        f"{row['within_5deg_beam180']:.1%}",
        f"{row['patterns_per_s']:,.0f}",
    )
