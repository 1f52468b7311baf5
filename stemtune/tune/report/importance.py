"""Which settings mattered, by functional ANOVA over what the trials showed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import json_to_distribution
from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator, get_param_importances

FEWEST = 6
"""Trials below which nothing can be said."""

FEWEST_FANOVA = 20
"""Trials below which PED-ANOVA stands in for fANOVA, whose forest needs more."""

_GOOD = 0.3
"""Share of the trials that PED-ANOVA takes as the good ones; its own 0.1 is one trial of ten."""

Point = tuple[dict[str, Any], float]
"""What the sampler kept of a trial (its parameters and their distributions), and the trial's best figure."""


def importances(points: Sequence[Point], mode: str) -> tuple[dict[str, float], str]:
    """Return each setting's share in the variance of the figure, largest first, and the method.

    Only settings that all trials share take part; settings of one branch are compared among its own trials.

    Parameters
    ----------
    points
        `{"params": {...}, "distributions": {...}}` and the figure, per trial.
    mode
        "min" or "max".

    References
    ----------
    Hutter, Hoos, Leyton-Brown, ICML 2014 (fANOVA); Watanabe, Bansal, Hutter, IJCAI 2023 (PED-ANOVA).
    """
    if len(points) < FEWEST:
        return {}, f"too few trials: {len(points)} of the sampler's, {FEWEST} are needed"
    found = by_method(points, mode)
    for method, shares in found.items():
        return shares, method
    return {}, "the trials are too much alike to tell"


def by_method(points: Sequence[Point], mode: str) -> dict[str, dict[str, float]]:
    """Return the shares of `importances` by every method that can say something, the better one first.

    fANOVA tells what matters over the whole range, PED-ANOVA what matters for being among the good trials.
    """
    if len(points) < FEWEST:
        return {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize" if mode == "min" else "maximize")
    kinds = _widest([kept["distributions"] for kept, _ in points])
    for kept, value in points:
        names = [name for name in kept["params"] if name in kinds]
        study.add_trial(
            optuna.trial.create_trial(
                params={name: kept["params"][name] for name in names},
                distributions={name: kinds[name] for name in names},
                value=value,
            )
        )
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


def _widest(distributions: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each setting's distribution; one that changed between trials is left out, as it compares nothing."""
    kinds: dict[str, str] = {}
    mixed: set[str] = set()
    for kept in distributions:
        for name, written in kept.items():
            text = json.dumps(written, sort_keys=True)
            if kinds.setdefault(name, text) != text:
                mixed.add(name)
    return {name: json_to_distribution(text) for name, text in kinds.items() if name not in mixed}
