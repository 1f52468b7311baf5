"""`python -m benchmarks accuracy`: models and other programs on Bloch-wave patterns of known orientation."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks import peers, testset
from benchmarks.table import format_tables
from benchmarks.testset import Beams, Condition
from stemtune._files import replaceable_file, shipped_models, whole_file, writable_folder
from stemtune._progress import Progress
from stemtune._version import __version__
from stemtune.analysis.evaluation.evaluate import RIGHT_DEG, angle_figures, count_families
from stemtune.config import Config
from stemtune.crystal.phase import Phase, linio2
from stemtune.crystal.symmetry import disorientation_beam180_deg, disorientation_deg
from stemtune.dataset.store import Store
from stemtune.errors import UserError
from stemtune.indexing.predictor import Predictor
from stemtune.learning.calibration import reliability
from stemtune.learning.model import OrientationModel

BASELINE = "matched"
"""The model without training that is judged where nothing is named, beside every model that ships."""

ALTERNATIVES = 10
"""Candidates per pattern; the JSON says how often the truth is among the first of them."""

OURS, THEIRS = "stemtune", "py4DSTEM"
"""Whose Bloch waves a set is made of."""

WITHIN = 0.1
"""Patterns of other programs may be read this much worse than ours of the same conditions."""


@dataclass(frozen=True)
class Options:
    """What `python -m benchmarks accuracy` is asked for; the command line's help says what each means."""

    patterns: int = 200
    seed: int = testset.SEED
    models: tuple[str, ...] = ()
    refine: bool = False
    full: bool = False
    peers: bool = True
    peer_pythons: tuple[str, ...] = ()
    conditions: tuple[Condition, ...] = testset.CONDITIONS
    out: str = "accuracy"
    json: str | None = None


class Set(NamedTuple):
    """Patterns of one source under one condition."""

    source: str
    condition: Condition
    beams: Beams
    seed: int

    @property
    def key(self) -> tuple[str, Condition, bytes]:
        """What tells it from other sets."""
        return self.source, self.condition, self.beams.orientation.tobytes()

    def patterns(self) -> npt.NDArray[Any]:
        """Draw the patterns (n, 128, 128); the same every time."""
        return testset.pictures(self.beams, self.condition, self.seed)


class Method(NamedTuple):
    """A model, refined or not."""

    name: str
    model: OrientationModel
    refine: bool


def run(options: Options) -> dict[str, Any]:
    """Score every method on every set, print the tables and return the figures.

    Returns
    -------
    dict
        `settings`; `rows`, one per set and method (see `score`); `foreign`, one per method and kind of physics that is
        not ours, with the figures beside those of our own patterns; `left_out`, what could not be measured and why.

    Raises
    ------
    UserError
        For a model that is not there or reads another crystal, and for folders that cannot be written.
    """
    folder = writable_folder(options.out)
    if options.json:
        replaceable_file(options.json)
    methods = list(_methods(options))
    others = (peers.PYXEM, peers.PY4DSTEM) if options.peers else ()
    found = {peer.name: peers.find(peer, options.peer_pythons) for peer in others}
    sets, pairs = _sets(options, folder)
    rows: list[dict[str, Any]] = []
    foreign: list[dict[str, Any]] = []
    left_out: list[str] = []
    for method in methods:
        wanted = {each.key: each for each in (*sets, *(each for pair in pairs for each in pair))}
        with Progress(len(wanted), method.name, "set") as progress:
            scored = {key: _score_model(method, each) for key, each in progress.over(wanted.items())}
        rows += [_row(each, method.name, scored[each.key]) for each in sets]
        foreign += [_foreign(method, theirs, scored[theirs.key], scored[ours.key]) for theirs, ours in pairs]
    for name, where in found.items():
        if where is None:
            left_out.append(
                f"{name} is not installed here; give --peer-python PATH, a Python that has it, to score it too"
            )
        else:
            try:
                rows += _score_peer(name, *where, sets, options.full)
            except UserError as problem:  # what is measured already took minutes
                left_out.append(str(problem))
    order = [each.source + each.condition.name for each in sets]
    rows.sort(key=lambda row: order.index(row["source"] + row["condition"]))
    result = {"settings": _settings(options), "rows": rows, "foreign": foreign, "left_out": left_out}
    print(format_tables(result))
    if options.json:
        with whole_file(options.json) as part:
            part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _methods(options: Options) -> Iterator[Method]:
    for name in options.models or (BASELINE, *shipped_models()):
        model = load(name)
        yield Method(name, model, False)
        if options.refine:
            yield Method(f"{name}, refined", model, True)


