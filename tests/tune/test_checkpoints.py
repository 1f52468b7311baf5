"""What a trial keeps on storage, what it goes on from when some of it is damaged, and what Tune goes on from."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from stemtune._files import damage, seal
from stemtune.errors import UserError
from stemtune.tune.run.checkpoints import (
    LATEST,
    RAYS_OWN,
    Snapshots,
    annotate,
    how_ended,
    mark_ended,
    newest_intact,
    remove_partial,
    restore_snapshot,
    store,
    stored_checkpoints,
    train_folder,
)
from stemtune.tune.run.sweep import disk_full
from stemtune.tune.run.trial import Clock, Reporter
from stemtune.tune.run.trial_state import TrialState, best_checkpoint, history

CONFIG = {"sweep": {"metric": "val/loss", "mode": "min", "gpus_per_worker": 0}}


def written(folder: Path, values: list[float]) -> Path:
    """Write what a worker writes after as many epochs: a checkpoint with the reports up to then."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "model.json").write_text(json.dumps({"value": values[-1]}))
    seal(folder)
    annotate(folder, [{"epoch": epoch, "val/loss": value} for epoch, value in enumerate(values, 1)])
    return folder


def run_of(sweep: Path, *values: float) -> Path:
    """Store the checkpoints of a run with these figures, one after the other, as a worker does."""
    run = train_folder(sweep, "abc")
    for epoch in range(1, len(values) + 1):
        (run / RAYS_OWN).parent.mkdir(parents=True, exist_ok=True)
        (run / RAYS_OWN).write_text("a file of Ray's, whose name begins like a checkpoint's")
        source = written(sweep / "scratch", list(values[:epoch]))
        assert store(source, run, f"checkpoint_{epoch}", "val/loss", "min").name == f"checkpoint_{epoch}"
    return run


def hurt(checkpoint: Path, name: str = "model/model.json") -> None:
    file = checkpoint / name
    file.write_bytes(b"x" + file.read_bytes()[1:])


def test_the_newest_the_one_before_and_the_best_are_kept(tmp_path: Path) -> None:
    run = run_of(tmp_path, 5.0, 2.0, 3.0, 4.0, 6.0)
    assert [(entry.epoch, entry.metrics["val/loss"]) for entry in stored_checkpoints(run)] == [
        (2, 2.0),
        (4, 4.0),
        (5, 6.0),
    ]
    assert [damage(entry.folder) for entry in stored_checkpoints(run)] == [""] * 3
    assert [report["val/loss"] for report in history(tmp_path, "abc")] == [5.0, 2.0, 3.0, 4.0, 6.0]


@pytest.mark.parametrize("name", ["model/model.json", ".metadata.json", "SHA256SUMS"])
def test_a_run_goes_on_from_the_newest_sound_checkpoint(tmp_path: Path, name: str) -> None:
    run = run_of(tmp_path, 5.0, 2.0, 3.0)
    found, faults = newest_intact(run)
    assert found is not None and (found.epoch, faults) == (3, [])
    hurt(run / "checkpoint_3", name)
    found, faults = newest_intact(run)
    assert found is not None and found.epoch == 2
    assert len(faults) == 1 and "checkpoint_3" in faults[0]
    source = written(tmp_path / "scratch", [5.0, 2.0, 3.5])
    store(source, run, "checkpoint_3_again", "val/loss", "min")  # the damaged one goes when its epoch is done again
    assert [entry.folder.name for entry in stored_checkpoints(run)] == ["checkpoint_2", "checkpoint_3_again"]
    assert not (run / "checkpoint_3").exists()
    for checkpoint in run.glob("checkpoint_*/"):
        hurt(checkpoint)
    found, faults = newest_intact(run)
    assert found is None and len(faults) == 2


def test_a_corrupt_checkpoint_is_no_champion(tmp_path: Path) -> None:
    run = run_of(tmp_path, 5.0, 2.0, 3.0)

    def best(mode: str, trial: str = "abc") -> tuple[float, Path] | None:
        found = best_checkpoint(tmp_path, trial, "val/loss", mode)
        return (found.metrics["val/loss"], found.folder) if found else None

    assert best("min") == (2.0, run / "checkpoint_2")
    assert best("max") == (3.0, run / "checkpoint_3")
    hurt(run / "checkpoint_2")
    assert best("min") == (3.0, run / "checkpoint_3")
    hurt(run / "checkpoint_3")
    assert best("min") is None
    assert best("min", "none") is None


def test_half_done_work_is_cleared_away(tmp_path: Path) -> None:
    run = run_of(tmp_path, 5.0, 2.0)
    (run / ".checkpoint_3.abc.part" / "model").mkdir(parents=True)
    (run / RAYS_OWN).write_text('{"ray_version": "2.6')  # cut short
    remove_partial(run)
    assert sorted(entry.name for entry in run.iterdir()) == ["checkpoint_1", "checkpoint_2"]
    remove_partial(tmp_path / "absent")


