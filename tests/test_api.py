"""What `import stemtune` offers: light to import, typed, and the same work as the commands."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import stemtune
from stemtune import api


def test_importing_is_light_and_every_name_is_there() -> None:
    code = (
        "import sys, stemtune; dir(stemtune); stemtune.simulate; "
        "print(sorted({'torch', 'ray', 'mlflow', 'h5py'} & set(sys.modules)), stemtune.__all__)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("[] ")
    assert sorted(stemtune.__all__) == stemtune.__all__ or set(stemtune.__all__) <= set(dir(stemtune))
    with pytest.raises(AttributeError, match="no attribute 'simulated'"):
        stemtune.simulated  # noqa: B018


def test_every_function_is_documented_and_typed() -> None:
    public = [name for name in stemtune.__all__ if name != "UserError"]
    for name in public:
        function = getattr(api, name)
        words = inspect.getdoc(function) or ""
        assert "Parameters" in words and "Raises" in words, name
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty, name
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, f"{name}: {parameter.name}"
            assert parameter.name in words, f"{name} does not say what {parameter.name} is"
    assert (Path(stemtune.__file__).parent / "py.typed").exists()


def test_sweep_is_a_function_after_its_module_was_imported(tmp_path: Path) -> None:
    code = "from stemtune import sweep; print(sweep.main(['--check', 'smoke.yaml']), callable(sweep))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "0 True"
    import stemtune.sweep as module

    assert inspect.signature(stemtune.sweep) == inspect.signature(api.sweep)

    assert callable(module)
    with pytest.raises(stemtune.UserError, match="there is no search space 'nowhere"):
        stemtune.sweep("nowhere.yaml")
    assert module.main(["nowhere.yaml"]) == 2  # and still a script's module


def test_the_signature_of_sweep_is_known_without_importing_ray() -> None:
    code = (
        "import inspect, sys, stemtune; print(inspect.signature(stemtune.sweep));"
        " assert not {'ray', 'torch'} & set(sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for parameter in ("space", "name", "settings", "trials", "local", "resume", "nodes", "study"):
        assert f"{parameter}:" in said


def test_from_simulation_to_a_judged_map(tmp_path: Path) -> None:
    small = {"size": 48, "scale": 0.066, "dose": 3000, "precession": 0.5}
    store = stemtune.simulate("linio2", tmp_path / "scan.h5", scan=(8, 10), grains=2, seed=1, **small)
    with store:
        assert (store.n, store.size) == (80, 48)
        assert store.attrs["scan_shape"] == [8, 10]
    stemtune.simulate("linio2", tmp_path / "train.h5", 96, thickness=(20, 80), **small).close()
    figures = stemtune.train(
        tmp_path / "train.h5", tmp_path / "model", {"model.name": "matched", "model.grid_step": 6.0}
    )
    assert figures["val/disorientation_median_deg"] < 180
    found = stemtune.predict(tmp_path / "scan.h5", tmp_path / "model", tmp_path / "map")
    assert found.shape == (8, 10)
    judged = stemtune.evaluate(tmp_path / "map", tmp_path / "scan.h5")
    assert judged["disorientation"]["beam180"]["median_deg"] < 6
    labelled = stemtune.label(tmp_path / "scan.h5", "linio2", tmp_path / "labels.h5")
    with labelled:
        assert np.isfinite(labelled.orientation).all(axis=1).sum() > 20


def test_load_tells_what_it_opens(tmp_path: Path) -> None:
    stemtune.simulate("linio2", tmp_path / "a.h5", 4, size=32, scale=0.1).close()
    with stemtune.load(tmp_path / "a.h5") as store:
        assert store.n == 4
    assert stemtune.load("linio2").phase.name == "LiNiO2"
    np.save(tmp_path / "frames.npy", np.ones((6, 32, 32), np.uint16))
    assert stemtune.load(tmp_path / "frames.npy", shape=(2, 3)).data.shape[-2:] == (32, 32)
    with pytest.raises(stemtune.UserError, match="missing"):
        stemtune.load(tmp_path / "missing.h5")
    (tmp_path / "space.yaml").write_text("search: {}\n")
    with pytest.raises(stemtune.UserError, match=r"stemtune\.sweep\(\.\.\.\) runs it"):
        stemtune.load(tmp_path / "space.yaml")


def test_mistakes_are_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(stemtune.UserError, match="no setting is called 'simulate.thicknes'; did you mean"):
        stemtune.simulate("linio2", tmp_path / "a.h5", 4, thicknes=(20, 80))
    with pytest.raises(stemtune.UserError, match="asks for Bloch waves, but physics is 'kinematic'"):
        stemtune.simulate("linio2", tmp_path / "a.h5", 4, dynamical=True, physics="kinematic")
    with pytest.raises(stemtune.UserError, match="there is no model 'linio3'"):
        stemtune.predict(tmp_path / "a.h5", "linio3", tmp_path / "map")
    assert not list(tmp_path.iterdir())
