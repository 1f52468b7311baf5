"""The sampler: Optuna's TPE inside Ray Tune, with its study on disk and a memory that survives a crash."""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import distribution_to_json
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import TrialState
from ray.tune.search.optuna import OptunaSearch

from stemtune.config import Scalar
from stemtune.files import whole_file
from stemtune.tune.schedule import UNTRAINED
from stemtune.tune.space import SearchSpace
from stemtune.tune.trial import EARLIER

STUDY = "study.journal"
_REPEATS = 8  # proposals of settings that ran already before one is accepted


class StudySearch(OptunaSearch):  # type: ignore[misc]
    """Proposes trials from a `SearchSpace`.

    Ray's class forgets what happened between Tune's last snapshot and a crash, while the study on disk knows it:
    reporting to a trial that has ended raises, and trials that Tune never wrote down stay running for ever. This
    class takes both as they are. It also runs the space's baselines, which no sampler proposes, and tells the study
    the best figure of a trial instead of its last.

    Parameters
    ----------
    space
        What is searched.
    folder
        The sweep's folder, for the study.
    settings
        What every trial is told besides its settings.
    seed
        Seed of the sampler.
    """

    def __init__(self, space: SearchSpace, folder: Path, settings: dict[str, Any], seed: int = 0) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        logging.getLogger("ray.tune.search.optuna.optuna_search").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
        self.space = space
        self.settings = settings
        self._best: dict[str, float] = {}
        self._baselines = space.baselines()
        self._numbers: dict[str, int] = {}
        self._seen: list[str] = []
        super().__init__(
            space=space.suggest,
            metric=space.metric,
            mode=space.mode,
            points_to_evaluate=space.enqueued(),
            sampler=sampler,
            study_name=folder.name,
            storage=JournalStorage(JournalFileBackend(os.fspath(folder / STUDY))),
        )

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Return the settings of the next trial."""
        self._numbers.setdefault(trial_id, len(self._numbers))
        if self._baselines and trial_id not in self._ot_trials:
            flat, optuna_part = self._baselines.pop(0), None
        else:
            flat, optuna_part = self._proposed(trial_id)
        knobs = self.space.settings(flat)
        self._seen.append(_fingerprint(knobs))
        return {
            "knobs": knobs,
            "number": self._numbers[trial_id],
            "optuna": optuna_part,
            "sweep": self.settings,
        }

    def _proposed(self, trial_id: str) -> tuple[dict[str, Scalar], dict[str, Any]]:
        for attempt in range(_REPEATS):
            trial = self._ot_study.ask()
            flat = self.space.suggest(trial)
            if attempt == _REPEATS - 1 or _fingerprint(self.space.settings(flat)) not in self._seen:
                break
            self._ot_study.tell(
                trial, state=TrialState.FAIL
            )  # it ran already; a failed one teaches the sampler nothing
        self._ot_trials[trial_id] = trial
        distributions = {name: json.loads(distribution_to_json(kind)) for name, kind in trial.distributions.items()}
        return flat, {"params": dict(trial.params), "distributions": distributions}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Tell the study what a trial reported."""
        for report in (*result.get(EARLIER, ()), result):
            value = float(report[self.space.metric])
            best = self._best.get(trial_id, value)
            self._best[trial_id] = min(best, value) if self.space.mode == "min" else max(best, value)
            trial = self._ot_trials.get(trial_id)
            if trial is None or self._ended(trial):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an epoch that is told again after a restart
                trial.report(value, int(report.get("epoch", result["training_iteration"])))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study that a trial ended, and with which figure."""
        if result and self.space.metric in result and not error:
            self.on_trial_result(trial_id, result)
        trial = self._ot_trials.get(trial_id)
        self._completed_trials.add(trial_id)
        if trial is None or self._ended(trial):
            return
        value = self._best.get(trial_id)
        if error or value is None or not math.isfinite(value):
            self._ot_study.tell(trial, state=TrialState.FAIL)
        else:
            self._ot_study.tell(trial, value, state=TrialState.COMPLETE)

    def _ended(self, trial: Any) -> bool:
        frozen = self._ot_study._storage.get_trial(trial._trial_id)
        return bool(frozen.state.is_finished())

    def restore(self, checkpoint_path: str) -> None:
        """Take up the searcher's state from before a crash, and end the study's trials that Tune never knew."""
        super().restore(checkpoint_path)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        known = {trial.number for trial in self._ot_trials.values()}
        for trial in self._ot_study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.number in known:
                continue
            planned = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
            self._ot_study.tell(trial.number, state=TrialState.FAIL)
            if planned:
                self._ot_study.enqueue_trial(planned)  # what was lost is run again, whoever proposed it


def mend_study(folder: Path) -> None:
    """Take lines out of the study's journal that a crash or a full disk cut short: Optuna would read no further."""
    file = folder / STUDY
    if not file.exists():
        return
    lock = JournalFileSymlinkLock(os.fspath(file))
    lock.acquire()  # who writes holds it, so that no line is under way
    try:
        lines = file.read_bytes().splitlines(keepends=True)
        sound = [line for line in lines if line.endswith(b"\n") and _is_json(line)]
        if len(sound) < len(lines):
            with whole_file(file) as part:
                part.write_bytes(b"".join(sound))
    finally:
        lock.release()


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _fingerprint(knobs: dict[str, Scalar]) -> str:
    """Return what makes two trials the same; a model that is not trained has no optimiser and no head."""
    shown = knobs
    if knobs.get("model.name") in UNTRAINED:
        shown = {key: value for key, value in knobs.items() if key.split(".")[0] in ("model", "data", "simulate")}
    return json.dumps(shown, sort_keys=True)
