"""What a file or folder holds, in words: a scan, a store, a map, a model folder or a search space; and in pixels."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from stemtune._files import existing, whole_file
from stemtune.crystal_map.io import read_map_h5
from stemtune.dataset.labels import LABELLED
from stemtune.dataset.store import SPLITS, Store
from stemtune.diffraction.geometry import Geometry, wavelength_angstrom
from stemtune.errors import UserError
from stemtune.plot import calibration
from stemtune.scan.readers import Scan, read_scan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from stemtune.crystal_map.orientation_map import OrientationMap

_COLUMNS, _PATTERNS = 8, 40
_GAMMA = 0.25
_LINE = 110  # characters of a line
_BARS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # lengths a scale bar may have, 1/Å
_DARK, _LIGHT, _ACCENT = "#11141b", "#ebe7df", "#f2b35d"
_CELL_IN, _DPI = 1.35, 150


class _Panel(NamedTuple):
    pattern: npt.NDArray[Any]
    label: str


def describe(path: str | os.PathLike[str]) -> str:
    """Return in a few lines what is at `path`.

    Raises
    ------
    UserError
        When nothing is there, or nothing that stemtune reads.
    """
    found = existing(path, "the path")
    about = {"store": _store, "scan": _scan, "map": _map, "model": _model, "search space": _space}
    title, facts = about[kind_of(found)](found)
    width = max((len(name) for name in facts), default=0)
    pages = textwrap.TextWrapper(_LINE, break_long_words=False, break_on_hyphens=False)  # a path stays in one piece
    pages.subsequent_indent = " " * (width + 4)
    lines = [f"{found.name}: {title}"]
    for name, text in facts.items():
        pages.initial_indent = f"  {name:<{width}}  "
        lines += pages.wrap(text)
    return "\n".join(lines)


def kind_of(path: Path) -> str:
    """Return "store", "map", "model", "search space" or "scan" (everything else that rosettasciio may read)."""
    if path.is_dir():
        if (path / "model.json").is_file() or (path / "model.safetensors").is_file():
            return "model"
        if (path / "map.h5").is_file():
            return "map"
        if path.suffix.lower() != ".zspy":
            raise UserError(f"'{path}' is a folder without model.json or map.h5, so it is neither a model nor a map")
        return "scan"
    if path.suffix.lower() in (".yaml", ".yml"):
        return "search space"
    if path.suffix.lower() == ".hspy" or not h5py.is_hdf5(path):
        return "scan" if path.suffix.lower() not in (".h5", ".hdf5") else "store"
    try:
        with h5py.File(path) as file:
            if "stemtune" in file and "crystal_map" in file:
                return "map"
            return "store" if "schema" in file.attrs or "patterns" in file else "scan"
    except OSError:  # truncated: what kind it was meant to be does not matter
        return "store"


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
            title = _store_title(store)
    elif kind == "scan":
        scan = read_scan(found)
        panels = _panels_of_scan(scan)
        scale, centre, title = scan.scale_inv_angstrom(scan.kv), scan.centre_px, _scan_title(scan)
    else:
        raise UserError(f"'{path}' is a {kind}, which holds no patterns to draw; give a scan or a store")
    with whole_file(png) as part:
        _draw(panels, f"{found.name}: {title}", scale, centre, part)


def _store(path: Path) -> tuple[str, dict[str, str]]:
    with Store.open(path) as store:
        geometry = store.geometry
        options = _options(store.attrs.get("options"))
        made = " ".join(str(store.attrs[key]) for key in ("origin", "command") if store.attrs.get(key))
        digest = str(store.attrs.get("origin_sha256", ""))
        sums = store.take(_spread(store.n, 256)).sum(axis=(1, 2), dtype=np.float64)
        facts = {
            "scan": _positions(store.scan_shape, store.step_nm) if store.scan_shape else "",
            "calibration": f"{geometry.kv:g} kV (wavelength {geometry.wavelength_angstrom:.5f} Å), "
            f"{geometry.scale_inv_angstrom:g} 1/Å per pixel, {geometry.radius_inv_angstrom:.3g} 1/Å to the edge, "
            f"direct beam at row {geometry.centre_px[0]:g}, column {geometry.centre_px[1]:g}",
            "counts": f"{np.median(sums):,.0f} per pattern (median), {sums.min():,.0f} to {sums.max():,.0f}",
            "labels": _labels(store),
            "labelled": _options(store.attrs.get(LABELLED)),
            "overlaps": _overlaps(store),
            "phases": _phases(store),
            "splits": _splits(store),
            "origin": made + (f", sha256 {digest[:12]}" if digest else ""),
            "corrected": calibration.in_words(store.attrs),
            "options": options,
            "layout": "mapped from the page cache" if store.is_mapped else "in chunks, so loading is slower",
            "content": f"sha256 {store.sha256[:16]}, written by stemtune {store.attrs.get('stemtune_version', '?')}",
        }
        return _store_title(store), facts


def _store_title(store: Store) -> str:
    return f"a store of {store.n:,} patterns of {store.size} x {store.size} pixels, {store.patterns.dtype}"


def _labels(store: Store) -> str:
    labelled = int(store.labelled.sum())
    if not labelled:
        return "none: these patterns can be predicted, not trained on"
    confidence = store.confidence[store.labelled]
    confidence = confidence[np.isfinite(confidence)]
    sure = "no confidence" if not len(confidence) else f"confidence {np.median(confidence):.3g} (median)"
    if len(confidence) and confidence.min() < confidence.max():
        sure += f", {confidence.min():.3g} to {confidence.max():.3g}"
    scores = f"; scores {', '.join(store.scores)}" if store.scores else ""
    return f"{labelled:,} of {store.n:,} patterns have an orientation; {sure}{scores}"


def _overlaps(store: Store) -> str:
    if store.overlap_weight is None:
        return ""
    grains = (store.overlap_weight > 0).sum(axis=1)
    several = grains > 1
    if not several.any():
        return "no pattern shows more than one grain"
    strongest = np.median(store.overlap_weight[several, 0])
    return (
        f"{int(several.sum()):,} patterns show further grains ({int((grains == 3).sum()):,} show three), the strongest"
        f" has {strongest:.0%} of the beam in them (median)"
    )


def _phases(store: Store) -> str:
    parts = [
        f"{number} {phase.name} (space group {phase.space_group}, Laue class {phase.symmetry.laue}), "
        f"{int((store.phase == number).sum()):,} patterns"
        for number, phase in enumerate(store.phases)
    ]
    missing = int((store.phase < 0).sum())
    return "; ".join(parts + ([f"no phase, {missing:,} patterns"] if parts and missing else []))


def _splits(store: Store) -> str:
    count = [int((store.split == number).sum()) for number in range(len(SPLITS))]
    shares = ", ".join(f"{name} {number:,}" for name, number in zip(SPLITS, count, strict=True))
    return f"{shares}; whole groups, of which there are {len(np.unique(store.group)):,}"


def _scan(path: Path) -> tuple[str, dict[str, str]]:
    scan = read_scan(path)
    scale = scan.scale_inv_angstrom(scan.kv)
    said = f"{scan.scale[0]:g} {scan.scale_units}".strip()
    missing = [flag for flag, value in (("--kv KV", scan.kv), ("--scale SCALE", scale)) if value is None]
    facts = {
        "scan": _positions(scan.shape, scan.step_nm),
        "scale": f"{scale:g} 1/Å per pixel" if scale else f"the file says {said} per pixel; give --scale in 1/Å",
        "voltage": f"{scan.kv:g} kV (wavelength {wavelength_angstrom(scan.kv):.5f} Å)" if scan.kv else "give --kv",
        "direct beam": "row {:g}, column {:g} by the file's axes".format(*scan.centre_px)
        if scan.centre_px
        else "fitted when the scan is ingested",
        "next": " ".join(["stemtune ingest", path.name, "--out", f"{path.stem}.h5", *missing]),
    }
    return _scan_title(scan), facts


def _scan_title(scan: Scan) -> str:
    rows, columns = scan.shape
    height, width = scan.pattern_shape
    return f"a scan of {rows * columns:,} patterns of {height} x {width} pixels, {scan.data.dtype}"


def _positions(shape: tuple[int, int], step: tuple[float, ...] | None) -> str:
    apart = f", {step[0]:g} x {step[1]:g} nm apart" if step else ", at an unknown distance"
    return f"{shape[0]} rows x {shape[1]} columns{apart}"


def _map(path: Path) -> tuple[str, dict[str, str]]:

    found = read_map_h5(path)
    indexed, phases = found.indexed, found.phases
    shares = [f"{phase.name} {np.mean(found.phase == number):.1%}" for number, phase in enumerate(phases)]
    confidence = found.confidence[indexed]
    folder = path if path.is_dir() else path.parent
    pictures = sorted(picture.name for picture in folder.glob("*.png"))
    facts = {
        "scan": _positions(found.shape, found.step_nm),
        "indexed": f"{indexed.mean():.1%} of {len(indexed):,} pixels ({', '.join(shares)})",
        "confidence": f"{np.median(confidence):.3g} (median of the indexed pixels)" if len(confidence) else "",
        "answers": f"the best {found.answers.shape[1]} of every pixel" + _refined(found),
        **{name: str(value) for name, value in found.attrs.items() if isinstance(value, str | int | float)},
        "pictures": ", ".join(pictures),
    }
    return f"an orientation map of {found.shape[0]} x {found.shape[1]} pixels", facts


def _refined(found: OrientationMap) -> str:
    ncc = None if found.ncc is None else found.ncc[found.indexed, 0]
    if ncc is None or not len(ncc):
        return ""
    return f", refined: ncc {np.nanmedian(ncc):.3g} (median of the indexed pixels)"


def _model(path: Path) -> tuple[str, dict[str, str]]:
    from stemtune.learning.checkpoint import read_description

    model = read_description(path)
    if not all(isinstance(model[part], Mapping) for part in ("config", "phase", "geometry")):
        raise UserError(f"'{path}/model.json' does not describe a model: a part of it is malformed")
    geometry = Geometry.from_dict(model["geometry"]).to_dict()
    phase, metrics = model["phase"], model.get("metrics") or {}
    facts = {
        "phase": f"{phase.get('name')} (space group {phase.get('space_group')})",
        "input": "{size} x {size} pixels of {scale_inv_angstrom:g} 1/Å at {kv:g} kV".format(**geometry)
        + "; other calibrations are resampled to this",
        "metrics": ", ".join(
            f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, int | float)
        ),
        "trained on": f"store {str(model.get('store_sha256') or '')[:16]}" if model.get("store_sha256") else "no store",
        "settings": ", ".join(f"{key} {value}" for key, value in _unusual(model["config"]).items()),
        "versions": ", ".join(f"{name} {value}" for name, value in (model.get("versions") or {}).items()),
    }
    missing = [name for name in ("model.safetensors",) if not (path / name).is_file()]
    title = f"a model, {model.get('architecture')} of {model.get('parameters', 0):,} weights"
    return title + (f", without its {missing[0]}" if missing else ""), facts


def _unusual(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that differ from their defaults."""
    from stemtune.config import Config

    usual = Config().to_flat()
    return {key: value for key, value in flat.items() if usual.get(key) != value}


