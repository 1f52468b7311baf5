"""The study's report: a page, a picture and every figure as JSON."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from stemtune._files import whole_file
from stemtune._version import __version__
from stemtune.study.findings import CHANCE_DEG, Outcome, Size
from stemtune.tune.report import without_nan
from stemtune.tune.report.charts import plain_decades
from stemtune.tune.report.output import render

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    picture = base64.b64encode((out / "findings.png").read_bytes()).decode()
    page = render(
        "stemtune.study", "report.html", found=found, kind=kind, size=size, chance_deg=CHANCE_DEG, picture=picture
    )
    with whole_file(out / "report.html") as part:
        part.write_text(page)
    return out / "report.html"


def draw(found: list[Outcome], png: Path, kind: str) -> None:
    """Draw each finding: the last mean disorientation of every trial, grouped by what was varied."""
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
    values = [value for group in each.groups for value in group.error_deg]
    for line, group in enumerate(each.groups):
        place.plot(group.error_deg, [line] * len(group.error_deg), "o", color="#0072B2", alpha=0.75)
        place.plot([group.mean_deg], [line], "|", color="k", markersize=12)
    if values and max(values) > 8 * min(values):
        place.set_xscale("log")
        plain_decades(place.xaxis)
    place.axvspan(CHANCE_DEG, max([*values, CHANCE_DEG]) * 1.08, color="0.93", zorder=0)
    place.set_yticks(range(len(each.groups)), [group.label for group in each.groups], fontsize=8)
    place.set_ylim(len(each.groups) - 0.5, -0.5)
    place.set_xlabel("mean disorientation / °", fontsize=8)
    place.set_ylabel(",\n".join(each.finding.by), fontsize=7)
    place.set_title(f"{each.finding.title}  {each.verdict}", fontsize=10, loc="left")
    place.grid(axis="x", color="0.9")
