"""An exported model answers as the model does, in a process that knows nothing of stemtune."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stemtune
from stemtune import cli
from stemtune.config import Config
from stemtune.crystal.phase import linio2
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError
from stemtune.learning.calibration import Calibration
from stemtune.learning.checkpoint import load_model, save_model
from stemtune.learning.export import exported
from stemtune.learning.inference import predict_candidates
from stemtune.learning.model import OrientationModel
from stemtune.learning.models import build

POLAR = {"model.grid_step": 12, "model.angles": 48, "model.radii": 12}
SMALL: dict[str, dict[str, object]] = {
    "cnn": {"model.width": 8, "model.depth": 2, "head.step": 30},
    "densenet": {"model.width": 16, "model.depths": "1-1-1-1", "head.step": 30},
    "swin": {"model.width": 16, "model.depths": "1-1-1-1", "head.step": 30},
    "matched": POLAR,
    "polar": POLAR,
    "rerank": {**POLAR, "model.width": 16},
}
ALONE = """
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "stemtune":
            raise ImportError("no stemtune here")

sys.meta_path.insert(0, Blocker())
import torch
extra = {"stemtune.json": ""}
model = torch.export.load(sys.argv[1], extra_files=extra).module()
orientation, confidence = model(torch.load(sys.argv[2]))
try:
    import stemtune
except ImportError:
    torch.save((orientation, confidence, json.loads(extra["stemtune.json"])), sys.argv[3])
"""


def made(name: str, **more: object) -> OrientationModel:
    torch.manual_seed(0)
    flat = {"model.name": name, **SMALL[name], **{key.replace("__", "."): value for key, value in more.items()}}
    model = build(Config.from_flat(flat), linio2(), Geometry(32, 0.08, 200.0)).eval()
    model.calibration = Calibration(1.2, 0.9, 0.1)
    return model


def patterns(count: int) -> torch.Tensor:
    return torch.poisson(torch.full((count, 32, 32), 3.0), generator=torch.Generator().manual_seed(count))


def check(model: OrientationModel, answer: tuple[torch.Tensor, torch.Tensor], counts: torch.Tensor, n: int) -> None:
    with torch.no_grad():
        plain = predict_candidates(model, counts, n)
    assert answer[0].shape == (len(counts), n, 4) and answer[0].dtype == answer[1].dtype == torch.float32
    torch.testing.assert_close(answer[0], plain.orientation, atol=1e-3, rtol=1e-3, equal_nan=True)
    torch.testing.assert_close(answer[1], plain.confidence, atol=1e-3, rtol=1e-3)


def test_torch_alone_runs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(made("cnn"), tmp_path / "model", {}, "")
    file = tmp_path / "model.pt2"
    assert cli.main(["export", str(tmp_path / "model"), "--out", str(file), "--alternatives", "3"]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    torch.save(patterns(7), tmp_path / "counts.pt")
    command = [sys.executable, "-I", "-c", ALONE, file, tmp_path / "counts.pt", tmp_path / "answer.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    orientation, confidence, told = torch.load(tmp_path / "answer.pt")
    model = load_model(tmp_path / "model")
    check(model, (orientation, confidence), patterns(7), 3)
    assert told["geometry"] == {"size": 32, "scale_inv_angstrom": 0.08, "kv": 200.0, "centre_px": [15.5, 15.5]}
    assert (told["phase"]["name"], told["phase"]["cif"]) == (model.phase.name, model.phase.cif)
    assert "scalar first" in told["orientation"]


@pytest.mark.parametrize(
    "name", ["polar", *(pytest.param(name, marks=pytest.mark.slow) for name in SMALL if name not in ("cnn", "polar"))]
)
def test_any_number_of_patterns(name: str) -> None:
    model = made(name)
    program = exported(model, 2).module()
    for count in (1, 3, 40):
        check(model, program(patterns(count)), patterns(count), 2)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"head__name": "sixd"}, {"head__name": "mixture"}, {"model__test_time": "flips"}])
def test_other_heads_and_views_are_exported(more: dict[str, object]) -> None:
    model = made("cnn", **more)
    check(model, exported(model).module()(patterns(5)), patterns(5), 1)


def test_mistakes_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made("cnn")
    save_model(model, tmp_path / "model", {}, "")
    folder, out = str(tmp_path / "model"), str(tmp_path / "x.pt2")
    (tmp_path / "empty").mkdir()
    for words, says in (
        ([folder], "export needs --to ctf|ang|h5|dream3d|csv for a map, or --out FILE.pt2 for a model"),
        ([folder, "--to", "pt2"], "--to pt2 needs --out FILE.pt2"),
        ([folder, "--to", "pt2", "--out", str(tmp_path / "x.onnx")], "must end in .pt2"),
        ([folder, "--out", out, "--alternatives", "11"], "11 alternatives are asked for, but must be in [1, 10]"),
        ([folder, "--to", "ctf", "--alternatives", "2"], "--alternatives belongs to a model"),
        ([str(tmp_path / "nowhere"), "--out", out], "there is no model"),
        ([str(tmp_path / "empty"), "--out", out], "model.json is missing"),
    ):
        assert cli.main(["export", *words]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1, err
    monkeypatch.setattr(torch.export, "export", _refuse)
    with pytest.raises(UserError, match=r"this model \('cnn'\) cannot be exported \(.*these can, .*: densenet, swin"):
        stemtune.export(folder, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "model"]


def _refuse(*_: object, **__: object) -> None:
    raise RuntimeError("data-dependent\nand more")
