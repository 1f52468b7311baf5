"""The sampler: what it remembers after a crash that Tune's snapshot does not know of."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from stemtune.tune.searcher import STUDY, StudySearch
from stemtune.tune.space import SearchSpace, space_from_text

TEXT = """\
metric: val/loss
search:
  optim.lr: {log: [1.0e-5, 1.0e-1]}
  model.name:
    one_of:
      cnn: {model.width: [8, 16]}
      polar: {model.width: {int: [8, 32], step: 8}}
first:
  - {model.name: cnn, optim.lr: 1.0e-3, model.width: 8}
  - {model.name: cnn, optim.lr: 1.0e-2, model.width: 16}
"""


@pytest.fixture
def space() -> SearchSpace:
    return space_from_text(TEXT, "test")


def made(space: SearchSpace, folder: Path) -> StudySearch:
    return StudySearch(space, folder, {"folder": str(folder)}, seed=3)


def result(value: float, epoch: int) -> dict[str, Any]:
    return {"val/loss": value, "epoch": epoch, "training_iteration": epoch}


def trials_on_disk(folder: Path) -> list[optuna.trial.FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(folder / STUDY)))
    return optuna.load_study(study_name=folder.name, storage=storage).get_trials()


def test_first_trials_come_first_and_the_study_is_on_disk(space: SearchSpace, tmp_path: Path) -> None:
    search = made(space, tmp_path)
    one, two = search.suggest("a"), search.suggest("b")
    assert one["knobs"]["optim.lr"] == pytest.approx(1e-3)
    assert two["knobs"]["model.width"] == 16
    assert [one["number"], two["number"]] == [0, 1]
    search.on_trial_result("a", result(5.0, 1))
    search.on_trial_result("a", result(2.0, 2))
    search.on_trial_complete("a", result(3.0, 3))
    first = trials_on_disk(tmp_path)[0]
    assert first.state == TrialState.COMPLETE
    assert first.value == 2.0  # the best, not the last
    assert first.intermediate_values == {1: 5.0, 2: 2.0, 3: 3.0}


def test_seeded_samplers_agree(space: SearchSpace, tmp_path: Path) -> None:
    def proposals(folder: Path) -> list[dict[str, Any]]:
        folder.mkdir()
        search = made(space, folder)
        drawn = []
        for number in range(14):
            drawn.append(search.suggest(f"t{number}")["knobs"])
            search.on_trial_complete(f"t{number}", result(float(drawn[-1]["optim.lr"]), 1))
        return drawn

    one, two = proposals(tmp_path / "one"), proposals(tmp_path / "two")
    assert one == two
    assert one[2] != one[3]


def test_restore_mends_what_the_snapshot_missed(space: SearchSpace, tmp_path: Path) -> None:
    search = made(space, tmp_path)
    at_the_start = pickle.dumps(search)  # as Tune keeps it
    search.suggest("a")
    snapshot = tmp_path / "snapshot.pkl"
    search.save(str(snapshot))
    search.suggest("b")  # a `first` trial that Tune will not remember
    search.on_trial_result("a", result(4.0, 1))
    search.on_trial_complete("a", result(4.0, 2))  # nor that this one ended

    again = pickle.loads(at_the_start)
    again.restore(str(snapshot))
    states = [trial.state for trial in trials_on_disk(tmp_path)]
    assert states == [TrialState.COMPLETE, TrialState.FAIL, TrialState.WAITING]
    again.on_trial_result("a", result(4.0, 1))  # Tune runs it again: neither may raise
    again.on_trial_complete("a", result(4.0, 2))
    again.on_trial_complete("stranger", result(4.0, 2))
    assert again.suggest("c")["knobs"]["optim.lr"] == pytest.approx(1e-2)  # the lost `first` trial
    assert trials_on_disk(tmp_path)[0].value == 4.0


def test_failed_trials_teach_nothing(space: SearchSpace, tmp_path: Path) -> None:
    search = made(space, tmp_path)
    search.suggest("a")
    search.on_trial_result("a", result(1.0, 1))
    search.on_trial_complete("a", error=True)
    assert trials_on_disk(tmp_path)[0].state == TrialState.FAIL


def test_a_baseline_runs_outside_the_study(tmp_path: Path) -> None:
    space = space_from_text(TEXT + "  - {model.name: matched}\n", "test")
    search = made(space, tmp_path)
    assert search.suggest("a")["knobs"]["model.name"] == "matched"
    search.on_trial_result("a", result(0.5, 1))
    search.on_trial_complete("a", result(0.5, 1))
    assert search.suggest("b")["knobs"]["optim.lr"] == pytest.approx(1e-3)
    assert len([trial for trial in trials_on_disk(tmp_path) if trial.state != TrialState.WAITING]) == 1


def test_the_same_trial_is_not_run_twice(tmp_path: Path) -> None:
    text = "metric: val/loss\nsearch: {model.width: [8, 16, 24], head.residual: [true, false]}"
    search = made(space_from_text(text, "test"), tmp_path)
    seen = set()
    for number in range(6):
        knobs = search.suggest(f"t{number}")["knobs"]
        seen.add((knobs["model.width"], knobs["head.residual"]))
        search.on_trial_complete(f"t{number}", result(1.0, 1))
    assert len(seen) >= 5


def test_two_objectives_meet_in_one_study(tmp_path: Path) -> None:
    text = "metric: [val/loss, model/ms_per_pattern]\nsearch:\n  optim.lr: {log: [1.0e-5, 1.0e-1]}"
    search = made(space_from_text(text, "test"), tmp_path)
    for number in range(8):
        search.suggest(f"t{number}")
        for epoch, (loss, wait) in enumerate([(9.0, 1.0), (float(number), 20.0 - number), (10.0, 3.0)], 1):
            search.on_trial_result(f"t{number}", {**result(loss, epoch), "model/ms_per_pattern": wait})
        search.on_trial_complete(f"t{number}", None)
    told = trials_on_disk(tmp_path)
    assert told[4].values == [4.0, 16.0]  # both figures of the best epoch
    storage = JournalStorage(JournalFileBackend(str(tmp_path / STUDY)))
    study = optuna.load_study(study_name=tmp_path.name, storage=storage)
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MINIMIZE"]
    assert len(study.best_trials) == 8  # each is better than every other in one of the two
