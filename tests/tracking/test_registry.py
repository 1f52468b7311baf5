"""From names to models and runs, and what MLflow shows of a sweep; no secret is shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_up import model_folder, tell
from mlflow_server import Server

from stemtune.errors import UserError
from stemtune.tracking import (
    Tracker,
    address,
    champions,
    code_version,
    log_files,
    read_sweep,
    reigning,
    resolve,
    resolve_model,
    roll_back,
)
from stemtune.tracking.client import client


def test_the_champion_has_a_card_in_the_registry(prepared: Path) -> None:
    tracker = Tracker(prepared / "sweep", "alpha", "id1", address())
    tracker.sweep({"metric": "val/loss"}, {"stemtune.store_sha256": "5a5a", "stemtune.commit": "c0ffee"}, "")
    tracker.trial("t0", "000 cnn", {"model.name": "cnn"}, {"stemtune.architecture": "cnn adjusted"})
    tags = {"stemtune.champion_metric": "val/loss", "stemtune.champion_value": "0.3"}
    tracker.champion("t0", str(model_folder(prepared / "best")), tags)
    assert tracker.close() == 0
    api = client(address())
    how = "stemtune predict SCAN --model models:/alpha@champion"
    assert how in api.get_registered_model("alpha").description
    card = api.get_model_version_by_alias("alpha", "champion").description
    for words in ("cnn adjusted", "val/loss 0.3", "000 cnn", "5a5a", "c0ffee", how):
        assert words in card


def crown(here: Path, sweep: str, trial: str, **tags: str) -> None:
    tracker = Tracker(here / sweep / trial, sweep, f"id of {sweep}", address())
    tell(tracker, trials=2)
    told = {"stemtune.champion_metric": "val/loss", "stemtune.champion_value": "0.3", **tags}
    tracker.champion(trial, str(model_folder(here / f"{sweep} {trial}")), told)
    assert tracker.close() == 0


def test_who_reigned_and_who_reigns_after_a_rollback(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    crystal = {"stemtune.crystal": "LiNiO2 (space group 166)", "stemtune.champion_test": "3.10° (2.90° to 3.40°)"}
    crown(prepared, "old", "t0", **crystal)
    crown(prepared, "new", "t0")
    crown(prepared, "new", "t1", **crystal)
    assert [(one.address, one.reigns) for one in champions()] == [
        ("models:/new/2", True),
        ("models:/new/1", False),
        ("models:/old/1", True),
    ]
    weights = "model.safetensors"
    assert (resolve_model("champion") / weights).read_bytes() == b"weights of new t1"
    told = capsys.readouterr().err
    for words in (
        "new, trial 001 cnn",
        "val/loss 0.3",
        "3.10° (2.90° to 3.40°)",
        "LiNiO2 (space group 166)",
        "since 20",
    ):
        assert words in told
    for expected in ("new t0", "old t0"):
        roll_back()
        assert (resolve_model("champion") / weights).read_bytes() == f"weights of {expected}".encode()
    assert [one.deposed for one in champions()] == [True, True, False]
    with pytest.raises(UserError, match="no champion of new reigns"):
        roll_back("new")
    assert roll_back("old")[1] is None
    assert not reigning()
    with pytest.raises(UserError, match="no sweep has crowned a champion"):
        resolve_model("champion")


def test_a_report_is_kept_with_the_run_of_the_model(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker(prepared / "sweep", "alpha", "id1", address())
    tell(tracker, trials=1)
    tracker.champion("t0", str(model_folder(prepared / "best")), {})
    assert tracker.close() == 0
    run = read_sweep("alpha").trials[0].run_id
    folder = prepared / "particle"
    folder.mkdir()
    for name in ("report.html", "ipf_x.png", "map.h5"):
        (folder / name).write_text(name)
    for model in ("champion", "models:/alpha@champion", "models:/alpha/1", f"runs:/{run}/model"):
        assert resolve(model).run == run
    assert log_files(run, folder, ("report.html", "*.png"), "maps/particle") == f"runs:/{run}/maps/particle"
    api = client(address())
    assert [file.path for file in api.list_artifacts(run, "maps/particle")] == [
        "maps/particle/ipf_x.png",
        "maps/particle/report.html",
    ]
    assert resolve(str(prepared / "best")).run is None
    (prepared / "temporary").mkdir()
    once = [
        sys.executable,
        "-c",
        f"from stemtune.tracking.registry import resolve; print(resolve('runs:/{run}/model'))",
    ]
    found = subprocess.run(
        once, check=True, capture_output=True, env={**os.environ, "TMPDIR": str(prepared / "temporary")}
    )
    assert b"temporary" in found.stdout  # MLflow copies what a run keeps
    assert not list((prepared / "temporary").iterdir())
    with pytest.raises(UserError, match=r"did not take the files for the run 0123"):
        log_files("0123", folder, ("*",), "maps/particle")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{prepared}/gone.db")
    with pytest.raises(UserError, match=r"there is no MLflow file"):
        log_files(run, folder, ("*",), "maps/particle")


def test_mistakes_are_one_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"there is no MLflow file .*mlflow\.db"):
        read_sweep()
    with pytest.raises(UserError, match="there is no model 'nothing'"):
        resolve_model("nothing")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "ftp://somewhere")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI is 'ftp://somewhere', but must be"):
        address()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@host:1")
    assert "secret" not in address().shown


def test_unknown_names_are_suggested(prepared: Path) -> None:
    tracker = Tracker(prepared / "sweep", "alpha", "id1", address())
    tell(tracker, trials=1)
    assert tracker.close() == 0
    with pytest.raises(UserError, match="no sweep called 'alpah'.*did you mean 'alpha'"):
        read_sweep("alpah")
    with pytest.raises(UserError, match="no sweep has crowned a champion"):
        resolve_model("champion")
    with pytest.raises(UserError, match="no model 'models:/beta@champion'"):
        resolve_model("models:/beta@champion")


def test_a_checkpoint_folder_holds_a_model_folder(here: Path) -> None:
    model_folder(here / "checkpoint" / "model")
    assert resolve_model("checkpoint") == Path("checkpoint/model")


def test_code_version_names_the_commit() -> None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    assert code_version()["stemtune.commit"] == head.stdout.strip()


FETCH = """
import os
from stemtune.tracking import resolve_model
folder = resolve_model("champion")
print((folder / "model.safetensors").read_bytes().decode(), os.environ["MLFLOW_TRACKING_URI"], flush=True)
"""


@pytest.mark.slow
def test_a_fetched_model_goes_when_the_process_ends(
    here: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.start()
    tracker = Tracker(here / "sweep", "fetched", "id1", address())
    tell(tracker, trials=1)
    tracker.champion("t0", str(model_folder(here / "best")), {})
    assert tracker.close() == 0
    (here / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(here / "temporary"))
    done = subprocess.run([sys.executable, "-c", FETCH], capture_output=True, text=True, check=True)
    assert done.stdout == f"weights of best {server.uri}\n"
    assert not list((here / "temporary").iterdir())


SECRETS = (
    "http://me:s3cret@host:5000",
    "postgresql+psycopg2://me:s3cret@host/mlflow",
    "postgresql://me:s3cr3t/s3cret@host/mlflow",
    "postgresql://host/mlflow?user=me&password=s3cret",
    "https://host/path?access_token=s3cret",
)


@pytest.mark.parametrize("uri", SECRETS)
def test_no_password_is_shown_or_kept(uri: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in messages, not in the log of a fault, not in the journal of what MLflow refused."""
    from stemtune.errors import fault_line, masked
    from stemtune.tracking import Address

    assert "s3cret" not in Address(uri).shown
    assert "host" in Address(uri).shown
    monkeypatch.setattr("sys.argv", ["stemtune", f"--uri={uri}"])
    try:
        raise RuntimeError(f"API request to {uri}/api failed")
    except RuntimeError as fault:
        line = fault_line(fault)
    log = Path(line.rsplit(" ", 1)[1])
    assert "s3cret" not in line + log.read_text()
    assert "RuntimeError" in log.read_text()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"x{uri}")
    with pytest.raises(UserError) as mistake:
        address()
    assert "s3cret" not in str(mistake.value)
    assert masked("2 tokens, token= , a@b and http://host/x stay") == "2 tokens, token= , a@b and http://host/x stay"


