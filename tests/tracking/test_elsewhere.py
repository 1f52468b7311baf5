"""Records that are no longer where they were: another database, a run that is gone, a folder that was copied."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from made_up import model_folder, tell

from stemtune.errors import UserError
from stemtune.tracking import Tracker, address, check_server, read_sweep, resolve_model
from stemtune.tracking.client import client


@pytest.mark.parametrize("how", ["another database", "a run is deleted", "the sweep's run is deleted"])
def test_what_is_gone_is_sent_again(how: str, prepared: Path) -> None:
    folder = prepared / "sweep"
    empty = (prepared / "mlflow.db").read_bytes()
    tracker = Tracker(folder, "alpha", "id1", address())
    tell(tracker, trials=3, epochs=2)
    assert tracker.close(240) == 0
    before = read_sweep("alpha", curves=("val/loss",))
    if how == "another database":
        (prepared / "mlflow.db").write_bytes(empty)
    else:
        gone = before.run_id if "sweep's" in how else next(one.run_id for one in before.trials if one.trial == "t1")
        client(address()).delete_run(gone)
    tracker = Tracker(folder, "alpha", "id1", address())
    tracker.metrics("t1", 3, {"val/loss": 0.25})
    tracker.done("finished", {}, {})
    assert tracker.close(240) == 0
    assert not (folder / "tracking.refused.jsonl").exists()
    after = read_sweep("alpha", curves=("val/loss",))
    assert after.status == "finished" and after.params == before.params
    now = {trial.trial: trial for trial in after.trials}
    assert len(after.trials) == 3
    for old in before.trials:
        new = now[old.trial]
        added = [(3, 0.25)] if old.trial == "t1" else []
        assert (new.name, new.params, new.status) == (old.name, old.params, old.status)
        assert new.curves["val/loss"] == old.curves["val/loss"] + added


def test_a_journal_without_its_beginning_is_put_aside(prepared: Path) -> None:
    tracker = Tracker(prepared / "sweep", "alpha", "id1", address())
    tracker.metrics("never", 1, {"val/loss": 1.0})
    tracker.sweep({"metric": "val/loss"}, {}, "")
    assert tracker.close(240) == 0
    assert "was never begun" in (prepared / "sweep" / "tracking.refused.jsonl").read_text()
    assert read_sweep("alpha").trials == []


def test_what_a_resume_changes_becomes_a_tag(prepared: Path) -> None:
    tracker = Tracker(prepared / "sweep", "alpha", "id1", address())
    tracker.sweep({"budget.trials": 2}, {}, "")
    tracker.sweep({"budget.trials": 5, "budget.hours": 1}, {}, "")
    assert tracker.close(240) == 0
    assert not (prepared / "sweep" / "tracking.refused.jsonl").exists()
    record = read_sweep("alpha")
    assert record.params == {"budget.trials": "2", "budget.hours": "1"}
    assert record.tags["stemtune.changed.budget.trials"] == "5"


CROWN = """
from pathlib import Path
from stemtune.tracking import Tracker, address
tracker = Tracker(Path("sweep"), "alpha", "id1", address())
tracker.champion("t0", "second", {})
assert tracker.close(240) == 0
"""


def test_a_copied_folder_has_records_of_its_own(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's file names the original's artifacts: a copy reads and writes those that lie beside it."""
    tracker = Tracker(prepared / "sweep", "alpha", "id1", address())
    tell(tracker, trials=1)
    model_folder(prepared / "sweep" / "first")
    tracker.champion("t0", "first", {})
    assert tracker.close(240) == 0
    copy = prepared.parent / "copy"
    shutil.copytree(prepared, copy)
    before = {path: path.read_bytes() for path in prepared.rglob("*") if path.is_file()}
    monkeypatch.chdir(copy)
    model_folder(copy / "sweep" / "second")
    subprocess.run([sys.executable, "-c", CROWN], check=True)  # in this process MLflow remembers the original's folder
    assert resolve_model("champion").is_relative_to(copy)
    assert (resolve_model("champion") / "model.safetensors").read_bytes() == b"weights of second"
    assert {path: path.read_bytes() for path in prepared.rglob("*") if path.is_file()} == before
    shutil.rmtree(prepared)
    assert (resolve_model("models:/alpha/1") / "model.json").is_file()


def test_a_file_of_another_mlflow_is_refused_at_the_start(prepared: Path) -> None:
    with sqlite3.connect(prepared / "mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = '5b0e9adcef9c'")
    database.close()
    for call in (lambda: check_server(address(), "alpha"), read_sweep):
        with pytest.raises(UserError, match="run mlflow db upgrade 'sqlite:///") as refused:
            call()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["50%", "a%20b", "a?b", "a'b", "a#b c"])
def test_any_name_of_the_working_folder_will_do(name: str, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = prepared / "top" / name
    here.mkdir(parents=True)
    shutil.copy(prepared / "mlflow.db", here)
    monkeypatch.chdir(here)
    assert address().file == here / "mlflow.db"
    tracker = Tracker(here / "sweep", "alpha", "id1", address())
    tell(tracker, trials=1)
    tracker.champion("t0", str(model_folder(here / "sweep" / "first")), {})
    assert tracker.close(240) == 0
    assert resolve_model("champion").is_relative_to(here)
    assert [path.name for path in here.parent.iterdir()] == [name]
