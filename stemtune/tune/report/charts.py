"""What a sweep found, as pictures: learning curves, architectures, settings, importances, prices, seeds."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from stemtune._files import whole_file
from stemtune.tune.formatting import searched_settings
from stemtune.tune.report.leaderboard import Comparison, common_distributions, front, optuna_study

PRICES = {
    "parameters": "weights of the model",
    "ms_per_pattern": "milliseconds per pattern",
    "device_s": "training, device hours",
}
"""What accuracy is weighed against: figures of `Row` that should be small."""

_AXES = 9  # settings that parallel coordinates show at most
_FEW = 8  # values of a setting that not all trials have, above which it is left out there


def colours(names: list[str]) -> dict[str, str]:
    """Return a colour for each architecture, best first; Okabe and Ito's, which the colour-blind tell apart."""
    palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
    return {name: palette[index % len(palette)] for index, name in enumerate(names)}


def save(chart: Figure, png: Path) -> None:
    with whole_file(png) as part:
        chart.savefig(part, dpi=130, format=png.suffix.lstrip(".") or "png")


def overview(found: Comparison) -> Figure:
    """Draw every trial's learning curve, and the best of each architecture beside the baseline."""
    chart = Figure(figsize=(11, 4.5), layout="constrained")
    curves, bars = chart.subplots(1, 2)
    _curves(curves, found)
    _bars(bars, found)
    drawn = [value for row in found.ranked for _, value in row.curve]
    _logarithmic(curves, "y", drawn)
    _logarithmic(bars, "x", drawn)
    for number, epoch in enumerate(found.figures["rungs"]):
        label = "ASHA decides" if number == 0 else None
        curves.axvline(epoch, color="0.6", linewidth=0.8, linestyle=":", zorder=0, label=label)
    if found.ranked and found.ranked[0].curve:
        curves.legend(fontsize="small")
    return chart


def _curves(place: Axes, found: Comparison) -> None:
    shade = found.colours
    best: set[str] = set()
    for row in found.ranked:
        if not row.curve:
            continue
        epochs, values = zip(*row.curve, strict=True)
        first = row.architecture not in best
        best.add(row.architecture)
        style: dict[str, Any] = {"linewidth": 2.0, "label": row.architecture, "zorder": 3} if first else {"alpha": 0.35}
        place.plot(epochs, values, marker=".", color=shade[row.architecture], **style)
        if row.status == "stopped":
            place.plot(epochs[-1], values[-1], "x", color=shade[row.architecture], markersize=6)
    place.set(xlabel="epoch (x: stopped by ASHA)", ylabel=found.metric, title=f"{found.sweep.name}: learning curves")
    place.xaxis.set_major_locator(MaxNLocator(integer=True))


def _bars(place: Axes, found: Comparison) -> None:
    shown = [entry for entry in found.figures["architectures"] if not math.isnan(entry["best"])]
    places = list(range(len(shown)))
    shades = [found.colours[entry["architecture"]] for entry in shown]
    # no bars: on a logarithmic axis they begin nowhere
    place.scatter([entry["best"] for entry in shown], places, color=shades, marker="D", s=90, zorder=3)
    for line, entry in zip(places, shown, strict=True):
        mine = [row.best for row in found.ranked if row.architecture == entry["architecture"]]
        points = [best for best in mine if not math.isnan(best)]
        place.plot(points, [line] * len(points), ".", color=shades[line], alpha=0.6)
        place.plot([min(points), max(points)], [line, line], color="0.8", linewidth=1, zorder=0)
        if entry["baseline"]:
            place.axvline(entry["best"], color="k", linestyle="--", linewidth=1)
    place.set_ylim(-0.6, len(shown) - 0.4)
    labels = [entry["architecture"] + ("\n(baseline)" if entry["baseline"] else "") for entry in shown]
    place.set_yticks(places, labels)
    place.invert_yaxis()
    place.set(xlabel=found.metric, title="each architecture (diamond: its best; dots: its trials)")


