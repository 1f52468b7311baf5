"""What the reference study found, each as a question that a sweep answers: which group of trials beats which."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

CHANCE_DEG = 60.0
"""A group with a larger mean error has learned nothing to speak of: answers at random are 66.6° off in LiNiO2."""

METRIC = "val/disorientation_mean_deg"
"""What is compared: unlike the median, the mean falls from the first grain that is read."""


@dataclass(frozen=True)
class Size:
    """How large a study is."""

    scan: int  # rows and columns of the scan
    grains: int
    pixels: int  # rows and columns of a pattern
    scale: float  # 1/Å per pixel
    pretraining: int  # simulated patterns that are pretrained on
    passes: int  # how often each
    share: float  # of the epochs that the spaces name
    seeds: int  # how many seeds of each setting
    gpu: bool  # whether trials get GPUs and the models that start from weights of the hub take part
    settings: Mapping[str, object] = field(default_factory=dict)  # of every training, beside those of the spaces
    models: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # and of each architecture


@dataclass(frozen=True)
class Finding:
    """A claim, and how to judge it."""

    name: str  # of its space in `search_spaces/reference/`, and of its sweep there
    title: str  # what is asked
    claim: str  # what the study says
    by: tuple[str, ...]  # settings that tell the groups of trials apart
    better: tuple[tuple[str, str], ...] = ()  # pairs of groups: the first should have the smaller error
    no_better: tuple[tuple[str, str], ...] = ()  # pairs of groups: the first should not have the smaller error


def _entries(name: str) -> Any:
    return yaml.safe_load(resources.files("stemtune.study").joinpath(name).read_text(encoding="utf-8"))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


FINDINGS = tuple(Finding(**{key: _tuples(value) for key, value in each.items()}) for each in _entries("findings.yaml"))
SIZES = {name: Size(**each) for name, each in _entries("sizes.yaml").items()}


@dataclass(frozen=True)
class Group:
    """Trials that differ in the seed only: their last mean disorientation, share within 5°, and learning curves."""

    label: str
    error_deg: list[float] = field(default_factory=list)
    within_5deg: list[float] = field(default_factory=list)
    curves: list[list[tuple[int, float]]] = field(default_factory=list)
    device_s: list[float] = field(default_factory=list)

    @property
    def mean_deg(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.error_deg)

    @property
    def spread(self) -> str:
        """Mean and standard deviation over the seeds, in words."""
        beside = f" ± {statistics.stdev(self.error_deg):.1f}" if len(self.error_deg) > 1 else ""
        return f"{self.mean_deg:.1f}{beside}°"


@dataclass(frozen=True)
class Outcome:
    """A finding, measured."""

    finding: Finding
    groups: list[Group]
    verdict: str  # agrees, disagrees, partly, or cannot tell
    reasons: list[str]  # one line for each pair of groups
    failed: int = 0  # trials that did not run to their last epoch


def sweep_name(finding: Finding) -> str:
    """Return the name of a finding's sweep and MLflow experiment."""
    return f"reference-{finding.name}"


def label_of(finding: Finding, params: dict[str, str]) -> str:
    """Return the group of a trial from its settings, in few words."""
    words = []
    for key in finding.by:
        value = params.get(key, "")
        if key in ("model.adjusted", "head.clamp"):
            words += [key.split(".")[1]] if value == "True" else []
        elif key == "model.pretrained" and len(finding.by) > 1:
            words += ["pretrained"] if value != "False" else []
        elif key == "model.pretrained":
            words.append("none" if value == "False" else Path(value).name)
        elif key == "data.store":
            words.append(Path(value).stem)
        else:
            words.append(value)
    return " ".join(words)


def outcome(finding: Finding) -> Outcome:
    """Read a finding's sweep from MLflow and judge the claim."""
    from stemtune.tracking import read_sweep

    share = "val/within_5deg"
    sweep = read_sweep(sweep_name(finding), curves=(METRIC,))
    groups: dict[str, Group] = {}
    failed = 0
    for trial in sorted(sweep.trials, key=lambda trial: int(trial.tags.get("stemtune.number", 0))):
        curve = trial.curves.get(METRIC, [])
        if not curve or curve[-1][0] < int(trial.params.get("train.epochs", 0)):
            failed += 1  # or interrupted: its last figure is not that of the others
            continue
        label = label_of(finding, trial.params)
        group = groups.setdefault(label, Group(label))
        group.error_deg.append(curve[-1][1])
        group.within_5deg.append(trial.last.get(share, math.nan))
        group.curves.append(curve)
        group.device_s.append(trial.last.get("time/device_s", math.nan))
    verdict, reasons = judged(finding, groups)
    return Outcome(finding, list(groups.values()), verdict, reasons, failed)


def judged(finding: Finding, groups: dict[str, Group]) -> tuple[str, list[str]]:
    """Return the verdict and a reason for each pair.

    One group beats another when every seed of it does: with the few seeds of a study no finer statement holds. Of two
    groups that have learned nothing neither does, whatever their figures. The last epoch counts, which nobody picked.
    """
    votes, reasons = [], []
    for pairs, wanted in ((finding.better, True), (finding.no_better, False)):
        for one, two in pairs:
            if one not in groups or two not in groups:
                reasons.append(f"{one} and {two}: not both were run")
                continue
            blind = min(groups[one].mean_deg, groups[two].mean_deg) > CHANCE_DEG
            side = 0 if blind else _side(groups[one].error_deg, groups[two].error_deg)
            word = {1: "better than", -1: "worse than", 0: "not told from"}[side]
            means = f"{groups[one].spread} and {groups[two].spread}"
            reasons.append(f"{one} is {word} {two} ({means}{'; neither has learned' if blind else ''})")
            votes.append(0 if blind else side if wanted else (-1 if side == 1 else 1))
    if not votes or not any(votes):
        return "cannot tell", reasons
    if all(vote == 1 for vote in votes):
        return "agrees", reasons
    return ("disagrees" if not any(vote == 1 for vote in votes) else "partly"), reasons


def _side(one: Sequence[float], two: Sequence[float]) -> int:
    """Return 1 where all of `one` are smaller than all of `two`, -1 where all are larger, else 0."""
    if max(one) < min(two):
        return 1
    return -1 if min(one) > max(two) else 0