def test_a_password_file_that_others_can_read_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    secret = here / ".mlflow" / "credentials"
    secret.parent.mkdir()
    secret.write_text("[mlflow]\nmlflow_tracking_username = me\nmlflow_tracking_password = s3cret\n")
    secret.chmod(0o644)
    with pytest.raises(UserError, match=f"which others can read; chmod 600 {secret}"):
        address()
    secret.chmod(0o600)
    assert address().uri == "http://host:5000"


def test_the_ui_finds_a_view_of_what_matters(prepared: Path) -> None:
    """What the MLflow UI shows for `?viewStateShareKey=stemtune`: looked at in Chromium, MLflow 3.17."""
    tracker = Tracker(prepared / "sweep", "viewed", "id1", address())
    tracker.sweep({"metric": "val/within_5deg", "mode": "max", "searched": "optim.lr, model.name"}, {}, "")
    assert tracker.close() == 0
    experiment = client(address()).get_experiment_by_name("viewed")
    view = json.loads(experiment.tags["mlflow.sharedViewState.stemtune"])
    assert view["selectedColumns"][0] == "metrics.`best`"
    assert view["selectedColumns"][3:5] == ["params.`model.name`", "params.`optim.lr`"]
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`best`", False)
    assert view["searchFilter"] == "tags.`stemtune.kind` = 'trial'"
    assert list(view["runsExpanded"]) == [read_sweep("viewed").run_id]
