"""What a sweep found: `stemtune compare` as text, pictures, JSON and a page."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Any

from stemtune._files import whole_file, writable_folder
from stemtune.tracking.query import read_sweep, tagged_json
from stemtune.tune.report.charts import CHARTS, PRICES, colours, overview, save
from stemtune.tune.report.leaderboard import (
    Comparison,
    architectures,
    cost,
    pareto,
    rows,
    rungs,
    seeds,
    setting_importances,
)
from stemtune.tune.report.output import format_comparison, page


def compare_trials(name: str | None = None) -> Comparison:
    """Return what the sweep `name`, or the one that started last, found."""
    sweep = read_sweep(name)
    metric, mode = sweep.params["metric"], sweep.params["mode"]
    sweep = read_sweep(sweep.name, curves=(metric,))
    ranked = rows(sweep, metric, mode)
    sides = architectures(ranked, mode)
    drawn = {trial.trial: tagged_json(trial.tags, "stemtune.optuna") for trial in sweep.trials}
    proposals = {trial: proposal for trial, proposal in drawn.items() if proposal}
    figures = {
        "sweep": sweep.name,
        "status": sweep.status,
        "metric": metric,
        "mode": mode,
        "commit": sweep.tags.get("stemtune.commit", ""),
        "store_sha256": sweep.tags.get("stemtune.store_sha256", ""),
        "champion": sweep.tags.get("stemtune.champion", ""),
        "trials": [asdict(row) for row in ranked],
        "architectures": sides,
        "importances": setting_importances(proposals, ranked, metric, mode),
        "pareto": {price: pareto(ranked, mode, price) for price in PRICES},
        "seeds": seeds(ranked),
        "rungs": rungs(sweep.params),
        "cost": cost(sweep, ranked),
    }
    shades = colours([entry["architecture"] for entry in sides])
    return Comparison(sweep, metric, mode, ranked, figures, shades, proposals)


def compare(
    name: str | None = None,
    png: str | Path | None = None,
    json: str | Path | None = None,
    out: str | Path | None = None,
) -> str:
    """Return a sweep's comparison (`compare_trials`) as text.

    With `png` the learning curves and the architectures are drawn into that file, with `json` every figure is written;
    `out` is a folder for all pictures, the figures and the page `compare.html`.
    """
    found = compare_trials(name)
    if json is not None:
        with whole_file(json) as part:
            part.write_text(as_json(found))
    if png is not None:
        save(overview(found), Path(png))
    if out is not None:
        write_comparison(found, out)
    return format_comparison(found)


def write_comparison(found: Comparison, out: str | os.PathLike[str]) -> list[Path]:
    """Write pictures, `compare.json` and `compare.html` into the folder `out`; return the files."""
    folder = Path(out)
    writable_folder(folder)
    written = []
    for name, draw in CHARTS.items():
        if chart := draw(found):
            save(chart, folder / f"{name}.png")
            written.append(folder / f"{name}.png")
    pictures = {file.stem: file.read_bytes() for file in written}
    for file, text in (("compare.json", as_json(found)), ("compare.html", page(found, pictures))):
        with whole_file(folder / file) as part:
            part.write_text(text)
        written.append(folder / file)
    return written


def as_json(found: Comparison) -> str:
    return dumps(without_nan(found.figures), indent=1) + "\n"


def without_nan(value: Any) -> Any:
    """Return `value` with null for every NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = ["Comparison", "as_json", "compare", "compare_trials", "format_comparison", "without_nan", "write_comparison"]
