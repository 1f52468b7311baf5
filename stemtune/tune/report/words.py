"""What a sweep found, in words."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from stemtune.tune.report.leaderboard import BASELINE, Row
from stemtune.tune.run.progress import aligned
from stemtune.tune.run.trial_state import STATUS_WORDS, figure

if TYPE_CHECKING:
    from stemtune.tune.report import Comparison

_SHOWN = 20  # trials that are printed; the JSON holds all


def in_words(found: Comparison) -> str:
    """Return a sweep's leaderboard, its architectures side by side, the importances and the cost."""
    figures, ranked = found.figures, found.ranked
    lines = [*_head(figures, ranked), "", *_board(ranked, found.metric), "", *_side_by_side(figures), ""]
    lines += [*_mattered(figures), *_fronts(figures), *_chance(figures), "", *_costs(figures)]
    return "\n".join(lines)


def _head(found: dict[str, Any], ranked: list[Row]) -> list[str]:
    counts = Counter(STATUS_WORDS.get(row.status, row.status) for row in ranked)
    states = ", ".join(f"{count} {word}" for word, count in counts.items())
    return [
        f"sweep {found['sweep']} ({found['status']}): {len(ranked)} trials, {states}",
        f"metric {found['metric']}, {'less' if found['mode'] == 'min' else 'more'} is better",
    ]


def _board(ranked: list[Row], metric: str) -> list[str]:
    table = [("", "trial", "model", metric.removeprefix("val/"), "epoch", "epochs", "status", "settings")]
    for place, row in enumerate(ranked[:_SHOWN], 1):
        searched = {key.split("@")[0]: value for key, value in row.searched.items() if not key.startswith("model.name")}
        status = STATUS_WORDS.get(row.status, row.status)
        table.append(
            (
                "-" if math.isnan(row.best) else str(place),
                str(row.number),
                row.architecture + (" (baseline)" if row.architecture == BASELINE else ""),
                figure(metric, row.best),
                str(row.best_epoch),
                str(row.epochs),
                f"{status}: {row.reason[:60]}" if row.status == "failed" else status,
                ", ".join(f"{key}={_short(value)}" for key, value in searched.items()),
            )
        )
    lines = aligned(table).splitlines()
    left = len(ranked) - _SHOWN
    return [*lines, *([f"... and {left} more; --json FILE holds all"] if left > 0 else [])]


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _side_by_side(found: dict[str, Any]) -> list[str]:
    table = [("model", "best", "median", "trials", "samples/s", "device time")]
    for entry in found["architectures"]:
        rate = entry["samples_per_s"]
        table.append(
            (
                entry["architecture"] + (" (baseline)" if entry["baseline"] else ""),
                figure(found["metric"], entry["best"]),
                figure(found["metric"], entry["median"]),
                str(entry["trials"]),
                "-" if math.isnan(rate) else f"{rate:.0f}",
                _time(entry["device_s"]),
            )
        )
    return aligned(table).splitlines()


def _mattered(found: dict[str, Any]) -> list[str]:
    lines = []
    for entry in found["importances"]:
        if not entry["importances"]:
            lines.append(f"importances among {entry['among']}: {entry['method']}")
            continue
        shares = ", ".join(f"{key} {share:.0%}" for key, share in list(entry["importances"].items())[:8])
        lines.append(f"importances among {entry['among']} ({entry['method']}, {entry['trials']} trials): {shares}")
    return lines


def _fronts(found: dict[str, Any]) -> list[str]:
    """Say which trials no other beats in both the metric and a price."""
    shown = {"parameters": "weights", "ms_per_pattern": "time per pattern", "device_s": "training time"}
    words = [
        f"{shown[price]}: trials {', '.join(str(number) for number in front)}"
        for price, front in found["pareto"].items()
        if front
    ]
    return [f"Pareto front of the metric and {line}" for line in words]


def _chance(found: dict[str, Any]) -> list[str]:
    """Say how much the seed alone moves the metric."""
    metric = found["metric"]
    return [
        f"seeds of {group['architecture']}{_told(group['settings'])}: {figure(metric, group['mean'])}"
        f" +- {figure(metric, group['spread'])} ({len(group['values'])} seeds)"
        for group in found["seeds"][:8]
    ]


def _told(settings: dict[str, Any]) -> str:
    shown = {key: value for key, value in settings.items() if not key.startswith("model.name")}
    return f" ({', '.join(f'{key}={_short(value)}' for key, value in shown.items())})" if shown else ""


def _costs(found: dict[str, Any]) -> list[str]:
    spent = found["cost"]
    wall = "" if math.isnan(spent["wall_s"]) else f"{_time(spent['wall_s'])} wall, "
    wait = spent["median_first_report_s"]
    start = "" if math.isnan(wait) else f"; a trial's first report came after {wait:.0f} s (median)"
    return [f"cost: {wall}{_time(spent['device_s'])} of devices, {spent['epochs']:.0f} epochs{start}"]


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
