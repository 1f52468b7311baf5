"""Reading sweeps back out of MLflow."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from stemtune.errors import UserError, did_you_mean
from stemtune.tracking.client import Address, ask, open_client
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


def _parents(api: Any, where: Address) -> list[Any]:
    """Return the runs of all sweeps, the newest first."""
    experiments = ask(api.search_experiments, where)
    ids = [experiment.experiment_id for experiment in experiments]
    is_sweep, newest = f"tags.`{KIND_TAG}` = 'sweep'", ["attributes.start_time DESC"]
    found = list(ask(api.search_runs, where, ids, is_sweep, order_by=newest)) if ids else []
    if not found:
        raise UserError(f"no sweep is recorded at {where.shown}; run `stemtune sweep` first")
    return found


def newest_sweep() -> str:
    """Return the name of the sweep that started last."""
    return str(_parents(*open_client())[0].data.tags[SWEEP_TAG])


def read_sweep(name: str | None = None, curves: tuple[str, ...] = ()) -> SweepRecord:
    """Read the newest sweep called `name`, or the newest of all, with the full `curves` of these metrics."""
    api, where = open_client()
    parents = _parents(api, where)
    names = [run.data.tags[SWEEP_TAG] for run in parents]
    if name is not None and name not in names:
        hint = did_you_mean(name, names) or f"; there are {', '.join(dict.fromkeys(names))}"
        raise UserError(f"no sweep called '{name}' is recorded at {where.shown}{hint}")
    parent = parents[0] if name is None else parents[names.index(name)]
    found: list[Any] = []
    page: str | None = None
    while page is None or page:
        part = ask(
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
        for points in [ask(api.get_metric_history, where, run.info.run_id, metric)]
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
