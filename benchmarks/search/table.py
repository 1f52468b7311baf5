"""Recorded learning curves of the settings of a search space: a table that a search can be replayed on."""

from __future__ import annotations

import gzip
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stemtune._files import existing, whole_file
from stemtune.config import Scalar
from stemtune.errors import UserError
from stemtune.tune.space.forms import Branch, Range
from stemtune.tune.space.space import SearchSpace, space_from_text, walk

SECONDS = "time/device_s"
METRICS = (
    "val/loss",
    "val/disorientation_median_deg",
    "val/disorientation_mean_deg",
    "val/within_5deg",
)
"""What is recorded of every epoch, beside the seconds since the start of the training."""


@dataclass(frozen=True)
class Run:
    """One training: its settings as the space draws them, without constants, and figures by epoch."""

    settings: Mapping[str, Scalar]
    seed: int
    curves: Mapping[str, Sequence[float]]  # by metric, and the seconds by `SECONDS`

    @property
    def key(self) -> str:
        """What runs of the same settings share."""
        return json.dumps(self.settings, sort_keys=True)


@dataclass(frozen=True)
class Table:
    """The runs of a space, with the text of its file and the commands that recorded them."""

    text: str
    commands: tuple[str, ...]
    runs: tuple[Run, ...]

    @cached_property
    def space(self) -> SearchSpace:
        """The search space."""
        return space_from_text(self.text, "table")

    @cached_property
    def settings(self) -> list[list[Run]]:
        """The runs by their settings, the seeds of one together; those shorter than the others are left out."""
        longest = max(len(run.curves[SECONDS]) for run in self.runs)
        groups: dict[str, list[Run]] = {}
        for run in self.runs:
            if len(run.curves[SECONDS]) == longest:
                groups.setdefault(run.key, []).append(run)
        return list(groups.values())

    @cached_property
    def ranked(self) -> list[tuple[float, list[Run]]]:
        """Every setting with the best figure of a run, as the mean over its seeds, best first."""
        metric, sign = self.space.metric, 1 if self.space.mode == "min" else -1
        means = [
            (statistics.fmean(min(sign * value for value in run.curves[metric]) for run in runs), runs)
            for runs in self.settings
        ]
        return [(sign * mean, runs) for mean, runs in sorted(means, key=lambda one: one[0])]

    def goal(self, share: float) -> float:
        """Return the figure of the last setting that belongs to the best `share` of all."""
        return self.ranked[max(0, math.ceil(share * len(self.ranked)) - 1)][0]

    def nearest(self, knobs: Mapping[str, Scalar]) -> list[Run]:
        """Return the runs of the recorded setting that is nearest to a proposal.

        A choice that differs counts 1, a number the part of its range that it is off; the branches have to be the same.
        """
        return min(self.settings, key=lambda runs: self._distance(knobs, runs[0].settings))

    def _distance(self, one: Mapping[str, Scalar], other: Mapping[str, Scalar]) -> float:
        total = 0.0
        for key, (form, weight) in self._forms.items():
            if (key in other) != (key in one) or isinstance(form, Branch):
                total += weight * (one.get(key) != other.get(key))
            elif key not in other:
                continue
            elif isinstance(form, Range):
                scale = math.log if form.log else float
                ends = scale(form.high) - scale(form.low)
                total += abs(scale(float(one[key])) - scale(float(other[key]))) / ends
            else:
                total += one[key] != other[key]
        return total

    @cached_property
    def _forms(self) -> dict[str, tuple[Any, float]]:
        """The form of each setting, and what another branch, or none of the two having it, weighs."""
        return {key: (form, 100.0 if isinstance(form, Branch) else 0.0) for key, form, _ in walk(self.space.search)}


def read_table(path: str | Path) -> Table:
    """Read a table: JSON lines, compressed; the first says what the others hold."""
    file = existing(path, "the table")
    try:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            head, *rows = [json.loads(line) for line in lines]
        runs = tuple(Run(row["settings"], int(row["seed"]), row["curves"]) for row in rows)
        return Table(head["space"], tuple(head["commands"]), runs)
    except (OSError, ValueError, KeyError, EOFError) as problem:
        raise UserError(f"{path} is no table of learning curves: {problem}") from None


def write_table(table: Table, path: str | Path) -> None:
    """Write a table; five digits of each figure are kept."""
    lines: list[dict[str, Any]] = [{"space": table.text, "commands": table.commands}]
    for run in table.runs:
        curves = {key: [float(f"{value:.5g}") for value in values] for key, values in run.curves.items()}
        lines.append({"settings": dict(run.settings), "seed": run.seed, "curves": curves})
    with whole_file(path) as part, gzip.open(part, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
