"""A search space in words: what `stemtune check` prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stemtune.config import Config, knob
from stemtune.tune.formatting import format_settings
from stemtune.tune.space.forms import Branch, Constant, Form
from stemtune.tune.space.space import SearchSpace, load_space, samples

_SHOWN = 3  # sampled trials that are printed
_WORDS = {"min": "less", "max": "more"}


def check(paths: Sequence[str | Path]) -> str:
    """Validate search spaces, and say what each would run."""
    return "\n\n".join(describe_space(load_space(path), path) for path in paths)


def describe_space(space: SearchSpace, path: str | Path) -> str:
    """Say what the space asks, what it varies, what it costs, and show a few trials it might run."""
    budget, resources = space.budget, space.resources
    fewest, most, epochs = space.extremes
    workers = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    least = f", {resources.workers_least} at least when a node is lost" if resources.workers_least else ""
    limit = f", at most {budget.hours:g} h" if budget.hours else ""
    lines = [
        f"{path}: fine",
        *([f"  {space.about}"] if space.about else []),
        "  optimises "
        + " and ".join(f"{metric} ({_WORDS[mode]} is better)" for metric, mode in space.objectives)
        + (f"; {space.metric} decides" if space.also else ""),
        f"  {budget.trials} trials of up to {epochs} epochs{limit}; "
        + (
            "every combination, none stopped early"
            if space.design == "grid"
            else f"ASHA may stop a trial after {budget.grace_epochs} and lets 1 in {budget.reduction:g} go on"
        ),
        f"  each trial: {workers} worker(s) of {resources.cpus_per_worker:g} CPU and {resources.gpus_per_worker:g} GPU"
        f"{least}",
    ]
    if space.fixed:
        lines.append("  fixed: " + ", ".join(f"{key} = {value}" for key, value in space.fixed.items()))
    lines.append("  searched:" if space.search else "  nothing is searched")
    for key, form in space.search.items():
        lines += _form_lines(key, form, "    ")
    lines.append("  would run, for instance:")
    shown = [({**space.fixed, **point}, " (first)") for point in space.first[:_SHOWN]]
    drawn = [(flat, "") for flat in samples(space, _SHOWN)]
    for flat, note in [*shown, *drawn][: max(_SHOWN, len(shown) + 1)]:
        lines.append("    " + (format_settings(flat, space.fixed) or "the defaults") + note)
    return "\n".join([*lines, *_notes(space)])


def _form_lines(key: str, form: Form, indent: str) -> list[str]:
    unit = f" {knob(key).unit}" if knob(key).unit else ""
    if not isinstance(form, Branch):
        return [f"{indent}{key}: {'always ' if isinstance(form, Constant) else ''}{form}{unit}"]
    lines = [f"{indent}{key}: {form}"]
    for label, inside in form.branches.items():
        for inner, kind in inside.items():
            lines += [f"{indent}  {label}: {line.strip()}" for line in _form_lines(inner, kind, indent)]
    return lines


def _notes(space: SearchSpace) -> list[str]:
    config = Config.from_flat(space.settings(dict(space.fixed)))
    searched = "data.store" in space.search or any("data.store" in point for point in space.first)
    if config.data.source == "store" and not searched and "data.source" not in space.search:
        if not config.data.store:
            return ["  note: no store is named; give `fixed: {data.store: FILE}` or --set data.store=FILE to the sweep"]
        if not Path(config.data.store).expanduser().exists():
            return [f"  note: the store {config.data.store} is not here yet; the sweep needs it"]
    return []
