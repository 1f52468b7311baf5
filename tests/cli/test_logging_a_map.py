"""Which run a map is logged to is settled once, before inference; MLflow never costs the map."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stemtune import cli, tracking
from stemtune.map_folder import predict as prediction
from stemtune.tracking import Tracker, address
from stemtune.tracking.client import client


def champion(here: Path, trial: str) -> str:
    """Make a trial the champion of the sweep alpha; return the id of its run."""
    folder = here / f"model of {trial}"
    folder.mkdir()
    (folder / "model.json").write_text(json.dumps({"trial": trial}))
    tracker = Tracker(here / "sweep", "alpha", "id1", address())
    tracker.sweep({"metric": "val/loss"}, {}, "")
    tracker.trial(trial, trial, {"model.name": "cnn"}, {})
    tracker.champion(trial, str(folder), {})
    assert tracker.close() == 0
    return tracking.resolve("champion").run or ""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def predicting(monkeypatch: pytest.MonkeyPatch, meanwhile: Any) -> list[dict[str, Any]]:
    """Put a prediction in the place of the real one, during which `meanwhile` is called; return what it was given."""
    given: list[dict[str, Any]] = []

    def predict(scan: str, models: list[Path], out: str, **options: Any) -> dict[str, Any]:
        given.append({"models": models, **options})
        meanwhile()
        Path(out).mkdir()
        (Path(out) / "report.html").write_text("a map")
        return {"patterns": 6, "indexed_fraction": 1.0, "patterns_per_second": 1.0}

    monkeypatch.setattr(prediction, "predict", predict)
    return given


PREDICT = ["predict", "scan.h5", "--out", "map", "--model"]


def test_another_champion_during_the_prediction(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = champion(here, "t0")
    given = predicting(monkeypatch, lambda: champion(here, "t1"))
    assert cli.main([*PREDICT, "champion"]) == 0
    assert given[0]["runs"] == [run] and given[0]["addresses"] == ["champion"]
    assert json.loads((given[0]["models"][0] / "model.json").read_text()) == {"trial": "t0"}
    assert f"logged report and pictures to runs:/{run}/maps/map" in capsys.readouterr().out
    assert [file.path for file in client(address()).list_artifacts(run, "maps/map")] == ["maps/map/report.html"]
    assert tracking.resolve("champion").run != run


def test_a_server_that_went_away_costs_a_note(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    champion(here, "t0")

    class Away:
        def log_artifact(self, *arguments: str) -> None:
            raise OSError("connection refused")

    predicting(monkeypatch, lambda: monkeypatch.setattr(tracking.client, "client", lambda where: Away()))
    assert cli.main([*PREDICT, "champion"]) == 0
    said = capsys.readouterr()
    assert "note: report and pictures are not logged to MLflow: sqlite:///" in said.err
    assert "did not take the files for the run" in said.err and "connection refused" in said.err
    assert "100.0% of them indexed" in said.out and (here / "map" / "report.html").exists()


@pytest.mark.parametrize("extra", [[], ["--no-log"]])
def test_a_model_folder_asks_nobody(extra: list[str], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking.client, "client", lambda where: pytest.fail("MLflow was asked"))
    predicting(monkeypatch, lambda: None)
    (here / "model").mkdir()
    (here / "model" / "model.json").write_text("{}")
    assert cli.main([*PREDICT, "model", *extra]) == 0


def test_no_log_asks_only_for_the_model(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    champion(here, "t0")

    def away() -> None:
        monkeypatch.setattr(tracking.client, "client", lambda where: pytest.fail("MLflow was asked"))
        shutil.rmtree(here / "mlartifacts")

    predicting(monkeypatch, away)
    assert cli.main([*PREDICT, "champion", "--no-log"]) == 0


def test_what_is_resolved_leaves_the_environment_alone(here: Path) -> None:
    """MLflow's own way to name the server would, and another folder's sweeps would not be found any more."""
    import os

    champion(here, "t0")
    assert "MLFLOW_TRACKING_URI" not in os.environ
