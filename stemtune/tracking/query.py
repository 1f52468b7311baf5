"""Reading sweeps back out of MLflow."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stemtune.errors import UserError, did_you_mean, masked
from stemtune.tracking.address import Address, address, client
from stemtune.tracking.events import ID_TAG, KIND_TAG, REASON_TAG, STATUS_TAG, SWEEP_TAG, TRIAL_TAG


@dataclass(frozen=True)
class TrialRecord:
    """One trial as MLflow keeps it: parameters as text, every epoch's metrics by name as (epoch, value) pairs."""

    trial: str
    name: str
    run_id: str
    status: str
    reason: str
    params: dict[str, str]
    tags: dict[str, str]
    last: dict[str, float]
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepRecord:
    """A sweep and its trials."""

    name: str
    run_id: str
    status: str
    params: dict[str, str]
    tags: dict[str, str]
    last: dict[str, float]
    trials: list[TrialRecord]


def _connect() -> tuple[Any, Address]:
    where = address()
    if where.uri.startswith("sqlite:///") and not Path(where.uri.removeprefix("sqlite:///")).exists():
        raise UserError(
            f"there is no MLflow file {where.uri.removeprefix('sqlite:///')}; go to the folder where the sweep ran,"
            " or set MLFLOW_TRACKING_URI"
        )
    return client(where), where


def reach(call: Any, where: Address, *arguments: Any, **named: Any) -> Any:
    """Call MLflow; a server that does not answer is the user's to mend."""
    try:
        return call(*arguments, **named)
    except Exception as problem:
        code = str(getattr(problem, "error_code", ""))
        if code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "UNAUTHENTICATED", "PERMISSION_DENIED"):
            reason = masked(str(problem)).splitlines()[0][:160]
            raise UserError(f"the MLflow server {where.shown} does not answer as it should: {reason}") from None
        raise


def _parents(api: Any, where: Address) -> list[Any]:
    experiments = reach(api.search_experiments, where)
    ids = [experiment.experiment_id for experiment in experiments]
    if not ids:
        return []
    found = reach(api.search_runs, where, ids, f"tags.`{KIND_TAG}` = 'sweep'", order_by=["attributes.start_time DESC"])
    return list(found)


def newest_sweep() -> str:
    """Return the name of the sweep that started last."""
    api, where = _connect()
    parents = _parents(api, where)
    if not parents:
        raise UserError(f"no sweep is recorded at {where.shown}; run `stemtune sweep` first")
    return str(parents[0].data.tags[SWEEP_TAG])


def read_sweep(name: str | None = None, curves: tuple[str, ...] = ()) -> SweepRecord:
    """Read the newest sweep called `name`, or the newest of all, with the full `curves` of these metrics.

    Raises
    ------
    UserError
        When there is no such sweep, or the tracking server does not answer.
    """
    api, where = _connect()
    parents = _parents(api, where)
    names = [run.data.tags[SWEEP_TAG] for run in parents]
    if not parents:
        raise UserError(f"no sweep is recorded at {where.shown}; run `stemtune sweep` first")
    if name is not None and name not in names:
        hint = did_you_mean(name, names) or f"; there are {', '.join(dict.fromkeys(names))}"
        raise UserError(f"no sweep called '{name}' is recorded at {where.shown}{hint}")
    parent = parents[0] if name is None else parents[names.index(name)]
    found: list[Any] = []
    page: str | None = None
    while page is None or page:
        part = reach(
            api.search_runs,
            where,
            [parent.info.experiment_id],
            f"tags.`{ID_TAG}` = '{parent.data.tags[ID_TAG]}' and tags.`{KIND_TAG}` = 'trial'",
            order_by=["attributes.start_time ASC"],
            page_token=page,
        )
        found += list(part)
        page = part.token or ""
    tags = dict(parent.data.tags)
    return SweepRecord(
        name=tags[SWEEP_TAG],
        run_id=parent.info.run_id,
        status=tags.get(STATUS_TAG, "running"),
        params=dict(parent.data.params),
        tags=tags,
        last=dict(parent.data.metrics),
        trials=[_trial(api, where, run, curves) for run in found],
    )


def _trial(api: Any, where: Address, run: Any, curves: tuple[str, ...]) -> TrialRecord:
    tags = dict(run.data.tags)
    history = {
        metric: sorted({(int(point.step), float(point.value)) for point in points})
        for metric in curves
        if metric in run.data.metrics
        for points in [reach(api.get_metric_history, where, run.info.run_id, metric)]
    }
    return TrialRecord(
        trial=tags[TRIAL_TAG],
        name=run.info.run_name or tags[TRIAL_TAG],
        run_id=run.info.run_id,
        status=tags.get(STATUS_TAG, "running"),
        reason=tags.get(REASON_TAG, ""),
        params=dict(run.data.params),
        tags=tags,
        last=dict(run.data.metrics),
        curves=history,
    )


def tagged_json(tags: dict[str, str], key: str) -> Any:
    """Return the JSON in a tag, or None where it is missing or was cut."""
    try:
        return json.loads(tags.get(key, ""))
    except ValueError:
        return None
