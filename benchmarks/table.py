"""The figures of `python -m benchmarks accuracy` as Markdown tables with aligned columns, for people and docs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SET = ("Bloch waves", "prec.", "electrons", "centre", "scale")
_ROWS = (*_SET, "method", "median", "mean", "< 2°", "< 5°", "median*", "< 5°*", "pseudo", "patterns/s")
_NOTE = (
    "* modulo half a turn about the beam; pseudo: taken for a pseudo-symmetric variant; centre and scale: how far they"
    " are off; no answer counts as 180°"
)
_PAIRS = ("patterns of", "prec.", "electrons", "method", "median", "ours", "< 5°", "ours", "within 10 %")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; columns are as wide as their longest cell, and numbers stand at the right."""
    widths = [max(len(line[place]) for line in (head, *rows)) for place in range(len(head))]
    words = [not any(row[place][:1].isdigit() for row in rows) for place in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        parts = zip(cells, widths, words, strict=True)
        return "| " + " | ".join(cell.ljust(width) if word else cell.rjust(width) for cell, width, word in parts) + " |"

    rule = ["-" * width if word else "-" * (width - 1) + ":" for width, word in zip(widths, words, strict=True)]
    return "\n".join(line(cells) for cells in (head, rule, *rows))


def format_tables(result: Mapping[str, Any]) -> str:
    """Return the tables of what `accuracy.run` found: every set and method, and physics that is not ours."""
    parts = [markdown(_ROWS, [_line(row) for row in result["rows"]]), _NOTE]
    if result["foreign"]:
        parts.append("Patterns of other programs beside our own of the same orientations, thicknesses and noise:")
        parts.append(markdown(_PAIRS, [_pair(row) for row in result["foreign"]]))
    return "\n\n".join([*parts, *result["left_out"]])


def _taken(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['precession_deg']:g}°", f"{row['electrons']:,}" if row["electrons"] else "no noise"]


def _line(row: Mapping[str, Any]) -> list[str]:
    strict, twin = row["strict"], row["beam180"]
    rate = row["patterns_per_s"]
    return [
        row["source"],
        *_taken(row),
        f"{row['centre_px']:g} px",
        f"{100 * row['scale_error']:g} %",
        row["method"],
        f"{strict['median_deg']:.2f}°",
        f"{strict['mean_deg']:.1f}°",
        f"{strict['within_2deg']:.1%}",
        f"{strict['within_5deg']:.1%}",
        f"{twin['median_deg']:.2f}°",
        f"{twin['within_5deg']:.1%}",
        f"{row['pseudo']:.1%}",
        f"{rate:.2g}" if rate < 10 else f"{rate:,.0f}",
    ]


def _pair(row: Mapping[str, Any]) -> list[str]:
    theirs, ours = row["theirs"]["strict"], row["ours"]["strict"]
    return [
        row["program"],
        *_taken(row),
        row["method"],
        f"{theirs['median_deg']:.2f}°",
        f"{ours['median_deg']:.2f}°",
        f"{theirs['within_5deg']:.1%}",
        f"{ours['within_5deg']:.1%}",
        "yes" if row["no_worse"] else "no",
    ]
