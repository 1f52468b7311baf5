"""What the sampler takes up from a sweep whose folder was copied or moved, or that may try more than it began with."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

from optuna.trial import TrialState
from test_searcher import result, space, trials_on_disk

from stemtune.tune.run.searcher import STUDY, Limiter, Proposals, StudySearch
from stemtune.tune.run.trial_state import driver_state, drop_driver_state
from stemtune.tune.space.space import SearchSpace

__all__ = ["space"]


def test_a_copied_study_goes_on_where_it_lies_now(space: SearchSpace, tmp_path: Path) -> None:
    """The pickles name the folder of the original, which the copy must neither write to nor need."""
    old, new = tmp_path / "old" / "sweep", tmp_path / "new" / "sweep"
    old.mkdir(parents=True)
    search = StudySearch(space, old, {"folder": str(old)}, 3, "id1")
    at_the_start = pickle.dumps(search)
    search.suggest("a")
    search.on_trial_result("a", result(4.0, 1))
    search.save(str(old / "searcher.pkl"))
    shutil.copytree(old, new)
    before = (old / STUDY).read_bytes()
    try:
        state = driver_state("id1")
        state.folder, state.space = new, space.with_budget(trials=5)
        again = pickle.loads(at_the_start)
        again.restore(str(new / "searcher.pkl"))
        again.on_trial_complete("a", result(3.0, 2))
        assert again.suggest("b")["sweep"]["folder"] == str(new)
        assert (old / STUDY).read_bytes() == before
        assert [trial.state for trial in trials_on_disk(new)] == [TrialState.COMPLETE, TrialState.RUNNING]
        shutil.rmtree(old)
        again = pickle.loads(at_the_start)
        again.restore(str(new / "searcher.pkl"))
        assert again.suggest("c")["sweep"]["folder"] == str(new) and not old.exists()
    finally:
        drop_driver_state("id1")


def test_a_finished_search_goes_on_when_it_may_try_more(space: SearchSpace, tmp_path: Path) -> None:
    def proposals() -> Proposals:
        return Proposals(Limiter(StudySearch(space, tmp_path, {}, 3, "id2"), 1))

    ended = {"counter": 2, "total_samples": 2, "finished": True, "experiment": None}
    try:
        search = proposals()
        search.set_state(ended)
        assert search.is_finished()  # as many as there were to be
        driver_state("id2").space = space.with_budget(trials=3)
        search.set_state(ended)
        assert not search.is_finished() and search.total_samples == 3
    finally:
        drop_driver_state("id2")
