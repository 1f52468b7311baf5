"""The sampler: Optuna's TPE inside Ray Tune, with its study on disk and a memory that survives a crash.

The study lies in the sweep's folder, or where several sweeps share it. Several drivers that share a study propose from
what all of them have learned. Each trial of a study carries the id of the sweep that runs it, so that a driver that
comes back after a crash ends its own lost trials and nobody else's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import pickle
import warnings
import zlib
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import optuna
from optuna.distributions import distribution_to_json
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import ConcurrencyLimiter, Searcher, SearchGenerator

from stemtune._files import whole_file
from stemtune.config import Scalar
from stemtune.errors import UserError, masked
from stemtune.tune.run.trial import EARLIER
from stemtune.tune.run.trial_state import driver_state, unpacked
from stemtune.tune.space.forms import Dice
from stemtune.tune.space.space import SearchSpace

STUDY = "study.journal"
SWEEP, SETTINGS = "stemtune.sweep", "stemtune.settings"
"""User attributes of a trial: the sweep that runs it, the digest of its settings."""

SPACE, AGAIN = "stemtune.space", "stemtune.again"
"""User attributes of a study: what it searches; with a sweep's id, which trials that planned anew after a crash."""

_LOCK = 0x5354454D  # number of the database's lock, any that nobody else uses
_REPEATS = 8  # proposals of settings that ran already before one is accepted; the later half at random
_YOUNG = timedelta(seconds=60)  # a trial that carries no sweep's id yet may be one that another driver just asked for


FINISHED: str = Searcher.FINISHED  # what Tune is told instead of settings when there are no more

UNTRAINED = ("matched",)
"""Models that learn nothing: their one report says how good they are, not how good they will become."""


class Limiter(ConcurrencyLimiter):  # type: ignore[misc]
    """Proposes a trial only where the cluster that the sweep runs on has room for it: a resume may find another one."""

    def suggest(self, trial_id: str) -> Any:
        """Return the settings of the next trial, or None while there is no room."""
        self.max_concurrent: int = driver_state(self.searcher.sweep_id).at_once or self.max_concurrent
        return super().suggest(trial_id)


class Proposals(SearchGenerator):  # type: ignore[misc]
    """Makes trials until there are as many as the budget says: a resume may raise it, even of a finished sweep."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Take up the state from before an interrupt, but for what ended the sweep then."""
        space = driver_state(getattr(self.searcher.searcher, "sweep_id", "")).space
        total = state["total_samples"] if space is None else space.budget.trials
        super().set_state({**state, "total_samples": total, "finished": False})


