"""Inverse pole figure (IPF) maps: the colour of a pixel is the crystal direction along one lab axis.

Colours and fundamental sectors are orix's TSL key (Nolze and Hielscher, J. Appl. Cryst. 49, 2016, 1786), which for
-3m swaps green and blue against some other programs; the key is therefore drawn beside every map. Directions: x to
the right and y up on the diffraction pattern, z along the beam (towards the source; for a Laue class a direction and
its opposite have one colour, so the sense does not matter).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stemtune.crystal_map.orientation_map import OrientationMap, orix_phase
from stemtune.plot.figures import NEUTRAL, framed, save, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from stemtune.crystal.phase import Phase

DIRECTIONS: dict[str, tuple[float, float, float]] = {"x": (1, 0, 0), "y": (0, 1, 0), "z": (0, 0, 1)}
"""The lab axes that a map can be coloured by."""

MEANING = {"x": "x of the map", "y": "y of the map", "z": "the beam"}
"""What the lab axes are."""

_FRAME = "Detector x points right, y up on the diffraction pattern."
_KEY_PIXELS = 360
_LABEL_TOLERANCE_DEG = 1.0


def ipf_colours(
    orientation: npt.NDArray[np.float64], phase: Phase, direction: tuple[float, float, float] = (0, 0, 1)
) -> npt.NDArray[np.float64]:
    """Return the RGB colours (n, 3), each 0 to 1, of the crystal directions along a lab `direction`.

    `orientation` (n, 4) are unit quaternions, scalar first, lab-to-crystal; not finite ones become the neutral grey.
    The Laue class of `phase` chooses the key.
    """
    from orix.quaternion import Rotation
    from orix.vector import Vector3d

    colours = np.full((len(orientation), 3), NEUTRAL)
    known = np.isfinite(orientation).all(axis=1)
    if known.any():
        key = ColourKey(phase)
        colours[known] = key.colours(Rotation(orientation[known]) * Vector3d(direction))
    return colours


class ColourKey:
    """orix's TSL key in the setting of the phase.

    orix has the key of -3m for two-fold axes along a (321) only; for 312 the crystal is turned by 30 degrees about
    c before it is coloured.
    """

    def __init__(self, phase: Phase) -> None:
        from orix.plot import DirectionColorKeyTSL
        from orix.quaternion import Rotation
        from orix.quaternion.symmetry import D3d
        from orix.vector import Vector3d

        turned = phase.symmetry.proper == "312"
        self.laue: Any = D3d if turned else phase.symmetry.to_orix()
        self._turn = Rotation.from_axes_angles(Vector3d.zvector(), 30 if turned else 0, degrees=True)
        self._key = DirectionColorKeyTSL(self.laue)

    def colours(self, directions: Any) -> npt.NDArray[np.float64]:
        """Return RGB (n, 3) of crystal directions, orix vectors (n,)."""
        colours: npt.NDArray[np.float64] = np.clip(self._key.direction2color(self._turn * directions), 0, 1)
        return colours

    def crystal(self, directions: Any) -> Any:
        """Return the crystal directions of directions in the key's own frame."""
        return ~self._turn * directions


def present_phases(orientation_map: OrientationMap) -> list[int]:
    """Return the phases that some pixel is of; the first one where none is indexed."""
    return [i for i in range(len(orientation_map.phases)) if (orientation_map.phase == i).any()] or [0]


def map_colours(orientation_map: OrientationMap, axis: str) -> npt.NDArray[np.float64]:
    """Return the RGB colours (rows, columns, 3) of the IPF map along lab axis "x", "y" or "z"."""
    colours = np.full((len(orientation_map.phase), 3), NEUTRAL)
    for index in present_phases(orientation_map):
        own = orientation_map.phase == index
        chosen = orientation_map.orientation[own]
        colours[own] = ipf_colours(chosen, orientation_map.crystals[index], DIRECTIONS[axis])
    return colours.reshape(*orientation_map.shape, 3)