def _space(path: Path) -> tuple[str, dict[str, str]]:
    import yaml

    try:
        space = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise UserError(f"'{path}' is not YAML: {' '.join(str(problem).split())}") from None
    if not isinstance(space, dict) or "search" not in space:
        raise UserError(f"'{path}' is not a search space: it has no block 'search'")
    budget, fixed = space.get("budget") or {}, space.get("fixed") or {}
    searched = space["search"] if isinstance(space["search"], dict) else {}
    facts = {
        "asks": " ".join(str(space.get("about", "")).split()),
        "looks for": f"{space.get('mode', 'min')} of {space.get('metric', '?')}",
        "budget": ", ".join(f"{key} {value}" for key, value in budget.items()),
        "fixed": ", ".join(f"{key} {value}" for key, value in fixed.items()),
        **{f"varies {key}": _form(value) for key, value in searched.items()},
        "first": f"{len(space.get('first') or [])} given trials before the sampler starts",
        "next": f"stemtune check {path}",
    }
    return f"a search space over {len(searched)} settings", facts


def _form(value: Any) -> str:
    """Return one entry of a search space in words."""
    if isinstance(value, list):
        return "one of " + ", ".join(map(str, value))
    if not isinstance(value, dict):
        return str(value)
    if isinstance(branches := value.get("one_of"), dict):
        parts = [f"{name} ({', '.join(inner)})" if inner else str(name) for name, inner in branches.items()]
        return "one of " + ", ".join(parts)
    return ", ".join(f"{form} {' to '.join(map(str, span))}" if isinstance(span, list) else f"{form} {span}"
                     for form, span in value.items())  # fmt: skip


