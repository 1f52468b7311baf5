"""The sampler: what it remembers after a crash that Tune's snapshot does not know of."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from stemtune.errors import UserError
from stemtune.tune.run.searcher import (
    FINISHED,
    SETTINGS,
    STUDY,
    SWEEP,
    Limiter,
    StudySearch,
    find_study,
    open_storage,
    repair_journal,
)
from stemtune.tune.run.trial_state import driver_state
from stemtune.tune.space.space import SearchSpace, space_from_text

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


def test_a_stopped_trial_is_pruned_with_the_figure_of_its_last_rung(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = made(space, tmp_path)
    monkeypatch.setattr(driver_state(""), "pruned", {"a"})  # as the scheduler notes it
    for name, values in (("a", (7.0, 3.0, 4.0)), ("b", (6.0, 5.0))):
        search.suggest(name)
        for epoch, value in enumerate(values[:-1], 1):
            search.on_trial_result(name, result(value, epoch))
        search.on_trial_complete(name, result(values[-1], len(values)))  # Tune tells the last report of a stop so
    one, two = trials_on_disk(tmp_path)
    assert (one.state, one.value, one.intermediate_values) == (TrialState.PRUNED, 4.0, {1: 7.0, 2: 3.0, 3: 4.0})
    assert (two.state, two.value) == (TrialState.COMPLETE, 5.0)


def test_the_sampler_learns_within_the_budget(tmp_path: Path) -> None:
    """Of 12 trials three are drawn at random; the fourth goes by them, where another sampler of the seed would not."""
    text = "metric: val/loss\nbudget: {trials: %d}\nsearch:\n  optim.lr: {log: [1.0e-5, 1.0e-1]}"
    drawn = []
    for count in (12, 40):
        (folder := tmp_path / str(count)).mkdir()
        search = made(space_from_text(text % count, "test"), folder)
        rates = []
        for number in range(4):
            rates.append(search.suggest(f"t{number}")["knobs"]["optim.lr"])
            search.on_trial_complete(f"t{number}", result(float(number), 1))
        drawn.append(rates)
    assert drawn[0][:3] == drawn[1][:3] and drawn[0][3] != drawn[1][3]


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


FINITE = """\
metric: val/loss
search:
  model.name: {one_of: {cnn: {model.width: [8, 16, 24, 32], train.batch_size: [16, 32, 64]}}}
first:
  - {model.name: cnn, model.width: 8, train.batch_size: 16}
  - {model.name: matched}
"""


def sharing(folder: Path, sweep: str, text: str = TEXT) -> StudySearch:
    """One driver's searcher; it shares the study of the sweep called alpha."""
    place = folder / sweep
    place.mkdir(exist_ok=True)
    study = "" if sweep == "alpha" else "alpha"
    return StudySearch(space_from_text(text, "test"), place, {}, 3, sweep_id=sweep, study=study)


def drive(folder: Path, sweep: str, count: int, text: str) -> None:
    search = sharing(folder, sweep, text)
    for number in range(count):
        search.suggest(f"{sweep}-{number}")
        search.on_trial_result(f"{sweep}-{number}", result(2.0, 1))
        search.on_trial_complete(f"{sweep}-{number}", result(1.0, 2))


def test_two_drivers_share_a_study(tmp_path: Path) -> None:
    """Both propose at once: every trial is somebody's, nothing runs twice, and the planned ones run once in all."""
    drive(tmp_path, "alpha", 1, TEXT)
    fork = multiprocessing.get_context("fork")
    drivers = [fork.Process(target=drive, args=(tmp_path, sweep, 15, TEXT)) for sweep in ("beta", "gamma")]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join(timeout=120)
        assert driver.exitcode == 0
    trials = trials_on_disk(tmp_path / "alpha")
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert [trial.user_attrs[SWEEP] for trial in done].count("beta") == 15
    assert [trial.user_attrs[SWEEP] for trial in done].count("gamma") == 15
    assert len(done) == 31
    assert len({trial.user_attrs[SETTINGS] for trial in done}) == 31
    planned = [trial for trial in trials if "fixed_params" in trial.system_attrs]
    assert [trial.state for trial in planned] == [TrialState.COMPLETE] * 2
    assert not (tmp_path / "beta" / STUDY).exists()


def test_who_joins_runs_what_is_left(tmp_path: Path) -> None:
    """Twelve settings and a baseline: the second driver runs neither the baseline nor what the first has run."""
    one = sharing(tmp_path, "alpha", FINITE)
    first = [one.suggest(f"a{number}")["knobs"] for number in range(6)]
    for number in range(6):
        one.on_trial_complete(f"a{number}", result(1.0, 1))
    two = sharing(tmp_path, "beta", FINITE)
    second = [two.suggest(f"b{number}")["knobs"] for number in range(4)]
    assert [knobs.get("model.name") for knobs in first].count("matched") == 1
    assert "matched" not in [knobs.get("model.name") for knobs in second]
    pairs = [(knobs["model.width"], knobs["train.batch_size"]) for knobs in first + second if "model.width" in knobs]
    assert len(set(pairs)) >= len(pairs) - 1  # the sampler may fail to find the last ones
    assert pairs.count((8, 16)) == 1


