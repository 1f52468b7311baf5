"""What a file or folder holds, for people: a scan, a store (of patterns or beams), a map, a model or a search space."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stemtune._files import existing
from stemtune.crystal_map.io import read_map_h5
from stemtune.dataset.schema import kind_of
from stemtune.dataset.store import Store
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError
from stemtune.scan.readers import read_scan

_LINE = 110  # characters of a line

Description = tuple[str, dict[str, str]]
"""A title, and facts by topic."""


def describe(path: str | os.PathLike[str]) -> str:
    """Return in a few lines what is at `path`; a `UserError` says that nothing is there, or nothing that we read."""
    found = existing(path, "the path")
    describers: dict[str, Callable[[Path], Description]] = {
        "store": _store, "beams": _beams, "scan": lambda path: read_scan(path).describe(), "map": _map, "model": _model,
        "search space": _space,
    }  # fmt: skip
    title, facts = describers[kind_of(found)](found)
    width = max((len(name) for name in facts), default=0)
    pages = textwrap.TextWrapper(_LINE, break_long_words=False, break_on_hyphens=False)  # a path stays in one piece
    pages.subsequent_indent = " " * (width + 4)
    lines = [f"{found.name}: {title}"]
    for name, text in facts.items():
        pages.initial_indent = f"  {name:<{width}}  "
        lines += pages.wrap(text)
    return "\n".join(lines)


def _store(path: Path) -> Description:
    with Store.open(path) as store:
        return store.describe()


def _beams(path: Path) -> Description:
    from stemtune.dataset.beam_store import BeamStore  # loads torch

    return BeamStore.open(path).describe()


def _map(path: Path) -> Description:
    title, facts = read_map_h5(path).describe()
    folder = path if path.is_dir() else path.parent
    return title, {**facts, "pictures": ", ".join(sorted(picture.name for picture in folder.glob("*.png")))}


def _model(path: Path) -> tuple[str, dict[str, str]]:
    from stemtune.learning.checkpoint import read_description

    model = read_description(path)
    if not all(isinstance(model[part], Mapping) for part in ("config", "phase", "geometry")):
        raise UserError(f"'{path}/model.json' does not describe a model: a part of it is malformed")
    from stemtune.config import Config

    usual, geometry = Config().to_flat(), Geometry.from_dict(model["geometry"]).to_dict()
    phase, metrics = model["phase"], model.get("metrics") or {}
    facts = {
        "phase": f"{phase.get('name')} (space group {phase.get('space_group')})",
        "input": "{size} x {size} pixels of {scale_inv_angstrom:g} 1/Å at {kv:g} kV".format(**geometry)
        + "; other calibrations are resampled to this",
        "metrics": ", ".join(
            f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, int | float)
        ),
        "trained on": f"store {str(model.get('store_sha256') or '')[:16]}" if model.get("store_sha256") else "no store",
        "settings": ", ".join(f"{key} {value}" for key, value in model["config"].items() if usual.get(key) != value),
        "versions": ", ".join(f"{name} {value}" for name, value in (model.get("versions") or {}).items()),
    }
    without = "" if (path / "model.safetensors").is_file() else ", without its model.safetensors"
    return f"a model, {model.get('architecture')} of {model.get('parameters', 0):,} weights{without}", facts


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
