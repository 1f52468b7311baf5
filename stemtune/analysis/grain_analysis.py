"""Grains and boundaries of a map together: as layers and tables of it, as figures, in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stemtune.analysis.boundaries import Boundaries, boundary_figures, find_boundaries
from stemtune.analysis.grains import Grains, find_grains
from stemtune.analysis.neighbors import Neighbourhood
from stemtune.config import GrainsConfig
from stemtune.crystal_map.orientation_map import OrientationMap


class Analysis(NamedTuple):
    """A map with its grains: the map holds them as the layers `grain`, `kam_deg` and `grod_deg` and as two tables."""

    orientation_map: OrientationMap
    grains: Grains
    boundaries: Boundaries


def analyse(orientation_map: OrientationMap, settings: GrainsConfig, twins: Sequence[str] = ()) -> Analysis:
    """Find grains and boundaries of `orientation_map` and return a copy of it that holds them.

    `twins` are special relations to look for besides the known ones, see `analysis.boundaries.twin`.
    """
    near = Neighbourhood(orientation_map)
    grains = find_grains(orientation_map, settings, near)
    boundaries = find_boundaries(orientation_map, grains, settings, twins, near)
    layers = {"grain": grains.number, "kam_deg": grains.kam_deg, "grod_deg": grains.grod_deg}
    tables = {"grains": grains.table.columns(), "boundaries": boundaries.between(grains.number)}
    facts = {"grains": {**dataclasses.asdict(settings), "twins": list(twins)}}
    changed = dataclasses.replace(
        orientation_map,
        layers={**orientation_map.layers, **layers},
        tables={**orientation_map.tables, **tables},
        attrs={**orientation_map.attrs, **facts},
    )
    return Analysis(changed, grains, boundaries)


def grain_figures(analysis: Analysis) -> dict[str, Any]:
    """Return what `summary.json` says about the grains.

    Returns
    -------
    dict
        `count`; `share_of_indexed`, indexed pixels that belong to a grain; `unit` and `median_diameter` and
        `mean_diameter` (of whole grains: those that do not touch the edge, None without any); `median_spread_deg` and
        `median_kam_deg`; `boundaries`: `length` and the length and share of each class.
    """
    orientation_map, grains, boundaries = analysis
    table, unit = grains.table, orientation_map.scan_unit
    whole = table.diameter[~table.at_edge]
    indexed = orientation_map.indexed
    return {
        "count": len(table),
        "share_of_indexed": float((grains.number[indexed] >= 0).mean()) if indexed.any() else None,
        "unit": unit,
        "median_diameter": float(np.median(whole)) if len(whole) else None,
        "mean_diameter": float(whole.mean()) if len(whole) else None,
        "median_spread_deg": _median(table.spread_deg),
        "median_kam_deg": _median(grains.kam_deg),
        "boundaries": boundary_figures(boundaries, unit),
    }


def describe_grains(figures: Mapping[str, Any]) -> str:
    """Return the figures of `grain_figures` as a few lines of text."""
    unit, boundaries = figures["unit"], figures["boundaries"]
    diameter = figures["median_diameter"]
    size = "none of them whole" if diameter is None else f"median diameter of whole ones {diameter:,.3g} {unit}"
    share = figures["share_of_indexed"]
    lines = [f"{figures['count']:,} grains, {size}; {0.0 if share is None else share:.1%} of the indexed pixels"]
    if figures["count"]:
        kam = figures["median_kam_deg"]
        shown = "-" if kam is None else f"{kam:.2f}°"
        lines.append(f"median spread inside a grain {figures['median_spread_deg']:.2f}°, median KAM {shown}")
    lines.append(f"boundaries {boundaries['length']:,.4g} {unit}")
    lines += [
        f"  {name:24s} {part['length']:10,.4g} {unit}  {part['share']:6.1%}"
        for name, part in boundaries["classes"].items()
    ]
    return "\n".join(lines)


def _median(values: npt.NDArray[Any]) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else None
