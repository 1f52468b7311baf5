"""Ray Tune set up for a sweep, or taken up again where an interrupted one stopped."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ray import tune

from stemtune.tune.cluster import HEAD
from stemtune.tune.records import SHEET
from stemtune.tune.schedule import LearnersASHA, TimeBudget
from stemtune.tune.searcher import StudySearch, mend_study
from stemtune.tune.snapshots import FOLDER, hand_over
from stemtune.tune.space import SearchSpace
from stemtune.tune.trial import FAILURE, PASSED_ON, run_trial
from stemtune.tune.watch import Watch


def driver() -> Any:
    """Return the function that Tune starts per trial; it takes no CPU, its workers do."""
    return tune.with_resources(run_trial, tune.PlacementGroupFactory([{HEAD: 0.001}]))


def trial_name(trial: Any) -> str:
    """Name a trial's own folder."""
    return f"trial-{trial.trial_id}"


def made_tuner(space: SearchSpace, folder: Path, watch: Watch, at_once: int) -> Any:
    """Return Tune set up for a new sweep of at most `at_once` trials at a time."""
    _, _, epochs = space.extremes
    settings = {
        "folder": str(folder),
        "metric": space.metric,
        "mode": space.mode,
        "cpus_per_worker": space.resources.cpus_per_worker,
        "gpus_per_worker": space.resources.gpus_per_worker,
        "environment": {name: os.environ[name] for name in PASSED_ON if name in os.environ},
    }
    seed = space.fixed.get("train.seed", 0)
    return tune.Tuner(
        driver(),
        tune_config=tune.TuneConfig(
            metric=space.metric,
            mode=space.mode,
            search_alg=StudySearch(space, folder, settings, seed=int(seed)),
            scheduler=LearnersASHA(
                time_attr="epoch",
                max_t=epochs + 1,  # one more, or the last epoch would count as a stop
                grace_period=space.budget.grace_epochs,
                reduction_factor=space.budget.reduction,
            ),
            num_samples=space.budget.trials,
            max_concurrent_trials=at_once,
            trial_name_creator=trial_name,
            trial_dirname_creator=trial_name,
        ),
        run_config=tune.RunConfig(
            stop=TimeBudget(space.budget.hours) if space.budget.hours else None,
            name=folder.name,
            storage_path=str(folder.parent),
            callbacks=[watch],
            failure_config=tune.FailureConfig(max_failures=1),
            verbose=0,
        ),
    )


def restored_tuner(folder: Path) -> Any | None:
    """Return Tune as the interrupted sweep in `folder` left it; None when it left nothing to go on from."""
    handed_over = hand_over(folder)
    if not tune.Tuner.can_restore(str(folder)) or ((folder / FOLDER).exists() and not handed_over):
        discard(folder)
        return None
    remove_notes(folder)
    mend_study(folder)
    return tune.Tuner.restore(str(folder), trainable=driver(), resume_unfinished=True, resume_errored=True)


def remove_notes(folder: Path) -> None:
    """Forget why trials failed, so that a resumed sweep tries them again."""
    for note in (folder / "train").glob(f"*/{FAILURE}"):
        note.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Empty the folder of a sweep that has no snapshot: it died before the first, or all are damaged."""
    for entry in folder.iterdir():
        if entry.name == SHEET or entry.name.startswith("tracking."):
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