def test_the_first_report_after_a_restart_tells_of_the_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(Reporter, "_send_to_ray", lambda _, values, folder: told.append(values))
    now = Clock.now()
    reporter = Reporter({**CONFIG, "folder": str(tmp_path), "started": now}, 1, now)
    before = [{"epoch": 1, "val/loss": 3.0, "time/device_s": 7.0}, {"epoch": 2, "val/loss": 2.0, "time/device_s": 9.0}]
    reporter.resume(before, ["'x' is not what was written"])
    reporter.report({"val/loss": 1.0}, None)
    reporter.report({"val/loss": 0.5}, None)
    assert told[0]["epoch"] == 3 and told[0]["earlier"] == before and told[0]["time/device_s"] >= 9.0
    assert told[0]["damaged"] == ["'x' is not what was written; the trial goes on from epoch 2"]
    assert told[1]["epoch"] == 4 and "earlier" not in told[1] and "damaged" not in told[1]


def test_an_epoch_that_is_told_again_changes_nothing() -> None:
    state = TrialState("abc", 0, {})
    for epoch, value in ((1, 3.0), (2, 1.0), (3, 2.0), (2, 1.0)):
        state.take({"epoch": epoch, "val/loss": value}, "val/loss", "min")
    assert (state.epoch, state.last, state.best, state.best_epoch) == (3, 2.0, 1.0, 2)


def test_time_is_right_whatever_is_done_to_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    wall = time.time
    earlier = Clock.now()
    monkeypatch.setattr(time, "time", lambda: wall() - 3600.0)
    assert 0.0 <= Clock.now().since(earlier) < 5.0
    elsewhere = Clock("another machine", 1.0, wall() + 5.0)
    assert Clock.now().since(elsewhere) == 0.0


def state_of_tune(staging: Path, session: str, text: str) -> None:
    staging.mkdir(exist_ok=True)
    for name in (
        f"experiment_state-{session}.json",
        f"search_gen_state-{session}.json",
        f"searcher-state-{session}.pkl",
    ):
        (staging / name).write_text(f"{text} {name}")


def test_tune_goes_on_from_the_last_whole_snapshot(tmp_path: Path) -> None:
    sweep, staging = tmp_path / "sweep", tmp_path / "staging"
    sweep.mkdir()
    assert not restore_snapshot(sweep)
    snapshots = Snapshots(sweep)
    snapshots.copy_if_new(staging, now=True)
    for number in range(4):
        state_of_tune(staging, "2026-01-02", f"{number} first")
        snapshots.copy_if_new(staging, now=True)
    snapshots.copy_if_new(staging, now=True)  # nothing new
    assert sorted(entry.name for entry in (sweep / "snapshots").iterdir()) == ["00000003", "00000004"]
    (sweep / "experiment_state-2027-01-01.json").write_text("of a clock that was ahead")
    assert restore_snapshot(sweep)
    assert not (sweep / "experiment_state-2027-01-01.json").exists()
    assert (sweep / f"experiment_state-{LATEST}.json").read_text().startswith("3 first")
    hurt(sweep / "snapshots" / "00000004", "searcher-state-2026-01-02.pkl")
    assert restore_snapshot(sweep)
    assert (sweep / f"searcher-state-{LATEST}.pkl").read_text().startswith("2 first")
    # A later session writes beside the files it went on from, with a clock that was set back.
    resumed = Snapshots(sweep)
    state_of_tune(staging, LATEST, "handed over")
    resumed.copy_if_new(staging, now=True)
    state_of_tune(staging, "2025-01-01", "second")
    os.utime(staging / "experiment_state-2025-01-01.json", (1.0, 1.0))
    resumed.copy_if_new(staging, now=True)
    assert restore_snapshot(sweep)
    assert (sweep / f"experiment_state-{LATEST}.json").read_text().startswith("second")


def test_that_a_trial_ended_is_noted_in_its_folder(tmp_path: Path) -> None:
    assert how_ended(tmp_path) == ""
    mark_ended(tmp_path, "stopped")
    assert how_ended(tmp_path) == "stopped"
    mark_ended(tmp_path / "never began", "stopped")
    assert not (tmp_path / "never began").exists()


def test_a_full_disk_is_known_through_what_wraps_it() -> None:
    assert disk_full(OSError(errno.ENOSPC, "No space left on device"))
    assert disk_full(UserError("cannot write to the folder 'x': No space left on device; choose another --out"))
    wrapped = RuntimeError("the callback failed")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert disk_full(wrapped)
    assert not disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not disk_full(None)