def parallel(found: Comparison) -> Figure | None:
    """Draw every trial as a line from its figure through its settings; None where nothing was searched.

    A setting that some trials do not have is there as `-` among its values, if these are few.
    """
    from matplotlib import pyplot
    from optuna.distributions import CategoricalDistribution
    from optuna.visualization.matplotlib import plot_parallel_coordinate

    ranked = [row for row in found.ranked if not math.isnan(row.best) and row.searched]
    names = list(dict.fromkeys(name for row in ranked for name in row.searched))
    values = {name: {str(row.searched.get(name, "-")) for row in ranked} for name in names}
    shared = [name for name in names if all(name in row.searched for row in ranked)]
    shown = [name for name in names if len(values[name]) > 1 and (name in shared or len(values[name]) <= _FEW)][:_AXES]
    if len(ranked) < 2 or not shown:
        return None
    kinds = common_distributions([found.proposals[row.trial] for row in ranked])
    shown = [name for name in shown if name in kinds]
    for name in set(shown) - set(shared):
        kinds[name] = CategoricalDistribution(sorted(values[name]))
    points = [
        ({name: row.searched[name] if name in shared else str(row.searched.get(name, "-")) for name in shown}, row.best)
        for row in ranked
    ]
    study = optuna_study(points, kinds, found.mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optuna calls its pictures experimental
        place = plot_parallel_coordinate(study, params=shown, target_name=found.metric.split("/")[-1])
    chart = place.get_figure(root=True)
    assert chart is not None
    pyplot.close(chart)  # or a notebook would show it by itself
    labels = [tick.get_text().replace(".", ".\n", 1).replace("_", "_\n", 1) for tick in place.get_xticklabels()]
    place.set_xticks(place.get_xticks(), labels, rotation=0, ha="center", fontsize=8)
    chart.subplots_adjust(bottom=0.15)
    place.set_title("figure and settings of each trial (dark: good; -: no such setting)", fontsize=10)
    chart.set_size_inches(max(6.0, 1.8 * (len(shown) + 1)), 4.8)
    return chart


def importances(found: Comparison) -> Figure | None:
    """Draw which settings mattered, by each method, over all trials and within architectures; None if nobody knows."""
    groups = [entry for entry in found.figures["importances"] if entry["by_method"]]
    if not groups:
        return None
    chart = Figure(figsize=(5.5 * min(2, len(groups)), 3.4 * math.ceil(len(groups) / 2)), layout="constrained")
    places = chart.subplots(math.ceil(len(groups) / 2), min(2, len(groups)), squeeze=False).ravel()
    for place, entry in zip(places, groups, strict=False):
        methods = entry["by_method"]
        names = list(next(iter(methods.values())))[:8]
        height = 0.8 / len(methods)
        for number, (method, shares) in enumerate(methods.items()):
            lines = [line + (number - (len(methods) - 1) / 2) * height for line in range(len(names))]
            shade = ("#0072B2", "#E69F00")[number % 2]
            place.barh(lines, [shares.get(name, 0.0) for name in names], height=height, color=shade, label=method)
        place.set_yticks(range(len(names)), names, fontsize=8)
        place.invert_yaxis()
        place.set(xlabel="share", title=f"{entry['among']} ({entry['trials']})")
        place.legend(fontsize="small", loc="lower right")
    for place in places[len(groups) :]:
        place.set_axis_off()
    return chart


def prices(found: Comparison) -> Figure | None:
    """Draw the metric against the size, the latency and the training time, with the Pareto fronts."""
    chart = Figure(figsize=(12, 4.2), layout="constrained")
    for place, (price, label) in zip(chart.subplots(1, len(PRICES)), PRICES.items(), strict=True):
        known = [row for row in found.ranked if not math.isnan(row.best) and getattr(row, price) > 0]
        if not known:
            place.set_axis_off()
            place.text(0.5, 0.5, f"no trial reports\n{label}", ha="center")
            continue
        unit = 3600.0 if price == "device_s" else 1.0
        for name, shade in found.colours.items():
            mine = [row for row in known if row.architecture == name]
            if mine:
                values = [getattr(row, price) / unit for row in mine]
                place.plot(values, [row.best for row in mine], "o", color=shade, alpha=0.8, label=name)
        line = [(getattr(row, price) / unit, row.best) for row in front(found.ranked, found.mode, price)]
        place.step(*zip(*line, strict=True), where="post", color="0.4", linewidth=1, zorder=0, label="Pareto front")
        place.set(xlabel=label, ylabel=found.metric)
        _logarithmic(place, "x", [getattr(row, price) for row in known], 3)
        _logarithmic(place, "y", [row.best for row in known])
    handles, labels = chart.axes[-1].get_legend_handles_labels()
    if handles:
        chart.axes[-1].legend(handles, labels, fontsize="small")
    return chart


def _logarithmic(place: Axes, axis: str, values: list[float], spread: float = 10.0) -> None:
    """Make the axis "x" or "y" logarithmic where its values, all above 0, differ by more than a factor of `spread`."""
    if values and min(values) > 0 and max(values) > spread * min(values):
        place.set(**{f"{axis}scale": "log"})
        plain_decades(getattr(place, f"{axis}axis"))


def plain_decades(axis: Axis) -> None:
    """Write 0.2, 0.5, 1, 2, 5 instead of powers, whose labels run into each other within a decade."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.3g}" if value < 1000 else f"{value:.0e}"))
    axis.set_minor_formatter(NullFormatter())


def spreads(found: Comparison) -> Figure | None:
    """Draw the metric of settings that ran with several seeds; None where there are none."""
    groups = found.figures["seeds"][:20]
    if not groups:
        return None
    chart = Figure(figsize=(8, 1.2 + 0.35 * len(groups)), layout="constrained")
    place = chart.subplots()
    for line, group in enumerate(groups):
        shade = found.colours[group["architecture"]]
        place.plot(group["values"], [line] * len(group["values"]), "o", color=shade, alpha=0.7)
        place.plot([group["mean"]], [line], "|", color="k", markersize=14)
    settings = [searched_settings(group["settings"]) for group in groups]
    labels = [g["architecture"] + (f" ({text})" if text else "") for g, text in zip(groups, settings, strict=True)]
    place.set_yticks(range(len(groups)), labels, fontsize=8)
    place.invert_yaxis()
    place.set(xlabel=found.metric, title="the same settings with several seeds (bar: mean)")
    return chart


CHARTS = {"overview": overview, "parallel": parallel, "importances": importances, "prices": prices, "seeds": spreads}
"""What draws each picture of a comparison, by the name of its file; None where there is nothing to draw."""
