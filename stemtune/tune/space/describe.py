"""A search space in words: what `stemtune check` prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stemtune.config import Config, knob
from stemtune.tune.formatting import format_settings
from stemtune.tune.space.forms import Branch, Choice, Constant, Form
from stemtune.tune.space.space import SearchSpace, load_space, samples, walk

_SHOWN = 3  # sampled trials that are printed
LOSSES = ("val/loss", "train/loss")
LOSS_UNITS = (
    *("head.name", "head.step", "head.softness", "head.residual", "head.components"),
    *("model.view", "model.grid_step"),
)
"""Settings that change what a loss means: two trials that differ in one are not told apart by theirs."""

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
        + ("every combination, none stopped early" if space.design == "grid" else _stops(space)),
        *([] if space.design == "grid" else [f"  {_proposals(space)}"]),
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
    return "\n".join([*lines, *_stop_notes(space), *_notes(space)])


def _stops(space: SearchSpace) -> str:
    """Say when ASHA decides by what, and how many epochs that leaves of all."""
    budget, (_, _, epochs) = space.budget, space.extremes
    how = f"by {budget.stop_by}" + (f" among trials of one {', '.join(budget.within)}" if budget.within else "")
    if budget.grace_device_s:
        return f"ASHA may stop a trial after {budget.grace_device_s:g} device seconds, {how}"
    if budget.grace_patterns:
        return f"ASHA may stop a trial after {budget.grace_patterns} patterns, {how}"
    if not (rungs := budget.rungs(epochs)):
        return "ASHA stops none"
    shares = [budget.reduction**-place for place in range(len(rungs) + 1)]
    ends = zip([0, *rungs], [*rungs, epochs], shares, strict=True)
    left = budget.trials * sum((last - first) * share for first, last, share in ends)
    return (
        f"after epoch {', '.join(str(rung) for rung in rungs)} ASHA lets 1 in {budget.reduction:g} go on, {how}: some"
        f" {max(left, epochs):.0f} of {budget.trials * epochs} epochs in all"
    )


def _proposals(space: SearchSpace) -> str:
    """Say who proposes how many of the trials."""
    given = min(len(space.first), space.budget.trials)
    drawn = min(space.budget.trials - given, max(0, space.budget.startup - len(space.enqueued())))
    left = space.budget.trials - given - drawn
    return f"proposals: {given} given as `first`, {drawn} at random, {left} by what the trials before have taught"


def _form_lines(key: str, form: Form, indent: str) -> list[str]:
    unit = f" {knob(key).unit}" if knob(key).unit else ""
    if not isinstance(form, Branch):
        return [f"{indent}{key}: {'always ' if isinstance(form, Constant) else ''}{form}{unit}"]
    lines = [f"{indent}{key}: {form}"]
    for label, inside in form.branches.items():
        for inner, kind in inside.items():
            lines += [f"{indent}  {label}: {line.strip()}" for line in _form_lines(inner, kind, indent)]
    return lines


def _stop_notes(space: SearchSpace) -> list[str]:
    """Say where ASHA would compare what cannot be compared."""
    budget, (_, _, epochs) = space.budget, space.extremes
    by_epochs = not (budget.grace_patterns or budget.grace_device_s)
    if space.design == "grid" or (by_epochs and not budget.rungs(epochs)):
        return []
    if budget.stop_by not in (*LOSSES, "val/disorientation_mean_deg"):
        return [
            f"  note: ASHA goes by {budget.stop_by}, which stays at chance for the first epochs of a network from"
            " random weights; rungs on that plateau stop trials by a lottery: leave budget.stop_by out, or raise the"
            " grace"
        ]
    varied = {key for key, form, _ in walk(space.search) if not isinstance(form, Choice) or len(form.values) > 1}
    unlike = [key for key in LOSS_UNITS if key in varied and key not in budget.within]
    if budget.stop_by in LOSSES and unlike:
        return [
            f"  note: ASHA goes by {budget.stop_by}, but trials of another {', '.join(unlike)} have losses of other"
            " units; give budget.stop_by: val/disorientation_mean_deg, or name it in budget.within"
        ]
    return []


def _notes(space: SearchSpace) -> list[str]:
    config = Config.from_flat(space.settings(dict(space.fixed)))
    searched = "data.store" in space.search or any("data.store" in point for point in space.first)
    if config.data.source == "store" and not searched and "data.source" not in space.search:
        if not config.data.store:
            return ["  note: no store is named; give `fixed: {data.store: FILE}` or --set data.store=FILE to the sweep"]
        if not Path(config.data.store).expanduser().exists():
            return [f"  note: the store {config.data.store} is not here yet; the sweep needs it"]
    return []
