"""Who is crowned: only what beats chance, the matched filter and the present champion by more than chance does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stemtune._files import seal
from stemtune.config import Config
from stemtune.crystal.phase import linio2
from stemtune.tune.formatting import judged_by
from stemtune.tune.run.checkpoints import StoredCheckpoint, annotate, train_folder
from stemtune.tune.run.promotion import Standing, decide, note_nothing_learned, settings_groups
from stemtune.tune.run.replicates import replicate_space
from stemtune.tune.run.trial_state import TrialState, kept_checkpoints, table
from stemtune.tune.space.space import space_from_text

MEDIAN = "val/disorientation_median_deg"
JUDGED = "disorientation_median_deg"


def state(number: int, best: float, model: str = "cnn", seed: int = 0, lr: float = 1e-3) -> TrialState:
    knobs = {"model.name": model, "train.seed": seed, "optim.lr": lr}
    return TrialState(f"t{number}", number, knobs, status="finished", epoch=2, best=best, best_epoch=1)


def standing(name: str, value: float, spread: float = 0.5, seed: int = 0, learned: bool = True) -> Standing:
    drawn = value + spread * np.random.default_rng(seed).standard_normal(1000)
    return Standing(name, value, drawn, learned)


MATCHED = standing("matched", 5.0)
NETWORK = [state(0, 4.0)]


def crowned(found: list[Standing], rivals: list[Standing], groups: list[list[TrialState]] | None = None) -> object:
    winner, lines = decide(groups or [NETWORK], found, rivals, JUDGED)
    return winner[0].number if winner else lines[-1]


def test_a_clear_winner_is_crowned() -> None:
    rivals = [MATCHED, standing("the champion of old", 3.5, seed=1)]
    assert crowned([standing("trial 0 (cnn)", 1.0, seed=2)], rivals) == 0


def test_a_difference_that_chance_may_make_crowns_nobody() -> None:
    told = crowned([standing("trial 0 (cnn)", 4.6, seed=2)], [MATCHED, standing("the champion of old", 4.7, seed=1)])
    assert told == "trial 0 (cnn) is not surely better than matched and the champion of old"


def test_the_same_patterns_tell_what_two_intervals_cannot() -> None:
    """Both intervals are wide for want of patterns, but pattern by pattern one model is always better."""
    champion = standing("the champion of old", 4.0, spread=1.0)
    better = Standing("trial 0 (cnn)", 3.6, champion.drawn - 0.4, True)
    assert np.percentile(better.drawn, 97.5) > np.percentile(champion.drawn, 2.5)
    assert crowned([better], [champion]) == 0


def test_more_is_better_within_5_degrees() -> None:
    many, few = standing("trial 0 (cnn)", 0.9, 0.01), standing("matched", 0.5, 0.01, seed=1)
    assert many.beats(few, "within_5deg") and not few.beats(many, "within_5deg")
    assert few.beats(many, JUDGED)


def test_chance_is_never_crowned() -> None:
    told = crowned([standing("trial 0 (cnn)", 66.0, learned=False)], [standing("matched", 80.0, seed=1)])
    assert told == "trial 0 (cnn) is not surely better than chance"


def test_the_matched_filter_of_the_sweep_stands_in() -> None:
    """It is crowned where no network beats it, unless the present champion is as good."""
    groups = [[state(0, 4.0)], [state(1, 4.1)], [state(2, 5.0, "matched")]]
    filters = standing("trial 2 (matched)", 5.0, seed=3)
    found = [standing("trial 0 (cnn)", 5.2, seed=1), standing("trial 1 (cnn)", 1.0, seed=2), filters]
    assert crowned(found, [filters], groups) == 2
    champion = standing("the champion of old", 5.0, seed=4)
    assert crowned(found, [filters, champion], groups) == (
        "trial 2 (matched) is not surely better than the champion of old"
    )


def kept(folder: Path, state: TrialState, *values: float) -> None:
    """Store a checkpoint of a trial, of the best epoch of these."""
    best = int(np.argmin(values)) + 1
    there = train_folder(folder, state.trial) / "checkpoint_1"
    (there / "model").mkdir(parents=True)
    described = {"schema": 1, "config": {}, "phase": {"cif": linio2().cif}, "geometry": {}}
    (there / "model" / "model.json").write_text(json.dumps(described))
    seal(there)
    reports = [{"epoch": at, MEDIAN: value, "val/disorientation_mean_deg": value} for at, value in enumerate(values, 1)]
    annotate(there, reports[:best])


def test_the_figure_told_is_of_the_weights_that_are_kept(tmp_path: Path) -> None:
    one = state(0, best=2.0)  # of an epoch that a crash has taken away
    kept(tmp_path, one, 9.0, 7.0)
    entry = kept_checkpoints(tmp_path, [one], MEDIAN, "min")["t0"]
    assert (one.best, one.best_epoch) == (7.0, 2) == (entry.metrics[MEDIAN], entry.epoch)


@pytest.mark.parametrize(("value", "learned"), [(70.0, False), (66.0, False), (60.0, True)])
def test_the_table_says_who_learned_nothing(tmp_path: Path, value: float, learned: bool) -> None:
    one = state(0, best=value)
    kept(tmp_path, one, value)
    note_nothing_learned([one], kept_checkpoints(tmp_path, [one], MEDIAN, "min"))
    assert ("finished; nothing learned (chance is 69°)" in table([one], MEDIAN, "min")) is not learned


def test_seeds_count_together(tmp_path: Path) -> None:
    """The luckiest trial is one of three seeds whose mean is worse than that of other settings."""
    states = [state(seed, best, seed=seed) for seed, best in enumerate((1.0, 9.0, 8.0))]
    states += [state(3 + seed, best, seed=seed, lr=2e-3) for seed, best in enumerate((4.0, 3.0, 5.0))]
    entries = {one.trial: StoredCheckpoint(tmp_path, 1, []) for one in states}
    groups = settings_groups(states, entries, "min")
    assert [[one.number for one in group] for group in groups] == [[4, 3, 5], [0, 2, 1]]
    assert len(settings_groups(states, {"t3": entries["t3"]}, "min")) == 1


def test_what_decides_on_the_test_split() -> None:
    assert judged_by("val/within_5deg") == "within_5deg"
    assert judged_by("val/disorientation_mean_deg") == "disorientation_mean_deg"
    for other in ("val/loss", "val/ece", "model/ms_per_pattern", "train/samples_per_s"):
        assert judged_by(other) == JUDGED


def test_the_table_shows_the_test_split() -> None:
    one = state(0, best=3.0)
    one.test = {f"test/{JUDGED}": 3.5, f"test/{JUDGED}_low": 3.1, f"test/{JUDGED}_high": 4.0}
    lines = table([one, state(1, best=4.0)], MEDIAN, "min").splitlines()
    assert f"test {JUDGED}" in lines[0]
    assert "3.50° (3.10° to 4.00°)" in lines[2]


def test_the_space_of_a_promotion() -> None:
    """Each of the settings with each seed, completely, whatever branch a setting came from."""
    text = "metric: val/within_5deg\nresources: {cpus_per_worker: 2}\nsearch: {optim.lr: {log: [1e-4, 1e-2]}}"
    old = space_from_text(text, "old")
    settings = [
        {"model.name": "cnn", "model.width": 8, "optim.lr": 1e-5, "train.epochs": 3, "simulate.thickness": "20:80"},
        {"model.name": "circular", "optim.lr": 2e-3, "train.epochs": 3, "simulate.thickness": "20:80", "train.seed": 7},
    ]
    again = replicate_space(old, settings, 2, None, 2, "again")
    assert (again.metric, again.mode, again.budget.trials, again.budget.epochs) == ("val/within_5deg", "max", 4, 3)
    assert (again.resources.workers, again.resources.cpus_per_worker) == (2, 2)
    assert again.fixed == {"simulate.thickness": "20:80"}
    every = [Config.from_flat(again.settings({**again.fixed, **point})).to_flat() for point in again.enqueued()]
    for number, flat in enumerate(every):
        given = {**settings[number // 2], "train.seed": number % 2, "train.workers": 2}
        assert flat == Config.from_flat(given).to_flat()
    longer = replicate_space(old, settings, 2, 9, None, "longer")
    assert (longer.budget.epochs, longer.budget.grace_epochs, longer.resources.workers) == (9, 9, 1)
