"""Who watches a sweep: a Tune callback that keeps records, tells MLflow and the terminal, and frees resources."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

from ray import PlacementGroupID
from ray.tune import Callback
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup

from stemtune._progress import say
from stemtune.config import METRICS, Config
from stemtune.tracking import NullTracker, Tracker, address, code_version
from stemtune.tune.cluster.node_check import nodes_of
from stemtune.tune.run.checkpoints import Snapshots, how_ended, mark_ended, train_folder
from stemtune.tune.run.manifest import PATHS
from stemtune.tune.run.trial import CORRUPT, DIVERGED, EARLIER, NO_SPACE, failure, passed_on
from stemtune.tune.run.trial_state import SweepProgress, TrialState, driver_state, history, unpacked
from stemtune.tune.space.space import SearchSpace

_TIMES = ("time/start_s", "time/first_report_s", "time/train_s", "time/device_s")


class SweepCallback(Callback):  # type: ignore[misc]
    """Follows every trial of the sweep `name` in `folder`; `tracked` is whether MLflow is told.

    Tune pickles its callbacks and restores them after a crash, so everything that cannot be pickled is made in
    `setup`, and the one in use is that of `driver_state`. `store_hash` is the training store's content hash, if there
    is a store.
    """

    def __init__(
        self, space: SearchSpace, folder: Path, name: str, sweep_id: str, tracked: bool, store_hash: str
    ) -> None:
        self.space, self.folder, self.name, self.sweep_id = space, folder, name, sweep_id
        self.tracked = tracked
        self._store_tag = {"stemtune.store_sha256": store_hash} if store_hash else {}
        self.trials: dict[str, TrialState] = {}
        self.over_time = False
        self._groups: dict[str, str] = {}
        self._stopped: set[str] = set()
        self._late: set[str] = set()
        self._started: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        gone = ("tracker", "progress", "snapshots")
        return {key: value for key, value in self.__dict__.items() if key not in gone}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        now = driver_state(self.sweep_id)
        if now.folder is not None and now.space is not None:  # moved or extended since
            self.folder, self.name, self.space = now.folder, now.folder.name, now.space

    def get_state(self) -> dict[str, Any]:
        return {"trials": self.trials}

    def set_state(self, state: dict[str, Any]) -> None:
        self.trials = state["trials"]
        driver_state(self.sweep_id).restored = True

    def setup(self, stop: Any = None, num_samples: Any = None, total_num_samples: Any = None, **info: Any) -> None:
        self.snapshots, self._staging = Snapshots(self.folder), Path()
        self._looked_back = False
        self.tracker: NullTracker | Tracker = NullTracker()
        if self.tracked:
            records_id = driver_state(self.sweep_id).records_id or self.sweep_id
            self.tracker = Tracker(self.folder, self.name, records_id, address())
        space = self.space
        self.progress = SweepProgress(space.budget.trials, space.metric, space.mode, space.fixed, self.trials.values())
        driver_state(self.sweep_id).callback = self
        params = {f"budget.{key}": value for key, value in vars(space.budget).items()}
        params |= {f"resources.{key}": value for key, value in vars(space.resources).items() if key != "workers_given"}
        params = {key: value for key, value in params.items() if value is not None}
        params["budget.within"] = ", ".join(space.budget.within)
        params |= {"metric": space.metric, "mode": space.mode, "design": space.design, **space.fixed}
        params["searched"] = ", ".join(space.searched)
        if space.also:
            params["metric.also"] = ", ".join(metric for metric, _ in space.also)
        tags = {**code_version(), "mlflow.note.content": space.about, "stemtune.folder": str(self.folder)}
        self.tracker.sweep(params, {**tags, **self._store_tag}, space.text)

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Before anything happens, see what was lost since Tune's last snapshot."""
        if not driver_state(self.sweep_id).restored:
            raise RuntimeError(f"Ray Tune did not take up the state of the sweep in {self.folder}; its log says why")
        if not self._looked_back:
            self._looked_back = True
            self._forget({trial.trial_id for trial in trials})
            for trial in trials:  # begun before an interrupt: this machine's network, and its folders, may be others
                trial.config["sweep"] |= {"environment": passed_on(), "folder": str(self.folder)}
                trial.config["knobs"] |= {key: self.space.fixed[key] for key in PATHS if key in self.space.fixed}
        self.snapshot(trials)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Keep what Tune has just written down, if it has."""
        self.over_time = self.over_time or driver_state(self.sweep_id).time_over
        self.snapshot(trials)

    def snapshot(self, trials: list[Any] | None = None) -> None:
        """Keep Tune's state; without `trials` for the last time."""
        if trials:
            self._staging = Path(trials[0].storage.experiment_driver_staging_path)
        if self._staging != Path():
            self.snapshots.copy_if_new(self._staging, now=trials is None)

    def _forget(self, known: set[str]) -> None:
        """Drop the trials that began after Tune's last snapshot: the sampler proposes them anew, as other trials."""
        for trial_id in self.tracker.begun() - known:
            self.tracker.lost(trial_id)
        for run in self.folder.glob("train/train-*"):
            if run.name.removeprefix("train-") not in known:
                shutil.rmtree(run, ignore_errors=True)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        knobs = dict(trial.config["knobs"])
        state = self.trials.get(trial.trial_id) or TrialState(trial.trial_id, int(trial.config["number"]), knobs)
        state.status, state.reason = "running", ""
        self.trials[trial.trial_id] = state
        self._started[trial.trial_id] = time.monotonic() - state.wall_s
        tags = {**code_version(), **self._store_tag, "stemtune.number": str(state.number)}
        tags["stemtune.architecture"] = state.label
        if trial.config.get("optuna"):
            tags["stemtune.optuna"] = json.dumps(trial.config["optuna"])
        name = f"{state.number:03d} {state.label}"
        self.tracker.trial(trial.trial_id, name, Config.from_flat(knobs).to_flat(), tags)
        self.progress.started(state)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Keep one epoch's figures."""
        result = unpacked(result)
        state = self.trials[trial.trial_id]
        for line in result.get(CORRUPT, ()):
            say(f"trial {state.number}: {line}")
        state.wall_s = self._wall(trial.trial_id)
        for report in (*result.get(EARLIER, ()), result):
            state.take(report, self.space.metric, self.space.mode)
            self._record(state, report)
        group = result.get("placement_group")
        if group and self._groups.get(trial.trial_id) != group:
            self._groups[trial.trial_id] = group
            state.nodes = nodes_of(group) or state.nodes
        if result.get("done"):  # set by who stops it: a trial that ends by itself reports no more
            (self._late if driver_state(self.sweep_id).time_over else self._stopped).add(trial.trial_id)
        self.progress.reported(state)

    def _record(self, state: TrialState, result: dict[str, Any]) -> None:
        state.values = {key: float(result[key]) for key in (*METRICS, *_TIMES) if key in result}
        self.tracker.metrics(state.trial, int(result["epoch"]), {**state.values, "time/wall_s": state.wall_s})

    def catch_up(self) -> None:
        """Take up the reports that reached a checkpoint but not Tune.

        A trial that ASHA stops may end one more epoch before its workers are gone; its checkpoint can be the best,
        and then the records have to know of it.
        """
        for state in self.trials.values():
            late = [report for report in history(self.folder, state.trial) if report["epoch"] > state.epoch]
            for metrics in late:
                state.take(metrics, self.space.metric, self.space.mode)
                self._record(state, metrics)
            if late and state.status in ("finished", "stopped", "failed"):
                self._record_end(state)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ended by itself, was stopped by ASHA, or ran out of the sweep's time."""
        folder, state = train_folder(self.folder, trial.trial_id), self.trials[trial.trial_id]
        through = state.epoch >= int(state.knobs.get("train.epochs", Config().train.epochs))
        if trial.trial_id in self._stopped or how_ended(folder) == "stopped":
            self._end(trial.trial_id, "stopped", "stopped by ASHA")
        elif trial.trial_id in self._late and not through:
            self._end(trial.trial_id, "stopped", f"out of time: the sweep's {self.space.budget.hours:g} h are over")
        else:
            patience = int(state.knobs.get("train.patience", 0))
            early = not through and 0 < patience < state.epoch  # a model without training has one epoch only
            why = f"no better {self.space.metric} for {patience} epoch{'s' * (patience > 1)}" if early else ""
            self._end(trial.trial_id, "finished", failure(folder, DIVERGED) or why)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's driver died, before its first report perhaps, and the trial starts once more."""
        self._free_dead(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._free_dead(trial.trial_id)
        error = str(trial.get_error() or "")
        reason = failure(train_folder(self.folder, trial.trial_id))
        reason = reason or (error.strip().splitlines() or ["no reason given"])[-1]
        if NO_SPACE in reason or NO_SPACE in error:
            raise OSError(errno.ENOSPC, NO_SPACE)  # the others would only fail one after another
        self._end(trial.trial_id, "failed", reason)

    def _end(self, trial_id: str, status: str, reason: str) -> None:
        state = self.trials[trial_id]
        state.status, state.reason, state.wall_s = status, reason, self._wall(trial_id)
        if status != "failed":  # that is tried again
            mark_ended(train_folder(self.folder, trial_id), status)
        self._free(trial_id)
        self._record_end(state)
        self.progress.ended(state)

    def _record_end(self, state: TrialState) -> None:
        values = {"time/wall_s": state.wall_s, "time/device_s": state.device_s}
        if not math.isnan(state.best):
            values |= {"best": state.best, "best_epoch": float(state.best_epoch)}
            values |= {f"best/{key.removeprefix('val/')}": value for key, value in state.best_values.items()}
        tags = {"stemtune.train_folder": str(train_folder(self.folder, state.trial))}
        tags["stemtune.nodes"] = " ".join(state.nodes)
        self.tracker.end(state.trial, state.status, state.reason, values, tags)

    def _wall(self, trial_id: str) -> float:
        now = time.monotonic()
        return now - self._started.get(trial_id, now)

    def _free_dead(self, trial_id: str) -> None:
        from stemtune.tune.cluster.ray_internals import free_groups

        self._groups.pop(trial_id, None)
        with contextlib.suppress(Exception):  # Ray itself may be gone
            free_groups(train_folder(self.folder, trial_id).name)

    def _free(self, trial_id: str) -> None:
        """Give the resources of several workers back: nobody else does when a trial is stopped from outside.

        Those of one worker are Tune's, which keeps them for the next trial.
        """
        group = self._groups.pop(trial_id, "")
        if not group or self.trials[trial_id].knobs["train.workers"] == 1:
            return
        with contextlib.suppress(Exception):
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))
