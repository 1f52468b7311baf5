"""Every kind of bad input at the command line: exit code 2, one line that says what and the remedy, nothing left."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from rsciio import hspy

from stemtune import cli
from stemtune.config import Config
from stemtune.crystal.phase import linio2
from stemtune.dataset.simulate import simulate_polycrystal, simulate_store
from stemtune.dataset.writer import ResumableWriter
from stemtune.diffraction.geometry import Geometry
from stemtune.learning.checkpoint import save_model
from stemtune.learning.models import build

TRAIN = ["--set", "train.epochs=1", "--set", "head.step=20", "--set", "train.batch_size=32"]
MICROSCOPE = {"simulate.size": 32, "simulate.scale": 0.1, "simulate.dose": 3000}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, a scan store, a model and a map that are all as they should be."""
    folder = tmp_path_factory.mktemp("inputs")
    settings = Config.from_flat(MICROSCOPE).simulate
    simulate_store("linio2", folder / "train.h5", 200, settings, 0)
    simulate_polycrystal("linio2", folder / "scan.h5", (8, 9), 2, settings, 0)
    config = Config.from_flat({"model.name": "cnn", "model.width": 4, "head.step": 20})
    save_model(build(config, linio2(), Geometry(32, 0.1, 200.0)), folder / "model", {}, "")
    assert (
        cli.main(["predict", str(folder / "scan.h5"), "--model", str(folder / "model"), "--out", str(folder / "map")])
        == 0
    )
    return folder


@pytest.fixture
def here(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with copies of the inputs, and without records of a sweep."""
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "STEMTUNE_SWEEPS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail as the user's mistake, and return its one line."""
    before = tree(Path.cwd())
    capfd.readouterr()
    try:
        code: object = cli.main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    out, err = capfd.readouterr()
    assert (code, out) == (2, ""), err
    assert err.startswith("stemtune: ")
    assert err.count("\n") == 1, err
    assert tree(Path.cwd()) == before
    return err


def half(path: Path) -> bytes:
    return path.read_bytes()[: path.stat().st_size // 2]


def foreign(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(5)


def grouped(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_group("patterns")
        file.attrs["schema"] = 1


def changed(path: Path, name: str, value: Any) -> None:
    shutil.copy("scan.h5", path)
    with h5py.File(path, "a") as file:
        file.attrs[name] = value


def counted(path: Path, value: float) -> None:
    shutil.copy("scan.h5", path)
    with h5py.File(path, "a") as file:
        patterns = file["patterns"][()].astype("float32")
        patterns[:, 3, 3] = value
        del file["patterns"]
        file["patterns"] = patterns


HDF5: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda path: path.write_bytes(half(Path("scan.h5"))), "truncated"),
    "only a head": (lambda path: path.write_bytes(Path("scan.h5").read_bytes()[:100]), "truncated"),
    "text": (lambda path: path.write_text("hello"), "bad.h5"),
    "empty": (lambda path: path.touch(), "bad.h5"),
    "foreign": (foreign, "bad.h5"),
    "patterns a group": (grouped, "bad.h5"),
    "voltage in words": (lambda path: changed(path, "kv", "two hundred"), "'two hundred'"),
    "other schema": (lambda path: changed(path, "schema", 99), "schema 99"),
    "rubbish for a CIF": (lambda path: changed(path, "phases_cif", ["rubbish"]), "does not parse as a CIF"),
    "NaN counts": (lambda path: counted(path, np.nan), "has NaN or negative counts in pattern 0"),
    "negative counts": (lambda path: counted(path, -4), "has NaN or negative counts in pattern 0"),
}


@pytest.mark.parametrize("case", HDF5)
@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "bad.h5"],
        ["train", "--store", "bad.h5", "--out", "new", *TRAIN],
        ["predict", "bad.h5", "--model", "model", "--out", "new"],
        ["evaluate", "map/map.h5", "--truth", "bad.h5"],
        ["evaluate", "bad.h5", "--truth", "scan.h5"],
        ["ingest", "bad.h5", "--out", "new.h5"],
    ],
    ids=["inspect", "train", "predict", "truth", "map", "ingest"],
)
def test_bad_hdf5(case: str, command: list[str], here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make, says = HDF5[case]
    make(here / "bad.h5")
    message = refused(capfd, *command)
    assert "bad.h5" in message or command[0] == "train"  # two grains are too few to train on, if nothing else is wrong
    if command[0] == "inspect":  # the others may know a scan, or a map, rather than a store
        assert says in message


def write_scan(
    path: Path,
    value: float | None = None,
    units: str = "1/Å",
    scale: float = 0.1,
    kv: float = 200,
    shape: tuple[int, int] = (4, 5),
) -> None:
    data = np.random.default_rng(0).integers(0, 9, (*shape, 32, 32)).astype("float32")
    data[..., 15:17, 15:17] += 100
    if value is not None:
        data[1, 2, 3, 4] = value
    axes = [
        {"_type": "UniformDataAxis", "name": name, "units": units if k > 1 else "nm", "navigate": k < 2, "size": length,
         "is_binned": False, "scale": scale if k > 1 else 4.0, "offset": -scale * 15.5 if k > 1 else 0.0}
        for k, (name, length) in enumerate(zip("yxvu", data.shape, strict=True))
    ]  # fmt: skip
    metadata: dict[str, Any] = {"General": {"title": "scan"}, "Signal": {"signal_type": ""}}
    if kv:
        metadata["Acquisition_instrument"] = {"TEM": {"beam_energy": kv}}
    signal = {
        "data": data, "axes": axes, "metadata": metadata, "original_metadata": {}, "learning_results": {}, "models": {},
        "package_info": {"package": "hyperspy", "package_version": "2.0"},
        "attributes": {"_lazy": False, "ragged": False}, "tmp_parameters": {},
    }  # fmt: skip
    hspy.file_writer(str(path), signal)


SCANS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "no scale": ({"units": "px"}, [], "give --scale"),
    "a scale of zero": ({"scale": 0.0}, [], "give --scale"),
    "no number for a scale": ({"scale": np.nan}, [], "give --scale"),
    "no voltage": ({"kv": 0}, [], "give --kv"),
    "NaN counts": ({"value": np.nan}, [], "at pixel (3, 4) of the pattern at scan position (1, 2)"),
    "infinite counts": ({"value": np.inf}, [], "at pixel (3, 4)"),
    "negative counts": ({"value": -5}, [], "a negative count (-5) at pixel (3, 4)"),
    "other shape": ({}, ["--shape", "3,3"], "which is not 3 x 3"),
    "centre outside": ({}, ["--centre", "99,99"], "lies outside"),
    "keeps too much": ({}, ["--keep", "0:99,0:9"], "--keep is '0:99,0:9'"),
    "size without end": ({}, ["--size", "100000"], "--size is 100000, but must be in [8, 2048]"),
    "voltage below zero": ({}, ["--kv", "-3"], "must be in [20, 1500]"),
}


