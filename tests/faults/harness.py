"""A sweep to kill things in: a small store, twelve short trials, a real process, and what must hold at the end.

`Sweep` starts, watches, kills and resumes; `check` is the one judge of every fault. Moments are drawn from
STEMTUNE_FAULT_SEED (1), so that a run can be repeated; STEMTUNE_FAULT_TRIALS makes a quicker, weaker check.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

from stemtune._files import damage

METRIC = "val/disorientation_median_deg"
EPOCHS = 3
FIRST: list[dict[str, Any]] = [
    {"model.name": "matched", "model.grid_step": 6},
    *(
        {"model.name": "cnn", "optim.lr": rate, "model.kernel_size": size, "model.width": width}
        for rate, size, width in (
            *((1e-2, 3, 8), (3e-3, 3, 8), (3e-3, 5, 8), (1e-3, 3, 8)),
            *((1e-3, 3, 4), (3e-4, 3, 8), (3e-4, 3, 4), (1e-4, 3, 4)),
        )
    ),
]
TRIALS = int(os.environ.get("STEMTUNE_FAULT_TRIALS", "12"))
SPACE: dict[str, Any] = {
    "about": "Does a sweep outlive what dies in it?",
    "metric": METRIC,
    "budget": {"trials": TRIALS, "epochs": EPOCHS, "grace_epochs": 1, "reduction": 2},
    "resources": {"cpus_per_worker": 1},
    "fixed": {"data.store": "small.h5", "train.batch_size": 32, "head.step": 20},
    "search": {
        "optim.lr": {"log": [1e-4, 1e-2]},
        "model.name": {"one_of": {"cnn": {"model.kernel_size": [3, 5], "model.width": {"log_int": [4, 8]}}}},
    },
    "first": FIRST[: max(1, TRIALS - 3)],  # the sampler proposes the rest
}

SEED = int(os.environ.get("STEMTUNE_FAULT_SEED", "1"))
PATIENCE_S = float(os.environ.get("STEMTUNE_FAULT_PATIENCE_S", "1800"))

WORKER, TRIAL = "ray::RayTrainWorker", "ray::ImplicitFunc"
"""Titles of the processes that Ray starts: one of several workers of a trial; where one worker trains, or where several
are driven from."""


class Sweep:
    """A sweep as users run it, in a folder of its own.

    Parameters
    ----------
    here
        The folder.
    space
        Its search space.
    local
        Whether it starts a Ray of its own.
    environment
        More environment variables.
    """

    def __init__(
        self, here: Path, space: dict[str, Any] = SPACE, local: bool = True, environment: dict[str, str] | None = None
    ) -> None:
        from stemtune.config import Config
        from stemtune.dataset.simulate import simulate_store

        self.here, self.log, self.name = here, here / "sweep.log", "faulty"
        self.folder = here / "sweeps" / self.name
        self.space = space
        self.local = ["--local"] if local else []
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        for name in ("STEMTUNE_SWEEPS", "RAY_ADDRESS"):
            if name not in (environment or {}):
                self.environment.pop(name, None)
        settings = Config.from_flat({"simulate.size": 32, "simulate.scale": 0.1}).simulate
        simulate_store("linio2", here / "small.h5", 1200, settings, 0)
        (here / "space.yaml").write_text(json.dumps(space))  # JSON is YAML
        self.process: psutil.Popen | None = None

    def start(self, *arguments: str) -> None:
        """Start it, or go on with it (`--resume`)."""
        with self.log.open("ab") as log:
            self.process = psutil.Popen(
                [sys.executable, "-m", "stemtune.cli", "sweep", *arguments, *self.local],
                cwd=self.here,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def begin(self) -> None:
        """Start it for the first time."""
        self.start("space.yaml", "--name", self.name)

    def resume(self) -> None:
        """Go on with it and wait for its end."""
        self.start("--resume", self.name)
        self.ends()

    def ends(self, code: int | None = 0) -> int:
        """Wait for its end and see that it ends as it should."""
        assert self.process is not None
        found = int(self.process.wait(timeout=PATIENCE_S))
        assert code is None or found == code, f"exit code {found}\n{self.said()}"
        return found

    def said(self) -> str:
        """Return all that it said."""
        return self.log.read_text() if self.log.exists() else ""

    def ended(self) -> int:
        """Return how many trials have ended."""
        return sum(" after epoch " in line for line in self.said().splitlines())

    def until(self, what: Callable[[], Any], pause_s: float = 0.2) -> Any:
        """Wait until `what` gives something true, as long as the sweep runs, and return that."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            found = what()
            if found:
                return found
            assert self.process is not None
            assert self.process.poll() is None, f"the sweep ended:\n{self.said()}"
            time.sleep(pause_s)
        raise AssertionError(f"nothing came in {PATIENCE_S:g} s:\n{self.said()}")

    def random_moment(self, kind: str) -> None:
        """Wait for some trials to end, and some seconds more; which and how many depends on the seed and the fault."""
        draw = random.Random(f"{kind} {SEED}")
        trials, seconds = draw.randint(2, TRIALS // 2), draw.uniform(0.0, 5.0)
        self.until(lambda: self.ended() >= trials)
        time.sleep(seconds)
        self.note(f"{kind}: {seconds:.1f} s after trial {trials} ended")

    def note(self, line: str) -> None:
        """Write a line of the harness into the log."""
        with self.log.open("a") as log:
            log.write(f"harness: {line}\n")

    def members(self, title: str = "") -> list[psutil.Process]:
        """Return the processes that the sweep started, by the beginning of their title."""
        assert self.process is not None
        return [member for member in self.process.children(recursive=True) if titled(member, title)]

    def kill(self, victims: Iterable[psutil.Process]) -> None:
        """Kill -9."""
        for victim in victims:
            self.note(f"kill -9 {victim.pid} {titled_as(victim)[:60]}")
            kill(victim)

    def kill_driver(self) -> None:
        """Kill the process that the user started; what it started must go by itself."""
        assert self.process is not None
        family = self.members()
        self.kill([self.process])
        self.process.wait(timeout=60)
        _, left = psutil.wait_procs(family, timeout=120)
        assert not left, f"still there two minutes after the driver's death: {[titled_as(one) for one in left]}"

    def stop(self) -> None:
        """Leave nothing running."""
        if self.process is not None and self.process.is_running():
            family = [*self.process.children(recursive=True), self.process]
            for member in family:
                kill(member)


def kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)