def load(name: str) -> OrientationModel:
    """Return the model `name`: `matched` at its defaults, or whatever `stemtune predict --model` takes.

    Raises
    ------
    UserError
        When there is none, or it is made for another crystal.
    """
    if name == BASELINE and not Path(name).exists():
        from stemtune.learning.models import build

        return build(Config.from_flat({"model.name": name}), linio2(), testset.GEOMETRY).eval()
    from stemtune.learning.checkpoint import load_model
    from stemtune.tracking import resolve_model

    model = load_model(resolve_model(name))
    if model.phase.symmetry.laue != linio2().symmetry.laue or set(model.phase.elements) != set(linio2().elements):
        raise UserError(
            f"the model '{name}' reads {model.phase.name}, but the test set is LiNiO2; give another --model"
        )
    return model


def predictor(method: Method, store: Store) -> Predictor:
    """Return what answers for `method`: the one place where refinement is asked for."""
    return Predictor(method.model, store, alternatives=ALTERNATIVES, refine=method.refine)


def _sets(options: Options, folder: Path) -> tuple[list[Set], list[tuple[Set, Set]]]:
    """Return the sets that are scored, and the pairs (theirs, ours) of the same orientations, thicknesses and noise."""
    n, seed = options.patterns, options.seed
    own = testset.draw(n, seed)
    beams = {(OURS, p): _ours(*own, p, folder) for p in testset.PRECESSIONS_DEG}
    beams |= {(THEIRS, p): testset.py4dstem(p).first(n) for p in testset.PRECESSIONS_DEG}
    sets = [
        Set(source, condition, beams[source, condition.precession_deg], seed)
        for source in (OURS, THEIRS)
        for condition in options.conditions
    ]
    pairs = []
    for each in sets:
        if each.source == THEIRS and each.condition.ideal and each.condition.electrons:
            same = _ours(each.beams.orientation, each.beams.thickness_nm, each.condition.precession_deg, folder)
            pairs.append((each, Set(OURS, each.condition, same, seed)))
    still = Condition()
    pairs.append(
        (
            Set("diffsims", still, testset.diffsims(*own), seed),
            Set("stemtune, kinematic", still, testset.kinematic(*own), seed),
        )
    )
    return sets, pairs


def _ours(orientation: testset.Floats, thickness: npt.NDArray[np.float32], precession: float, folder: Path) -> Beams:
    beams, path, new = testset.bloch(orientation, thickness, precession, folder)
    print(f"test set: {path} ({'built' if new else 'read'})", file=sys.stderr)
    return beams


def _for_pyxem(each: Set) -> bool:
    """Say whether pyxem (tens of patterns per second) is scored on the set where not all are asked for."""
    return each.source == THEIRS and (each.condition.ideal or _worst(each.condition))


def _for_py4dstem(each: Set) -> bool:
    """Say the same of py4DSTEM's ACOM (a few patterns per second)."""
    return each.source == THEIRS and each.condition.ideal and each.condition.electrons > 0


def _worst(condition: Condition) -> bool:
    return condition.electrons > 0 and condition.centre_px > 0 and condition.scale_error > 0


def _score_model(method: Method, each: Set) -> dict[str, Any]:
    """Return the score of a model on a set, read from a store as a scan would be."""
    with tempfile.TemporaryDirectory(prefix="stemtune-accuracy-") as folder:
        path = testset.write_store(Path(folder) / "set.h5", each.patterns(), each.beams)
        with Store.open(path) as store:
            reader = predictor(method, store)
            reader.run(np.arange(min(32, store.n)), progress=False)  # warms up
            began = time.perf_counter()
            answered = reader.run(progress=False)
            seconds = time.perf_counter() - began
    truth, answers = torch.from_numpy(each.beams.orientation), torch.from_numpy(answered.candidates)
    figures = score(answers, truth, linio2(), torch.from_numpy(answered.confidence))
    return {**figures, "patterns_per_s": len(truth) / seconds}


