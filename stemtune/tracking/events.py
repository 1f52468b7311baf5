"""What each event of a sweep becomes in MLflow. Sending an event twice leaves the same records as sending it once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from stemtune.tracking.client import KIND_OF_EXPERIMENT, UNAVAILABLE, Address, client, error_code

SWEEP_TAG = "stemtune.sweep"
TRIAL_TAG = "stemtune.trial"
KIND_TAG = "stemtune.kind"
ID_TAG = "stemtune.sweep_id"
STATUS_TAG = "stemtune.status"
REASON_TAG = "stemtune.reason"
NOTE_TAG = "stemtune.note"
CHANGED = "stemtune.changed"
CHAMPION = "champion"
CROWNED = "stemtune.champion_time"  # of a model version: when, in milliseconds since 1970
DEPOSED = "stemtune.deposed"  # of a model version: when its crown was taken back
MODEL_FOLDER = "model"

# A trial that ASHA stopped did what it should: a red cross would say that it failed. The tag tells the two apart.
_STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE", "ALREADY_EXISTS")
_ABSENT = (*UNAVAILABLE, "REQUEST_LIMIT_EXCEEDED")
_BATCH = 90  # parameters or tags of one request; MLflow takes 100
_LONGEST = 4000  # characters of a tag

# Where the MLflow UI finds the view that `?viewStateShareKey=stemtune` at the end of its address asks for.
VIEW_TAG = "mlflow.sharedViewState.stemtune"
_COLUMNS = 6  # searched settings that the view shows


def leaderboard_view(params: Mapping[str, Any], run: str) -> str:
    """Return the table of a sweep as the MLflow UI keeps views: trials, best first, and the columns that matter.

    `params` are those of the sweep's `run`: `metric`, `mode`, and `searched`, the settings that trials differ in.
    """
    searched = [name for name in str(params.get("searched", "")).split(", ") if name][:_COLUMNS]
    # Figures of the best epoch, so that those in one row belong together.
    columns = ["metrics.`best`", "metrics.`best_epoch`", "metrics.`best/within_5deg`"]
    columns += [f"params.`{name}`" for name in dict.fromkeys(["model.name", *searched])]
    state = {
        "orderByKey": "metrics.`best`",
        "orderByAsc": params.get("mode", "min") == "min",
        "selectedColumns": [*columns, f"tags.`{STATUS_TAG}`"],
        "searchFilter": f"tags.`{KIND_TAG}` = 'trial'",  # the sweep's own run does not stand among them
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "compareRunsMode": "TABLE",
        "viewMaximized": True,
        "hideEmptyCharts": True,
        "useGroupedValuesInCharts": True,
        "groupBy": None,
        "runsExpanded": {run: True},
        **{key: [] for key in ("runsPinned", "runsHidden", "datasetsFilter")},
    }
    return json.dumps(state)


class UnsendableEvent(Exception):
    """An event that no server could ever apply."""


class RecordsGone(Exception):
    """MLflow does not know a run that was begun: it came back with another database, or the run was deleted."""


def judge_failure(problem: Exception) -> Literal["refused", "away", "unclear"]:
    """Tell an event that MLflow will never take from a server that is not there."""
    code = error_code(problem)
    if code in _REFUSED or isinstance(problem, UnsendableEvent):
        return "refused"
    if code in _ABSENT or isinstance(problem, OSError):
        return "away"
    return "unclear"


class Sender:
    """Applies events to MLflow and remembers the ids of the runs it made or found."""

    def __init__(self, where: Address, name: str, sweep_id: str, folder: Path) -> None:
        self._where = where
        self._name = name
        self._sweep_id = sweep_id
        self._folder = folder  # of the sweep: the champion's model lies there, wherever it was moved to
        self._client: Any = None
        self._experiment_id: str | None = None
        self._runs: dict[str, str] = {}

    def forget(self) -> None:
        """Look runs up again: the server may have come back as another one."""
        self._experiment_id = None
        self._runs = {}

    def send(self, event: dict[str, Any]) -> None:
        """Apply one event; `RecordsGone` says that those before it have to be sent again."""
        if self._client is None:
            self._client = client(self._where)
        try:
            getattr(self, f"_{event['kind']}")(event)
        except Exception as problem:
            key = str(event.get("trial", ""))
            if self._is_gone(self._runs.get(key) or self._runs.get("")):
                raise RecordsGone(key) from problem
            raise

    def _is_gone(self, run: str | None) -> bool:
        """Whether MLflow answers, and no longer has this run among those that are not deleted."""
        try:
            return run is not None and self._client.get_run(run).info.lifecycle_stage == "deleted"
        except Exception as problem:
            return error_code(problem) == "RESOURCE_DOES_NOT_EXIST"

    def knows_sweep(self) -> bool:
        """Whether MLflow has the sweep's own run."""
        if self._client is None:
            self._client = client(self._where)
        return self._found(self._identity("")) is not None

    def _experiment(self) -> str:
        if self._experiment_id is None:
            found = self._client.get_experiment_by_name(self._name)
            if found is None:
                root = self._where.artifacts
                place = (root / self._name).as_uri() if root else None
                self._experiment_id = str(self._client.create_experiment(self._name, place, KIND_OF_EXPERIMENT))
            else:
                if found.lifecycle_stage == "deleted":
                    self._client.restore_experiment(found.experiment_id)
                self._experiment_id = str(found.experiment_id)
        return self._experiment_id

    def _run(self, key: str, event: dict[str, Any], name: str, tags: dict[str, str]) -> str:
        """Return the id of the run that carries the tag `key`; the event that begins it makes it if there is none."""
        if key not in self._runs:
            identity = self._identity(key)
            found = self._found(identity)
            if not found:
                if event["kind"] not in ("sweep", "trial"):
                    raise RecordsGone(key)
                tags = {**identity, **tags}
                made = self._client.create_run(self._experiment(), event["time"], tags, name)
                found = str(made.info.run_id)
            self._runs[key] = found
        return self._runs[key]

    def _identity(self, key: str) -> dict[str, str]:
        return {ID_TAG: self._sweep_id, **({TRIAL_TAG: key} if key else {KIND_TAG: "sweep"})}

    def _found(self, identity: dict[str, str]) -> str | None:
        wanted = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in identity.items())
        found = self._client.search_runs([self._experiment()], wanted, max_results=1)
        return str(found[0].info.run_id) if found else None

    def _parent(self, event: dict[str, Any]) -> str:
        return self._run("", event, self._name, {SWEEP_TAG: self._name})

    def _child(self, event: dict[str, Any]) -> str:
        key = event["trial"]
        if key in self._runs:
            return self._runs[key]
        tags = {SWEEP_TAG: self._name, KIND_TAG: "trial", "mlflow.parentRunId": self._parent(event)}
        return self._run(key, event, event.get("name", key), tags)

    def _write(self, run: str, event: dict[str, Any]) -> None:
        """Write the event's parameters, tags and values to the run."""
        from mlflow.entities import Metric, Param, RunTag

        params = [Param(key, str(value)) for key, value in event.get("params", {}).items()]
        tags = [RunTag(key, str(value)[:_LONGEST]) for key, value in event.get("tags", {}).items()]
        values = [
            Metric(key, float(value), report["time"], report.get("step", 0))
            for report in (event, *event.get("more", ()))  # with the reports that waited with this one
            for key, value in report.get("values", {}).items()
        ]
        try:
            self._log(run, params, tags, values)
        except Exception as problem:
            if "hanging param" not in str(problem):
                raise
            # MLflow keeps the first value of each: what a resume changed (trials, a moved store) becomes a tag.
            known = self._client.get_run(run).data.params
            changed = [RunTag(f"{CHANGED}.{one.key}", one.value) for one in params if known.get(one.key) != one.value]
            self._log(run, [one for one in params if one.key not in known], [*tags, *changed], values)

    def _log(self, run: str, params: list[Any], tags: list[Any], values: list[Any]) -> None:
        for start in range(0, max(len(params), len(tags), 1), _BATCH):
            part = slice(start, start + _BATCH)
            self._client.log_batch(
                run, metrics=values if not start else [], params=params[part], tags=tags[part], synchronous=True
            )

    def _sweep(self, event: dict[str, Any]) -> None:
        run = self._parent(event)
        self._client.update_run(run, status="RUNNING")
        self._write(run, event)
        self._client.set_experiment_tag(self._experiment(), VIEW_TAG, leaderboard_view(event.get("params", {}), run))
        if event.get("text"):
            self._client.log_text(run, event["text"], "space.yaml")

    def _trial(self, event: dict[str, Any]) -> None:
        run = self._child(event)
        self._client.update_run(run, status="RUNNING")
        self._write(run, event)

    def _metrics(self, event: dict[str, Any]) -> None:
        self._write(self._child(event), event)

    def _end(self, event: dict[str, Any]) -> None:
        run = self._child(event)
        outcome = {STATUS_TAG: event["status"], REASON_TAG: event["reason"]}
        self._write(run, {**event, "tags": {**event["tags"], **outcome}})
        self._client.set_terminated(run, _STATUS[event["status"]], end_time=event["time"])

    def _figures(self, event: dict[str, Any]) -> None:
        self._write(self._child(event), event)

    def _lost(self, event: dict[str, Any]) -> None:
        run = self._runs.pop(event["trial"], None) or self._found(self._identity(event["trial"]))
        if run is not None:
            self._client.delete_run(run)

    def _done(self, event: dict[str, Any]) -> None:
        run = self._parent(event)
        self._write(run, {**event, "tags": {**event["tags"], STATUS_TAG: event["status"]}})
        self._client.set_terminated(run, _STATUS[event["status"]], end_time=event["time"])

    def _champion(self, event: dict[str, Any]) -> None:
        run = self._child(event)
        folder = self._folder / event["folder"]
        if not (folder / "model.json").is_file():
            raise UnsendableEvent(f"the champion's model folder {folder} is gone")
        self._client.log_artifacts(run, str(folder), MODEL_FOLDER)
        self._write(run, event)
        source = f"{self._client.get_run(run).info.artifact_uri}/{MODEL_FOLDER}"
        version = self._version(run, source, event)
        self._client.set_registered_model_alias(self._name, CHAMPION, version)
        self._client.set_tag(self._parent(event), "stemtune.champion", event["trial"])
        self._client.update_registered_model(self._name, _family_card(self._name))
        self._client.update_model_version(self._name, version, self._card(run, event))

    def _card(self, run: str, event: dict[str, Any]) -> str:
        """Return what a person who meets this version in the registry must know, in Markdown."""
        parent = self._client.get_run(self._parent(event)).data.tags
        trial = self._client.get_run(run)
        tags = {**trial.data.tags, **event.get("tags", {})}
        facts = {
            "architecture": tags.get("stemtune.architecture", ""),
            "metric": f"{tags.get('stemtune.champion_metric', '')} {tags.get('stemtune.champion_value', '')}".strip(),
            "on the test split": tags.get("stemtune.champion_test", ""),
            "crystal": tags.get("stemtune.crystal", ""),
            "trial": trial.info.run_name or event["trial"],
            "training store (SHA-256)": parent.get("stemtune.store_sha256", ""),
            "commit": parent.get("stemtune.commit", ""),
        }
        lines = [f"- {name}: `{value}`" for name, value in facts.items() if value]
        return "\n".join([*lines, "", f"Load: `{_loaded(self._name)}`"])

    def _version(self, run: str, source: str, event: dict[str, Any]) -> str:
        """Return the registered model's version that `run` made; register it if it is not there yet."""
        try:
            self._client.get_registered_model(self._name)
        except Exception as problem:
            if error_code(problem) != "RESOURCE_DOES_NOT_EXIST":
                raise
            self._client.create_registered_model(self._name, tags={SWEEP_TAG: self._name})
        name = self._name.replace("'", "")
        for version in self._client.search_model_versions(f"name = '{name}'"):
            if version.run_id == run and version.tags.get(CROWNED) == str(event["time"]):
                return str(version.version)
        named = {"stemtune.trial_name": self._client.get_run(run).info.run_name}
        tags = {ID_TAG: self._sweep_id, CROWNED: str(event["time"]), **named, **event.get("tags", {})}
        return str(self._client.create_model_version(self._name, source, run_id=run, tags=tags).version)


def _loaded(name: str) -> str:
    return f"stemtune predict SCAN --model models:/{name}@{CHAMPION}"


def _family_card(name: str) -> str:
    """Return what stands above all versions of a sweep's model, in Markdown."""
    return (
        f"Reads crystal orientations out of STEM diffraction patterns. The alias `{CHAMPION}` is the trial that the"
        f" newest sweep `{name}` crowned; each version says which trial it is.\n\nLoad: `{_loaded(name)}`"
    )
