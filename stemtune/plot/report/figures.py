"""What a report shows: pictures and pixel data inside the page, diagrams and colour keys as vectors, worst fits."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from stemtune.analysis.grain_analysis import Analysis
from stemtune.config import SimulateConfig, Span
from stemtune.crystal.phase import Phase
from stemtune.crystal.rotations import to_euler_deg
from stemtune.crystal.sampling import random_orientations
from stemtune.crystal.symmetry import disorientation_deg
from stemtune.crystal_map.frame_rotations import scan_rotation_deg, to_pattern_frame
from stemtune.crystal_map.orientation_map import OrientationMap
from stemtune.dataset.store import Store
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator
from stemtune.errors import UserError
from stemtune.indexing.overlap import WEIGHT_LAYER
from stemtune.plot.figures import NEUTRAL
from stemtune.plot.ipf import draw_key
from stemtune.plot.patterns import measured_patterns
from stemtune.plot.pole_figures import pole_figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _PALE = "#0072B2", "#A6CEE3"
_RANDOM = 40_000  # pairs of random orientations behind the curve of a random texture
_RAMP_STOPS = 9


def picture(colours: npt.NDArray[Any]) -> str:
    """Return a picture (rows, columns, 3), each 0 to 1, as a PNG in a data URI, one pixel each."""
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, np.round(np.clip(colours, 0, 1) * 255).astype(np.uint8), format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def scalar_colours(values: npt.NDArray[Any], highest: float) -> npt.NDArray[np.float64]:
    """Return the colours (rows, columns, 3) of values from 0 to `highest`; NaN is the neutral grey."""
    import matplotlib

    colours = matplotlib.colormaps["viridis"](np.nan_to_num(values) / highest)[..., :3]
    return np.where(np.isfinite(values)[..., None], colours, NEUTRAL)


def ramp() -> str:
    """Return the colours of `scalar_colours` from low to high as stops of a CSS gradient."""
    import matplotlib
    from matplotlib.colors import to_hex

    return ",".join(to_hex(matplotlib.colormaps["viridis"](stop)) for stop in np.linspace(0, 1, _RAMP_STOPS))


def grey_picture(pattern: npt.NDArray[np.float64], power: float) -> str:
    """Return a pattern as a grey picture, its counts to the `power`; the brightest 0.05 % are white."""
    shown = np.clip(np.nan_to_num(pattern), 0, None) ** power
    brightest = float(np.quantile(shown, 0.9995)) or float(shown.max()) or 1.0
    return picture(np.repeat(shown[..., None] / brightest, 3, axis=2))


def svg(figure: Figure) -> str:
    """Return a figure as an element of a page: nothing in it names another place."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "stemtune", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href=", "href=")
    return re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", re.sub(r' height="[\d.]+pt"', "", text, count=1), count=1)


def key(phase: Phase) -> str:
    """Return the colour key of the phase's Laue class."""
    figure = _figure(2.6, 2.3)
    draw_key(figure.add_axes((0.17, 0.12, 0.66, 0.76)), phase)
    return svg(figure)


def poles(orientation: npt.NDArray[np.float64], phase: Phase) -> str:
    """Return the pole figures of one phase, all on one scale of density, from orientations (n, 4)."""
    from matplotlib.patches import Circle

    found = pole_figures(orientation, phase)
    figure = _figure(8.6, 2.75)
    highest = max(float(np.nanmax(one.density)) for one in found)
    image: Any = None
    for place, one in enumerate(found):
        axes = figure.add_axes((0.02 + 0.3 * place, 0.03, 0.27, 0.84))
        image = axes.imshow(
            np.nan_to_num(_to_the_rim(one.density)),
            extent=(-1, 1, -1, 1),
            origin="lower",
            interpolation="bilinear",
            cmap="viridis",
            vmin=0,
            vmax=highest,
        )
        rim = Circle((0, 0), 1, fill=False, linewidth=0.9, edgecolor="0.15")
        axes.add_patch(rim)
        image.set_clip_path(rim)
        for x, y, name, across, upright in ((1.04, 0, "x", "left", "center"), (0, 1.03, "y", "center", "bottom")):
            axes.text(x, y, name, ha=across, va=upright, fontsize=8, color="0.35")
        digits = r"\,".join(str(index) if index >= 0 else rf"\bar{{{-index}}}" for index in one.indices)
        axes.set_title(rf"$\{{{digits}\}}$", fontsize=10, pad=14)
        axes.set_xlim(-1.02, 1.02)
        axes.set_ylim(-1.02, 1.02)
        axes.set_aspect("equal")
        axes.set_axis_off()
    bar = figure.colorbar(image, cax=figure.add_axes((0.93, 0.14, 0.014, 0.6)))
    bar.ax.set_title("m.r.d.", fontsize=8, pad=5)
    bar.ax.tick_params(labelsize=8)
    return svg(figure)


