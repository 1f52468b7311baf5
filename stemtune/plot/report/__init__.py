"""`report.html`: a map as one page that needs nothing else, with what is known of every pixel under the pointer.

Pictures are data inside the page, diagrams are vectors, the script and the style are the two files beside this one.
Everything that comes from a file is escaped, for a CIF or a scan of somebody else may hold any text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from stemtune._version import __version__
from stemtune.analysis.grain_analysis import Analysis
from stemtune.crystal_map.orientation_map import OrientationMap
from stemtune.dataset.store import Store
from stemtune.errors import UserError
from stemtune.indexing.overlap import WEIGHT_LAYER
from stemtune.plot.figures import round_length
from stemtune.plot.grains import class_colours, edge_lines, grain_colours, highest_deg
from stemtune.plot.ipf import DIRECTIONS, MEANING, map_colours, present_phases
from stemtune.plot.phases import colours_of, phase_colours
from stemtune.plot.pole_figures import HALF_WIDTH_DEG
from stemtune.plot.report import figures as figures
from stemtune.plot.report.pixels import pixel_data
from stemtune.plot.report.worst_fit import worst_fit

NAME = "report.html"

_HIGH_PX = 430  # tallest map on the page
_GAMMA = 0.4
_LONGEST = 400  # characters of one setting that are shown


def write_report(analysis: Analysis, folder: Path, summary: Mapping[str, Any], store: Store | None = None) -> None:
    """Write `report.html` of a map into its folder.

    Parameters
    ----------
    analysis
        The map and its grains.
    folder
        The map folder.
    summary
        What `summary.json` says.
    store
        The patterns; left out, they are looked for where the map says, and if they are gone the page says so.
    """
    (folder / NAME).write_text(report(analysis, summary, store), encoding="utf-8")


def report(analysis: Analysis, summary: Mapping[str, Any], store: Store | None = None) -> str:
    """Return the page; see `write_report`."""
    here, made = Path(__file__).parent, analysis.orientation_map
    style, script = ((here / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    data = json.dumps(pixel_data(made), separators=(",", ":")).replace("<", "\\u003c")
    name = Path(str(made.attrs.get("source", "map"))).name
    rows, columns = made.shape
    step = "step not known" if made.step_nm is None else f"step {made.step_nm[1]:g} x {made.step_nm[0]:g} nm"
    phases = ", ".join(phase.name for phase in made.crystals)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(name)}: orientation map</title><style>{style}</style></head><body>",
        f"<header><h1>{escape(name)}</h1><p>Orientation map of {columns} x {rows} pixels, {escape(step)};"
        f" {escape(phases)}. stemtune {escape(__version__)}.</p></header><main>",
        _tiles(summary),
        _section("Maps", _maps(analysis), _MAPS_NOTE),
        _section("Pole figures", _poles(made), _POLES_NOTE),
        _section("Grains and boundaries", _grains(analysis)),
        _section("The patterns that fit worst", _worst(made, store), _WORST_NOTE),
        _section("How the map was made", _provenance(made, summary)),
        '</main><div id="tip" hidden></div>',
        f'<script type="application/json" id="pixels">{data}</script><script>{script}</script></body></html>',
    ]
    return "\n".join(parts) + "\n"


_MAPS_NOTE = (
    "Point at a pixel for its orientation; click to hold it. Bunge's Euler angles turn the lab into the crystal; x"
    " points right, y up, z along the beam. Grey: not indexed, or nothing known."
)
_POLES_NOTE = (
    "Normals of lattice planes, equal-area projection of the upper hemisphere, in multiples of a random distribution"
    f" (m.r.d.), smoothed over {HALF_WIDTH_DEG:g}°. Every indexed pixel counts the same, so few grains make few spots."
)
_WORST_NOTE = (
    "Measured (left), and simulated from the map's orientation (right: kinematic, 50 nm, no noise, undistorted"
    f" detector). Intensity to the power {_GAMMA:g}."
)


def _section(title: str, content: str, note: str = "") -> str:
    told = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{told}{content}</section>"


def _tiles(summary: Mapping[str, Any]) -> str:
    """Return the summary's main figures."""
    grains = summary.get("grains", {})
    told = [
        ("patterns", _number(summary.get("patterns"), ",")),
        ("indexed", _number(summary.get("indexed_fraction"), ".1%")),
        ("median confidence", _number(summary.get("median_confidence"), ".2f")),
        ("median fit", _number(summary.get("median_explained_intensity"), ".2f")),
        ("grains", _number(grains.get("count"), ",")),
        (f"diameter, {grains.get('unit', 'px')}", _number(grains.get("median_diameter"), ",.3g")),
        ("median KAM", _number(grains.get("median_kam_deg"), ".2f", "°")),
    ]
    if "disorientation" in summary:
        strict = summary["disorientation"]["strict"]
        told.append(("median off truth", _number(strict.get("median_deg"), ".2f", "°")))
        told.append(("within 5° of truth", _number(strict.get("within_5deg"), ".1%")))
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in told)
    return f'<dl class="tiles">{cells}</dl>'


