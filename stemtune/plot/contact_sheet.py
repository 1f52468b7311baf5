"""A contact sheet: patterns spread evenly over a scan or a store, with their positions, a scale bar and the beam."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stemtune._files import existing, whole_file
from stemtune.dataset.kind import kind_of
from stemtune.dataset.store import Store, spread_evenly
from stemtune.errors import UserError
from stemtune.scan.readers import Scan, read_scan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS, _PATTERNS = 8, 40
_GAMMA = 0.25
_BARS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # lengths a scale bar may have, 1/Å
_DARK, _LIGHT, _ACCENT = "#11141b", "#ebe7df", "#f2b35d"
_CELL_IN, _DPI = 1.35, 150


class _Panel(NamedTuple):
    pattern: npt.NDArray[Any]
    label: str


def contact_sheet(path: str | os.PathLike[str], png: str | os.PathLike[str]) -> None:
    """Draw patterns spread evenly over a scan or store, with their positions, as the picture `png`.

    Intensities are raised to the power 0.25 and each pattern is scaled to its own maximum. A bar shows the
    reciprocal scale where it is known, and a cross the direct beam where the file says where it is.

    Raises
    ------
    UserError
        When `path` is neither a scan nor a store, or `png` cannot be written.
    """
    found = existing(path, "the path")
    if Path(png).suffix.lower() not in (".png", ".jpg", ".pdf", ".svg"):
        raise UserError(f"the picture '{png}' must be called .png, .jpg, .pdf or .svg")
    kind = kind_of(found)
    if kind == "store":
        with Store.open(found) as store:
            panels = _panels_of_store(store)
            scale: float | None = store.geometry.scale_inv_angstrom
            centre: tuple[float, float] | None = store.geometry.centre_px
            title = str(store)
    elif kind == "scan":
        scan = read_scan(found)
        panels = _panels_of_scan(scan)
        scale, centre, title = scan.scale_inv_angstrom(scan.kv), scan.centre_px, str(scan)
    else:
        raise UserError(f"'{path}' is a {kind}, which holds no patterns to draw; give a scan or a store")
    with whole_file(png) as part:
        _draw(panels, f"{found.name}: {title}", scale, centre, part)


def _grid(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Return about 40 positions (row, column) of a scan on an even grid, at most 8 of them in a row."""
    columns = min(_COLUMNS, shape[1], max(1, round(math.sqrt(_PATTERNS * shape[1] / shape[0]))))
    rows = max(1, _PATTERNS // columns)
    return [(int(y), int(x)) for y in spread_evenly(shape[0], rows) for x in spread_evenly(shape[1], columns)]


def _panels_of_store(store: Store) -> list[_Panel]:
    if store.scan_shape and store.scan_shape[0] * store.scan_shape[1] == store.n:
        rows = np.array([y * store.scan_shape[1] + x for y, x in _grid(store.scan_shape)])
        labels = [f"{y}, {x}" for y, x in store.position[rows]]
    else:
        rows = spread_evenly(store.n, _PATTERNS)
        labels = [f"{row}" for row in rows]
    return [_Panel(*pair) for pair in zip(store.take(rows), labels, strict=True)]


def _panels_of_scan(scan: Scan) -> list[_Panel]:
    panels = []
    for row, column in _grid(scan.shape):
        panels.append(_Panel(np.asarray(scan.data[row, column].compute()), f"{row}, {column}"))
    return panels


def _draw(
    panels: list[_Panel], title: str, scale: float | None, centre: tuple[float, float] | None, target: Path
) -> None:
    from matplotlib.figure import Figure

    first_row = panels[0].label.split(",")[0] + ","
    columns = sum(panel.label.startswith(first_row) for panel in panels) or min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    height, width = panels[0].pattern.shape
    size = (columns * _CELL_IN, rows * _CELL_IN * height / width + 0.62)
    figure = Figure(figsize=(max(size[0], 4.5), size[1]), dpi=_DPI, facecolor=_DARK)
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(0.01, 0.24 / size[1], 0.99, 1 - 0.36 / size[1], 0.04, 0.04)
    for place in axes.flat:
        place.set_axis_off()
    for place, panel in zip(axes.flat, panels, strict=False):
        counts = np.clip(np.nan_to_num(panel.pattern.astype(np.float64)), 0, None) ** _GAMMA
        low = float(np.percentile(counts, 5))
        place.imshow(counts, cmap="magma", interpolation="nearest", vmin=low, vmax=max(float(counts.max()), low + 1e-9))
        box = {"facecolor": _DARK, "alpha": 0.7, "edgecolor": "none", "boxstyle": "square,pad=0.2"}
        place.text(0.03, 0.965, panel.label, transform=place.transAxes, fontsize=6.5, color=_LIGHT, va="top", bbox=box)
    _mark(axes.flat[0], panels[0].pattern.shape, scale, centre)
    figure.text(0.012, 1 - 0.12 / size[1], title, color=_LIGHT, fontsize=8.5, va="top", weight="bold")
    note = f"labels: scan row, column  ·  intensity to the power {_GAMMA:g}, each pattern to its own maximum"
    if "," not in panels[0].label:
        note = note.replace("scan row, column", "row of the store")
    figure.text(0.012, 0.07 / size[1], note, color=_LIGHT, fontsize=6, alpha=0.75)
    figure.savefig(target, format="png", facecolor=_DARK)


def _mark(place: Axes, shape: tuple[int, ...], scale: float | None, centre: tuple[float, float] | None) -> None:
    """Draw the scale bar, and a cross around the direct beam, into the first pattern."""
    height, width = shape[:2]
    if centre:
        row, column = centre
        near, far = 0.05 * width, 0.12 * width
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            ends = [column + dx * near, column + dx * far], [row + dy * near, row + dy * far]
            place.plot(*ends, color=_ACCENT, linewidth=0.8)
    if scale:
        wanted = [bar for bar in _BARS if bar / scale < 0.45 * width] or [_BARS[0]]
        left, down = 0.06 * width, 0.92 * height
        place.plot([left, left + wanted[-1] / scale], [down, down], color=_ACCENT, linewidth=1.6)
        place.text(left, down - 0.03 * height, f"{wanted[-1]:g} 1/Å", color=_ACCENT, fontsize=6, va="bottom")
    place.set_xlim(-0.5, width - 0.5)
    place.set_ylim(height - 0.5, -0.5)
