"""`python -m benchmarks`: the speed figures of the README, each measured beside its peer or its limit in one run.

Machines are shared and noisy: the ratio of two figures of one run can be trusted, a single figure less. How accurate
models are is measured in `accuracy.py`, by name only, for it takes minutes.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from stemtune.config import Config, SimulateConfig
from stemtune.errors import UserError, did_you_mean

Figures = Mapping[str, object]

MODELS: dict[str, dict[str, object]] = {
    "cnn": {"model.name": "cnn", "model.input_size": 64},
    "polar": {"model.name": "polar"},
}
"""The settings whose training loop is measured: models of the size that two cores can train."""


ACCURACY, LABEL, PREDICT = "accuracy", "label", "predict"
"""The names of the measurements that have options of their own."""


def run(names: Sequence[str] = (), peer_pythons: Sequence[str] | None = ()) -> None:
    """Measure the speeds that `names` says (all without names) and print each figure.

    Parameters
    ----------
    names
        Names of measurements.
    peer_pythons
        Where pyxem may be, besides this Python, for the measurement `predict`; None leaves it out.
    """
    with tempfile.TemporaryDirectory(prefix="stemtune-bench-") as folder:
        for name in names or _MEASUREMENTS:
            about, measure = _MEASUREMENTS[name]
            if name == PREDICT:
                measure = partial(_predict, pythons=peer_pythons)
            print(f"{name}: {about}", flush=True)
            for key, value in measure(Path(folder)).items():
                shown = f"{value:,.4g}" if isinstance(value, float) else value
                print(f"  {key:32s} {shown}", flush=True)


def known(name: str) -> str:
    """Return `name` if a benchmark is called that, else raise a `UserError` that lists them."""
    if name not in NAMES:
        raise UserError(f"no benchmark is called '{name}'{did_you_mean(name, NAMES)}; there are {', '.join(NAMES)}")
    return name


def add_accuracy_options(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Add what `accuracy` and `label` can be asked for; `positive` reads whole numbers."""
    group = parser.add_argument_group(
        "accuracy: LiNiO2 patterns of Bloch waves, read by models and other programs; label: template matching beside"
        " pyxem, one crystal per Laue class (minutes; only by name)"
    )
    group.add_argument("--patterns", type=positive, default=200, metavar="N", help="patterns of a set; default 200")
    group.add_argument("--seed", type=positive, default=2024, help="of the test set; default 2024")
    group.add_argument(
        "--model", action="append", default=[], help="a model to judge, repeatable; default matched and what ships"
    )
    group.add_argument("--refine", action="store_true", help="judge every model refined as well")
    group.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="PATH",
        help="a Python that has pyxem or py4DSTEM, repeatable; default this one; predict asks pyxem as well",
    )
    group.add_argument("--no-peers", action="store_true", help="leave pyxem and py4DSTEM out")
    group.add_argument(
        "--full",
        action="store_true",
        help="pyxem and py4DSTEM on every set (hours), not only on those of py4DSTEM's Bloch waves: pyxem with ideal"
        " calibration and with the worst, py4DSTEM at 3,000 electrons and ideal calibration",
    )
    group.add_argument("--out", default="accuracy", metavar="DIR", help="folder of the test set; default accuracy")
    group.add_argument(
        "--laue", action="append", default=[], metavar="CLASS", help="label: a Laue class, repeatable; default five"
    )
    group.add_argument("--json", metavar="FILE", help="write the figures there")


def run_label(options: argparse.Namespace) -> None:
    """Run the benchmark of template matching that the parsed `options` describe."""
    from benchmarks.labelling import Options, run

    run(
        Options(
            patterns=options.patterns,
            seed=options.seed,
            classes=tuple(options.laue),
            peers=not options.no_peers,
            peer_pythons=tuple(options.peer_python),
            json=options.json,
        )
    )


def run_accuracy(options: argparse.Namespace) -> None:
    """Run the accuracy benchmark that the parsed `options` describe."""
    from benchmarks.accuracy import Options
    from benchmarks.accuracy import run as judge

    judge(
        Options(
            patterns=options.patterns,
            seed=options.seed,
            models=tuple(options.model),
            refine=options.refine,
            full=options.full,
            peers=not options.no_peers,
            peer_pythons=tuple(options.peer_python),
            out=options.out,
            json=options.json,
        )
    )


def _store(folder: Path, patterns: int = 4096) -> Path:
    from stemtune.dataset.simulate import simulate_store

    path = folder / f"{patterns}.h5"
    if not path.exists():
        simulate_store("linio2", path, patterns, SimulateConfig(), seed=0)
    return path


def _simulate(_: Path) -> Figures:
    from benchmarks.simulation_rates import simulation_rate

    return simulation_rate()


def _bloch(_: Path) -> Figures:
    from benchmarks.simulation_rates import bloch_rate

    return bloch_rate()


def _loading(folder: Path) -> Figures:
    from benchmarks.loading_rates import loading_rate, sharing

    store = _store(folder, 16384)
    return loading_rate(store) | sharing(store)


def _ingest(folder: Path) -> Figures:
    from benchmarks.ingest_rates import ingest_rate

    return ingest_rate(folder)


def _matched(_: Path) -> Figures:
    from benchmarks.learning_rates import matching_rate

    return matching_rate()


def _train(folder: Path) -> Figures:
    from benchmarks.learning_rates import loop_rate

    figures: dict[str, object] = {}
    for name, settings in MODELS.items():
        config = Config.from_flat({"data.store": str(_store(folder)), **settings})
        figures |= {f"{name} {key}": value for key, value in loop_rate(config).items()}
    return figures


def _predict(folder: Path, pythons: Sequence[str] | None = None) -> Figures:
    from benchmarks import predicting

    return predicting.run(_store(folder), MODELS, pythons)


def _refine(folder: Path) -> Figures:
    from benchmarks.map_rates import refine_rate
    from stemtune.dataset.store import Store
    from stemtune.learning.models import build

    with Store.open(_store(folder)) as store:
        model = build(Config.from_flat({"model.name": "matched"}), store.phases[0], store.geometry).eval()
        return refine_rate(store, model)


def _spread(folder: Path) -> Figures:
    from benchmarks.spreading import spread_rate

    return spread_rate(_store(folder), folder)


def _map(_: Path) -> Figures:
    from benchmarks.map_rates import grains_rate

    return grains_rate()


_MEASUREMENTS: dict[str, tuple[str, Callable[[Path], Figures]]] = {
    "simulate": ("kinematic patterns per second, beside diffsims", _simulate),
    "bloch": ("Bloch waves: orientations per second, 100 beams and four thicknesses, beside py4DSTEM", _bloch),
    "loading": ("shuffled batches from a store beside an array in memory; one copy among four readers", _loading),
    "ingest": ("a scan into a store, beside copying or unpacking the same bytes (MiB of patterns per second)", _ingest),
    "matched": ("patterns per second of the matched filter at 2 degrees", _matched),
    "train": ("the training loop beside the bare forward, backward and step", _train),
    "spread": ("prediction over a Ray of this machine, beside as many processes and beside one", _spread),
    PREDICT: ("prediction from file to answers, beside the bare model and beside pyxem", _predict),
    "map": ("grains, KAM, GROD and boundaries of a map of 1,000 x 1,000 pixels", _map),
    "refine": ("the physical fit of matched's answers, alone and from file to refined answers", _refine),
}

NAMES = (*_MEASUREMENTS, ACCURACY, LABEL, "sweep")
"""What can be measured; accuracy, label and sweep take minutes and are run by name only."""
