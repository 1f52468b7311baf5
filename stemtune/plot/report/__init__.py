"""`report.html`: a map as one page that needs nothing else, with what is known of every pixel under the pointer.

Pictures are data inside the page, diagrams are vectors; template, style and script are the three files beside this one.
Everything that comes from a file is escaped, for a CIF or a scan of somebody else may hold any text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader

from stemtune._version import __version__
from stemtune.analysis.grain_analysis import Analysis
from stemtune.crystal_map.orientation_map import OrientationMap
from stemtune.dataset.store import Store
from stemtune.errors import UserError
from stemtune.indexing.overlap import WEIGHT_LAYER
from stemtune.plot.figures import length_text, round_length
from stemtune.plot.grains import class_colours, colours_of, edge_lines, grain_colours, highest_deg, phase_colours
from stemtune.plot.ipf import DIRECTIONS, MEANING, map_colours, present_phases
from stemtune.plot.pole_figures import HALF_WIDTH_DEG
from stemtune.plot.report import figures
from stemtune.plot.report.figures import pixel_data, worst_fit

NAME = "report.html"

_HERE = Path(__file__).parent
_TALLEST_PX = 430  # of a map on the page
_GAMMA = 0.4
_LONGEST = 400  # characters of one setting that are shown


def write_report(analysis: Analysis, folder: Path, summary: Mapping[str, Any], store: Store | None = None) -> None:
    """Write `report.html` of a map into its folder; `summary` is what `summary.json` says.

    The patterns are those of `store`; without it they are looked for where the map says, and if they are gone the page
    says so.
    """
    (folder / NAME).write_text(report(analysis, summary, store), encoding="utf-8")


def report(analysis: Analysis, summary: Mapping[str, Any], store: Store | None = None) -> str:
    """Return the page; see `write_report`."""
    made = analysis.orientation_map
    rows, columns = made.shape
    dy, dx = made.step_nm or (1.0, 1.0)
    ratio, length = columns * dx / (rows * dy), round_length(0.28 * columns * dx, whole=made.step_nm is None)
    ipf = {f"IPF-{axis}: crystal direction along {MEANING[axis]}": map_colours(made, axis) for axis in DIRECTIONS}
    template = Environment(loader=FileSystemLoader(_HERE), autoescape=True).get_template(NAME)
    return template.render(
        name=Path(str(made.attrs.get("source", "map"))).name,
        style=(_HERE / "report.css").read_text(encoding="utf-8"),
        script=(_HERE / "report.js").read_text(encoding="utf-8"),
        data=json.dumps(pixel_data(made), separators=(",", ":")).replace("<", "\\u003c"),
        version=__version__,
        rows=rows,
        columns=columns,
        step="step not known" if made.step_nm is None else f"step {made.step_nm[1]:g} x {made.step_nm[0]:g} nm",
        phases=", ".join(made.phase_names),
        ratio=f"{ratio:.5g}",
        scale={"percent": f"{100 * length / (columns * dx):.3f}", "text": length_text(length, made.scan_unit)},
        ramp=figures.ramp(),
        tiles=_tiles(summary),
        ipf_maps=[_map(ratio, title, colours) for title, colours in ipf.items()],
        keys=[
            {
                "svg": figures.key(made.crystals[index]),
                "name": f"{made.phase_names[index]}, {made.phases[index].symmetry.laue}",
            }
            for index in present_phases(made)
        ],
        further_maps=[*_grain_map(ratio, analysis), *_scalars(ratio, made)],
        boundaries=list(_boundaries(analysis)),
        half_width=f"{HALF_WIDTH_DEG:g}",
        poles=list(_poles(made)),
        grain_sizes=figures.grain_sizes(analysis),
        disorientations=figures.disorientations(analysis),
        gamma=f"{_GAMMA:g}",
        notes=summary.get("notes", ()),
        settings=list(_flat(made.attrs)),
        figures=list(_flat(summary)),
        **_worst(made, store),
    )


def _tiles(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the summary's main figures."""
    grains = summary.get("grains", {})
    tiles = [
        ("patterns", _number(summary.get("patterns"), ",")),
        ("indexed", _number(summary.get("indexed_fraction"), ".1%")),
        ("median confidence", _number(summary.get("median_confidence"), ".2f")),
        ("explained intensity", _number(summary.get("median_explained_intensity"), ".2f")),
        ("grains", _number(grains.get("count"), ",")),
        (f"diameter, {grains.get('unit', 'px')}", _number(grains.get("median_diameter"), ",.3g")),
        ("median KAM", _number(grains.get("median_kam_deg"), ".2f", "°")),
    ]
    if "disorientation" in summary:
        strict = summary["disorientation"]["strict"]
        tiles.append(("median off truth", _number(strict.get("median_deg"), ".2f", "°")))
        tiles.append(("within 5° of truth", _number(strict.get("within_5deg"), ".1%")))
    return tiles