def titled_as(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def titled(process: psutil.Process, beginning: str) -> bool:
    return titled_as(process).startswith(beginning)


def unfinished_checkpoints(sweep: Sweep) -> list[Path]:
    """Return the newest checkpoint of each trial that has one but is not through."""
    newest = []
    for run in (sweep.folder / "train").glob("train-*"):
        entries = sorted(run.glob("checkpoint_*/"), key=lambda entry: entry.name)
        if entries and len(entries) < EPOCHS and not (run / "ended").exists():
            newest.append(entries[-1])
    return newest


def check(sweep: Sweep, uri: str | None = None, failed: tuple[int, ...] = ()) -> dict[str, Any]:
    """See that the sweep ended as an undisturbed one would have: trials, study, MLflow, champion, checkpoints.

    Parameters
    ----------
    sweep
        The sweep, through.
    uri
        The tracking server; the sweep's own SQLite file without it.
    failed
        Numbers of the trials that had to fail.

    Returns
    -------
    dict
        The champion's number and figure.
    """
    from mlflow.tracking import MlflowClient

    api = MlflowClient(uri or f"sqlite:///{sweep.here / 'mlflow.db'}")
    experiment = api.get_experiment_by_name(sweep.name)
    runs = list(api.search_runs([experiment.experiment_id], max_results=1000))
    parents = [run for run in runs if run.data.tags["stemtune.kind"] == "sweep"]
    trials = {int(run.data.tags["stemtune.number"]): run for run in runs if run not in parents}
    count = sweep.space["budget"]["trials"]
    assert [run.info.status for run in parents] == ["FINISHED"]
    assert len(runs) == 1 + count, f"{len(runs)} runs for {count} trials"
    assert sorted(trials) == list(range(count)), "the same set of trials, each once"
    curves = {number: _curve(api, run, number in failed) for number, run in trials.items()}
    _check_settings(sweep, trials)
    best = {number: min(curve.values()) for number, curve in curves.items() if curve}
    champion = min(best, key=lambda number: best[number])
    assert parents[0].data.metrics["best"] == best[champion]
    if crowned := parents[0].data.tags.get("stemtune.champion"):  # trials this short learn little
        assert crowned == trials[champion].data.tags["stemtune.trial"]
        version = api.get_model_version_by_alias(sweep.name, "champion")
        assert version.run_id == trials[champion].info.run_id
    _check_disk(sweep, trials, best)
    _check_study(sweep, trials, best)
    return {"champion": champion, METRIC: best[champion]}


def trained(sweep: Sweep) -> list[tuple[float, float]]:
    """Return when each trial began to train and made its last report, in seconds since 1970."""
    from mlflow.tracking import MlflowClient

    api = MlflowClient(f"sqlite:///{sweep.here / 'mlflow.db'}")
    experiment = api.get_experiment_by_name(sweep.name)
    spans = []
    for run in api.search_runs([experiment.experiment_id], max_results=1000):
        if run.data.tags["stemtune.kind"] == "sweep":
            continue
        told = sorted(point.timestamp / 1000 for point in api.get_metric_history(run.info.run_id, METRIC))
        figures = run.data.metrics
        spans.append((told[0] - (figures["time/first_report_s"] - figures["time/start_s"]), told[-1]))
    return spans


def _curve(api: Any, run: Any, failed: bool) -> dict[int, float]:
    """Return a trial's figure by epoch, after seeing that MLflow has each of its figures once for each epoch."""
    number, status = run.data.tags["stemtune.number"], run.data.tags["stemtune.status"]
    assert (status == "failed") is failed, f"trial {number} {status}: {run.data.tags.get('stemtune.reason')}"
    assert run.info.status == ("FAILED" if failed else "FINISHED"), status
    if failed:
        return {}
    epochs = None
    for key in ("val/loss", "train/loss", "train/samples_per_s", METRIC):
        points = api.get_metric_history(run.info.run_id, key)
        steps = sorted(point.step for point in points)
        assert steps == list(range(1, len(steps) + 1)), f"trial {number}, {key}: epochs {steps}"
        assert epochs in (None, len(steps)), f"trial {number}, {key}: {len(steps)} epochs, not {epochs}"
        epochs = len(steps)
        curve = {point.step: point.value for point in points}
    wanted = 1 if run.data.params["model.name"] == "matched" else EPOCHS
    diverged = min(curve.values()) >= 180.0  # reported as worse than any other, and over
    fewest = wanted if status == "finished" and not diverged else 1
    assert fewest <= (epochs or 0) <= wanted, f"trial {number} {status}: {epochs} epochs"
    assert 0 < run.data.metrics["time/device_s"] < PATIENCE_S
    assert 0 < run.data.metrics["time/wall_s"] < 2 * PATIENCE_S
    return curve


def _check_settings(sweep: Sweep, trials: dict[int, Any]) -> None:
    """Each planned trial ran once, as planned, and no settings ran twice."""
    settings = [{key: _plain(value) for key, value in run.data.params.items()} for run in trials.values()]
    for planned in sweep.space["first"]:
        wanted = {key: _plain(value) for key, value in planned.items()}
        assert sum(wanted.items() <= known.items() for known in settings) == 1, f"{planned} did not run just once"
    searched = sorted({key for planned in sweep.space["first"] for key in planned} - {"model.grid_step"})
    proposed = [tuple(known[key] for key in searched) for known in settings if known["model.name"] != "matched"]
    assert len(set(proposed)) == len(proposed), "settings ran twice"


def _plain(value: Any) -> str:
    """Return a setting as MLflow's text and the space's number have it in common."""
    try:
        return f"{float(value):.9g}"
    except ValueError:
        return str(value)


def _check_disk(sweep: Sweep, trials: dict[int, Any], best: dict[int, float]) -> None:
    """The sweep says that it is through, nothing waits for MLflow, every checkpoint is sound and the best is there."""
    assert json.loads((sweep.folder / "sweep.json").read_text())["status"] == "finished"
    assert not (sweep.folder / "tracking.refused.jsonl").exists()
    assert int((sweep.folder / "tracking.sent").read_text()) == (sweep.folder / "tracking.jsonl").stat().st_size
    runs = {run.data.tags["stemtune.trial"]: number for number, run in trials.items()}
    for folder in (sweep.folder / "train").iterdir():
        number = runs[folder.name.removeprefix("train-")]
        kept = list(folder.glob("checkpoint_*/"))
        assert len(kept) <= 3, f"trial {number} keeps {len(kept)} checkpoints"
        assert [damage(entry) for entry in kept if damage(entry)] == []
        figures = [json.loads((entry / "model" / "model.json").read_text())["metrics"][METRIC] for entry in kept]
        if number in best and figures:
            assert min(figures) <= best[number] * (1 + 1e-6), f"trial {number} lost its best checkpoint"


def _check_study(sweep: Sweep, trials: dict[int, Any], best: dict[int, float]) -> None:
    """The searcher remembers every trial that it proposed, with its best figure, and waits for none."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = JournalStorage(JournalFileBackend(str(sweep.folder / "study.journal")))
    study = optuna.load_study(study_name=sweep.name, storage=storage)
    states = [trial.state.name for trial in study.get_trials()]
    assert not {"RUNNING", "WAITING"} & set(states), states
    ended = [trial for trial in study.get_trials() if trial.state.name in ("COMPLETE", "PRUNED")]
    remembered = Counter(round(min(trial.intermediate_values.values()), 6) for trial in ended)
    proposed = [number for number, run in trials.items() if "stemtune.optuna" in run.data.tags and number in best]
    wanted = Counter(round(best[number], 6) for number in proposed)
    again = sum(len(numbers) for key, numbers in study.user_attrs.items() if key.startswith("stemtune.again."))
    assert wanted <= remembered
    assert (remembered - wanted).total() <= again  # what ended unknown to Tune is known twice
