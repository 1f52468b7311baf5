"""What a sweep found, as pictures: learning curves, architectures, settings, importances, prices, seeds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stemtune._files import whole_file
from stemtune.tune.report.leaderboard import Row, front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from stemtune.tune.report import Comparison

PRICES = {
    "parameters": "weights of the model",
    "ms_per_pattern": "milliseconds per pattern",
    "device_s": "training, device hours",
}
"""What accuracy is weighed against: figures of `Row` that should be small."""

_AXES = 9  # settings that parallel coordinates show at most


def colours(names: list[str]) -> dict[str, str]:
    """Return a colour for each architecture, best first; Okabe and Ito's, which the colour-blind tell apart."""
    palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
    return {name: palette[index % len(palette)] for index, name in enumerate(names)}


def save(chart: Figure, png: Path) -> None:
    """Write a picture, whole or not at all."""
    with whole_file(png) as part:
        chart.savefig(part, dpi=130, format=png.suffix.lstrip(".") or "png")


def overview(found: Comparison) -> Figure:
    """Draw every trial's learning curve, and the best of each architecture beside the baseline."""
    from matplotlib.figure import Figure

    chart = Figure(figsize=(11, 4.5), layout="constrained")
    curves, bars = chart.subplots(1, 2)
    _curves(curves, found)
    _bars(bars, found)
    drawn = [value for row in found.ranked for _, value in row.curve]
    if drawn and min(drawn) > 0 and max(drawn) > 10 * min(drawn):
        curves.set_yscale("log")
        bars.set_xscale("log")
        plain_decades(curves.yaxis)
        plain_decades(bars.xaxis)
    for number, epoch in enumerate(found.figures["rungs"]):
        label = "ASHA decides" if number == 0 else None
        curves.axvline(epoch, color="0.6", linewidth=0.8, linestyle=":", zorder=0, label=label)
    if found.ranked and found.ranked[0].curve:
        curves.legend(fontsize="small")
    return chart


def _curves(place: Axes, found: Comparison) -> None:
    from matplotlib.ticker import MaxNLocator

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
        points = [
            row.best for row in found.ranked if row.architecture == entry["architecture"] and not math.isnan(row.best)
        ]
        place.plot(points, [line] * len(points), ".", color=found.colours[entry["architecture"]], alpha=0.6)
        place.plot([min(points), max(points)], [line, line], color="0.8", linewidth=1, zorder=0)
        if entry["baseline"]:
            place.axvline(entry["best"], color="k", linestyle="--", linewidth=1)
    place.set_ylim(-0.6, len(shown) - 0.4)
    labels = [entry["architecture"] + ("\n(baseline)" if entry["baseline"] else "") for entry in shown]
    place.set_yticks(places, labels)
    place.invert_yaxis()
    place.set(xlabel=found.metric, title="each architecture (diamond: its best; dots: its trials)")


