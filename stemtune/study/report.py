"""The study's report: a page, a picture and every figure as JSON."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from stemtune._files import whole_file
from stemtune._version import __version__
from stemtune.study.findings import CHANCE_DEG, Group, Outcome
from stemtune.tune.report import without_nan
from stemtune.tune.report.charts import plain_decades

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from stemtune.study import Size

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1100px;padding:1.2rem 1.5rem;color:#1a1a1a}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin:2rem 0 .4rem}
table{border-collapse:collapse;width:100%;font-size:.9rem;margin:.4rem 0}
th,td{padding:.3rem .6rem;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}th{background:#f5f5f5}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}img{max-width:100%}p.note{color:#555}
"""


def write_report(found: list[Outcome], out: Path, kind: str, size: Size, seconds: float) -> Path:
    """Write `report.html`, `report.json` and `findings.png` into `out`; return the page."""
    draw(found, out / "findings.png", kind)
    facts = {
        "study": "reference",
        "size": kind,
        "budget": dataclasses.asdict(size),
        "stemtune": __version__,
        "seconds_of_this_run": round(seconds, 1),
        "findings": [dataclasses.asdict(each) for each in found],
    }
    with whole_file(out / "report.json") as part:
        part.write_text(json.dumps(without_nan(facts), indent=1) + "\n")
    with whole_file(out / "report.html") as part:
        part.write_text(_page(found, kind, size, (out / "findings.png").read_bytes()))
    return out / "report.html"


def in_words(found: list[Outcome]) -> str:
    """Return each finding in a line, with the reasons below it."""
    lines = []
    for each in found:
        lines.append(f"{each.finding.title} The study: {each.finding.claim}. Here: {each.verdict}.")
        lines += [f"  {reason}" for reason in each.reasons]
    return "\n".join(lines)


def draw(found: list[Outcome], png: Path, kind: str) -> None:
    """Draw each finding: the last median disorientation of every trial, grouped by what was varied."""
    from matplotlib.figure import Figure

    columns = 2
    lines = math.ceil(len(found) / columns)
    heights = [
        max(len(each.groups) for each in found[line * columns : (line + 1) * columns]) + 2.5 for line in range(lines)
    ]
    chart = Figure(figsize=(11, 0.42 * sum(heights)), layout="constrained")
    places = chart.subplots(lines, columns, squeeze=False, height_ratios=heights).ravel()
    for place, each in zip(places, found, strict=False):
        _panel(place, each)
    for place in places[len(found) :]:
        place.set_axis_off()
    chart.suptitle(
        f"Reference study, {kind} size: disorientation from the exact truth (dots: seeds; grey: learned nothing)",
        fontsize=11,
    )
    with whole_file(png) as part:
        chart.savefig(part, dpi=110, format="png")


def _panel(place: Axes, each: Outcome) -> None:
    values = [value for group in each.groups for value in group.median_deg]
    for line, group in enumerate(each.groups):
        place.plot(group.median_deg, [line] * len(group.median_deg), "o", color="#0072B2", alpha=0.75)
        place.plot([group.mean_deg], [line], "|", color="k", markersize=12)
    if values and max(values) > 8 * min(values):
        place.set_xscale("log")
        plain_decades(place.xaxis)
    place.axvspan(CHANCE_DEG, max([*values, CHANCE_DEG]) * 1.08, color="0.93", zorder=0)
    place.set_yticks(range(len(each.groups)), [group.label for group in each.groups], fontsize=8)
    place.set_ylim(len(each.groups) - 0.5, -0.5)
    place.set_xlabel("median disorientation / °", fontsize=8)
    place.set_ylabel(",\n".join(each.finding.by), fontsize=7)
    place.set_title(f"{each.finding.title}  {each.verdict}", fontsize=10, loc="left")
    place.grid(axis="x", color="0.9")


def _page(found: list[Outcome], kind: str, size: Size, png: bytes) -> str:
    rows = "".join(
        f"<tr><td>{escape(each.finding.title)}</td><td>{escape(each.finding.claim)}</td>"
        f"<td><b>{escape(each.verdict)}</b></td><td>{'<br>'.join(escape(reason) for reason in each.reasons)}</td></tr>"
        for each in found
    )
    tables = "".join(_table(each) for each in found)
    picture = base64.b64encode(png).decode()
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>The reference study, measured again</title>"
        f"<style>{_STYLE}</style><h1>The reference study, measured again ({kind} size)</h1>"
        f"<p>{escape(_budget(size))}</p>"
        "<table><thead><tr><th>question</th><th>the study says</th><th>here</th><th>because</th></tr></thead>"
        f"<tbody>{rows}</tbody></table><p class=note>One group is better than another when every seed of it is, and"
        f" when not both have learned nothing (median above {CHANCE_DEG:g}°). The last epoch counts; no trial was"
        " stopped early.</p>"
        f"<img alt='all findings' src='data:image/png;base64,{picture}'>{tables}</html>\n"
    )


def _budget(size: Size) -> str:
    hub = "" if size.gpu else " Models that start from weights of the hub are left out at this size."
    return (
        f"A simulated scan of {size.scan} x {size.scan} positions and {size.grains} grains of LiNiO2, {size.pixels} px,"
        " Bloch waves, 20 to 80 nm, 0.5° of precession, 3,000 electrons; labelled by template matching, judged by the"
        f" exact orientations. {size.seeds} seeds; {size.share:.0%} of the full study's epochs.{hub}"
    )


def _table(each: Outcome) -> str:
    rows = "".join(_row(group) for group in each.groups)
    failed = f"<p class=note>{each.failed} trials did not run to their last epoch.</p>" if each.failed else ""
    return (
        f"<h2>{escape(each.finding.title)}</h2><table><thead><tr><th>{escape(', '.join(each.finding.by))}</th>"
        "<th class=n>median (seeds)</th><th class=n>within 5°</th><th class=n>epochs</th><th class=n>training</th></tr>"
        f"</thead><tbody>{rows}</tbody></table>{failed}"
    )


def _row(group: Group) -> str:
    seeds = ", ".join(f"{value:.2f}" for value in group.median_deg)
    cells = (
        f"{group.mean_deg:.2f}° ({seeds})",
        f"{sum(group.within_5deg) / len(group.within_5deg):.1%}",
        f"{max(len(curve) for curve in group.curves)}",
        f"{sum(group.device_s) / len(group.device_s):.0f} s",
    )
    return f"<tr><td>{escape(group.label)}</td>{''.join(f'<td class=n>{cell}</td>' for cell in cells)}</tr>"
