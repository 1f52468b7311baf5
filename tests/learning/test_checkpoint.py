"""Model folders: what is loaded is what was saved, and what is damaged is refused in one line."""

import json
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stemtune._files import damage, seal
from stemtune.config import Config
from stemtune.crystal.phase import linio2
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError
from stemtune.learning.calibration import Calibration
from stemtune.learning.checkpoint import load_checkpoint, load_model, save_checkpoint, save_model
from stemtune.learning.model import OrientationModel
from stemtune.learning.models import build


@pytest.fixture
def model() -> OrientationModel:
    torch.manual_seed(2)
    config = Config.from_flat({"model.name": "cnn", "model.width": 8, "model.depth": 2, "head.step": 30})
    return build(config, linio2(), Geometry(32, 0.06, 300.0))


@pytest.fixture
def folder(model: OrientationModel, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "model", {"val/loss": 1.5}, "abc")
    return tmp_path / "model"


def test_a_loaded_model_answers_as_the_saved_one(model: OrientationModel, folder: Path) -> None:
    loaded = load_model(folder)
    patterns = torch.rand(5, 32, 32)
    torch.testing.assert_close(loaded(patterns)["logits"], model.eval()(patterns)["logits"], rtol=0, atol=0)
    assert not loaded.training
    assert loaded.geometry == model.geometry and loaded.config == model.config
    assert loaded.phase.space_group == 166
    assert sorted(file.name for file in folder.iterdir()) == ["model.json", "model.safetensors"]
    described = json.loads((folder / "model.json").read_text())
    assert described["geometry"]["kv"] == 300.0
    assert described["store_sha256"] == "abc" and described["metrics"] == {"val/loss": 1.5}
    assert described["config"]["optim.lr"] == 1e-3 and described["versions"]["torch"]


def test_the_calibration_travels_with_the_model_and_older_folders_have_none(
    model: OrientationModel, tmp_path: Path
) -> None:
    model.calibration, model.spread_deg = Calibration(0.5, 1.25, -0.5), 0.8
    save_model(model, tmp_path / "model", {}, "")
    assert load_model(tmp_path / "model").calibration == model.calibration
    assert load_model(tmp_path / "model").spread_deg == 0.8
    described = json.loads((tmp_path / "model" / "model.json").read_text())
    assert described.pop("calibration") == {"low": 0.5, "high": 1.25, "offset": -0.5}
    assert described.pop("spread_deg") == 0.8
    (tmp_path / "model" / "model.json").write_text(json.dumps(described))
    assert load_model(tmp_path / "model").calibration == Calibration()
    assert load_model(tmp_path / "model").spread_deg == OrientationModel.spread_deg


def test_loading_does_not_ask_for_the_pretrained_weights_it_once_started_from(
    model: OrientationModel, folder: Path
) -> None:
    described = json.loads((folder / "model.json").read_text())
    described["config"]["model.pretrained"] = "gone/elsewhere.pt"
    (folder / "model.json").write_text(json.dumps(described))
    assert load_model(folder).config.model.pretrained == "gone/elsewhere.pt"


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def remove_description(folder: Path) -> None:
    (folder / "model.json").unlink()


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def cut_description(folder: Path) -> None:
    file = folder / "model.json"
    file.write_text(file.read_text()[:200])


def reshape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.stages.0.down.weight"] = torch.zeros(4, 1, 3, 3)
    save_file(tensors, folder / "model.safetensors")


def lose_one(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["backbone.stages.0.down.weight"]
    save_file(tensors, folder / "model.safetensors")


def change(key: str, value: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        described = json.loads((folder / "model.json").read_text())
        described[key] = value
        (folder / "model.json").write_text(json.dumps(described))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_weights, "model.safetensors is missing"),
        (remove_description, "model.json is missing"),
        (cut_weights, "cannot be read as weights"),
        (cut_description, "is not JSON"),
        (reshape, "'backbone.stages.0.down.weight' is"),
        (lose_one, "'backbone.stages.0.down.weight' is not in both"),
        (change("schema", 99), "schema 99"),
        (change("config", {"model.nam": "cnn"}), "did you mean 'model.name'"),
        (change("config", {"model.name": "transformer"}), "must be one of"),
        (change("phase", {"cif": "nonsense"}), "does not describe a model"),
        (change("phase", {}), "missing or malformed"),
        (change("geometry", {"size": 32}), "lacks scale_inv_angstrom, kv"),
        (change("calibration", {"slope": 1.0}), "missing or malformed"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "nothing")


class Exploit:
    """Unpickles by making a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path(self.path),)


def test_a_checkpoint_runs_no_code(model: OrientationModel, tmp_path: Path) -> None:
    save_checkpoint(model, {"epoch": 1}, tmp_path / "checkpoint", {}, "")
    (tmp_path / "checkpoint" / "checkpoint.pt").write_bytes(pickle.dumps(Exploit(str(tmp_path / "ran"))))
    seal(tmp_path / "checkpoint")  # whoever writes such a file can write its hash
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(model, tmp_path / "checkpoint")
    torch.save({"epoch": Exploit(str(tmp_path / "ran"))}, tmp_path / "checkpoint" / "checkpoint.pt")
    seal(tmp_path / "checkpoint")
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(model, tmp_path / "checkpoint")
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_another_model_is_refused(model: OrientationModel, tmp_path: Path) -> None:
    save_checkpoint(model, {"epoch": 1}, tmp_path / "checkpoint", {}, "")
    other = build(model.config.replace({"model.width": 16}), model.phase, model.geometry)
    with pytest.raises(UserError, match=r"has model.width=8, but this run has 16"):
        load_checkpoint(other, tmp_path / "checkpoint")


@pytest.mark.parametrize("name", ["checkpoint.pt", "model/model.safetensors", "model/model.json", "SHA256SUMS"])
def test_a_damaged_checkpoint_names_the_file(model: OrientationModel, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoint"
    save_checkpoint(model, {"epoch": 1}, folder, {}, "")
    assert damage(folder) == ""
    assert load_checkpoint(model, folder)["epoch"] == 1
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match="the checkpoint is damaged: '.*checkpoint") as caught:
        load_checkpoint(model, folder)
    assert name == "SHA256SUMS" or f"'{folder / name}' is not what was written" in str(caught.value)
    (folder / name).unlink()
    with pytest.raises(UserError, match="damaged: .* missing|cannot be read|does not exist"):
        load_checkpoint(model, folder)


def test_a_checkpoint_is_checked_by_sha256sum_too(model: OrientationModel, tmp_path: Path) -> None:
    save_checkpoint(model, {"epoch": 1}, tmp_path / "checkpoint", {}, "")
    done = subprocess.run(
        ["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path / "checkpoint", check=False, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b": OK") == 3
