"""What the pictures of a map share: size, pixels that stay square, a scale bar, and how a figure is saved.

Figures are made without pyplot: they keep no global state, need no display and cost nothing until they are asked for.
"""

from __future__ import annotations

import math
import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEUTRAL = (0.82, 0.82, 0.82)
"""Colour of pixels that are not indexed: a grey that no direction has (those are saturated or white)."""

_DPI = 200
_LONG_SIDE_IN = 5.0
_SHORT_SIDE_IN = 1.2
_HEAD_IN = 0.42
_FOOT_IN = 0.66
_MARGIN_IN = 0.2


def framed(
    shape: tuple[int, int], step: tuple[float, float] | None, side_in: float, title: str, note: str
) -> tuple[Figure, Axes, tuple[float, float, float, float]]:
    """Return a figure with axes for a map of `shape` (rows, columns) and, right of it, room for a key.

    `step` is the distance between rows and between columns, which sets the pixels' aspect. The room is `side_in` inches
    wide and returned as (left, bottom, width, height) in figure coordinates; `title` is a line above, `note` small
    print below.
    """
    from matplotlib.figure import Figure

    dy, dx = step or (1.0, 1.0)
    high, wide = shape[0] * dy, shape[1] * dx
    inches = _LONG_SIDE_IN / max(high, wide)
    height, width = max(high * inches, _SHORT_SIDE_IN), max(wide * inches, _SHORT_SIDE_IN)
    body = max(height, side_in)
    total_w, total_h = width + side_in + 3 * _MARGIN_IN, body + _HEAD_IN + _FOOT_IN
    figure = Figure(figsize=(total_w, total_h), dpi=_DPI, facecolor="white")
    bottom = _FOOT_IN + (body - height) / 2
    axes = figure.add_axes((_MARGIN_IN / total_w, bottom / total_h, width / total_w, height / total_h))
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_linewidth(0.6)
    left = _MARGIN_IN / total_w
    figure.text(left, 1 - 0.16 / total_h, title, ha="left", va="top", fontsize=11)
    lines = textwrap.fill(note, int((total_w - 2 * _MARGIN_IN) * 17))
    figure.text(left, 0.09 / total_h, lines, ha="left", va="bottom", fontsize=7, color="0.35", linespacing=1.3)
    room = (
        (width + 2 * _MARGIN_IN) / total_w,
        (_FOOT_IN + (body - side_in) / 2) / total_h,
        side_in / total_w,
        side_in / total_h,
    )
    return figure, axes, room


def show(axes: Axes, picture: npt.NDArray[Any], step: tuple[float, float] | None, **options: Any) -> Any:
    """Draw `picture` (rows, columns[, 3]) with square corners, row 0 on top, and a scale bar below."""
    dy, dx = step or (1.0, 1.0)
    image = axes.imshow(picture, interpolation="nearest", aspect=dy / dx, **options)
    scale_bar(axes, picture.shape[1], dx, "px" if step is None else "nm")
    return image


def scale_bar(axes: Axes, columns: int, dx: float, unit: str) -> None:
    """Draw a bar of a round length near a quarter of the width under the lower left corner of `axes`."""
    from matplotlib.patches import Rectangle

    length = round_length(0.28 * columns * dx, whole=unit == "px")
    text = length_text(length, unit)
    figure = axes.get_figure()
    assert figure is not None
    box = axes.get_position()
    inch = 1 / figure.get_figheight()  # type: ignore[union-attr]
    wide = box.width * length / (columns * dx)
    bar = Rectangle((box.x0, box.y0 - 0.15 * inch), wide, 0.05 * inch, color="black", linewidth=0)
    bar.set_transform(figure.transFigure)
    figure.add_artist(bar)
    beside = 0.06 * box.width / (box.width * figure.get_figwidth())  # type: ignore[union-attr]
    figure.text(box.x0 + wide + beside, box.y0 - 0.125 * inch, text, ha="left", va="center", fontsize=8)


def length_text(length: float, unit: str) -> str:
    """Return a length as text, in µm from 1000 nm on."""
    return f"{length / 1000:g} µm" if unit == "nm" and length >= 1000 else f"{length:g} {unit}"


def round_length(length: float, whole: bool = False) -> float:
    """Return the largest of 1, 2, 5 x 10^n that is not above `length`; at least 1 when `whole`."""
    if not length > 0:
        return 0.0
    decade = 10.0 ** math.floor(math.log10(length))
    chosen = max(step * decade for step in (1, 2, 5) if step * decade <= length * (1 + 1e-9))
    return max(chosen, 1.0) if whole else chosen


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write `figure` as PNG."""
    figure.savefig(Path(path), dpi=_DPI, metadata={"Software": "stemtune"})


def draw_scalar(
    values: npt.NDArray[Any],
    path: str | os.PathLike[str],
    *,
    step: tuple[float, float] | None,
    title: str,
    label: str,
    note: str = "",
    limits: tuple[float, float] = (0.0, 1.0),
    beyond: bool = False,
) -> None:
    """Draw `values` (rows, columns), NaN in the neutral grey, with a colour bar called `label`.

    `beyond` says by an arrow on the bar that values above the upper limit have its colour.
    """
    import matplotlib

    rows, columns = values.shape
    figure, axes, room = framed((rows, columns), step, 1.5, title, note)
    colours = matplotlib.colormaps["viridis"].with_extremes(bad=NEUTRAL)
    masked = np.ma.masked_invalid(values)
    image = show(axes, masked, step, cmap=colours, vmin=limits[0], vmax=limits[1])
    box = axes.get_position()
    high = max(min(box.height, 1.0), room[3] * 0.8)
    middle = box.y0 + box.height / 2
    bar = figure.add_axes((room[0], middle - high / 2, room[2] * 0.12, high))
    figure.colorbar(image, cax=bar, label=label, extend="max" if beyond else "neither")
    bar.tick_params(labelsize=8)
    save(figure, path)
