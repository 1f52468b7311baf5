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

from stemtune.tune.searcher import STUDY, StudySearch, mend_study
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


def test_a_study_cut_short_is_read_on(space: SearchSpace, tmp_path: Path) -> None:
    """A full disk leaves half a line, to which the next one is added; the rest is remembered."""
    search = made(space, tmp_path)
    for number in range(3):
        search.suggest(f"t{number}")
    journal = tmp_path / STUDY
    whole, before = journal.read_bytes(), len(trials_on_disk(tmp_path))
    journal.write_bytes(whole + b'{"op_code": 6, "wor{"op_code": 5}\n{"op_code": 4, "tri')
    with pytest.raises(ValueError):
        trials_on_disk(tmp_path)
    mend_study(tmp_path)
    assert journal.read_bytes() == whole
    assert len(trials_on_disk(tmp_path)) == before
    mend_study(tmp_path / "absent")


def test_a_lost_proposal_is_run_again(space: SearchSpace, tmp_path: Path) -> None:
    """One that the sampler drew and Tune forgot comes again, so that the trials are those of an undisturbed run."""
    search = made(space, tmp_path)
    at_the_start = pickle.dumps(search)
    search.suggest("a")
    search.suggest("b")
    search.save(str(tmp_path / "snapshot.pkl"))
    lost = search.suggest("c")["knobs"]
    again = pickle.loads(at_the_start)
    again.restore(str(tmp_path / "snapshot.pkl"))
    assert again.suggest("d")["knobs"] == lost


def test_reports_from_before_a_restart_count(space: SearchSpace, tmp_path: Path) -> None:
    search = made(space, tmp_path)
    search.suggest("a")
    search.on_trial_result("a", {**result(4.0, 3), "earlier": [result(5.0, 1), result(2.0, 2)]})
    search.on_trial_complete("a", result(4.0, 3))
    first = trials_on_disk(tmp_path)[0]
    assert (first.value, first.intermediate_values) == (2.0, {1: 5.0, 2: 2.0, 3: 4.0})
