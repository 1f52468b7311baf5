"""What a sweep found: `stemtune compare` in words, as a picture and as JSON."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Any

from stemtune.files import whole_file
from stemtune.tracking.reading import SweepRecord, read_sweep
from stemtune.tune.leaderboard import BASELINE, Row, architectures, cost, rows, what_mattered
from stemtune.tune.progress import aligned
from stemtune.tune.records import STATUS_WORDS, figure

_SHOWN = 20  # trials that are printed; the JSON holds all


def compare(name: str | None = None, png: str | Path | None = None, json: str | Path | None = None) -> str:
    """Return a sweep's leaderboard, its architectures side by side, the importances and the cost.

    Parameters
    ----------
    name
        The sweep; by default the one that started last.
    png
        Draw the learning curves and the architectures into this file.
    json
        Write every figure into this file.

    Raises
    ------
    UserError
        When there is no such sweep, or the tracking server does not answer.
    """
    sweep = read_sweep(name)
    metric, mode = sweep.params["metric"], sweep.params["mode"]
    sweep = read_sweep(sweep.name, curves=(metric,))
    ranked = rows(sweep, metric, mode)
    found = {
        "sweep": sweep.name,
        "status": sweep.status,
        "metric": metric,
        "mode": mode,
        "commit": sweep.tags.get("stemtune.commit", ""),
        "store_sha256": sweep.tags.get("stemtune.store_sha256", ""),
        "champion": sweep.tags.get("stemtune.champion", ""),
        "trials": [asdict(row) for row in ranked],
        "architectures": architectures(ranked, mode),
        "importances": what_mattered(sweep, ranked, mode),
        "cost": cost(sweep, ranked),
    }
    if json is not None:
        with whole_file(json) as part:
            part.write_text(dumps(_without_nan(found), indent=1) + "\n")
    if png is not None:
        _draw(sweep, ranked, found, Path(png))
    lines = [*_head(found, ranked), "", *_board(ranked, metric), "", *_side_by_side(found), "", *_mattered(found)]
    return "\n".join([*lines, "", *_costs(found)])


def _without_nan(value: Any) -> Any:
    """Return `value` with null for every NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


def _draw(sweep: SweepRecord, ranked: list[Row], found: dict[str, Any], png: Path) -> None:
    """Draw every trial's learning curve, and the best of each architecture beside the baseline."""
    from matplotlib.figure import Figure

    metric = found["metric"]
    names = [entry["architecture"] for entry in found["architectures"]]
    colours = {name: f"C{index % 10}" for index, name in enumerate(names)}
    chart = Figure(figsize=(11, 4.5), layout="constrained")
    curves, bars = chart.subplots(1, 2)
    for row in reversed(ranked):
        if row.curve:
            epochs, values = zip(*row.curve, strict=True)
            first = row is next(other for other in ranked if other.architecture == row.architecture)
            style: dict[str, Any] = {"linewidth": 2.0, "label": row.architecture} if first else {"alpha": 0.35}
            curves.plot(epochs, values, marker=".", color=colours[row.architecture], **style)
    curves.set(xlabel="epoch", ylabel=metric, title=f"{sweep.name}: learning curves")
    curves.xaxis.get_major_locator().set_params(integer=True)
    if ranked and ranked[0].curve:
        curves.legend(fontsize="small")
    shown = [entry for entry in found["architectures"] if not math.isnan(entry["best"])]
    places = list(range(len(shown)))
    bars.barh(places, [entry["best"] for entry in shown], color=[colours[entry["architecture"]] for entry in shown])
    for place, entry in zip(places, shown, strict=True):
        points = [row.best for row in ranked if row.architecture == entry["architecture"] and not math.isnan(row.best)]
        bars.plot(points, [place] * len(points), "k.", alpha=0.6)
        if entry["baseline"]:
            bars.axvline(entry["best"], color="k", linestyle="--", linewidth=1)
            curves.axhline(entry["best"], color="k", linestyle="--", linewidth=1)
    labels = [entry["architecture"] + ("\n(baseline)" if entry["baseline"] else "") for entry in shown]
    bars.set_yticks(places, labels)
    bars.invert_yaxis()
    bars.set(xlabel=metric, title="best of each architecture (dots: its trials)")
    drawn = [value for row in ranked for _, value in row.curve]
    if drawn and min(drawn) > 0 and max(drawn) > 10 * min(drawn):
        curves.set_yscale("log")
        bars.set_xscale("log")
    with whole_file(png) as part:
        chart.savefig(part, dpi=130, format=png.suffix.lstrip(".") or "png")
