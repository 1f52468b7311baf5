"""Who becomes the champion: the best settings of a sweep, if patterns that nobody has seen bear them out.

Validation selects: the figure of the best epoch of the best trial is a lucky one. So the best few trials read the test
split, and the best of them is crowned if it beats chance, the matched filter and the present champion of the same
crystal there by more than chance does: the interval of the difference, over bootstrap samples of the same patterns,
does not contain 0. Trials that differ in the seed only count together, with their mean.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stemtune.errors import UserError
from stemtune.tracking import reigning, resolve_model
from stemtune.tune.formatting import format_interval, judged_by
from stemtune.tune.run.checkpoints import StoredCheckpoint
from stemtune.tune.run.trial_state import TrialState
from stemtune.tune.space.budget import Resources
from stemtune.tune.space.space import SearchSpace

if TYPE_CHECKING:
    from stemtune.crystal.phase import Phase
    from stemtune.learning.held_out import HeldOut

TOP = 3  # settings whose trials read the test split
MATCHED = "matched"
_NEAR_CHANCE = 0.95  # share of chance above which a validation figure shows no learning
_CHANCE_OF = {
    "val/disorientation_mean_deg": "disorientation_mean_deg",
    "val/disorientation_median_deg": "disorientation_median_deg",
}


@dataclass(frozen=True)
class Verdict:
    """Whether a sweep has a champion, and why."""

    champion: TrialState | None
    lines: tuple[str, ...]
    tags: Mapping[str, str]  # what the registry is to say of the champion


NOBODY = Verdict(None, ("nobody is crowned: the sweep was interrupted",), {})


@dataclass(frozen=True)
class Standing:
    """What someone reads of the test split; of several seeds the mean."""

    name: str
    value: float
    drawn: Any  # the same of each bootstrap sample, an array (1000,)
    learned: bool = True

    @classmethod
    def of(cls, name: str, scores: Sequence[HeldOut]) -> Standing:
        """Return the mean of several seeds."""
        drawn = np.mean([score.drawn for score in scores], axis=0)
        value = statistics.fmean(score.value for score in scores)
        return cls(name, value, drawn, all(score.learned for score in scores))

    @property
    def is_matched(self) -> bool:
        return self.name == MATCHED or f"({MATCHED})" in self.name

    def told(self, metric: str) -> str:
        """Return the figure with its interval."""
        return format_interval(metric, self.value, *np.percentile(self.drawn, (2.5, 97.5)))

    def beats(self, other: Standing, metric: str) -> bool:
        """Whether the difference is more than chance."""
        gain = (self.drawn - other.drawn) * (1 if "within" in metric else -1)
        return bool(np.percentile(gain, 2.5) > 0)


def settings_groups(
    states: Sequence[TrialState], kept: Mapping[str, StoredCheckpoint], mode: str
) -> list[list[TrialState]]:
    """Return the trials that left a model, those that differ in the seed only together; best first, by their mean."""
    sign = 1 if mode == "min" else -1
    groups: dict[str, list[TrialState]] = {}
    for state in sorted(states, key=lambda state: sign * state.best):
        if state.trial in kept:
            alike = {key: value for key, value in state.knobs.items() if key != "train.seed"}
            groups.setdefault(json.dumps(alike, sort_keys=True), []).append(state)
    return sorted(groups.values(), key=lambda group: sign * statistics.fmean(state.best for state in group))


@cache
def _phase(folder: Path) -> Phase:
    from stemtune.crystal.phase import Phase
    from stemtune.learning.checkpoint import read_description

    return Phase.from_cif_text(str(read_description(folder)["phase"]["cif"]), str(folder))


def _chance_deg(folder: Path) -> dict[str, float]:
    from stemtune.learning.held_out import chance_deg

    return chance_deg(_phase(folder).symmetry)


def note_nothing_learned(states: Sequence[TrialState], kept: Mapping[str, StoredCheckpoint]) -> None:
    """Note it of each trial whose validation figures are those of random orientations, or hardly better."""
    for state in states:
        entry = kept.get(state.trial)
        if entry is None or not all(metric in entry.metrics for metric in _CHANCE_OF):
            continue
        chance = _chance_deg(entry.folder / "model")
        if all(float(entry.metrics[metric]) >= _NEAR_CHANCE * chance[name] for metric, name in _CHANCE_OF.items()):
            state.note = _nothing(entry.folder / "model")


def _nothing(folder: Path) -> str:
    return f"nothing learned (chance is {_chance_deg(folder)['disorientation_median_deg']:.0f}°)"


def judge(
    space: SearchSpace, folder: Path, states: Sequence[TrialState], kept: Mapping[str, StoredCheckpoint], tracked: bool
) -> Verdict:
    """Have the best trials of a sweep read the test split, note their figures, and decide who is crowned.

    Ray has to be joined: the patterns are read where a trial's worker would run, while nothing else of the sweep does,
    so that the time per pattern is right too. `tracked` is whether there is a registry with a present champion.
    """
    groups = settings_groups(states, kept, space.mode)
    if not groups:
        return Verdict(None, ("no champion: no trial left a model",), {})
    finalists = [*groups[:TOP], *[group for group in groups[TOP:] if _is_matched(group)][:1]]
    models = {state.trial: kept[state.trial].folder / "model" for group in finalists for state in group}
    best, metric = models[finalists[0][0].trial], judged_by(space.metric)
    baseline = [] if any(map(_is_matched, finalists)) else [None]
    try:
        with _present_champion(folder, best, tracked) as (who, reigning_model):
            *found, champion = _read([*models.values(), *baseline], reigning_model, metric, space.resources)
    except UserError as mistake:
        return Verdict(None, (f"not crowned: {mistake}; the best model is {best}",), {})
    scores = dict(zip(models, found, strict=False))
    for group in finalists:
        for state in group:
            state.test = scores[state.trial].figures
            state.note = "" if scores[state.trial].learned else _nothing(best)
    standings = [Standing.of(_name(group), [scores[state.trial] for state in group]) for group in finalists]
    rivals = [] if not baseline else [Standing.of(MATCHED, found[-1:])]
    rivals += [standing for group, standing in zip(finalists, standings, strict=True) if _is_matched(group)][:1]
    if champion is not None:
        rivals.append(Standing.of(who, [champion]))
    chance = _chance_deg(best)["disorientation_median_deg"]
    winner, lines = decide(finalists, standings, rivals, metric)
    lines = [f"on the test split: {lines[0]}; chance is a median of {chance:.0f}°", *lines[1:]]
    if reigning_model and champion is None:
        lines.append(f"{who} cannot read these patterns, and was not asked")
    if winner is None:
        return Verdict(None, (*lines, f"nobody is crowned; the best model is {best}"), {})
    tags = {"stemtune.champion_test": standings[finalists.index(winner)].told(f"test/{metric}")}
    crystal = _phase(best)
    tags["stemtune.crystal"] = f"{crystal.name} (space group {crystal.space_group})"
    return Verdict(winner[0], tuple(lines), tags)


def decide(
    finalists: Sequence[list[TrialState]], standings: Sequence[Standing], rivals: Sequence[Standing], metric: str
) -> tuple[list[TrialState] | None, list[str]]:
    """Return the trials whose settings are crowned, if any are, and what is to be said.

    The best by validation is asked, and where that fails the sweep's own matched filter, which is no worse a champion
    for having learned nothing. The matched filter is no rival of itself.
    """
    told = [standings[0], *(rival for rival in rivals if rival is not standings[0])]
    lines = [", ".join(f"{one.name} {one.told(metric)}" for one in told)]
    for place, (group, standing) in enumerate(zip(finalists, standings, strict=True)):
        if place and not _is_matched(group):
            continue
        against = [rival for rival in rivals if rival is not standing and not (_is_matched(group) and rival.is_matched)]
        lost = [rival.name for rival in against if not standing.beats(rival, metric)]
        if not standing.learned:
            lost = ["chance"]
        if not lost:
            return group, lines
        lines.append(f"{standing.name} is not surely better than {' and '.join(lost)}")
    return None, lines


def _is_matched(group: Sequence[TrialState]) -> bool:
    return group[0].label == MATCHED


def _name(group: Sequence[TrialState]) -> str:
    seeds = f", {len(group)} seeds" if len(group) > 1 else ""
    return f"trial {group[0].number} ({group[0].label}{seeds})"


def _read(folders: Sequence[Path | None], rival: Path | None, metric: str, resources: Resources) -> list[Any]:
    """Return what `score_held_out` does, from a process with the resources of one worker."""
    import ray
    from ray.exceptions import RayError

    task = ray.remote(num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker)(_score)
    try:
        scores: list[Any] = ray.get(task.remote(folders, rival, metric, resources.cpus_per_worker))
    except RayError as problem:  # a worker that died for want of memory must not cost the sweep its end
        if isinstance(cause := getattr(problem, "cause", None), UserError):
            raise cause from None
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[-1][:200]
        raise UserError(f"the test split could not be read ({reason})") from None
    return scores


def _score(folders: Sequence[Path | None], rival: Path | None, metric: str, cpus: float) -> list[Any]:
    import torch

    from stemtune.learning.held_out import score_held_out

    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, round(cpus)))
    return score_held_out(folders, rival, metric)


@contextmanager
def _present_champion(folder: Path, model: Path, tracked: bool) -> Iterator[tuple[str, Path | None]]:
    """Yield who reigns over the crystal of `model`, and a copy of that model which every node sees."""
    from stemtune.dataset.selection import same_crystal

    for champion in reigning() if tracked else ():
        found = resolve_model(champion.address)
        if same_crystal(_phase(found), _phase(model)):
            copy = folder / ".champion"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(found, copy)
            try:
                yield f"the champion of {champion.sweep}", copy
            finally:
                shutil.rmtree(copy, ignore_errors=True)
            return
    yield "", None
