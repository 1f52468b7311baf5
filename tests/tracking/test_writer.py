"""MLflow records: what is written is read back, and a server that is away for a while loses nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stemtune.errors import UserError
from stemtune.tracking import (
    NullTracker,
    Tracker,
    address,
    newest_sweep,
    read_sweep,
    resolve_model,
)
from stemtune.tracking.client import client
from stemtune.tracking.writer import JOURNAL

sys.path.insert(0, str(Path(__file__).parents[1]))
import feed
from counting import counted_calls
from made_up import model_folder, tell
from mlflow_server import Server


def test_what_is_written_is_read_back(here: Path) -> None:
    import mlflow

    tracker = Tracker(here / "sweep", "alpha", "id1", address())
    tell(tracker)
    tracker.trial("t9", "009 swin", {"model.name": "swin"}, {})
    tracker.end("t9", "failed", "UserError: no network", {}, {})
    tracker.champion("t0", str(model_folder(here / "best")), {"stemtune.champion_value": "0.3"})
    tracker.done("finished", {"time/wall_s": 12.0}, {})
    assert tracker.close() == 0
    assert not (here / "sweep" / "tracking.refused.jsonl").exists()
    assert (here / "mlflow.db").exists()
    assert (here / "mlartifacts").is_dir()

    sweep = read_sweep("alpha", curves=("val/loss",))
    assert newest_sweep() == "alpha"
    assert sweep.status == "finished"
    assert sweep.params == {"budget.trials": "2", "metric": "val/loss"}
    assert sweep.last["time/wall_s"] == 12.0
    by_trial = {trial.trial: trial for trial in sweep.trials}
    assert by_trial["t1"].curves["val/loss"] == [(1, 2.0), (2, 1.5), (3, pytest.approx(1 + 1 / 3))]
    assert by_trial["t1"].params == {"optim.lr": "0.001", "model.name": "cnn"}
    assert (by_trial["t1"].status, by_trial["t1"].reason) == ("stopped", "stopped by ASHA")
    assert (by_trial["t9"].status, by_trial["t9"].reason) == ("failed", "UserError: no network")

    api = mlflow.MlflowClient(tracking_uri=address().uri)  # what another MLflow user sees
    states = {run: api.get_run(by_trial[run].run_id).info.status for run in by_trial}
    assert states == {"t0": "FINISHED", "t1": "FINISHED", "t9": "FAILED"}
    assert api.get_run(by_trial["t0"].run_id).data.tags["mlflow.parentRunId"] == sweep.run_id
    run = by_trial["t0"].run_id
    for name in ("champion", "models:/alpha@champion", f"runs:/{run}/model"):
        assert (resolve_model(name) / "model.safetensors").read_bytes() == b"weights of best"


def test_events_told_twice_leave_the_same_records(prepared: Path) -> None:
    tracker = Tracker(prepared / "sweep", "alpha", "id1", address())
    tell(tracker)
    tracker.champion("t0", str(model_folder(prepared / "best")), {})
    tracker.done("finished", {}, {})
    assert tracker.close() == 0
    before = read_sweep("alpha", curves=("val/loss",))
    (prepared / "sweep" / "tracking.sent").unlink()  # as if a crash had lost how far it got
    assert Tracker(prepared / "sweep", "alpha", "id1", address()).close() == 0
    after = read_sweep("alpha", curves=("val/loss",))
    assert [trial.curves for trial in after.trials] == [trial.curves for trial in before.trials]
    assert [trial.run_id for trial in after.trials] == [trial.run_id for trial in before.trials]


def test_a_crash_in_the_middle_of_a_line_loses_that_line_only(prepared: Path) -> None:
    folder = prepared / "sweep"
    folder.mkdir()
    whole = {"kind": "sweep", "time": 1000, "params": {"metric": "val/loss"}, "tags": {}, "text": ""}
    (folder / JOURNAL).write_text(json.dumps(whole) + "\n" + '{"kind":"trial","ti')
    tracker = Tracker(folder, "alpha", "id1", address())
    tracker.done("finished", {}, {})
    assert tracker.close() == 0
    assert read_sweep("alpha").status == "finished"
    assert "cut short" in (folder / "tracking.refused.jsonl").read_text()


def test_a_second_sweep_of_an_experiment_is_told_apart(prepared: Path) -> None:
    for number, sweep_id in enumerate(("id1", "id2"), 1):
        tracker = Tracker(prepared / sweep_id, "alpha", sweep_id, address())
        tell(tracker, trials=number)
        assert tracker.close() == 0
    assert len(read_sweep("alpha").trials) == 2


def test_what_cannot_be_applied_is_put_aside(prepared: Path) -> None:
    tracker = Tracker(prepared / "sweep", "alpha", "id1", address())
    tell(tracker, trials=1)
    tracker.champion("t0", str(prepared / "gone"), {})
    tracker.done("finished", {}, {})
    assert tracker.close() == 0
    assert "gone" in (prepared / "sweep" / "tracking.refused.jsonl").read_text()
    assert read_sweep("alpha").status == "finished"


def test_what_was_put_aside_is_tried_again_by_the_next_run(prepared: Path) -> None:
    tracker = Tracker(prepared / "sweep", "alpha", "id1", address())
    tell(tracker, trials=1)
    tracker.champion("t0", str(prepared / "late"), {})
    assert tracker.close() == 0
    model_folder(prepared / "late")
    assert Tracker(prepared / "sweep", "alpha", "id1", address()).close() == 0
    assert not (prepared / "sweep" / "tracking.refused.jsonl").exists()
    assert (resolve_model("champion") / "model.safetensors").read_bytes() == b"weights of late"


def test_the_null_tracker_keeps_nothing(here: Path) -> None:
    tell(NullTracker())
    assert NullTracker().close() == 0
    assert list(here.iterdir()) == []


@pytest.mark.slow
def test_an_absent_server_loses_nothing(here: Path, server: Server) -> None:
    server.start()
    tracker = Tracker(here / "sweep", "away", "id1", address())
    tracker.sweep({"metric": "val/loss"}, {}, "metric: val/loss")
    tracker.trial("t0", "000 cnn", {"optim.lr": 0.1}, {})
    tracker.metrics("t0", 1, {"val/loss": 1.0})
    deadline = time.monotonic() + 60
    while tracker.waiting() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert tracker.waiting() == 0

    server.stop()
    for epoch in range(2, 7):
        began = time.monotonic()
        tracker.metrics("t0", epoch, {"val/loss": 1.0 / epoch})
        assert time.monotonic() - began < 0.5, "a sweep must not wait for its tracking server"
    time.sleep(2)
    assert tracker.waiting() == 5
    server.start()
    deadline = time.monotonic() + 60
    while tracker.waiting() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert tracker.waiting() == 0, tracker.problem

    server.stop()
    tracker.metrics("t0", 7, {"val/loss": 1.0 / 7})
    tracker.champion("t0", str(model_folder(here / "best")), {})
    tracker.end("t0", "finished", "", {}, {})
    assert tracker.close(wait_s=3) == 3  # the sweep ended before the server came back
    server.start()
    assert Tracker(here / "sweep", "away", "id1", address()).close() == 0
    sweep = read_sweep("away", curves=("val/loss",))
    assert [epoch for epoch, _ in sweep.trials[0].curves["val/loss"]] == [1, 2, 3, 4, 5, 6, 7]
    assert sweep.trials[0].status == "finished"
    assert (resolve_model("models:/away@champion") / "model.safetensors").read_bytes() == b"weights of best"
    server.stop()
    with pytest.raises(UserError, match="does not answer"):
        read_sweep("away")


def test_a_server_with_a_password_leaves_none_in_the_journal(here: Path) -> None:
    from stemtune.tracking import Address

    tracker = Tracker(here / "sweeps" / "s", "s", "1", Address("http://me:s3cret@127.0.0.1:9"))
    tracker.sweep({"a": 1}, {}, "text")
    deadline = time.monotonic() + 300
    while not tracker.problem and time.monotonic() < deadline:
        time.sleep(0.1)
    assert tracker.close(0.0) == 1
    assert "127.0.0.1" in tracker.problem
    assert "s3cret" not in tracker.problem
    for file in (here / "sweeps" / "s").iterdir():
        assert "s3cret" not in file.read_text()


def test_sixteen_trials_at_once_into_sqlite(prepared: Path) -> None:
    """The embedded default: every epoch of every trial is there once, in order or not, and nothing runs any more."""
    with counted_calls() as calls:
        outcome = feed.run("many", epochs=3, pause_s=0.02)
    assert outcome.unsent == 0
    assert not (outcome.folder / "tracking.refused.jsonl").exists()
    record = read_sweep("many", curves=("val/loss",))
    assert record.status == "finished"
    assert len(record.trials) == feed.TRIALS
    api = client(address())
    for trial in record.trials:
        number = int(trial.tags["stemtune.number"])
        history = api.get_metric_history(trial.run_id, "val/loss")
        epochs = [1, 2] if number % 4 == 1 else [1, 2, 3]
        assert sorted((point.step, point.value) for point in history) == [
            (epoch, pytest.approx(feed.value(number, epoch))) for epoch in epochs
        ]
        assert api.get_run(trial.run_id).info.status in ("FINISHED", "KILLED")
    for name in ("search_runs", "create_run", "set_terminated"):
        assert calls[name] == feed.TRIALS + 1, name  # the sweep's own run as well
    reports = feed.TRIALS * 3 - feed.TRIALS // 4
    assert sum(calls.values()) <= feed.TRIALS * 6 + reports + 20  # a few per trial and one per epoch at most
    best = f"many-{feed.TRIALS - 1:02d}"
    assert (resolve_model("champion") / "model.safetensors").read_bytes() == f"weights of {best}".encode() * 1000


def test_reports_that_wait_go_together(prepared: Path) -> None:
    """A server that was away gets a trial's waiting reports in one call, each with its own epoch and time."""
    from stemtune.tracking import Address

    away = Tracker(prepared / "sweep", "late", "id1", Address("http://127.0.0.1:9"))
    away.sweep({"metric": "val/loss"}, {}, "")
    for trial in ("t0", "t1"):
        away.trial(trial, trial, {"optim.lr": 0.1}, {})
    for epoch in range(1, 61):
        for trial in ("t0", "t1"):
            away.metrics(trial, epoch, {"val/loss": 1.0 / epoch})
    away.end("t0", "finished", "", {}, {})
    away.metrics("t1", 61, {"val/loss": 0.0})
    assert away.close(0.0) == 125
    with counted_calls() as calls:
        assert Tracker(prepared / "sweep", "late", "id1", address()).close() == 0
    assert calls["log_batch"] == 8  # the sweep, two trials, an end, and 121 reports in four
    record = read_sweep("late", curves=("val/loss",))
    curves = {trial.trial: [epoch for epoch, _ in trial.curves["val/loss"]] for trial in record.trials}
    assert curves == {"t0": list(range(1, 61)), "t1": list(range(1, 62))}
    assert {trial.trial: trial.status for trial in record.trials} == {"t0": "finished", "t1": "running"}


