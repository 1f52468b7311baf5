"""A sweep's records as figures: leaderboard, architectures side by side, importances, Pareto fronts, seeds, cost."""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator, get_param_importances

from stemtune.tracking.events import ID_TAG, NOTE_TAG, SWEEP_TAG
from stemtune.tracking.query import SweepRecord, TrialRecord, tagged_json
from stemtune.tune.formatting import architecture, better, judged_by, tested_figure
from stemtune.tune.space.budget import Budget

BASELINE = "matched"
_WITHIN = 8  # trials of one architecture from which its own settings are compared

FEWEST = 6  # trials below which nothing can be said
FEWEST_FANOVA = 20  # trials below which PED-ANOVA stands in for fANOVA, whose forest needs more
_GOOD = 0.3  # share of the trials that PED-ANOVA takes as the good ones; its own 0.1 is one trial of ten
Point = tuple[dict[str, Any], float]
"""What the sampler kept of a trial (its parameters and their distributions), and the trial's best figure."""


@dataclass(frozen=True)
class Row:
    """One trial of the leaderboard."""

    number: int
    trial: str
    run_id: str
    architecture: str
    status: str
    reason: str
    best: float  # best value of the sweep's metric
    best_epoch: int  # the epoch it was reached in
    epochs: int  # epochs that were run
    wall_s: float
    device_s: float  # wall time of the training times its devices
    first_report_s: float
    samples_per_s: float
    parameters: float
    ms_per_pattern: float  # in batches, on the machine that the trial ran on
    seed: str  # seed of its training
    alike: str  # what it has in common with the trials that differ from it in the seed only
    searched: dict[str, Any]
    curve: list[tuple[int, float]]  # (epoch, value) of the metric
    sweep: str = ""  # its sweep, where several are compared
    test: str = ""  # what it read of the test split, with the interval, where it was tested
    note: str = ""  # that it learned nothing

    @property
    def name(self) -> str:
        """What the trial is called in tables."""
        return f"{self.sweep} {self.number}".strip()


@dataclass(frozen=True)
class Comparison:
    """A sweep's trials beside each other."""

    sweep: SweepRecord  # the sweep as MLflow keeps it
    metric: str  # what decides
    mode: str  # whether less of it ("min") or more ("max") is better
    ranked: list[Row]  # the trials, best first
    figures: dict[str, Any]  # everything that the JSON holds
    colours: Mapping[str, str]  # a colour for each architecture
    proposals: Mapping[str, Any]  # what the sampler drew for each of its trials: parameters and their distributions

    @property
    def about(self) -> str:
        """The question that the search space asks."""
        return self.sweep.tags.get("mlflow.note.content", "")


def rows(sweep: SweepRecord, metric: str, mode: str) -> list[Row]:
    """Return the sweep's trials, best first; those without a figure come last."""
    made = [_row(trial, metric, mode) for trial in sweep.trials]
    if len({trial.tags.get(ID_TAG) for trial in sweep.trials}) > 1:
        named = {trial.run_id: trial.tags[SWEEP_TAG] for trial in sweep.trials}
        made = [replace(row, sweep=named[row.run_id]) for row in made]
    return sorted(made, key=lambda row: (math.isnan(row.best), row.best if mode == "min" else -row.best, row.number))