def test_who_comes_back_ends_only_its_own_lost_trials(tmp_path: Path) -> None:
    one = sharing(tmp_path, "alpha")
    at_the_start = pickle.dumps(one)
    one.suggest("a")
    snapshot = tmp_path / "snapshot.pkl"
    one.save(str(snapshot))
    one.suggest("lost")
    two = sharing(tmp_path, "beta")
    two.suggest("b")
    two._study.ask()  # what a third driver has just asked for, and not marked yet
    again = pickle.loads(at_the_start)
    again.restore(str(snapshot))
    states = {number: trial.state for number, trial in enumerate(trials_on_disk(tmp_path / "alpha"))}
    assert states[0] == states[2] == states[3] == TrialState.RUNNING
    assert states[1] == TrialState.FAIL
    two.on_trial_complete("b", result(3.0, 1))
    assert trials_on_disk(tmp_path / "alpha")[2].value == 3.0


def test_a_study_of_another_space_is_refused(tmp_path: Path) -> None:
    sharing(tmp_path, "alpha")
    with pytest.raises(UserError, match=r"the study 'alpha' at .*study\.journal searches another space"):
        sharing(tmp_path, "beta", TEXT.replace("1.0e-5", "1.0e-6"))
    with pytest.raises(UserError, match="or by another metric"):
        sharing(tmp_path, "beta", TEXT.replace("val/loss", "val/ece"))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("postgresql://me:s3cret@host/optuna", "must hold no password; put it into ~/.pgpass"),
        ("postgresql://me@host/optuna?password=s3cret", "must hold no password"),
        ("redis://me:x@host", "must hold no password"),
        ("redis://host", "--study is 'redis://host', but must be a sweep's name or postgresql://USER@HOST/DATABASE"),
    ],
)
def test_addresses_of_studies(given: str, wanted: str, space: SearchSpace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=wanted) as mistake:
        find_study(given, tmp_path, space)
    assert "s3cret" not in str(mistake.value)


def test_where_a_study_lies(space: SearchSpace, tmp_path: Path) -> None:
    folder = tmp_path / "beta"
    assert find_study("", folder, space).file == folder / STUDY
    assert find_study("alpha", folder, space).file == tmp_path / "alpha" / STUDY
    assert find_study("postgresql://me@host/db", folder, space).name == "test"
    named = find_study("postgresql://me@host/db#lr", folder, space)
    assert (named.name, named.url) == ("lr", "postgresql+psycopg://me@host/db")
    with pytest.raises(UserError, match=r"cannot open the study at postgresql\+psycopg://\.\.\.@127.0.0.1:9/db: "):
        open_storage(find_study("postgresql://me@127.0.0.1:9/db", folder, space))


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
    repair_journal(tmp_path / STUDY)
    assert journal.read_bytes() == whole
    assert len(trials_on_disk(tmp_path)) == before
    repair_journal(tmp_path / "absent")


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


def test_what_ended_after_the_last_snapshot_is_run_again_once(tmp_path: Path) -> None:
    """Tune and the records have lost it; of a grid every point has to be there in the end, and none twice."""
    grid = space_from_text("metric: val/loss\ndesign: grid\nsearch:\n  optim.lr: [0.001, 0.002, 0.003]\n", "test")
    search = made(grid, tmp_path)
    at_the_start = pickle.dumps(search)
    rates = [search.suggest("a")["knobs"]["optim.lr"]]
    search.on_trial_complete("a", result(1.0, 1))
    search.save(str(tmp_path / "snapshot.pkl"))
    lost = search.suggest("b")["knobs"]["optim.lr"]
    search.on_trial_complete("b", result(2.0, 1))
    for crash in range(2):  # the second time before it has come again
        again = pickle.loads(at_the_start)
        again.restore(str(tmp_path / "snapshot.pkl"))
        assert again._again, crash
    rates += [again.suggest(name)["knobs"]["optim.lr"] for name in ("c", "d")]
    assert sorted(rates) == [0.001, 0.002, 0.003]
    assert lost in rates[1:]
    again.on_trial_complete("c", result(2.0, 1))
    again.save(str(tmp_path / "snapshot.pkl"))
    last = pickle.loads(at_the_start)
    last.restore(str(tmp_path / "snapshot.pkl"))
    waiting = [trial for trial in trials_on_disk(tmp_path) if trial.state == TrialState.WAITING]
    assert not waiting and not last._again  # both are known now, or run


def test_when_the_time_is_over_nothing_is_proposed(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = Limiter(made(space, tmp_path), 1)
    monkeypatch.setattr(driver_state(""), "at_once", 2)  # the cluster has grown since
    assert [bool(search.suggest(name)) for name in "abc"] == [True, True, False]
    search.on_trial_complete("a", result(1.0, 1))
    monkeypatch.setattr(driver_state("another sweep"), "time_over", True)
    assert isinstance(search.suggest("d"), dict)  # of one process, and neither shares anything with the other
    search.on_trial_complete("b", result(1.0, 1))
    monkeypatch.setattr(driver_state(""), "time_over", True)
    assert search.suggest("e") == FINISHED


def test_reports_from_before_a_restart_count(space: SearchSpace, tmp_path: Path) -> None:
    search = made(space, tmp_path)
    search.suggest("a")
    search.on_trial_result("a", {**result(4.0, 3), "earlier": [result(5.0, 1), result(2.0, 2)]})
    search.on_trial_complete("a", result(4.0, 3))
    first = trials_on_disk(tmp_path)[0]
    assert (first.value, first.intermediate_values) == (2.0, {1: 5.0, 2: 2.0, 3: 4.0})
