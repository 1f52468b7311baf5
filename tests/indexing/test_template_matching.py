"""Template matching labels: right for every Laue class and every phase, with scores that mean what they say."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import crystals, testset
from stemtune import cli
from stemtune.config import Config
from stemtune.crystal.point_groups import LAUE_CLASSES
from stemtune.crystal.sampling import random_orientations
from stemtune.crystal.symmetry import disorientation_beam180_deg, disorientation_deg
from stemtune.dataset.labels import LABELLED
from stemtune.dataset.store import Store, StoreWriter
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator
from stemtune.indexing.template_matching import TemplateLabeller, ahead
from stemtune.learning.checkpoint import save_model
from stemtune.learning.models.matched import Matched
from stemtune.learning.models.polar_templates import inner_radius

GEOMETRY = Geometry(64, 0.05, 200.0)
CLEAN = {
    "simulate.size": 64,
    "simulate.scale": 0.05,
    "simulate.shape": "gaussian",
    "simulate.shape_width": 0.02,
    "simulate.intensity_power": 0.4,
    "simulate.precession": 0,
    "simulate.dose": 20_000,
    "simulate.background": 0.1,
    "simulate.centre_error": 0.3,
    "simulate.ellipticity": 0,
    "simulate.scale_error": 0,
}
STEP = {  # fewer templates than the defaults, and intensities that count more: two crystals are pseudo-symmetric
    "model.grid_step": 4,
    "data.gamma": 0.6,
    "model.template_power": 0.25,
    "model.template_width": 0.02,
    "model.template_spot": 0.04,
}
COUNT = 40


class Calibrated:
    """What a labeller asks a store for."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry


@functools.cache
def simulated(laue: str, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    simulator = KinematicSimulator(crystals.crystal(laue), GEOMETRY, Config.from_flat(CLEAN).simulate)
    orientation = random_orientations(count, seed)
    return orientation, simulator.patterns(orientation, torch.Generator().manual_seed(seed))


@functools.cache
def labeller(*classes: str) -> TemplateLabeller:
    phases = [crystals.crystal(laue) for laue in classes]
    return TemplateLabeller(phases, Calibrated(GEOMETRY), Config.from_flat(STEP))  # type: ignore[arg-type]


@pytest.mark.parametrize("laue", LAUE_CLASSES)
def test_every_laue_class_is_labelled_rightly(laue: str) -> None:
    """Half a turn about the beam is forgiven, a zero-layer pattern does not tell; nothing else is."""
    truth, patterns = simulated(laue, COUNT, 5)
    found = labeller(laue)(patterns)
    symmetry = crystals.crystal(laue).symmetry
    error = disorientation_beam180_deg(found.orientation.double(), truth, symmetry)
    assert (error < 5).double().mean() >= 0.8, error.sort().values
    assert disorientation_deg(found.orientation.double(), truth, symmetry).median() < 2
    assert (found.scores["Q"] > 0.2).all() and (found.scores["Q"] <= 1).all()


@pytest.mark.parametrize("laue", ["m-3m", "4/mmm"])
def test_patterns_of_diffsims_are_labelled_rightly(laue: str) -> None:
    orientation, thickness = testset.draw(30, 11)
    phase = crystals.crystal(laue)
    beams = testset.diffsims(orientation, thickness, phase)
    patterns = torch.from_numpy(testset.pictures(beams, testset.Condition(), 1).astype(np.float32))
    config = Config.from_flat({"model.grid_step": 3})
    found = TemplateLabeller([phase], Calibrated(testset.GEOMETRY), config)(patterns)  # type: ignore[arg-type]
    error = disorientation_beam180_deg(found.orientation.double(), torch.from_numpy(orientation), phase.symmetry)
    assert (error < 5).double().mean() >= 0.75 and error.median() < 1.5  # the grid is coarser than the default's


def test_each_pattern_gets_its_own_phase() -> None:
    classes = ("-3m", "m-3m", "6/mmm")
    several = labeller(*classes)
    assert len({float(model.view.radius[0]) for model in several.models}) == 1  # the same cells for all
    assert float(several.models[1].view.radius[0]) < inner_radius(crystals.crystal("m-3m"), GEOMETRY)
    for number, laue in enumerate(classes):
        truth, patterns = simulated(laue, COUNT, 5)
        found = several(patterns)
        assert (found.phase == number).double().mean() >= 0.9, laue
        mine = found.phase == number
        symmetry = crystals.crystal(laue).symmetry
        error = disorientation_beam180_deg(found.orientation[mine].double(), truth[mine], symmetry)
        assert (error < 5).double().mean() >= 0.8
        margin = found.scores["R_phase"]
        assert (margin >= 0).all() and (margin <= 100).all()
        if (~mine).any():
            assert margin[mine].median() > margin[~mine].median()


def test_scores_are_what_the_whole_grid_says() -> None:
    """Q and R the slow way: all cells scored, the best, and the best of those beyond 5 degrees and the symmetry.

    On a finer grid and with broad spots, where the parabola that Q and R are read from follows the cells closely.
    """
    _, patterns = simulated("-3m", COUNT, 5)
    config = Config.from_flat({"model.grid_step": 2.5})
    subject = TemplateLabeller([crystals.crystal("-3m")], Calibrated(GEOMETRY), config)  # type: ignore[arg-type]
    found, model = subject(patterns), subject.models[0]
    scores = model.scores(patterns[:12]).flatten(1)
    every = model.grid.orientation(torch.arange(scores.shape[1])).double()
    for number, row in enumerate(scores):
        best = int(row.argmax())
        apart = disorientation_deg(every, every[best].expand_as(every), model.phase.symmetry) > 5 + model.grid.step_deg
        first, second = float(row[best]), float(row[apart].max())
        # the labels' scores are those of a parabola through the cells around, which levels them out on a coarse grid
        assert abs(float(found.scores["Q"][number]) - first) < 0.1
        assert abs(float(found.scores["R"][number]) - 100 * (1 - second / first)) < 15


def test_the_reliability_is_small_where_two_answers_compete() -> None:
    _, patterns = simulated("m-3", COUNT, 5)
    alone = labeller("m-3")(patterns)
    both = labeller("m-3")(patterns.float() + patterns.float().roll(1, 0))  # two crystals, of equal weight
    assert both.scores["R"].median() < 0.7 * alone.scores["R"].median()
    assert both.confidence.mean() < alone.confidence.mean()
    assert both.scores["Q"].median() < alone.scores["Q"].median()


def test_reliability_by_hand() -> None:
    first, second = torch.tensor([0.5, 0.5, 0.5, -torch.inf, 0.4]), torch.tensor([0.4, 0.5, -torch.inf, -torch.inf, -1])
    torch.testing.assert_close(ahead(first, second), torch.tensor([20.0, 0.0, 100.0, 0.0, 100.0]))


def test_vacuum_and_junk_are_not_indexed() -> None:
    generator = torch.Generator().manual_seed(2)
    axis = torch.arange(64) - 31.5
    radius = torch.hypot(axis[:, None], axis[None])
    halo = 3 * torch.exp(-((radius - 14) ** 2) / 60)
    beam = 2000 * torch.exp(-(radius**2) / 4)
    kinds = [beam + 0.02, beam + halo, torch.full((64, 64), 1.0), torch.zeros(64, 64)]
    patterns = torch.poisson(torch.stack(kinds).repeat_interleave(15, 0), generator=generator)
    found = labeller("-3m", "m-3m")(patterns)
    assert found.indexed.double().mean() <= 0.05  # a few stray electrons may stand where one of the phases has spots
    assert not found.indexed[15:].any()
    assert not found.scores["Q"][-15:].any() and not found.scores["R"][-15:].any()  # nothing there
    assert torch.stack(list(found.scores.values())).isfinite().all()
    _, crystal = simulated("-3m", COUNT, 5)
    assert labeller("-3m", "m-3m")(crystal).indexed.double().mean() > 0.9


def test_refined_labels_are_better() -> None:
    truth, patterns = simulated("4/m", COUNT, 5)
    phase = crystals.crystal("4/m")
    config = Config.from_flat(STEP)
    refined = TemplateLabeller([phase], Calibrated(GEOMETRY), config, refine=True)(patterns)  # type: ignore[arg-type]
    plain = labeller("4/m")(patterns)
    errors = [disorientation_beam180_deg(each.orientation.double(), truth, phase.symmetry) for each in (refined, plain)]
    assert errors[0].median() < errors[1].median()
    torch.testing.assert_close(refined.scores["Q"], plain.scores["Q"])
    assert refined.scores["ncc"].median() > 0.5


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an unlabelled scan of LiNiO2, half of it vacuum, and a model `matched` with settings of its own."""
    monkeypatch.chdir(tmp_path)
    _, crystal = simulated("-3m", COUNT, 5)
    patterns = np.concatenate((crystal.numpy(), np.zeros_like(crystal))).astype("float32")
    attrs = {"scan_shape": [8, 10], "command": "ingest"}
    with StoreWriter("scan.h5", 80, GEOMETRY, dtype="float32", attrs=attrs) as writer:
        writer.write(0, patterns, position=np.indices((8, 10)).reshape(2, -1).T)
    config = Config.from_flat({"model.name": "matched", "model.grid_step": 6, "model.template_power": 0.2})
    save_model(Matched(config, crystals.crystal("-3m"), GEOMETRY), tmp_path / "model", {}, "")
    config = Config.from_flat({"model.name": "cnn", "model.width": 4, "head.step": 20})
    from stemtune.learning.models import build

    save_model(build(config, crystals.crystal("-3m"), GEOMETRY), tmp_path / "cnn", {}, "")
    return tmp_path


def test_the_command_labels_in_place_with_a_model_s_settings(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["label", "scan.h5", "--model", "model", "--set", "model.radii=30"]) == 0
    said = capsys.readouterr().out
    assert "80 patterns at" in said and "no phase, 4" in said and "method template" in said
    truth, _ = simulated("-3m", COUNT, 5)
    with Store.open("scan.h5") as store:
        assert not store.labelled[40:].any() and store.labelled[:40].mean() > 0.9
        error = disorientation_beam180_deg(
            torch.from_numpy(store.orientation[:40]), truth, crystals.crystal("-3m").symmetry
        )
        assert error.nanmedian() < 2.5
        assert sorted(store.scores) == ["Q", "R", "explained_intensity", "spot_z_score"]
        assert np.isnan(store.confidence[40:]).all() and (store.confidence[store.labelled] > 0).all()
        kept = str(store.attrs[LABELLED])
    for setting in ('"model.grid_step": 6', '"model.template_power": 0.2', '"model.radii": 30'):
        assert setting in kept
    assert sorted(path.name for path in here.iterdir()) == ["cnn", "model", "scan.h5"]


WRONG = {
    "no crystal": ([], "'scan.h5' does not say which crystal it shows; give --cif CIF"),
    "no such CIF": (["--cif", "x.cif"], "the CIF 'x.cif' does not exist"),
    "no CIF": (["--cif", "bad.cif"], "the CIF 'bad.cif' does not parse as a CIF"),
    "twice the same": (["--cif", "linio2", "--cif", "same.cif"], "--cif same.cif is the same crystal as --cif linio2"),
    "no such setting": (["--cif", "linio2", "--set", "optim.lr=1"], "--set optim.lr: matching has no such setting"),
    "out of range": (["--cif", "linio2", "--set", "data.gamma=7"], "`data.gamma` is 7"),
    "another kind of model": (["--cif", "linio2", "--model", "cnn"], "the model 'cnn' is a 'cnn', but template"),
    "a folder for --out": (["--cif", "linio2", "--out", "model"], "'model' is a folder"),
    "method": (["--cif", "linio2", "--method", "guess"], "invalid choice: 'guess'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_one_line_and_change_nothing(case: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, says = WRONG[case]
    (here / "bad.cif").write_text("rubbish")
    (here / "same.cif").write_text(crystals.crystal("-3m").cif)
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert cli.main(["label", "scan.h5", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


def test_ctrl_c_leaves_the_store_as_it_was(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TemplateLabeller, "__call__", stop)
    assert cli.main(["label", "scan.h5", "--cif", "linio2", "--set", "model.grid_step=8"]) == 130
    assert "nothing half-written" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


def test_the_cathode_scan(shared_data: Path) -> None:
    """c* at 89, 87 and 87 degrees from the beam (an independent matched filter's answer), vacuum not indexed."""
    from stemtune.scan.readers import read_scan

    scan = read_scan(shared_data / "cathode" / "cathode_scan.hspy")
    places = [(23, 18), (70, 20), (15, 45), (0, 0), (1, 57), (79, 0)]
    patterns = torch.from_numpy(
        np.stack([np.asarray(scan.data[place].compute()) for place in places]).astype("float32")
    )
    from stemtune.crystal.phase import Phase

    phase = Phase.from_cif(shared_data / "cathode" / "LCO.cif")
    geometry = Geometry(128, 0.0235, 300.0, scan.centre_px)
    found = TemplateLabeller([phase], Calibrated(geometry), Config.from_flat({"model.grid_step": 3}))(patterns)  # type: ignore[arg-type]
    w, x, y, z = found.orientation.double().unbind(1)
    cosine = (1 - 2 * (x * x + y * y)).abs()  # of c* and the beam: e3 . (g z)
    angle = torch.rad2deg(torch.arccos(cosine))
    assert found.indexed.tolist() == [True, True, True, False, False, False]
    assert (angle[:3] - torch.tensor([89.0, 87.0, 87.0])).abs().max() < 3
    assert math.isclose(float((w**2 + x**2 + y**2 + z**2)[0]), 1, abs_tol=1e-5)