def _row(trial: TrialRecord, metric: str, mode: str) -> Row:
    curve = trial.curves.get(metric, [])
    best, best_epoch = math.nan, 0
    for epoch, value in curve:
        if math.isnan(best) or better(value, best, mode):
            best, best_epoch = value, epoch
    kept = tagged_json(trial.tags, "stemtune.optuna") or {}
    if "best" in trial.last:  # of the epoch whose weights are kept
        best, best_epoch = trial.last["best"], int(trial.last.get("best_epoch", best_epoch))
    tested = tested_figure(trial.last, judged_by(metric))
    return Row(
        number=int(trial.tags.get("stemtune.number", 0)),
        trial=trial.trial,
        run_id=trial.run_id,
        architecture=trial.tags.get("stemtune.architecture") or architecture(trial.params),
        status=trial.status,
        reason=trial.reason,
        best=best,
        best_epoch=best_epoch,
        epochs=len({epoch for epoch, _ in curve}),
        wall_s=trial.last.get("time/wall_s", 0.0),
        device_s=trial.last.get("time/device_s", 0.0),
        first_report_s=trial.last.get("time/first_report_s", 0.0),
        samples_per_s=trial.last.get("train/samples_per_s", math.nan),
        parameters=trial.last.get("model/parameters", math.nan),
        ms_per_pattern=trial.last.get("model/ms_per_pattern", math.nan),
        seed=trial.params.get("train.seed", "0"),
        alike=json.dumps({key: value for key, value in sorted(trial.params.items()) if key != "train.seed"}),
        searched=kept.get("params", {}),
        curve=curve,
        test="" if tested == "-" else tested,
        note=trial.tags.get(NOTE_TAG, ""),
    )


def architectures(ranked: list[Row], mode: str) -> list[dict[str, Any]]:
    """Return one entry per architecture, best first; `matched` is marked as the baseline."""
    groups: dict[str, list[Row]] = {}
    for row in ranked:
        groups.setdefault(row.architecture, []).append(row)
    found = []
    for name, group in groups.items():
        values = [row.best for row in group if not math.isnan(row.best)]
        best = (min(values) if mode == "min" else max(values)) if values else math.nan
        found.append(
            {
                "architecture": name,
                "baseline": name == BASELINE,
                "trials": len(group),
                "best": best,
                "median": statistics.median(values) if values else math.nan,
                "samples_per_s": max((row.samples_per_s for row in group if row.samples_per_s > 0), default=math.nan),
                "device_s": sum(row.device_s for row in group),
            }
        )
    return sorted(
        found, key=lambda entry: (math.isnan(entry["best"]), entry["best"] if mode == "min" else -entry["best"])
    )


def setting_importances(proposals: Mapping[str, Any], ranked: list[Row], mode: str) -> list[dict[str, Any]]:
    """Return the importances over all trials, and within each architecture that has enough of them."""
    groups = {"all trials": ranked}
    for row in ranked:
        groups.setdefault(row.architecture, []).append(row)
    found = []
    for name, group in groups.items():
        if name != "all trials" and (len(group) < _WITHIN or len(group) == len(ranked)):
            continue
        points = [(proposals[row.trial], row.best) for row in group if row.trial in proposals]
        points = [point for point in points if not math.isnan(point[1])]
        shares = by_method(points, mode)
        few = f"too few trials: {len(points)} of the sampler's, {FEWEST} are needed"
        method = next(iter(shares), few if len(points) < FEWEST else "the trials are too much alike to tell")
        best = shares.get(method, {})
        entry = {"among": name, "method": method, "trials": len(points), "importances": best, "by_method": shares}
        found.append(entry)
    return found


def by_method(points: Sequence[Point], mode: str) -> dict[str, dict[str, float]]:
    """Return each setting's share in the figure, largest first, by every method that can say something, best first.

    fANOVA (Hutter, Hoos, Leyton-Brown, ICML 2014) says what matters over the whole range, PED-ANOVA (Watanabe, Bansal,
    Hutter, IJCAI 2023) what matters for being among the good trials. Only settings that all trials share take part;
    settings of one branch are compared among its own trials.
    """
    if len(points) < FEWEST:
        return {}
    kinds = common_distributions([proposal for proposal, _ in points])
    study = optuna_study([(proposal["params"], value) for proposal, value in points], kinds, mode)
    evaluators: list[tuple[str, Any]] = [("PED-ANOVA", PedAnovaImportanceEvaluator(target_quantile=_GOOD))]
    if len(points) >= FEWEST_FANOVA:
        evaluators.insert(0, ("fANOVA", FanovaImportanceEvaluator(seed=0)))
    shares: dict[str, dict[str, float]] = {}
    for method, evaluator in evaluators:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = get_param_importances(study, evaluator=evaluator)
        except (RuntimeError, ValueError, ImportError):
            continue
        if found:
            shares[method] = {name: float(found[name]) for name in sorted(found, key=lambda name: -found[name])}
    return shares


