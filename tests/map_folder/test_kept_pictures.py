"""A map's pictures are kept with the run of the model that made it, and kept again when the map is made anew."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
from sample_maps import MICROSCOPE

from stemtune.cli import main
from stemtune.config import Config
from stemtune.crystal.phase import linio2
from stemtune.dataset.simulate import simulate_polycrystal
from stemtune.diffraction.geometry import Geometry
from stemtune.learning.checkpoint import save_model
from stemtune.learning.models import build
from stemtune.tracking.client import address, client


@pytest.mark.slow
def test_predict_grains_and_clean_log_what_they_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    simulate_polycrystal("", tmp_path / "scan.h5", (8, 9), 2, MICROSCOPE, seed=1)
    model = build(Config.from_flat({"model.name": "matched", "model.grid_step": 4}), linio2(), Geometry(64, 0.05, 200))
    save_model(model, tmp_path / "model", {}, "")
    api: mlflow.MlflowClient = client(address())
    run = api.create_run(api.create_experiment("maps")).info.run_id
    api.log_artifacts(run, str(tmp_path / "model"), "model")

    def kept(name: str) -> set[str]:
        return {Path(file.path).name for file in api.list_artifacts(run, f"maps/{name}")}

    assert main(["predict", "scan.h5", "--model", f"runs:/{run}/model", "--out", "map", "--no-log"]) == 0
    assert kept("map") == set()
    assert main(["clean", "map", "--out", "cleaned"]) == 0
    assert main(["grains", "map/map.h5", "--grains-min-size", "1"]) == 0
    assert capsys.readouterr().out.count("logged report and pictures to runs:/") == 2
    wanted = {"report.html", "summary.json", "grains.png", "kam.png", "ipf_z.png"}
    assert wanted <= kept("cleaned")
    assert wanted <= kept("map")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/gone.db")
    assert main(["clean", "cleaned", "--undo"]) == 0  # done, if not logged
    assert "not logged to MLflow" in capsys.readouterr().err