def parallel(found: Comparison) -> Figure | None:
    """Draw every trial as a line through its settings to its figure; None where nothing was searched."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    ranked = [row for row in found.ranked if not math.isnan(row.best) and row.searched]
    names = _varied(ranked)
    if len(ranked) < 2 or not names:
        return None
    chart = Figure(figsize=(max(6.0, 1.5 * (len(names) + 1)), 4.5), layout="constrained")
    place = chart.subplots()
    scales = [_Scale([row.searched.get(name) for row in ranked]) for name in names]
    scales.append(_Scale([row.best for row in ranked]))
    order = len(ranked)
    for rank, row in reversed(list(enumerate(ranked))):
        heights = [scale.at(row.searched.get(name)) for name, scale in zip(names, scales[:-1], strict=True)]
        heights.append(scales[-1].at(row.best))
        shade = colormaps["cividis"](1 - rank / max(1, order - 1))
        style: dict[str, Any] = {"linewidth": 2.2, "zorder": 3} if rank == 0 else {"linewidth": 1.0, "alpha": 0.7}
        place.plot(range(len(heights)), heights, color=shade, **style)
    for number, scale in enumerate(scales):
        place.axvline(number, color="0.3", linewidth=0.8)
        for height, text in scale.ticks():
            place.text(number + 0.03, height, text, fontsize=7, va="center", bbox={"fc": "w", "ec": "none", "pad": 0.5})
    labels = [name.replace(".", ".\n", 1) for name in [*names, found.metric.replace("/", "/\n")]]
    place.set_xticks(range(len(scales)), labels, fontsize=8)
    place.set(yticks=[], ylim=(-0.06, 1.06), xlim=(-0.2, len(scales) - 0.5))
    place.set_title("settings of each trial (yellow: good, blue: bad; -: no such setting)", fontsize=10)
    for side in ("left", "right", "top", "bottom"):
        place.spines[side].set_visible(False)
    return chart


def _varied(ranked: list[Row]) -> list[str]:
    names = dict.fromkeys(name for row in ranked for name in row.searched)
    varied = [name for name in names if len({str(row.searched.get(name)) for row in ranked}) > 1]
    shared = {name: sum(name in row.searched for row in ranked) for name in varied}
    return sorted(varied, key=lambda name: -shared[name])[:_AXES]


class _Scale:
    """Heights, 0 to 1, of the values of one setting: linear, logarithmic over decades, or one step for each word."""

    def __init__(self, values: list[Any]) -> None:
        given = [value for value in values if value is not None]
        self.number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in given)
        self.words = [] if self.number else sorted({str(value) for value in given})
        self.gap = len(given) < len(values)  # some trials have no such setting: below the rest
        if self.number:
            self.low, self.high = min(given), max(given)
            self.few = sorted(set(given)) if len(set(given)) <= 4 else [self.low, self.high]
            self.log = self.low > 0 and self.high > 20 * self.low

    def at(self, value: Any) -> float:
        if value is None:
            return 0.0
        base = 0.12 if self.gap else 0.0
        if not self.number:
            share = self.words.index(str(value)) / max(1, len(self.words) - 1)
        elif self.high == self.low:
            share = 0.5
        elif self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return base + (1 - base) * share

    def ticks(self) -> list[tuple[float, str]]:
        shown = [(0.0, "-")] if self.gap else []
        if not self.number:
            return shown + [(self.at(word), word) for word in self.words]
        return shown + [(self.at(value), f"{value:.3g}") for value in self.few]


def importances(found: Comparison) -> Figure | None:
    """Draw which settings mattered, by each method, over all trials and within architectures; None if nobody knows."""
    from matplotlib.figure import Figure

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
    from matplotlib.figure import Figure

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
        costs = [getattr(row, price) for row in known]
        if max(costs) > 3 * min(costs):
            place.set_xscale("log")
            plain_decades(place.xaxis)
        values = [row.best for row in known]
        if min(values) > 0 and max(values) > 10 * min(values):
            place.set_yscale("log")
            plain_decades(place.yaxis)
    handles, labels = chart.axes[-1].get_legend_handles_labels()
    if handles:
        chart.axes[-1].legend(handles, labels, fontsize="small")
    return chart


def plain_decades(axis: Axis) -> None:
    """Write 0.2, 0.5, 1, 2, 5 instead of powers, whose labels run into each other within a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.3g}" if value < 1000 else f"{value:.0e}"))
    axis.set_minor_formatter(NullFormatter())


def spreads(found: Comparison) -> Figure | None:
    """Draw the metric of settings that ran with several seeds; None where there are none."""
    from matplotlib.figure import Figure

    groups = found.figures["seeds"][:20]
    if not groups:
        return None
    chart = Figure(figsize=(8, 1.2 + 0.35 * len(groups)), layout="constrained")
    place = chart.subplots()
    for line, group in enumerate(groups):
        shade = found.colours[group["architecture"]]
        place.plot(group["values"], [line] * len(group["values"]), "o", color=shade, alpha=0.7)
        place.plot([group["mean"]], [line], "|", color="k", markersize=14)
    labels = [group["architecture"] + _settings(group["settings"]) for group in groups]
    place.set_yticks(range(len(groups)), labels, fontsize=8)
    place.invert_yaxis()
    place.set(xlabel=found.metric, title="the same settings with several seeds (bar: mean)")
    return chart


def _settings(settings: dict[str, Any]) -> str:
    words = [f"{key.split('.')[-1]} {value}" for key, value in settings.items() if not key.startswith("model.name")]
    return f" ({', '.join(words)})" if words else ""


CHARTS = {
    "overview": overview,
    "parallel": parallel,
    "importances": importances,
    "prices": prices,
    "seeds": spreads,
}
"""What draws each picture of a comparison, by the name of its file; None where there is nothing to draw."""