def _options(text: Any) -> str:
    """Return the JSON text of a command's options, without those that were not given."""
    try:
        options = json.loads(text)
    except (TypeError, ValueError):
        return ""
    return ", ".join(f"{key} {value}" for key, value in options.items() if value is not None)


def _spread(length: int, count: int) -> npt.NDArray[np.intp]:
    """Return about `count` indices spread evenly over `length`, from the middle of equal parts."""
    count = min(length, count)
    return ((np.arange(count) + 0.5) * length / count).astype(np.intp)


def _grid(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Return about 40 positions (row, column) of a scan on an even grid, at most 8 of them in a row."""
    columns = min(_COLUMNS, shape[1], max(1, round(math.sqrt(_PATTERNS * shape[1] / shape[0]))))
    rows = max(1, _PATTERNS // columns)
    return [(int(y), int(x)) for y in _spread(shape[0], rows) for x in _spread(shape[1], columns)]


def _panels_of_store(store: Store) -> list[_Panel]:
    if store.scan_shape and store.scan_shape[0] * store.scan_shape[1] == store.n:
        rows = np.array([y * store.scan_shape[1] + x for y, x in _grid(store.scan_shape)])
        labels = [f"{y}, {x}" for y, x in store.position[rows]]
    else:
        rows = _spread(store.n, _PATTERNS)
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