@pytest.mark.parametrize("case", SCANS)
@pytest.mark.parametrize("command", [["ingest"], ["predict", "--model", "model"]], ids=["ingest", "predict"])
def test_bad_scans(case: str, command: list[str], here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    how, options, says = SCANS[case]
    write_scan(here / "bad.hspy", **how)
    assert says in refused(capfd, command[0], "bad.hspy", *command[1:], *options, "--out", "new.h5")


def cif(change: Callable[[str], str]) -> Callable[[Path], Any]:
    return lambda path: path.write_text(change(linio2().cif))


CIFS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent": (lambda path: None, "'bad.cif' does not exist"),
    "rubbish": (cif(lambda text: "rubbish"), "'bad.cif' does not parse as a CIF"),
    "binary": (lambda path: path.write_bytes(bytes(range(256))), "'bad.cif' does not parse"),
    "empty": (cif(lambda text: ""), "'bad.cif' has no atoms"),
    "no atoms": (cif(lambda text: text[: text.index("_atom_site_label")].rsplit("loop_", 1)[0]), "has no atoms"),
    "half": (cif(lambda text: text[: len(text) // 2]), "'bad.cif'"),
    "unknown element": (cif(lambda text: text.replace("Ni", "Xx")), "unknown element 'Xx'"),
    "a folder": (lambda path: path.mkdir(), "Is a directory"),
}


@pytest.mark.parametrize("case", CIFS)
@pytest.mark.parametrize("command", ["simulate", "train"])
def test_bad_cifs(case: str, command: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make, says = CIFS[case]
    make(here / "bad.cif")
    training = ["train", "--set", "data.source=simulate", "--set", "data.cif=bad.cif", *TRAIN]
    arguments = training if command == "train" else ["simulate", "bad.cif", "--patterns", "4"]
    assert says in refused(capfd, *arguments, "--out", "new")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--set", "model.name=cnm"], "did you mean 'cnn'?"),
        (["train", "--set", "model.widht=3"], "no setting is called 'model.widht'; did you mean 'model.width'?"),
        (["train", "--set", "head.name=gird"], "did you mean 'grid'?"),
        (["train", "--set", "optim.lr=7"], "`optim.lr` is 7.0, but must be in (0, 1]"),
        (["train", "--set", "optim.lr=nan"], "`optim.lr` is nan"),
        (["train", "--set", "optim.lr"], "write it as key=value"),
        (["train", "--set", "train.batch_size=100000"], "patterns to train on"),
        (["train", "--set", "model.pretrained=gone.pth", "--set", "model.name=densenet"], "'gone.pth' does not exist"),
        (["simulate", "linio2", "--seed", "-1"], "'-1' must be a whole number of at least 0"),
        (["simulate", "linio2", "--thickness", "80:20"], "`simulate.thickness` is '80:20'"),
        (["simulate", "linio2", "--scan", "9,9", "--grains", "500"], "500 grains do not fit"),
        (
            ["simulate", "linio2", "--dynamical", "--thickness", "0"],
            "`simulate.thickness` is '0', but must be in (0, 5000]",
        ),
        (["simulate", "linio2", "--dynamical", "--thickness=-5:20"], "`simulate.thickness` is '-5:20'"),
        (
            ["simulate", "linio2", "--dynamical", "--set", "simulate.beams=5000"],
            "`simulate.beams` is 5000, but must be in [2, 4000]",
        ),
        (["simulate", "linio2", "--scale", "0.0001"], "no reflection of"),
        (["simulate", "linio2", "--dynamical", "--scale", "0.0001"], "no reflection of"),
        (["simulate", "linio2", "--kv", "1500", "--size", "1024", "--scale", "1"], "free; lower `simulate.scale`"),
        (
            ["simulate", "linio2", "--dynamical", "--kv", "1500", "--size", "1024", "--scale", "1"],
            "free; lower `simulate.scale`",
        ),
        (["simulate", "linio2", "--dynamical", "--physics", "kinematic"], "--dynamical asks for Bloch waves"),
        (["simulate", "linio2", "--set", "simulate.beans=3"], "did you mean 'simulate.beams'?"),
        (["simulate", "linio2", "--set", "optim.lr=0.1"], "--set optim.lr"),
        (["simulate", "linio2", "--overlap", "1.5"], "`simulate.overlap` is 1.5, but must be in [0, 1]"),
        (
            ["simulate", "linio2", "--overlap-weight", "0:1"],
            "`simulate.overlap_weight` is '0:1', but must be in (0, 1]",
        ),
        (["predict", "scan.h5", "--model", "champion"], "there is no MLflow file"),
        (["predict", "scan.h5", "--model", "models:/nope@champion"], "there is no MLflow file"),
        (["predict", "scan.h5", "--model", "runs:/abc/model"], "there is no MLflow file"),
        (["predict", "scan.h5", "--model", "nowhere"], "there is no model 'nowhere'"),
        (["predict", "scan.h5", "--model", "model", "--kv", "200"], "leave out --kv"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_settings(arguments: list[str], says: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    more = ["--store", "train.h5", "--set", "train.epochs=1"] if arguments[0] == "train" else []
    assert says in refused(capfd, *arguments, *more, "--out", "new")


SMALL = ["--size", "24", "--scale", "0.06", "--set", "simulate.beams=8", "--tilts", "1", "--absorption", "none"]


def test_a_dynamical_simulation_of_too_many_beams(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with half a gigabyte to spare."""
    monkeypatch.setattr("stemtune._parallel.free_bytes", lambda device: 2**29)
    message = refused(capfd, "simulate", "linio2", "--dynamical", "--set", "simulate.beams=4000", "--out", "new.h5")
    assert "structure matrices of 4000 beams need" in message and "lower `simulate.beams`" in message


@pytest.mark.parametrize("folder", ["file", "/proc"])
def test_a_dynamical_simulation_into_a_folder_that_cannot_be_written(
    folder: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not even root can write into /proc."""
    (here / "file").write_text("mine")
    message = refused(capfd, "simulate", "linio2", "--dynamical", *SMALL, "--out", f"{folder}/new.h5")
    assert f"'{folder}'" in message and "choose another --out" in message


def test_a_simulation_that_was_begun_with_other_settings(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, then other settings: refused; then the same command: goes on; then --restart with others: begins anew."""
    command = ["simulate", "linio2", "--dynamical", *SMALL, "--patterns", "300", "--out", "new.h5"]
    write = ResumableWriter.write

    def interrupting(self: ResumableWriter, *arguments: Any, **columns: Any) -> None:
        write(self, *arguments, **columns)
        signal.raise_signal(signal.SIGINT)

    for anew in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(ResumableWriter, "write", interrupting)
            assert cli.main(command) == 130
        said = "interrupted; 256 of 300 patterns are kept in 'new.h5.part', and the same command goes on from there"
        assert capfd.readouterr().err.splitlines()[-1] == f"stemtune: {said}"
        message = refused(capfd, *command, "--dose", "77")
        assert "`simulate.dose` is 300:100000 there and 77 here" in message and "give --restart" in message
        assert "`seed` is 0 there and 1 here" in refused(capfd, *command, "--seed", "1")
        again = [*command, "--dose", "77", "--restart"] if anew else command
        assert cli.main(again) == 0
        assert ("resuming 'new.h5.part': 256 of 300" in capfd.readouterr().err) == (not anew)
        assert not (here / "new.h5.part").exists()


def described(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        file = model / "model.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return damage


MODELS: dict[str, tuple[Callable[[Path], Any], str, bool]] = {
    "no weights": (lambda model: (model / "model.safetensors").unlink(), "model.safetensors is missing", False),
    "no description": (lambda model: (model / "model.json").unlink(), "model.json is missing", True),
    "half the weights": (
        lambda m: (m / "model.safetensors").write_bytes(half(m / "model.safetensors")),
        "cannot",
        False,
    ),
    "no JSON": (lambda model: (model / "model.json").write_text("{"), "it is not JSON", True),
    "other shape": (described(lambda read: read["config"].update({"model.width": 7})), "do not fit", False),
    "other kind": (described(lambda read: read["config"].update({"model.name": "foo"})), "is 'foo'", False),
    "no settings": (described(lambda read: read.update(config=3)), "does not describe a model", True),
    "no geometry": (described(lambda read: read.update(geometry={"size": "x"})), "geometry lacks", True),
    "other schema": (described(lambda read: read.update(schema=9)), "schema 9", True),
}


@pytest.mark.parametrize("case", MODELS)
def test_bad_model_folders(case: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    damage, says, seen = MODELS[case]
    damage(here / "model")
    assert says in refused(capfd, "predict", "scan.h5", "--model", "model", "--out", "new")
    if seen:  # `inspect` reads the description only
        assert says in refused(capfd, "inspect", "model")


SPACES = {
    "empty range": ("search: {optim.lr: {log: [1.0e-3, 1.0e-3]}}", "empty range"),
    "unknown knob": ("search: {optim.lrr: [0.1]}", "did you mean 'optim.lr'?"),
    "unknown model": ("search: {model.name: {one_of: {cnm: {}}}}", "did you mean 'cnn'?"),
    "text for a number": ("search: {optim.lr: {log: [1e-5x, 1.0e-3]}}", "must be a number"),
    "a bare no": ("search: {model.pretrained: [no, true]}", "the bare word no"),
    "fixed and searched": ("fixed: {optim.lr: 0.1}\nsearch: {optim.lr: [0.1, 0.2]}", "both fixed and searched"),
    "unknown metric": ("metric: val/within_5degrees", "did you mean 'val/within_5deg'?"),
    "no YAML": ("search: [", "not valid YAML"),
    "absent": (None, "bad.yaml"),
}


@pytest.mark.parametrize("case", SPACES)
@pytest.mark.parametrize("command", ["check", "sweep"])
def test_bad_spaces(case: str, command: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text, says = SPACES[case]
    if text is not None:
        (here / "bad.yaml").write_text(text)
    assert says in refused(capfd, command, "bad.yaml", *(["--local"] if command == "sweep" else []))


def test_a_second_sweep_of_the_same_name(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "sweeps" / "first").mkdir(parents=True)
    (here / "sweeps" / "first" / "sweep.json").write_text('{"name": "first", "started": 1, "status": "finished"}')
    (here / "s.yaml").write_text("fixed: {data.store: train.h5}\nsearch: {optim.lr: [0.1, 0.2]}\n")
    assert "--resume first goes on with it" in refused(capfd, "sweep", "s.yaml", "--local", "--name", "first")
