"""How trials, their settings and their figures of merit are written, and which of two figures is better."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

STATUS_WORDS = {
    "running": "running",
    "finished": "finished",
    "stopped": "stopped by ASHA",
    "failed": "failed",
    "interrupted": "interrupted",
}


def better(value: float, than: float, mode: str) -> bool:
    return value < than if mode == "min" else value > than


def judged_by(metric: str) -> str:
    """Return the figure of the test split that decides where `metric` decided on validation, without its `test/`.

    Losses of different heads, sizes and times are no measure of how well a model reads: then it is the median.
    """
    kind, _, name = metric.partition("/")
    readings = name.startswith(("disorientation_", "within_"))
    return name if kind == "val" and readings else "disorientation_median_deg"


def format_interval(metric: str, value: float, low: float, high: float) -> str:
    """Write a figure with its interval."""
    return f"{format_metric(metric, value)} ({format_metric(metric, low)} to {format_metric(metric, high)})"


def tested_figure(figures: Mapping[str, float], judged: str) -> str:
    """Return a figure of the test split with its interval, or a dash."""
    values = [figures.get(f"test/{judged}{end}", math.nan) for end in ("", "_low", "_high")]
    return "-" if math.isnan(values[0]) else format_interval(judged, *values)


def architecture(knobs: Mapping[str, Any]) -> str:
    """Return a trial's architecture: `swin adjusted pretrained` for instance."""
    words = [str(knobs.get("model.name", "polar"))]
    if str(knobs.get("model.adjusted", "False")).lower() == "true":
        words.append("adjusted")
    if str(knobs.get("model.pretrained", "False")).lower() != "false":
        words.append("pretrained")
    return " ".join(words)


def format_metric(metric: str, value: float) -> str:
    """Write a value of `metric` with its unit."""
    if math.isnan(value):
        return "-"
    if metric.endswith(("_deg", "_deg_beam180")) and "within" not in metric:
        return f"{value:.2f}°"
    if "within" in metric or "fraction" in metric:
        return f"{value:.1%}"
    return f"{value:.4g}"


def format_settings(settings: Mapping[str, Any], without: Collection[str] = ()) -> str:
    """Write settings in one line, leaving out the keys in `without`; `width@cnn` is written `width`."""
    return ", ".join(
        f"{key.split('@')[0]}={f'{value:.3g}' if isinstance(value, float) else value}"
        for key, value in settings.items()
        if key not in without
    )


def searched_settings(searched: Mapping[str, Any]) -> str:
    """Write what a trial tried beside its architecture, which the line names already."""
    return format_settings({key: value for key, value in searched.items() if not key.startswith("model.name")})


def format_table(rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows as columns of equal width; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(len(line) for line in lines), *lines[1:]])
