"""The best settings of a sweep once more, with several seeds each: what promotion trains before it judges.

It is a sweep of its own, `NAME.promotion`, so that it spreads over a cluster, is recorded, and can be interrupted and
resumed as any other; the judging at its end is that of every sweep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from stemtune.config import Config, Scalar
from stemtune.errors import UserError
from stemtune.tune.run.manifest import absolute, read_manifest, space_from_manifest, sweeps_folder
from stemtune.tune.run.promotion import MATCHED, note_nothing_learned, settings_groups
from stemtune.tune.run.sweep import SweepOutcome, run_sweep
from stemtune.tune.run.trial_state import kept_checkpoints, recorded_trials
from stemtune.tune.space.space import SearchSpace, space_from_text

_OWN = ("train.seed", "train.epochs", "train.workers")  # settings that a replicate has of its own


def promote(
    name: str,
    *,
    top: int = 3,
    seeds: int = 3,
    epochs: int | None = None,
    workers: int | None = None,
    local: bool = False,
    nodes: int = 1,
) -> SweepOutcome:
    """Train the `top` best settings of the finished sweep `name` with so many `seeds`, and crown who deserves it.

    `epochs` and `workers` take the place of those of the sweep. A `UserError` says that there is no such sweep, that it
    is not finished, or that no network is among its best.
    """
    folder = sweeps_folder() / name
    manifest = read_manifest(folder)
    if manifest["status"] != "finished":
        raise UserError(f"the sweep '{name}' is not finished; stemtune sweep --resume {name} goes on with it")
    space = absolute(space_from_manifest(manifest), Path(manifest.get("home", ".")))
    states = recorded_trials(folder, space.metric, space.mode)
    kept = kept_checkpoints(folder, states, space.metric, space.mode)
    note_nothing_learned(states, kept)
    groups = settings_groups(states, kept, space.mode)
    networks = [group[0].knobs for group in groups if group[0].label != MATCHED and not group[0].note][:top]
    if not networks:
        raise UserError(f"no trial of the sweep '{name}' left a network that has learned something")
    numbers = (f"{name}.promotion{f'-{number}' if number > 1 else ''}" for number in count(1))
    free = next(number for number in numbers if not (sweeps_folder() / number).exists())
    return run_sweep(replicate_space(space, networks, seeds, epochs, workers, free), free, local=local, nodes=nodes)


def replicated(outcome: SweepOutcome, *, local: bool, nodes: int) -> SweepOutcome:
    """Run the best settings again with several seeds where the space asks for it; else return `outcome` as it is."""
    asked = outcome.replicates
    if asked is None or outcome.status != "finished" or outcome.model is None:
        return outcome
    return promote(outcome.name, top=asked.of_best, seeds=asked.seeds, local=local, nodes=nodes)


def replicate_space(
    space: SearchSpace,
    settings: Sequence[Mapping[str, Scalar]],
    seeds: int,
    epochs: int | None,
    workers: int | None,
    name: str,
) -> SearchSpace:
    """Return the space whose trials are these `settings` of trials of `space`, with each of `seeds` seeds."""
    flats = [Config.from_flat(dict(one)).to_flat() for one in settings]
    lasting = [epochs or int(flat["train.epochs"]) for flat in flats]
    searched: dict[str, list[Scalar]] = {}
    for key in flats[0]:
        values = list(dict.fromkeys(flat[key] for flat in flats))
        if key not in _OWN and len(values) > 1:
            searched[key] = values
    if len(set(lasting)) > 1:
        searched["train.epochs"] = list(dict.fromkeys(lasting))
    usual = Config().to_flat()
    fixed = {key: value for key, value in flats[0].items() if key not in (*_OWN, *searched) and value != usual.get(key)}
    first = [
        {**{key: flat[key] for key in searched if key != "train.epochs"}, "train.seed": seed}
        | ({"train.epochs": lasts} if "train.epochs" in searched else {})
        for flat, lasts in zip(flats, lasting, strict=True)
        for seed in range(seeds)
    ]
    budget: dict[str, Any] = {"trials": len(first), "grace_epochs": max(lasting)}
    if "train.epochs" not in searched:
        budget["epochs"] = lasting[0]
    resources = {key: getattr(space.resources, key) for key in ("cpus_per_worker", "gpus_per_worker")}
    resources["workers"] = workers or max(int(flat["train.workers"]) for flat in flats)
    content = {
        "about": f"The best settings of {space.name} again, with {seeds} seeds each",
        "metric": space.metric,
        "mode": space.mode,
        "budget": budget,
        "resources": resources,
        "fixed": fixed,
        "search": {**searched, "train.seed": list(range(seeds))},
        "first": first,
    }
    return space_from_text(yaml.safe_dump(content, sort_keys=False), name)