def _to_the_rim(density: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the density with the cells just outside of the disc as the nearest inside, so that its edge is smooth."""
    filled = density.copy()
    for _ in range(3):
        around = np.stack([np.roll(filled, step, axis) for axis in (0, 1) for step in (-1, 1)])
        known = np.isfinite(around)
        mean = np.where(known, around, 0).sum(0) / np.maximum(known.sum(0), 1)
        filled = np.where(np.isnan(filled) & known.any(0), mean, filled)
    return filled


def grain_sizes(analysis: Analysis) -> str:
    """Return the histogram of the grains' equivalent diameters, those cut by the map's edge on top."""
    from matplotlib.ticker import MaxNLocator

    table, unit = analysis.grains.table, analysis.orientation_map.scan_unit
    figure = _figure(4.6, 2.9)
    axes = _diagram(figure, f"equivalent diameter ({unit})", "grains")
    highest = float(table.diameter.max(initial=0.0)) or 1.0
    edges = np.linspace(0, highest * 1.02, int(np.clip(2 * len(table) ** (1 / 2), 8, 40)) + 1)
    axes.hist(
        [table.diameter[~table.at_edge], table.diameter[table.at_edge]],
        edges.tolist(),
        stacked=True,
        color=[_BLUE, _PALE],
        label=["whole", f"cut by the edge of the map ({int(table.at_edge.sum())})"],
        edgecolor="white",
        linewidth=0.5,
    )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_above(axes)
    return svg(figure)


def disorientations(analysis: Analysis) -> str:
    """Return the histogram of the disorientation across boundaries, by length, beside that of a random texture."""
    orientation_map, boundaries = analysis.orientation_map, analysis.boundaries
    figure = _figure(4.6, 2.9)
    axes = _diagram(figure, "disorientation across the boundary (degrees)", "length per degree")
    known = np.isfinite(boundaries.angle_deg)
    counts = np.bincount(orientation_map.phase[orientation_map.indexed], minlength=len(orientation_map.phases))
    phase = orientation_map.phases[int(counts.argmax())]
    pairs = random_orientations(2 * _RANDOM, 0)
    random = disorientation_deg(pairs[:_RANDOM], pairs[_RANDOM:], phase.symmetry).numpy()
    angles = boundaries.angle_deg[known]
    highest = max(float(random.max()), float(angles.max(initial=0.0)))
    edges = np.arange(0, highest + 2, 2).tolist()
    if known.any():
        axes.hist(
            angles,
            edges,
            weights=boundaries.length[known],
            density=True,
            color=_BLUE,
            edgecolor="white",
            linewidth=0.5,
            label="this map",
        )
    share, _ = np.histogram(random, edges, density=True)
    axes.plot(np.array(edges[:-1]) + 1, share, color="0.15", linewidth=1.1, label=f"random, {phase.symmetry.laue}")
    _legend_above(axes)
    return svg(figure)


def _legend_above(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1.0), borderaxespad=0.2)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _diagram(figure: Figure, across: str, up: str) -> Axes:
    axes = figure.add_axes((0.14, 0.17, 0.83, 0.73))
    axes.set_xlabel(across, fontsize=9)
    axes.set_ylabel(up, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


ANGLE_STEP_DEG = 0.01
"""To how much angles are rounded: 360 degrees in a 16-bit number."""

_SHARE_STEP = 1 / 250


def pixel_data(orientation_map: OrientationMap) -> dict[str, Any]:
    """Return what the page's script reads, ready for JSON.

    Returns
    -------
    dict
        `rows`, `columns`, `step` (between rows and columns) and `unit`, `phases` (names), and `layers`: of each name
        the numbers of all pixels, row by row, as `data` (base64 of little-endian numbers of `type`), `per` numbers a
        pixel; a number n means n * `step`, but `missing` means that nothing is known. `euler` are Bunge's angles in
        degrees, lab to crystal, of pixels that are indexed.
    """
    indexed = orientation_map.indexed
    euler = np.full((len(indexed), 3), np.nan)
    euler[indexed] = to_euler_deg(torch.from_numpy(orientation_map.orientation[indexed])).numpy()
    shown = {
        "euler": _angles(euler),
        "phase": _packed(orientation_map.phase, "int16", missing=-1),
        "confidence": _shares(np.where(indexed, orientation_map.confidence, np.nan)),
        "explained_intensity": _shares(np.where(indexed, orientation_map.score("explained_intensity"), np.nan)),
    }
    layers = orientation_map.layers
    if "grain" in layers:
        shown["grain"] = _packed(layers["grain"], "int32", missing=-1)
    shown |= {name.removesuffix("_deg"): _angles(layers[name]) for name in ("kam_deg", "grod_deg") if name in layers}
    if WEIGHT_LAYER in layers:
        shown["second"] = _shares(layers[WEIGHT_LAYER])
    dy, dx = orientation_map.step_nm or (1.0, 1.0)
    return {
        "rows": orientation_map.shape[0],
        "columns": orientation_map.shape[1],
        "step": [dy, dx],
        "unit": orientation_map.scan_unit,
        "phases": orientation_map.phase_names,
        "layers": shown,
    }


def _angles(values: npt.NDArray[Any]) -> dict[str, Any]:
    missing = 65535
    whole = np.where(np.isfinite(values), np.round(np.nan_to_num(values) / ANGLE_STEP_DEG), missing)
    return _packed(whole, "uint16", missing=missing, step=ANGLE_STEP_DEG)


def _shares(values: npt.NDArray[Any]) -> dict[str, Any]:
    missing = 255
    whole = np.where(np.isfinite(values), np.round(np.clip(np.nan_to_num(values), 0, 1) / _SHARE_STEP), missing)
    return _packed(whole, "uint8", missing=missing, step=_SHARE_STEP)


def _packed(values: npt.NDArray[Any], kind: str, missing: int, step: float = 1) -> dict[str, Any]:
    data = np.ascontiguousarray(values, dtype=np.dtype(kind).newbyteorder("<")).tobytes()
    return {
        "type": kind,
        "per": 1 if values.ndim == 1 else values.shape[1],
        "step": step,
        "missing": missing,
        "data": base64.b64encode(data).decode("ascii"),
    }


COUNT = 6
"""How many patterns are shown."""

_SHOWN = SimulateConfig(
    thickness=Span(50, 50),
    precession=Span(0.5, 0.5),
    convergence=Span(1, 1),
    dose=Span(0, 0),
    direct_beam=Span(0.4, 0.4),
    background=Span(0, 0),
    blur=Span(0.7, 0.7),
    centre_error=0,
    ellipticity=0,
    scale_error=0,
    dead_pixels=0,
)
"""What is simulated: no noise, no background, an undistorted detector; the orientation alone is the map's."""


class WorstFit(NamedTuple):
    """Pixels (k,), flat, worst first, with their patterns and simulations (k, size, size)."""

    pixel: npt.NDArray[np.intp]
    measured: npt.NDArray[np.float64]
    simulated: npt.NDArray[np.float64]


def worst_fit(orientation_map: OrientationMap, store: Store | None = None) -> WorstFit:
    """Return the patterns that fit worst and their simulations, from `measured_patterns`.

    Raises `UserError` when no pixel is indexed, or the patterns are no longer there or not those of the map.
    """
    shown = orientation_map.indexed & orientation_map.measured
    explained = np.where(shown, orientation_map.score("explained_intensity"), np.inf)
    order = np.argsort(explained, kind="stable")[:COUNT]
    pixel = order[np.isfinite(explained[order])]
    if not len(pixel):
        raise UserError("no pixel is indexed")
    geometry = Geometry.from_dict(orientation_map.attrs["geometry"])
    measured = measured_patterns(orientation_map, pixel.tolist(), store).astype(np.float64)
    simulated = np.empty((len(pixel), geometry.size, geometry.size))
    answers = to_pattern_frame(orientation_map.answers[pixel, 0], scan_rotation_deg(orientation_map.attrs))
    for index, phase in enumerate(orientation_map.crystals):
        own = orientation_map.phase[pixel] == index
        if own.any():
            simulator = KinematicSimulator(phase, geometry, dataclasses.replace(_SHOWN, kv=geometry.kv))
            made = simulator.patterns(torch.from_numpy(answers[own]), torch.Generator().manual_seed(0), noise=False)
            simulated[own] = made.double().numpy()
    return WorstFit(pixel, measured, simulated)
