"""What is known of a sweep's trials while it runs, and how a figure of merit is written."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stemtune._files import damage
from stemtune.config import Scalar
from stemtune.tune.run.checkpoints import kept, ranked, train_folder

STATUS_WORDS = {
    "running": "running",
    "finished": "finished",
    "stopped": "stopped by ASHA",
    "failed": "failed",
    "interrupted": "interrupted",
}

FIGURES = "figures"

DRIVER = "driver.lock"
"""Held by the process that drives a sweep, in the sweep's folder."""

SHEET = "sweep.json"
"""Where a sweep writes down what it is, in its folder."""


@dataclass
class TrialState:
    """One trial as the sweep sees it.

    Attributes
    ----------
    number
        Count from 0 in the order of proposal.
    knobs
        Its settings.
    status
        One of `STATUS_WORDS`.
    reason
        Why it stopped or failed.
    epoch, last, best
        Epochs reported, and the last and best value of the sweep's metric.
    wall_s, device_s
        Wall time since its start; the same times its devices, without the start-up.
    first_report_s
        From its start to its first report.
    values
        The figures of the last report.
    nodes
        Names of the nodes where its workers run.
    """

    trial: str
    number: int
    knobs: dict[str, Scalar]
    status: str = "running"
    reason: str = ""
    epoch: int = 0
    last: float = math.nan
    best: float = math.nan
    best_epoch: int = 0
    wall_s: float = 0.0
    device_s: float = 0.0
    first_report_s: float = 0.0
    values: dict[str, float] = field(default_factory=dict)
    nodes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The architecture, with what tells its variants apart."""
        return architecture(self.knobs)

    def take(self, result: dict[str, Any], metric: str, mode: str) -> None:
        """Take up a report; one of an epoch that is trained again after a restart as well."""
        epoch, value = int(result.get("epoch", self.epoch + 1)), float(result[metric])
        if epoch >= self.epoch:
            self.epoch, self.last = epoch, value
        if math.isnan(self.best) or better(value, self.best, mode):
            self.best, self.best_epoch = value, epoch
        self.device_s = float(result.get("time/device_s", self.device_s))
        self.first_report_s = float(result.get("time/first_report_s", self.first_report_s))


def packed(report: dict[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    """Return a trial's report as Tune gets it: the `metrics` it goes by, and the rest as one text.

    Of every number Tune keeps six statistics and two histories per trial, and writes all trials' down every few
    seconds: two thirds of what a trial costs the driver.
    """
    numbers = {key for key, value in report.items() if isinstance(value, int | float)} - {*metrics, "epoch"}
    kept = {key: value for key, value in report.items() if key not in numbers}
    return {**kept, FIGURES: json.dumps({key: report[key] for key in sorted(numbers)})}


def unpacked(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result of Tune with every figure under its own name."""
    return {**json.loads(result.get(FIGURES, "{}")), **result}


def architecture(knobs: dict[str, Any]) -> str:
    """Return a trial's architecture in words: `swin adjusted pretrained` for instance."""
    words = [str(knobs.get("model.name", "polar"))]
    if str(knobs.get("model.adjusted", "False")).lower() == "true":
        words.append("adjusted")
    if str(knobs.get("model.pretrained", "False")).lower() != "false":
        words.append("pretrained")
    return " ".join(words)


def better(value: float, than: float, mode: str) -> bool:
    """Whether `value` beats `than`."""
    return value < than if mode == "min" else value > than


def figure(metric: str, value: float) -> str:
    """Write a value of `metric` with its unit."""
    if math.isnan(value):
        return "-"
    if metric.endswith(("_deg", "_deg_beam180")) and "within" not in metric:
        return f"{value:.2f}°"
    if "within" in metric or "fraction" in metric:
        return f"{value:.1%}"
    return f"{value:.4g}"


def best_checkpoint(sweep_folder: Path, trial: str, metric: str, mode: str) -> tuple[float, Path] | None:
    """Return the best figure among a trial's kept checkpoints, and that checkpoint's model folder.

    The checkpoints themselves are asked, not the reports: after a crash they know of epochs that Tune does not. A
    damaged one cannot win.
    """
    for entry in ranked(kept(train_folder(sweep_folder, trial)), metric, mode):
        if not damage(entry.folder):
            return float(entry.metrics[metric]), entry.folder / "model"
    return None


def history(sweep_folder: str | Path, trial: str) -> list[dict[str, Any]]:
    """Return every report of a trial that its checkpoints know of, by epoch."""
    return max((entry.history for entry in kept(train_folder(sweep_folder, trial))), key=len, default=[])