def optuna_study(
    points: Sequence[tuple[Mapping[str, Any], float]], kinds: Mapping[str, BaseDistribution], mode: str
) -> optuna.Study:
    """Return a study of these parameters and figures, of those parameters alone that `kinds` names."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize" if mode == "min" else "maximize")
    for params, value in points:
        given = {name: params[name] for name in params if name in kinds}
        study.add_trial(
            optuna.trial.create_trial(params=given, distributions={name: kinds[name] for name in given}, value=value)
        )
    return study


def common_distributions(proposals: Sequence[Mapping[str, Any]]) -> dict[str, BaseDistribution]:
    """Return each setting's distribution; one that changed between trials is left out, as it compares nothing."""
    kinds: dict[str, str] = {}
    mixed: set[str] = set()
    for proposal in proposals:
        for name, written in proposal["distributions"].items():
            text = json.dumps(written, sort_keys=True)
            if kinds.setdefault(name, text) != text:
                mixed.add(name)
    return {name: json_to_distribution(text) for name, text in kinds.items() if name not in mixed}


def pareto(ranked: list[Row], mode: str, price: str) -> list[int | str]:
    """Return the numbers of the trials on `front`, with their sweeps where there are several."""
    return [row.name if row.sweep else row.number for row in front(ranked, mode, price)]


def front(ranked: list[Row], mode: str, price: str) -> list[Row]:
    """Return the trials that no other beats in both the metric and the figure `price` of `Row`, cheapest first."""
    known = [row for row in ranked if not math.isnan(row.best) and getattr(row, price) > 0]
    found: list[Row] = []
    sign = 1 if mode == "min" else -1
    for row in sorted(known, key=lambda row: (getattr(row, price), sign * row.best)):
        if not found or better(row.best, found[-1].best, mode):
            found.append(row)
    return found


def seeds(ranked: list[Row]) -> list[dict[str, Any]]:
    """Return, for settings that were run with several seeds, the spread of the metric over the seeds, best first."""
    groups: dict[str, list[Row]] = {}
    for row in ranked:
        if not math.isnan(row.best) and row.status == "finished":
            groups.setdefault(row.alike, []).append(row)
    those = [row for group in groups.values() for row in group]
    names = dict.fromkeys(name for row in those for name in row.searched if name != "train.seed")
    varied = [name for name in names if len({str(row.searched.get(name)) for row in those}) > 1]
    return [
        {
            "architecture": group[0].architecture,
            "settings": {key: group[0].searched[key] for key in varied if key in group[0].searched},
            "trials": [row.number for row in group],
            "values": [row.best for row in group],
            "mean": statistics.fmean(row.best for row in group),
            "spread": statistics.stdev(row.best for row in group),
        }
        for group in groups.values()
        if len({row.seed for row in group}) > 1
    ]


def rungs(params: dict[str, Any]) -> list[int]:
    """Return the epochs after which ASHA decided, from the parameters of the sweep's run."""
    if {"budget.grace_patterns", "budget.grace_device_s"} & set(params) or params.get("design") == "grid":
        return []
    try:
        grace, reduction = int(params["budget.grace_epochs"]), float(params["budget.reduction"])
        epochs = int(params.get("budget.epochs") or params.get("train.epochs") or 0)
    except (KeyError, ValueError):
        return []
    return Budget(grace_epochs=grace, reduction=reduction).rungs(epochs)


def cost(sweep: SweepRecord, ranked: list[Row]) -> dict[str, float]:
    """Return what the sweep cost, in seconds."""
    waits = [row.first_report_s for row in ranked if row.first_report_s > 0]
    return {
        "wall_s": sweep.last.get("time/wall_s", math.nan),
        "device_s": sum(row.device_s for row in ranked),
        "trial_wall_s": sum(row.wall_s for row in ranked),
        "median_first_report_s": statistics.median(waits) if waits else math.nan,
        "trials": float(len(ranked)),
        "epochs": float(sum(row.epochs for row in ranked)),
    }