def _number(value: Any, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _map(ratio: float, title: str, colours: Any, **more: Any) -> dict[str, Any]:
    """Return what the template needs of one map: title, picture, width, and its legend or colour bar."""
    return {"title": title, "source": figures.picture(colours), "width": f"{max(_TALLEST_PX * ratio, 120):.0f}", **more}


def _grain_map(ratio: float, analysis: Analysis) -> Iterator[dict[str, Any]]:
    shares = analysis.boundaries.shares()
    legend = [
        {"colour": colour, "text": f"{name} {shares[name]['share']:.0%}", "kind": "line"}
        for name, colour in class_colours(analysis.boundaries).items()
    ]
    title = f"{len(analysis.grains.table):,} grains: mean direction along the beam"
    colours = grain_colours(analysis.orientation_map, analysis.grains)
    yield _map(ratio, title, colours, legend=legend, kind="with-boundaries")


def _scalars(ratio: float, made: OrientationMap) -> Iterator[dict[str, Any]]:
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
        colours = figures.scalar_colours(values.reshape(made.shape), highest)
        yield _map(ratio, title, colours, bar={"unit": unit, "highest": f"{highest:.2g}"})
    if len(made.phases) > 1:
        names = zip(colours_of(len(made.phases)), made.phase_names, strict=True)
        legend = [{"colour": colour, "text": name, "kind": ""} for colour, name in names]
        yield _map(ratio, "Phase", phase_colours(made), legend=legend)


def _boundaries(analysis: Analysis) -> Iterator[dict[str, str]]:
    """Yield the boundaries of each class as lines that every map may show, in units of pixels."""
    boundaries, columns = analysis.boundaries, analysis.orientation_map.shape[1]
    for name, colour in class_colours(boundaries).items():
        own = boundaries.kind == boundaries.names.index(name)
        lines = np.round(edge_lines(boundaries.first[own], boundaries.second[own], columns) + 0.5).astype(int)
        drawn = "".join(f"M{x0} {y0}V{y1}" if x0 == x1 else f"M{x0} {y0}H{x1}" for (x0, y0), (x1, y1) in lines.tolist())
        yield {"drawn": drawn, "colour": colour}


def _poles(made: OrientationMap) -> Iterator[dict[str, str]]:
    for index in present_phases(made):
        own = made.phase == index
        if own.any():
            title = f"{made.phase_names[index]}, {int(own.sum()):,} pixels"
            yield {"title": title, "svg": figures.poles(made.orientation[own], made.crystals[index])}


def _worst(made: OrientationMap, store: Store | None) -> dict[str, Any]:
    """Return the worst patterns beside what was simulated for them, or why they cannot be shown."""
    try:
        worst = worst_fit(made, store)
    except UserError as problem:
        return {"worst_missing": str(problem)}
    except KeyError:
        return {"worst_missing": "the map does not say what it was made of"}
    pairs, explained = [], made.score("explained_intensity")
    for pixel, measured, simulated in zip(worst.pixel.tolist(), worst.measured, worst.simulated, strict=True):
        row, column = divmod(pixel, made.shape[1])
        text = f"row {row}, column {column}: explained {explained[pixel]:.2f}, confidence {made.confidence[pixel]:.2f}"
        pictures = {"measured": figures.grey_picture(measured, _GAMMA)}
        pictures["simulated"] = figures.grey_picture(simulated, _GAMMA)
        pairs.append({**pictures, "text": text})
    return {"worst": pairs}


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Yield every setting with its dotted name, in text."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        elif value is not None:
            text = (
                f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
            )
            yield f"{before}{name}", text[:_LONGEST] + ("…" if len(text) > _LONGEST else "")