def _number(value: Any, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _maps(analysis: Analysis) -> str:
    made = analysis.orientation_map
    present = present_phases(made)
    cards = [
        _card(made, f"IPF-{axis}: crystal direction along {MEANING[axis]}", figures.picture(map_colours(made, axis)))
        for axis in DIRECTIONS
    ]
    keys = "".join(
        f'<div class="key">{figures.key(made.crystals[index])}<div>{escape(made.crystals[index].name)},'
        f" {escape(made.crystals[index].symmetry.laue)}</div></div>"
        for index in present
    )
    cards.append(f'<figure><figcaption>Colour key (TSL)</figcaption><div class="keys">{keys}</div></figure>')
    grains = figures.picture(grain_colours(made, analysis.grains))
    count = f"{len(analysis.grains.table):,} grains: mean direction along the beam"
    cards.append(_card(made, count, grains, _legend(analysis), kind="with-boundaries"))
    cards += list(_scalars(made))
    switch = '<label class="switch"><input type="checkbox" id="all"> boundaries on all maps</label>'
    return f'{_boundaries(analysis)}{switch}<div class="maps">{"".join(cards)}</div>'


def _scalars(made: OrientationMap) -> Iterator[str]:
    """Yield the maps of numbers and of phases."""
    indexed, layers = made.indexed, made.layers
    shown: list[tuple[str, Any, float, str]] = [
        ("Confidence of the best answer", np.where(indexed, made.confidence, np.nan), 1.0, ""),
    ]
    for name, title in (("kam_deg", "Kernel average misorientation"), ("grod_deg", "Disorientation from the grain")):
        if name in layers:
            shown.append((f"{title} ({name[:-4].upper()})", layers[name], highest_deg(layers[name]), "°"))
    if WEIGHT_LAYER in layers:
        weight = np.where(indexed, np.nan_to_num(layers[WEIGHT_LAYER]), np.nan)
        shown.append(("Overlap: share of the second crystal", weight, 0.5, ""))
    for title, values, highest, unit in shown:
        picture = figures.picture(figures.scalar_colours(values.reshape(made.shape), highest))
        over = " and more" if unit else ""
        bar = (
            f'<div class="bar"><span>0{unit}</span><i style="background:linear-gradient(to right,{figures.ramp()})">'
            f"</i><span>{highest:.2g}{unit}{over}</span></div>"
        )
        yield _card(made, title, picture, bar)
    if len(made.phases) > 1:
        names = zip(colours_of(len(made.phases)), made.phase_names, strict=True)
        legend = "".join(_swatch(colour, name) for colour, name in names)
        yield _card(made, "Phase", figures.picture(phase_colours(made)), f'<div class="legend">{legend}</div>')


def _card(made: OrientationMap, title: str, source: str, below: str = "", kind: str = "") -> str:
    """Return one map with its title, boundaries, scale bar and key."""
    rows, columns = made.shape
    dy, dx = made.step_nm or (1.0, 1.0)
    ratio = columns * dx / (rows * dy)
    length = round_length(0.28 * columns * dx, whole=made.step_nm is None)
    text = f"{length / 1000:g} µm" if made.step_nm and length >= 1000 else f"{length:g} {made.scan_unit}"
    return (
        f'<figure style="max-width:{max(_HIGH_PX * ratio, 120):.0f}px"><figcaption>{escape(title)}</figcaption>'
        f'<div class="map {kind}" style="aspect-ratio:{ratio:.5g}"><img alt="{escape(title)}" src="{source}">'
        f'<svg viewBox="0 0 {columns} {rows}" preserveAspectRatio="none"><use href="#boundaries"/></svg><b></b></div>'
        f'<div class="scale"><i style="width:{100 * length / (columns * dx):.3f}%"></i>{escape(text)}</div>'
        f"{below}</figure>"
    )


def _boundaries(analysis: Analysis) -> str:
    """Return the boundaries as lines that every map may show, in units of pixels."""
    boundaries, columns = analysis.boundaries, analysis.orientation_map.shape[1]
    paths = []
    for name, colour in class_colours(boundaries).items():
        own = boundaries.kind == boundaries.names.index(name)
        lines = np.round(edge_lines(boundaries.first[own], boundaries.second[own], columns) + 0.5).astype(int)
        drawn = "".join(f"M{x0} {y0}V{y1}" if x0 == x1 else f"M{x0} {y0}H{x1}" for (x0, y0), (x1, y1) in lines.tolist())
        paths.append(f'<path d="{drawn}" stroke="{colour}"/>')
    return f'<svg class="store"><defs><g id="boundaries">{"".join(paths)}</g></defs></svg>'


def _legend(analysis: Analysis) -> str:
    shares = analysis.boundaries.shares()
    swatches = (
        _swatch(colour, f"{name} {shares[name]['share']:.0%}", "line")
        for name, colour in class_colours(analysis.boundaries).items()
    )
    return f'<div class="legend">{"".join(swatches)}</div>'


def _swatch(colour: str, text: str, kind: str = "") -> str:
    return f'<span><i class="{kind}" style="background:{colour}"></i>{escape(text)}</span>'


def _poles(made: OrientationMap) -> str:
    shown = []
    for index in present_phases(made):
        own = made.phase == index
        if own.any():
            phase = made.crystals[index]
            title = f"{phase.name}, {int(own.sum()):,} pixels"
            drawn = figures.poles(made.orientation[own], phase)
            shown.append(f'<figure class="wide"><figcaption>{escape(title)}</figcaption>{drawn}</figure>')
    return "".join(shown) or "<p>No pixel is indexed.</p>"


def _grains(analysis: Analysis) -> str:
    return (
        f'<div class="pair"><figure><figcaption>Grain sizes</figcaption>{figures.grain_sizes(analysis)}</figure>'
        "<figure><figcaption>Disorientation of neighbours across boundaries, by length</figcaption>"
        f"{figures.disorientations(analysis)}</figure></div>"
    )


def _worst(made: OrientationMap, store: Store | None) -> str:
    try:
        worst = worst_fit(made, store)
    except (UserError, KeyError) as problem:
        reason = "the map does not say what it was made of" if isinstance(problem, KeyError) else str(problem)
        return f"<p>They cannot be shown: {escape(reason)}.</p>"
    cards, explained = [], made.score("explained_intensity")
    for pixel, measured, simulated in zip(worst.pixel.tolist(), worst.measured, worst.simulated, strict=True):
        row, column = divmod(pixel, made.shape[1])
        text = f"row {row}, column {column}: explained {explained[pixel]:.2f}, confidence {made.confidence[pixel]:.2f}"
        both = "".join(
            f'<img alt="{name}" src="{figures.grey_picture(pattern, _GAMMA)}">'
            for name, pattern in (("measured", measured), ("simulated", simulated))
        )
        cards.append(f'<figure><div class="both">{both}</div><figcaption>{escape(text)}</figcaption></figure>')
    return f'<div class="worst">{"".join(cards)}</div>'


def _provenance(made: OrientationMap, summary: Mapping[str, Any]) -> str:
    notes = "".join(f"<li>{escape(str(note))}</li>" for note in summary.get("notes", ()))
    told = f'<ul class="notes">{notes}</ul>' if notes else ""
    return (
        f"{told}<details open><summary>Settings, model and calibration</summary>{_table(made.attrs)}</details>"
        f"<details><summary>All figures of summary.json</summary>{_table(summary)}</details>"
    )


def _table(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(text[:_LONGEST])}{'…' if len(text) > _LONGEST else ''}</td></tr>"
        for name, text in _flat(values)
    )
    return f"<table>{rows}</table>"


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Yield every setting with its dotted name, in text."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        elif value is not None:
            number = isinstance(value, float)
            yield (
                f"{before}{name}",
                f"{value:.6g}" if number else value if isinstance(value, str) else json.dumps(value),
            )


__all__ = ["NAME", "report", "write_report"]
