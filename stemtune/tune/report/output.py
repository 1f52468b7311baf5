"""What a sweep found, as text for a terminal, and as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from stemtune.tune.formatting import STATUS_WORDS, format_metric, format_table, searched_settings
from stemtune.tune.report.leaderboard import BASELINE, Comparison, Row

_SHOWN = 20  # trials that are printed; the JSON holds all

TITLES = {
    "overview": ("Learning curves and architectures", "A cross ends a trial that ASHA stopped."),
    "parallel": ("Settings", "Each line is a trial; where good trials bundle, a setting matters."),
    "importances": (
        "What mattered",
        "fANOVA: share of each setting in the variance over the whole range; PED-ANOVA: in being among the good trials",
    ),
    "prices": ("What accuracy costs", "A trial on the line is beaten by no other in both figures."),
    "seeds": ("Chance", "Differences smaller than the spread over seeds mean nothing."),
}
"""Heading and note of each picture, in the order of the page."""


def format_comparison(found: Comparison) -> str:
    """Return a sweep's leaderboard, its architectures side by side, the importances and the cost."""
    figures, ranked = found.figures, found.ranked
    counts = Counter(STATUS_WORDS.get(row.status, row.status) for row in ranked)
    states = ", ".join(f"{count} {word}" for word, count in counts.items())
    better = "less" if found.mode == "min" else "more"
    lines = [
        f"sweep {figures['sweep']} ({figures['status']}): {len(ranked)} trials, {states}",
        f"metric {found.metric}, {better} is better",
        "",
        *_board(ranked, found.metric),
        "",
        *_side_by_side(figures),
        "",
    ]
    lines += [*_importances(figures), *_fronts(figures), *_seeds(figures), "", _cost(figures["cost"])]
    return "\n".join(lines)


def _board(ranked: list[Row], metric: str) -> list[str]:
    tested = any(row.test for row in ranked)
    head = ("", "trial", "model", metric.removeprefix("val/"), "epoch", *(["test split"] if tested else []))
    table = [(*head, "epochs", "status", "settings")]
    for place, row in enumerate(ranked[:_SHOWN], 1):
        status = STATUS_WORDS.get(row.status, row.status)
        table.append(
            (
                "-" if math.isnan(row.best) else str(place),
                row.name,
                row.architecture + (" (baseline)" if row.architecture == BASELINE else ""),
                format_metric(metric, row.best),
                str(row.best_epoch),
                *([row.test or "-"] if tested else []),
                str(row.epochs),
                f"{status}: {row.reason[:60]}"
                if row.status == "failed"
                else "; ".join(filter(None, [status, row.note])),
                searched_settings(row.searched),
            )
        )
    left = len(ranked) - _SHOWN
    return [*format_table(table).splitlines(), *([f"... and {left} more; --json FILE holds all"] if left > 0 else [])]


def _side_by_side(found: dict[str, Any]) -> list[str]:
    table = [("model", "best", "median", "trials", "samples/s", "device time")]
    for entry in found["architectures"]:
        rate = entry["samples_per_s"]
        table.append(
            (
                entry["architecture"] + (" (baseline)" if entry["baseline"] else ""),
                format_metric(found["metric"], entry["best"]),
                format_metric(found["metric"], entry["median"]),
                str(entry["trials"]),
                "-" if math.isnan(rate) else f"{rate:.0f}",
                _time(entry["device_s"]),
            )
        )
    return format_table(table).splitlines()


def _importances(found: dict[str, Any]) -> list[str]:
    lines = []
    for entry in found["importances"]:
        if not entry["importances"]:
            lines.append(f"importances among {entry['among']}: {entry['method']}")
            continue
        shares = ", ".join(f"{key} {share:.0%}" for key, share in list(entry["importances"].items())[:8])
        lines.append(f"importances among {entry['among']} ({entry['method']}, {entry['trials']} trials): {shares}")
    return lines


def _fronts(found: dict[str, Any]) -> list[str]:
    names = {"parameters": "weights", "ms_per_pattern": "time per pattern", "device_s": "training time"}
    return [
        f"Pareto front of the metric and {names[price]}: trials {', '.join(str(number) for number in front)}"
        for price, front in found["pareto"].items()
        if front
    ]


def _seeds(found: dict[str, Any]) -> list[str]:
    metric, lines = found["metric"], []
    for group in found["seeds"][:8]:
        settings = searched_settings(group["settings"])
        lines.append(
            f"seeds of {group['architecture']}{f' ({settings})' if settings else ''}:"
            f" {format_metric(metric, group['mean'])} +- {format_metric(metric, group['spread'])}"
            f" ({len(group['values'])} seeds)"
        )
    return lines


def _cost(cost: dict[str, float]) -> str:
    wall = "" if math.isnan(cost["wall_s"]) else f"{_time(cost['wall_s'])} wall, "
    wait = cost["median_first_report_s"]
    start = "" if math.isnan(wait) else f"; a trial's first report came after {wait:.0f} s (median)"
    return f"cost: {wall}{_time(cost['device_s'])} of devices, {cost['epochs']:.0f} epochs{start}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def render(package: str, template: str, **content: Any) -> str:
    """Return the HTML template of a package, filled in; what is text stays text."""
    pages = Environment(loader=PackageLoader(package, ""), autoescape=True, undefined=StrictUndefined)
    return pages.get_template(template).render(**content)


def page(found: Comparison, pictures: Mapping[str, bytes]) -> str:
    """Return the page, with the pictures (PNG, by the names of `charts.CHARTS`) inside."""
    shown = [name for name in TITLES if name in pictures]
    return render(
        "stemtune.tune.report",
        "compare.html",
        found=found,
        best=next((row for row in found.ranked if not math.isnan(row.best)), None),
        pictures=[(*TITLES[name], base64.b64encode(pictures[name]).decode()) for name in shown],
        metric=lambda value: format_metric(found.metric, value),
        known=lambda value: not math.isnan(value),
        status=STATUS_WORDS,
        settings=searched_settings,
    )
