"""What a sweep found: `stemtune compare` as text, pictures, JSON and a page."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from json import dumps
from pathlib import Path
from typing import Any

import yaml

from stemtune._files import whole_file, writable_folder
from stemtune.config import Config
from stemtune.errors import UserError
from stemtune.tracking.query import SweepRecord, read_sweep, tagged_json
from stemtune.tune.formatting import format_metric
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


def compare_trials(names: Sequence[str] = ()) -> Comparison:
    """Return what the sweeps `names`, or the one that started last, found; several have one metric and mode."""
    found = [read_sweep(name) for name in names] or [read_sweep()]
    goals = {(sweep.params["metric"], sweep.params["mode"]) for sweep in found}
    if len(goals) > 1:
        told = "; ".join(f"{sweep.name}: {sweep.params['metric']} ({sweep.params['mode']})" for sweep in found)
        raise UserError(f"sweeps of different metrics cannot be compared ({told}); compare them one by one")
    ((metric, mode),) = goals
    sweep = joined([read_sweep(sweep.name, curves=(metric,)) for sweep in found])
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
        "importances": setting_importances(proposals, ranked, mode),
        "pareto": {price: pareto(ranked, mode, price) for price in PRICES},
        "seeds": seeds(ranked),
        "rungs": rungs(sweep.params),
        "cost": cost(sweep, ranked),
    }
    shades = colours([entry["architecture"] for entry in sides])
    return Comparison(sweep, metric, mode, ranked, figures, shades, proposals)


def joined(sweeps: Sequence[SweepRecord]) -> SweepRecord:
    """Return the trials of several sweeps as those of one, which has the first one's parameters."""
    first, *others = sweeps
    if not others:
        return first
    total = {key: sum(sweep.last.get(key, 0.0) for sweep in sweeps) for key in ("time/wall_s", "time/device_s")}
    return replace(
        first,
        name=", ".join(sweep.name for sweep in sweeps),
        status=", ".join(dict.fromkeys(sweep.status for sweep in sweeps)),
        last=total,
        tags={key: value for key, value in first.tags.items() if all(one.tags.get(key) == value for one in others)},
        trials=[trial for sweep in sweeps for trial in sweep.trials],
    )


def best_settings(found: Comparison) -> str:
    """Return as YAML what the best trial's settings are among those that were searched, its seed aside."""
    best = next((row for row in found.ranked if not math.isnan(row.best)), None)
    if best is None:
        raise UserError(f"no trial of {found.sweep.name} reports {found.metric}, so that there are no best settings")
    trial = next(trial for trial in found.sweep.trials if trial.run_id == best.run_id)
    searched = [name for name in found.sweep.params.get("searched", "").split(", ") if name in trial.params]
    drawn = {name.split("@")[0] for name in best.searched} or set(searched)
    chosen = [name for name in searched if name in {*drawn, "model.name"} - {"train.seed"}]
    typed = Config.from_flat({name: trial.params[name] for name in chosen}).to_flat()
    told = format_metric(found.metric, best.best) + (f", {best.test} on the test split" if best.test else "")
    head = f"# {found.sweep.name}, trial {best.name} ({best.architecture}): {found.metric} {told}"
    use = "# For the next search space: under `fixed:`, or as one entry of `first:`."
    return "\n".join([head, use, yaml.safe_dump({name: typed[name] for name in chosen}, sort_keys=False)])


def compare(
    names: Sequence[str] = (),
    png: str | Path | None = None,
    json: str | Path | None = None,
    out: str | Path | None = None,
    best: str | Path | None = None,
) -> str:
    """Return the comparison of sweeps (`compare_trials`) as text.

    With `png` the learning curves and the architectures are drawn into that file, with `json` every figure is written,
    with `best` the best trial's settings as YAML; `out` is a folder for all pictures, the figures and the page
    `compare.html`.
    """
    found = compare_trials(names)
    for file, text in ((json, as_json), (best, best_settings)):
        if file is not None:
            with whole_file(file) as part:
                part.write_text(text(found))
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