class StudySearch(Searcher):  # type: ignore[misc]
    """Proposes trials from a `SearchSpace` by Optuna.

    After a crash the study on disk knows what happened since Tune's last snapshot, where a trial may run that has
    ended, or one be missing that the study takes for running; this class takes both as they are, which Ray's own
    `OptunaSearch` does not. It also runs the space's baselines, which no sampler proposes, tells the study the best
    figure of a trial instead of its last, and that trials which the scheduler stopped were pruned.

    The study lies in the sweep's `folder`, or is the one that other sweeps share (`study`, see `find_study`), where
    `sweep_id` marks this sweep's trials. `settings` are what every trial gets besides its own.
    """

    _study: Any

    def __init__(
        self,
        space: SearchSpace,
        folder: Path,
        settings: dict[str, Any],
        seed: int = 0,
        sweep_id: str = "",
        study: str = "",
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if study:  # of two drivers with one seed both would draw the same
                seed = (seed + zlib.crc32(folder.name.encode())) % 2**32
            sampler = optuna.samplers.TPESampler(
                seed=seed,
                n_startup_trials=space.budget.startup,
                multivariate=True,
                group=True,
                constant_liar=True,
            )
        self.space = space
        self.settings = settings
        self.study = study
        place = find_study(study, folder, space)
        storage = open_storage(place)
        joined = join(place, storage, space)
        self.sweep_id = sweep_id
        self._best: dict[str, float] = {}
        self._others: dict[str, list[float]] = {}
        self._baselines = [] if joined and study else space.baselines()  # who began the study runs them
        self._numbers: dict[str, int] = {}
        self._seen: set[str] = set()
        self._again: set[str] = set()
        self._trials: dict[str, Any] = {}
        self._study: Any = optuna.create_study(
            study_name=place.name,
            storage=storage,
            sampler=sampler,
            directions=["minimize" if mode == "min" else "maximize" for _, mode in space.objectives],
            load_if_exists=True,
        )
        super().__init__(metric=space.metric, mode=space.mode)
        if joined:
            self._give_up_lost()
        else:
            self._study.set_user_attr(SPACE, search_digest(space))
            for point in space.enqueued():
                self._study.enqueue_trial(point)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Return the settings of the next trial, or that there is none when the sweep's time is over."""
        if driver_state(self.sweep_id).time_over:
            return FINISHED
        self._numbers.setdefault(trial_id, len(self._numbers))
        if self._baselines and trial_id not in self._trials:
            flat, optuna_part = self._baselines.pop(0), None
        else:
            flat, optuna_part = self._proposed(trial_id)
        knobs = self.space.settings(flat)
        self._seen.add(_fingerprint(knobs))
        return {"knobs": knobs, "number": self._numbers[trial_id], "optuna": optuna_part, "sweep": self.settings}

    def _proposed(self, trial_id: str) -> tuple[dict[str, Scalar], dict[str, Any]]:
        for attempt in range(_REPEATS):
            if attempt >= _REPEATS // 2:  # the sampler insists on what it knows already
                drawn = self.space.suggest(Dice(len(self._seen) * _REPEATS + attempt))
                self._study.enqueue_trial(self.space.registered_point(drawn))
            trial = self._study.ask()
            trial.set_user_attr(SWEEP, self.sweep_id)
            flat = self.space.suggest(trial)
            settings = _fingerprint(self.space.settings(flat))
            if settings in self._again:
                self._again.discard(settings)
                break
            if attempt == _REPEATS - 1 or not (settings in self._seen or self._elsewhere(settings)):
                break
            # It ran already; a failed one teaches the sampler nothing.
            self._study.tell(trial, state=TrialState.FAIL)
        self._trials[trial_id] = trial
        trial.set_user_attr(SETTINGS, settings)
        distributions = {name: json.loads(distribution_to_json(kind)) for name, kind in trial.distributions.items()}
        return flat, {"params": dict(trial.params), "distributions": distributions}

    def _elsewhere(self, settings: str) -> bool:
        """Whether the study knows a trial of these settings, another sweep's perhaps."""
        known = self._study.get_trials(deepcopy=False)
        return any(trial.user_attrs.get(SETTINGS) == settings for trial in known if trial.state != TrialState.FAIL)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        for report in (*result.get(EARLIER, ()), unpacked(result)):
            value = float(report[self.space.metric])
            best = self._best.get(trial_id, value)
            self._best[trial_id] = min(best, value) if self.space.mode == "min" else max(best, value)
            if trial_id not in self._others or self._best[trial_id] != best:
                self._others[trial_id] = [float(report[metric]) for metric, _ in self.space.also]
            trial = self._trials.get(trial_id)
            if trial is None or self.space.also:
                continue  # with several objectives a study takes no reports, only the end
            with warnings.catch_warnings(), contextlib.suppress(UpdateFinishedTrialError):
                warnings.simplefilter("ignore")  # an epoch that is told again after a restart
                trial.report(value, int(report.get("epoch", result["training_iteration"])))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study that a trial ended, and with which figure."""
        if result and self.space.metric in result and not error:
            self.on_trial_result(trial_id, result)
        trial = self._trials.get(trial_id)
        if trial is None:
            return
        value = self._best.get(trial_id)
        tell = partial(self._study.tell, trial, skip_if_finished=True)  # what a crash took from Tune, the study knows
        if error or value is None or not math.isfinite(value):
            tell(state=TrialState.FAIL)
        elif trial_id in driver_state(self.sweep_id).pruned and not self.space.also:
            tell(state=TrialState.PRUNED)  # with its last report, that of the rung
        else:
            tell(values=[value, *self._others.get(trial_id, [])], state=TrialState.COMPLETE)

    def save(self, checkpoint_path: str) -> None:
        """Write the searcher's state into the file `checkpoint_path`."""
        Path(checkpoint_path).write_bytes(pickle.dumps(self.__dict__))

    def restore(self, checkpoint_path: str) -> None:
        """Take up the searcher's state from before a crash, and end the study's trials that Tune never knew."""
        self.__dict__.update(pickle.loads(Path(checkpoint_path).read_bytes()))
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        now = driver_state(self.sweep_id)
        if now.folder is not None and now.space is not None:
            self._move_to(now.folder, now.space)
        self._give_up_lost()

    def _move_to(self, folder: Path, space: SearchSpace) -> None:
        """Go on in `folder`, which may be another than the one that the pickled study names."""
        self.space, self.settings = space, {**self.settings, "folder": str(folder)}
        storage = open_storage(find_study(self.study, folder, space))
        old = self._study
        self._study = optuna.load_study(study_name=old.study_name, storage=storage, sampler=old.sampler)
        for trial in self._trials.values():
            trial.study, trial.storage = self._study, storage

    def _give_up_lost(self) -> None:
        """Plan anew what this sweep began and Tune, after a crash, does not know, whether it ended or not.

        Trials that still run in the study are ended there. Those that had ended stay, for what they taught the sampler
        is true. That they were planned again is written down: another crash must not plan them a third time.
        """
        # What Tune knows, and what an earlier crash of this sweep has planned anew already.
        known = {trial.number for trial in self._trials.values()}
        mark = f"{AGAIN}.{self.sweep_id}"
        again = set(self._study.user_attrs.get(mark, []))
        trials = self._study.get_trials(deepcopy=False)
        going_on = {trial.user_attrs.get(SETTINGS) for trial in trials if trial.number in known}
        for trial in trials:
            if trial.number in known or not self._ours(trial):
                continue
            # A trial of ours that Tune has lost: end it if it still runs, and leave it if it never began.
            settings = trial.user_attrs.get(SETTINGS)
            if trial.state == TrialState.RUNNING:
                self._study.tell(trial.number, state=TrialState.FAIL)
            elif trial.state == TrialState.WAITING or not settings:
                continue  # planned, or proposed twice and never begun
            # Plan its settings once more, unless that was done: then only let them pass as no repetition.
            if trial.number in again:
                if settings not in going_on:
                    self._again.add(settings)
                continue
            planned = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
            if planned:
                self._study.enqueue_trial(planned)  # what was lost is run again, whoever proposed it
            if settings:
                self._again.add(settings)
                again.add(trial.number)
        self._study.set_user_attr(mark, sorted(again))

    def _ours(self, trial: FrozenTrial) -> bool:
        if SWEEP in trial.user_attrs:
            return bool(trial.user_attrs[SWEEP] == self.sweep_id)
        return trial.datetime_start is None or datetime.now() - trial.datetime_start > _YOUNG


def repair_journal(file: Path) -> None:
    """Take lines out of a study's journal that a crash or a full disk cut short: Optuna would read no further."""
    if not file.exists():
        return
    lock = JournalFileSymlinkLock(os.fspath(file))
    lock.acquire()  # who writes holds it, so that no line is under way
    try:
        lines = file.read_bytes().splitlines(keepends=True)
        intact = []
        for line in lines:
            with contextlib.suppress(ValueError):
                json.loads(line)
                if line.endswith(b"\n"):
                    intact.append(line)
        if len(intact) < len(lines):
            with whole_file(file) as part:
                part.write_bytes(b"".join(intact))
    finally:
        lock.release()


def _fingerprint(knobs: dict[str, Scalar]) -> str:
    """Return what makes two trials the same; a model that is not trained has no optimiser and no head."""
    if knobs.get("model.name") in UNTRAINED:
        knobs = {key: value for key, value in knobs.items() if key.split(".")[0] in ("model", "data", "simulate")}
    return digest(knobs)


@dataclass(frozen=True)
class Study:
    """A study's name, and the database or the journal file that holds it."""

    name: str
    url: str = ""
    file: Path | None = None

    @property
    def shown(self) -> str:
        """Where it lies, without secrets."""
        return masked(self.url) if self.url else str(self.file)


def find_study(given: str, folder: Path, space: SearchSpace) -> Study:
    """Return the study of the sweep in `folder`.

    `given` is empty for a study of its own; the name of another sweep, whose study is shared; or
    `postgresql://USER@HOST/DATABASE[#NAME]`, where NAME is the space's own name unless given. An address of another
    kind, or one that holds a password, is refused.
    """
    if "://" not in given:
        name = given or folder.name
        return Study(name, file=folder.parent / name / STUDY)
    url, _, name = given.partition("#")
    scheme, _, rest = url.partition("://")
    parts = urlsplit(url)
    if parts.password or "password=" in parts.query:
        raise UserError("the address of a study must hold no password; put it into ~/.pgpass (mode 600) or PGPASSWORD")
    if scheme.split("+")[0] == "postgresql":
        return Study(name or space.name, url=f"postgresql+psycopg://{rest}")
    raise UserError(f"--study is '{masked(given)}', but must be a sweep's name or postgresql://USER@HOST/DATABASE")


def open_storage(study: Study) -> BaseStorage:
    """Open what holds the study; refuse a database that does not answer, refuses us, or is MLflow's."""
    if study.file is not None:
        study.file.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(os.fspath(study.file)))
    import sqlalchemy

    try:
        engine = sqlalchemy.create_engine(study.url)
        with contextlib.ExitStack() as last:
            last.callback(engine.dispose)
            connection = last.enter_context(engine.connect())
            # Whoever comes first makes the tables; two at once would each find none and one would fail.
            connection.execute(sqlalchemy.text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
            tables = set(sqlalchemy.inspect(connection).get_table_names())
            if "alembic_version" in tables and "studies" not in tables:
                raise UserError(
                    f"the database {study.shown} holds other tables, MLflow's perhaps, and a study needs one of its"
                    " own: createdb --owner USER optuna"
                )
            return RDBStorage(study.url, engine_kwargs={"pool_pre_ping": True})
    except (ModuleNotFoundError, sqlalchemy.exc.SQLAlchemyError, RuntimeError) as problem:
        hint = "; pip install -e '.[server]'" if isinstance(problem, ModuleNotFoundError) else ""
        reason = masked(str(problem)).strip().splitlines()[0][:300] or type(problem).__name__
        raise UserError(f"cannot open the study at {study.shown}: {reason}{hint}") from None


def join(study: Study, storage: BaseStorage, space: SearchSpace) -> bool:
    """Return whether the study is there already; refuse it when it searches anything else than `space`."""
    try:
        number = storage.get_study_id_from_name(study.name)
    except KeyError:
        return False
    theirs = storage.get_study_user_attrs(number).get(SPACE)
    if theirs is not None and theirs != search_digest(space):
        raise UserError(
            f"the study '{study.name}' at {study.shown} searches another space or by another metric; sweeps that share"
            " a study need the same metric, mode and search"
        )
    return True


def search_digest(space: SearchSpace) -> str:
    """Return a digest of what two sweeps must have in common to share a study."""
    return digest([*map(list, space.objectives), {key: repr(form) for key, form in space.search.items()}])


def digest(value: Any) -> str:
    """Return a short digest of anything that JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