def _score_peer(name: str, python: str, version: str, sets: Sequence[Set], full: bool) -> list[dict[str, Any]]:
    """Return the rows of another program on those sets that it is fast enough for, or on all."""
    fast, answers = {"pyxem": (_for_pyxem, peers.run_pyxem), "py4DSTEM": (_for_py4dstem, peers.run_py4dstem)}[name]
    chosen = [each for each in sets if full or fast(each)]
    rows = []
    with tempfile.TemporaryDirectory(prefix="stemtune-accuracy-") as folder:
        asked = [(each.patterns(), each.beams) for each in chosen]
        for found in answers(python, version, asked, Path(folder)) if chosen else ():
            each = chosen[found.set_number]
            figures = score(found.orientation[:, None], torch.from_numpy(each.beams.orientation), linio2())
            rows.append(_row(each, found.method, {**figures, "patterns_per_s": found.patterns_per_s}))
    return rows


def score(answers: Tensor, truth: Tensor, phase: Phase, confidence: Tensor | None = None) -> dict[str, Any]:
    """Return how far `candidates` (n, k, 4), best first, are from `truth` (n, 4); no answer (NaN) is 180 degrees off.

    Returns
    -------
    dict
        `strict` and `beam180` (modulo half a turn about the beam), each `median_deg`, `mean_deg`, `within_2deg`,
        `within_5deg` of the first answer; `within_5deg_of_best`, the strict share for the best of 1, 2, ... answers;
        `taken_for`, shares of right answers, twins, each family of pseudo-symmetric variants and others; `pseudo`, the
        share of all those variants together; of a confidence (n, k), `calibration_error` and what of it is chance.
    """
    each = disorientation_deg(answers, truth[:, None], phase.symmetry).nan_to_num(nan=180.0)
    first = answers[:, 0]
    twin = disorientation_beam180_deg(first, truth, phase.symmetry).nan_to_num(nan=180.0)
    n = len(truth)
    taken = {name: count / n for name, count in count_families(truth, first.to(truth), phase).items()}
    best = each.cummin(dim=1).values
    result: dict[str, Any] = {
        "n": n,
        "strict": angle_figures(each[:, 0].numpy()),
        "beam180": angle_figures(twin.numpy()),
        "within_5deg_of_best": (best < RIGHT_DEG).double().mean(0).tolist(),
        "pseudo": sum(share for name, share in taken.items() if name not in ("right", "beam180")),
        "taken_for": {**taken, "other": 1 - sum(taken.values())},
    }
    if confidence is not None:
        reliable = reliability(confidence[:, 0].numpy(), (each[:, 0] < RIGHT_DEG).numpy())
        result |= {"calibration_error": reliable.error, "calibration_error_by_chance": reliable.by_chance}
    return result


def _row(each: Set, method: str, figures: dict[str, Any]) -> dict[str, Any]:
    return {
        "source": each.source,
        "condition": each.condition.name,
        **asdict(each.condition),
        "method": method,
        **figures,
    }


def _foreign(method: Method, theirs: Set, other: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return how a model reads patterns of another program (`other`) beside our own of the same conditions (`own`)."""
    median = other["strict"]["median_deg"] / own["strict"]["median_deg"]
    five = other["strict"]["within_5deg"] / own["strict"]["within_5deg"] if own["strict"]["within_5deg"] else np.inf
    return {
        "method": method.name,
        "program": theirs.source,
        **asdict(theirs.condition),
        "theirs": other,
        "ours": own,
        "median_ratio": float(median),
        "within_5deg_ratio": float(five),
        "no_worse": bool(median <= 1 + WITHIN and five >= 1 - WITHIN),
    }


def _settings(options: Options) -> dict[str, Any]:
    return {
        "stemtune": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **asdict(options),
    }
