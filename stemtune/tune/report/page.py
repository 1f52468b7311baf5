"""A sweep as one HTML page that needs nothing else: leaderboard, pictures, importances, cost."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from stemtune.tune.formatting import STATUS_WORDS, format_metric, searched_settings
from stemtune.tune.report.leaderboard import Comparison

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