def test_what_is_refused_together_is_sent_one_by_one(prepared: Path) -> None:
    folder = prepared / "sweep"
    folder.mkdir()
    lines = [{"kind": "sweep", "time": 1, "params": {}, "tags": {}, "text": ""}]
    lines += [{"kind": "trial", "time": 1, "trial": "t0", "name": "t0", "params": {}, "tags": {}}]
    values = [{"val/loss": 3.0}, {"val/loss{}": 2.0}, {"val/loss": 1.0}]  # MLflow takes no such name
    lines += [
        {"kind": "metrics", "time": 1, "trial": "t0", "step": step, "values": one} for step, one in enumerate(values)
    ]
    (folder / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert Tracker(folder, "alpha", "id1", address()).close() == 0
    assert read_sweep("alpha", curves=("val/loss",)).trials[0].curves["val/loss"] == [(0, 3.0), (2, 1.0)]
    refused = [json.loads(line) for line in (folder / "tracking.refused.jsonl").read_text().splitlines()]
    assert [json.loads(one["line"])["step"] for one in refused] == [1]


@pytest.mark.slow
def test_two_sweeps_at_once_into_one_sqlite_file(prepared: Path) -> None:
    """Not what SQLite is for, but nothing is lost: a writer that finds the file locked comes again."""
    script = str(Path(__file__).parents[1] / "feed.py")
    feeds = [subprocess.Popen([sys.executable, script, name, "5", "0.1"]) for name in ("one", "two")]
    assert [process.wait(timeout=300) for process in feeds] == [0, 0]
    for name in ("one", "two"):
        record = read_sweep(name, curves=("val/loss",))
        assert record.status == "finished"
        kept = [len(trial.curves["val/loss"]) for trial in record.trials]
        assert sorted(kept) == [4] * 4 + [5] * 12


def test_a_restart_tells_nothing_twice_and_takes_back_what_was_lost(prepared: Path) -> None:
    """After a crash the sweep remembers less than the journal: it trains epochs again, under other times."""
    tracker = Tracker(prepared / "sweep", "again", "id1", address())
    tell(tracker, trials=3, epochs=2)
    assert tracker.close() == 0
    resumed = Tracker(prepared / "sweep", "again", "id1", address())
    assert resumed.begun() == {"t0", "t1", "t2"}
    resumed.lost("t1")
    resumed.lost("t2")
    resumed.lost("t2")  # a crash after the journal and before the mark sends an event again
    resumed.lost("never")
    resumed.trial("t0", "000 cnn", {"optim.lr": 1e-3, "model.name": "cnn"}, {})
    for epoch in (1, 2, 3):
        resumed.metrics("t0", epoch, {"val/loss": 10.0 + epoch})
    resumed.end("t0", "finished", "", {}, {})
    assert resumed.begun() == {"t0"}
    assert resumed.close() == 0
    assert not (prepared / "sweep" / "tracking.refused.jsonl").exists()
    record = read_sweep("again", curves=("val/loss",))
    assert [(trial.trial, trial.curves["val/loss"]) for trial in record.trials] == [
        ("t0", [(1, 1.0), (2, 0.5), (3, 13.0)])
    ]
    assert Tracker(prepared / "sweep", "again", "id1", address()).begun() == {"t0"}
