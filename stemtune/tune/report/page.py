"""A sweep as one HTML page that needs nothing else: leaderboard, pictures, importances, cost."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from stemtune.tune.run.trial_state import STATUS_WORDS, figure

if TYPE_CHECKING:
    from stemtune.tune.report import Comparison

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:0 auto;max-width:1180px;padding:1.2rem 1.5rem;color:#1a1a1a}
h1{font-size:1.5rem;margin:0 0 .2rem}h2{font-size:1.15rem;margin:2rem 0 .5rem}p.note{color:#555;margin:.2rem 0 .6rem}
table{border-collapse:collapse;width:100%;font-size:.86rem}
th,td{padding:.3rem .55rem;border-bottom:1px solid #ddd;text-align:left}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
th{cursor:pointer;white-space:nowrap;background:#f5f5f5}td.s{color:#444;font-size:.8rem;min-width:17rem}
tr.champion td{font-weight:600}img{max-width:100%;height:auto}.wide{overflow-x:auto}
"""

_SCRIPT = """
for (const head of document.querySelectorAll('table.sortable th')) head.onclick = () => {
  const body = head.closest('table').tBodies[0], column = head.cellIndex;
  const up = head.dataset.up = head.dataset.up === '1' ? '0' : '1';
  const key = row => { const cell = row.cells[column]; return cell.dataset.v ?? cell.textContent; };
  const order = (a, b) => { const x = parseFloat(key(a)), y = parseFloat(key(b));
    return isNaN(x) || isNaN(y) ? key(a).localeCompare(key(b)) : x - y; };
  for (const row of [...body.rows].sort((a, b) => up === '1' ? order(a, b) : order(b, a))) body.append(row);
};
"""

_TITLES = {
    "overview": ("Learning curves and architectures", "A cross ends a trial that ASHA stopped."),
    "parallel": ("Settings", "Each line is a trial; where good trials bundle, a setting matters."),
    "importances": (
        "What mattered",
        "fANOVA: share of each setting in the variance over the whole range; PED-ANOVA: in being among the good trials",
    ),
    "prices": ("What accuracy costs", "A trial on the line is beaten by no other in both figures."),
    "seeds": ("Chance", "Differences smaller than the spread over seeds mean nothing."),
}


def page(found: Comparison, pictures: Mapping[str, bytes]) -> str:
    """Return the page, with the pictures (PNG, by the names of `charts.CHARTS`) inside."""
    figures = found.figures
    shown = "".join(_picture(name, pictures[name]) for name in _TITLES if name in pictures)
    about = escape(found.about)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(found.sweep.name)}: comparison</title><style>{_STYLE}</style>"
        f"<h1>{escape(found.sweep.name)}</h1><p class=note>{about}</p>"
        f"<p>{escape(_sentence(found))}</p>{_board(found)}{shown}"
        f"<h2>Cost</h2><p>{escape(_cost(figures['cost']))}</p>"
        f"<p class=note>{escape(_origin(figures))}</p><script>{_SCRIPT}</script></html>\n"
    )


def _sentence(found: Comparison) -> str:
    less = "less" if found.mode == "min" else "more"
    best = next((row for row in found.ranked if not math.isnan(row.best)), None)
    if best is None:
        return f"{len(found.ranked)} trials, none of which reports {found.metric}."
    return (
        f"{len(found.ranked)} trials by {found.metric} ({less} is better). Best: trial {best.number},"
        f" {best.architecture}, {figure(found.metric, best.best)} after epoch {best.best_epoch}."
    )


def _board(found: Comparison) -> str:
    heads = [
        *(("place", True), ("trial", True), ("model", False), (found.metric.split("/")[-1], True), ("epoch", True)),
        *(("epochs", True), ("status", False), ("weights", True), ("ms/pattern", True), ("device time", True)),
        ("settings", False),
    ]
    top = "".join(f"<th{' class=n' if number else ''}>{escape(name)}</th>" for name, number in heads)
    lines = []
    for place, row in enumerate(found.ranked, 1):
        known = not math.isnan(row.best)
        cells = [
            _number(place, str(place) if known else "-"),
            _number(row.number, str(row.number)),
            f"<td>{escape(row.architecture)}</td>",
            _number(row.best, figure(found.metric, row.best)),
            _number(row.best_epoch, str(row.best_epoch)),
            _number(row.epochs, str(row.epochs)),
            f"<td title='{escape(row.reason, quote=True)}'>{escape(STATUS_WORDS.get(row.status, row.status))}</td>",
            _number(row.parameters, "-" if math.isnan(row.parameters) else f"{row.parameters:,.0f}"),
            _number(row.ms_per_pattern, "-" if math.isnan(row.ms_per_pattern) else f"{row.ms_per_pattern:.2f}"),
            _number(row.device_s, f"{row.device_s:,.0f} s"),
            f"<td class=s>{escape(_settings(row.searched))}</td>",
        ]
        lines.append(f"<tr{' class=champion' if place == 1 and known else ''}>{''.join(cells)}</tr>")
    return (
        "<h2>Leaderboard</h2><p class=note>A click on a heading sorts.</p><div class=wide><table class=sortable>"
        f"<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _number(value: float, text: str) -> str:
    return f"<td class=n data-v='{value}'>{escape(text)}</td>"


def _settings(searched: Mapping[str, Any]) -> str:
    shown = {key.split("@")[0]: value for key, value in searched.items() if not key.startswith("model.name")}
    return ", ".join(f"{key}={f'{value:.3g}' if isinstance(value, float) else value}" for key, value in shown.items())


def _picture(name: str, png: bytes) -> str:
    title, note = _TITLES[name]
    data = base64.b64encode(png).decode()
    return f"<h2>{title}</h2><p class=note>{note}</p><img alt='{title}' src='data:image/png;base64,{data}'>"


def _cost(cost: Mapping[str, float]) -> str:
    wall = "" if math.isnan(cost["wall_s"]) else f"{cost['wall_s'] / 60:.1f} minutes of wall time, "
    return f"{wall}{cost['device_s'] / 3600:.2f} device hours of training, {cost['epochs']:.0f} epochs."


def _origin(figures: Mapping[str, Any]) -> str:
    words = {"commit": figures["commit"], "training store": figures["store_sha256"]}
    return "; ".join(f"{name} {value[:16]}" for name, value in words.items() if value)