def draw_ipf(orientation_map: OrientationMap, axis: str, path: str | os.PathLike[str]) -> None:
    """Draw the IPF map along lab axis "x", "y" or "z" with its colour key and a scale bar to the PNG `path`.

    Pixels that are not indexed are grey. With several phases, the keys are below one another.
    """
    rows, columns = orientation_map.shape
    present = present_phases(orientation_map)
    note = "Colour key: orix (TSL). Grey: not indexed." + ("" if axis == "z" else f" {_FRAME}")
    title = f"IPF-{axis}: crystal direction along {MEANING[axis]}"
    figure, axes, room = framed((rows, columns), orientation_map.step_nm, 2.3, title, note)
    show(axes, map_colours(orientation_map, axis), orientation_map.step_nm)
    left, bottom, width, height = room
    share = height / len(present)
    for place, index in enumerate(present):
        low = bottom + height - (place + 1) * share
        key_axes = figure.add_axes((left + 0.12 * width, low + 0.16 * share, 0.76 * width, 0.56 * share))
        draw_key(key_axes, orientation_map.crystals[index])
        name = f"{orientation_map.phase_names[index]}, {orientation_map.phases[index].symmetry.laue}"
        figure.text(left + width / 2, low + 0.86 * share, name, ha="center", va="bottom", fontsize=9)
    save(figure, path)


def draw_key(axes: Axes, phase: Phase) -> None:
    """Draw the TSL colour key of the Laue class of `phase` in stereographic projection, corners labelled."""
    from matplotlib.patches import Polygon
    from orix.projections import InverseStereographicProjection, StereographicProjection

    key = ColourKey(phase)
    sector = key.laue.fundamental_sector
    border = np.column_stack(StereographicProjection().vector2xy(sector.edges))
    low, high = border.min(axis=0), border.max(axis=0)
    step = (high - low).max() / _KEY_PIXELS
    xs = np.arange(low[0], high[0] + step, step)
    ys = np.arange(low[1], high[1] + step, step)
    x, y = (grid.ravel() for grid in np.meshgrid(xs, ys))
    on_disc = np.hypot(x, y) <= 1
    vectors = InverseStereographicProjection().xy2vector(x[on_disc], y[on_disc])
    picture = np.ones((x.size, 3))
    picture[on_disc] = key.colours(key.crystal(vectors))
    image = axes.imshow(
        picture.reshape(len(ys), len(xs), 3),
        extent=(xs[0], xs[-1], ys[0], ys[-1]),
        origin="lower",
        interpolation="bilinear",
    )
    outline = Polygon(border, closed=True, fill=False, linewidth=1, edgecolor="black")
    axes.add_patch(outline)
    image.set_clip_path(outline)
    margin = 0.04 * (high - low).max()
    axes.set_xlim(low[0] - margin, high[0] + margin)
    axes.set_ylim(low[1] - margin, high[1] + margin)
    axes.set_aspect("equal")
    axes.set_axis_off()
    middle = (low + high) / 2
    for label, corner in _corners(phase, key):
        away = np.sign(np.round((corner - middle) / (high - low), 2))
        spot = corner + away * margin * np.array([0.6, 1.0])
        across = {-1: "right", 0: "center", 1: "left"}[int(away[0])]
        if away[1] != 0:
            across = "center"
        upright = {-1: "top", 0: "center", 1: "bottom"}[int(away[1])]
        axes.text(spot[0], spot[1], label, ha=across, va=upright, fontsize=9, clip_on=False)


def _corners(phase: Phase, key: ColourKey) -> list[tuple[str, npt.NDArray[np.float64]]]:
    """Return the label and place of every corner of the sector that is a direction of low indices."""
    from orix.projections import StereographicProjection
    from orix.vector import Miller

    corners = key.laue.fundamental_sector.vertices
    if corners.size == 0:
        return []
    four = phase.symmetry.laue in ("-3", "-3m", "6/m", "6/mmm")
    full = orix_phase(phase)
    found = []
    places = np.column_stack(StereographicProjection().vector2xy(corners))
    for vector, place in zip(key.crystal(corners).data.reshape(-1, 3), places, strict=True):
        miller = Miller(xyz=vector, phase=full)
        miller.coordinate_format = "UVTW" if four else "uvw"
        rounded = miller.round(max_index=3)
        if np.rad2deg(float(rounded.angle_with(miller)[0])) > _LABEL_TOLERANCE_DEG:
            continue
        digits = [int(value) for value in np.round(rounded.coordinates.ravel())]
        text = r"\,".join(str(value) if value >= 0 else rf"\bar{{{-value}}}" for value in digits)
        found.append((rf"$[{text}]$", place))
    return found
