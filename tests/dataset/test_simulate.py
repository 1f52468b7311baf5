"""Simulated stores: the same for the same seed, whole or absent, and with the truth in them."""

import json

import h5py
import numpy as np
import pytest
import torch

from stemtune.cli.inspect import describe
from stemtune.config import Config
from stemtune.crystal import rotations
from stemtune.crystal.phase import linio2
from stemtune.crystal.symmetry import disorientation_deg
from stemtune.dataset import simulate
from stemtune.dataset.polycrystal import GRAIN_SPREAD_DEG
from stemtune.dataset.simulate import simulate_polycrystal, simulate_store
from stemtune.dataset.store import Store
from stemtune.diffraction.bloch import simulator_for
from stemtune.diffraction.kinematic import KinematicSimulator
from stemtune.errors import UserError


def _settings(**given):
    flat = {"size": 64, "scale": 0.04, "dose": 2000, "precession": "0.2:0.6", **given}
    return Config.from_flat({f"simulate.{key}": value for key, value in flat.items()}).simulate


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return simulate_store("linio2", tmp_path_factory.mktemp("simulate") / "a.h5", 600, _settings(), seed=4)


def test_a_store_of_random_orientations(store):
    with Store.open(store) as opened:
        assert opened.patterns.shape == (600, 64, 64) and opened.patterns.dtype == np.uint16
        assert np.linalg.norm(opened.orientation, axis=1) == pytest.approx(np.ones(600))
        assert (opened.confidence == 1).all() and (opened.phase == 0).all()
        assert opened.phases[0] == linio2()
        assert opened.geometry.scale_inv_angstrom == 0.04 and opened.geometry.centre_px == (31.5, 31.5)
        assert np.array_equal(opened.group, np.arange(600) // 16)
        for group in np.unique(opened.group):
            assert len(np.unique(opened.split[opened.group == group])) == 1
        assert np.bincount(opened.split) / 600 == pytest.approx([0.8, 0.1, 0.1], abs=0.04)
        total = opened.patterns.reshape(600, -1).sum(axis=1)
        assert np.median(total) == pytest.approx(2000, rel=0.1)
        # Uniform over all rotations: the mean of q q^T is a quarter of the identity.
        assert opened.orientation.T @ opened.orientation / 600 == pytest.approx(np.eye(4) / 4, abs=0.04)


def test_patterns_belong_to_their_orientations(store):
    """The bright pixels away from the middle stand where the stored orientation puts spots."""
    with Store.open(store) as opened:
        simulator = KinematicSimulator(opened.phases[0], opened.geometry, _settings(background=0, dose=0))
        chosen = slice(0, 600, 20)
        clean = simulator.patterns(torch.from_numpy(opened.orientation[chosen]), torch.Generator().manual_seed(0))
        seen = torch.from_numpy(opened.patterns[chosen].astype(np.float32)) ** 0.5
    line = torch.arange(64) - 31.5
    seen[:, torch.hypot(line[:, None], line) < 6] = 0
    clean[:, torch.hypot(line[:, None], line) < 6] = 0
    score = torch.einsum("ihw,jhw->ij", seen, clean**0.25)
    score /= torch.linalg.vector_norm(clean**0.25, dim=(1, 2))
    assert float((score.argmax(1) == torch.arange(len(score))).float().mean()) > 0.9


def test_every_option_is_kept(store):
    with h5py.File(store) as file:
        options = json.loads(file.attrs["options"])
    assert options["seed"] == 4 and options["patterns"] == 600 and options["cif"] == "linio2"
    assert options["simulate.precession"] == "0.2:0.6" and options["simulate.dose"] == "2000"


def test_the_seed_decides_and_the_workers_do_not(store, tmp_path):
    again = simulate_store("linio2", tmp_path / "b.h5", 600, _settings(), seed=4, workers=2)
    other = simulate_store("linio2", tmp_path / "c.h5", 32, _settings(), seed=5)
    with Store.open(store) as one, Store.open(again) as two, Store.open(other) as three:
        assert np.array_equal(one.patterns, two.patterns)
        assert np.array_equal(one.orientation, two.orientation)
        assert np.array_equal(one.split, two.split) and one.sha256 == two.sha256
        assert not np.array_equal(one.orientation[:32], three.orientation)


def test_noise_free_patterns_are_real_numbers(tmp_path):
    with Store.open(simulate_store("", tmp_path / "d.h5", 20, _settings(dose=0))) as opened:
        assert opened.patterns.dtype == np.float32
        assert opened.patterns.sum((1, 2)).max() == pytest.approx(1, abs=0.1)


def test_counts_saturate_instead_of_wrapping(tmp_path):
    strong = _settings(dose=10_000_000, direct_beam=1, background=0, convergence=0.5)
    with Store.open(simulate_store("", tmp_path / "e.h5", 16, strong)) as opened:
        assert (opened.patterns.reshape(16, -1).max(axis=1) == 65535).all()


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(simulate, "_stored", interrupted)
    with pytest.raises(KeyboardInterrupt):
        simulate_store("", tmp_path / "f.h5", 20, _settings())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("cif", "patterns", "given", "message"),
    [
        ("", 0, {}, "0 patterns"),
        ("", 5, {"scale": 0.0001}, "no reflection of"),
        ("absent.cif", 5, {}, "absent.cif"),
    ],
)
def test_what_cannot_be_simulated_leaves_nothing(tmp_path, cif, patterns, given, message):
    with pytest.raises(UserError, match=message) as problem:
        simulate_store(cif, tmp_path / "g.h5", patterns, _settings(**given))
    assert "\n" not in str(problem.value) and list(tmp_path.iterdir()) == []


PLAIN = {
    "thickness": 40, "precession": 0, "convergence": 1, "dose": 0, "direct_beam": 0.5, "background": 0, "blur": 0.5,
    "centre_error": 0, "ellipticity": 0, "scale_error": 0, "dead_pixels": 0, "beams": 30, "tilts": 2,
    "absorption": "none", "scale": 0.03,
}  # fmt: skip


@pytest.mark.parametrize("physics", ["kinematic", "bloch"])
def test_the_stored_truths_of_overlapping_grains_explain_the_patterns(physics, tmp_path):
    """Each pattern is again what its stored orientations and weights give, under a microscope without chance."""
    settings = _settings(**PLAIN, physics=physics, overlap=0.7, overlap_grains=3)
    with Store.open(simulate_store("", tmp_path / "o.h5", 40, settings, seed=2)) as opened:
        simulator = simulator_for(opened.phases[0], opened.geometry, settings)
        weight = opened.overlap_weight
        truth = np.concatenate((opened.orientation[:, None], opened.overlap_orientation), axis=1)
        assert np.array_equal(np.isfinite(truth).all(-1), weight > 0) and 20 < (weight[:, 1] > 0).sum() < 36
        made = simulator.patterns(torch.from_numpy(np.nan_to_num(truth, nan=0.5)).view(-1, 4))
        expected = np.einsum("nk,nkij->nij", weight, made.view(40, 3, 64, 64).numpy())
        assert np.abs(opened.patterns - expected).max() < 1e-3 * expected.max()
    assert "patterns show further grains" in " ".join(describe(tmp_path / "o.h5").split())


def test_dynamical_stores_and_scans(tmp_path):
    """`simulate.physics` is honoured: the same orientations, but other intensities."""
    cheap = {**PLAIN, "physics": "bloch", "thickness": 60}
    for make in (
        lambda out, settings: simulate_store("", tmp_path / out, 24, settings, seed=2),
        lambda out, settings: simulate_polycrystal("", tmp_path / out, (8, 8), 2, settings, seed=2),
    ):
        dynamical, kinematic = (
            make("d.h5", _settings(**cheap)),
            make("k.h5", _settings(**{**cheap, "physics": "kinematic"})),
        )
        with Store.open(dynamical) as one, Store.open(kinematic) as two:
            assert np.array_equal(one.orientation, two.orientation, equal_nan=True)
            inside = one.phase >= 0
            direct = [opened.patterns[inside, 30:34, 30:34].sum((1, 2)) for opened in (one, two)]
            assert direct[1] == pytest.approx(np.full(inside.sum(), direct[1].mean()), rel=0.01)
            assert direct[0].min() < 0.9 * direct[0].max()  # by theory, no setting
            assert one.patterns[~inside].sum() == pytest.approx((~inside).sum(), rel=0.01)


def test_positions_at_grain_boundaries_show_the_neighbour_too(tmp_path):
    settings = _settings(overlap=0.6)
    with Store.open(simulate_polycrystal("", tmp_path / "b.h5", (24, 24), 5, settings, seed=3)) as opened:
        weight, grain = opened.overlap_weight, opened.group.reshape(24, 24)
        further, symmetry = opened.overlap_orientation[:, 0], opened.phases[0].symmetry
        vacuum = opened.phase < 0
        assert (weight[vacuum, 1:] == 0).all() and (weight[:, 2] == 0).all()
        touching = np.zeros((24, 24), dtype=bool)
        for row, column in np.argwhere(weight[:, 1].reshape(24, 24) > 0):
            beside = [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
            near = [24 * y + x for y, x in beside if grain[y, x] not in (grain[row, column], 5)]
            off = disorientation_deg(
                torch.from_numpy(further[24 * row + column]), torch.from_numpy(opened.orientation[near]), symmetry
            )
            assert off.min() < GRAIN_SPREAD_DEG
        for axis in (0, 1):
            for step in (1, -1):
                moved = np.roll(grain, step, axis)
                touching |= (moved != grain) & (moved != 5) & (grain != 5)
        assert np.mean(weight[touching.ravel(), 1] > 0) == pytest.approx(0.6, abs=0.12)
        assert (weight[~touching.ravel(), 1] == 0).all()
    alone = simulate_polycrystal("", tmp_path / "a.h5", (24, 24), 5, _settings(), seed=3)
    with Store.open(alone) as one, Store.open(tmp_path / "b.h5") as two:
        assert np.array_equal(one.orientation, two.orientation, equal_nan=True)


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    out = tmp_path_factory.mktemp("scan") / "scan.h5"
    return simulate_polycrystal("linio2", out, (20, 26), 9, _settings(dose=4000), seed=1)


def test_a_scan_has_grains_and_vacuum(scan):
    with Store.open(scan) as opened:
        assert opened.scan_shape == (20, 26)
        assert np.array_equal(opened.position, np.stack(np.divmod(np.arange(520), 26), axis=1))
        group = opened.group.reshape(20, 26)
        vacuum = opened.phase.reshape(20, 26) == -1
        assert sorted(np.unique(group[~vacuum])) == list(range(9))
        assert vacuum[[0, -1]].all() and vacuum[:, [0, -1]].all() and 0.1 < vacuum.mean() < 0.45
        assert np.isnan(opened.orientation[vacuum.ravel()]).all() and (group[vacuum] == 9).all()
        assert np.isfinite(opened.orientation[~vacuum.ravel()]).all()
        assert np.array_equal(opened.labelled, ~vacuum.ravel())


def test_orientations_of_a_grain_lie_together(scan):
    with Store.open(scan) as opened:
        symmetry = opened.phases[0].symmetry
        for grain in range(9):
            inside = torch.from_numpy(opened.orientation[opened.group == grain])
            spread = disorientation_deg(inside, inside[len(inside) // 2], symmetry)
            assert spread.max() < 2 * GRAIN_SPREAD_DEG
        middle = torch.stack([torch.from_numpy(opened.orientation[opened.group == k][0]) for k in range(9)])
        between = disorientation_deg(middle[:, None], middle, symmetry) + 180 * torch.eye(9)
        assert between.min() > 5
        grain = torch.from_numpy(opened.orientation[opened.group == 0])
        assert rotations.angle_deg(rotations.multiply(grain[:1], rotations.inverse(grain[-1:]))) > 0.01


def test_vacuum_shows_the_direct_beam_only(scan):
    with Store.open(scan) as opened:
        vacuum = opened.phase == -1
        line = np.arange(64) - 31.5
        near = np.hypot(line[:, None], line) < 7
        outside = opened.patterns[:, ~near].sum(axis=1)
        assert outside[vacuum].max() == 0
        assert np.median(outside[~vacuum]) > 300
        assert opened.patterns[vacuum].sum(axis=(1, 2)) == pytest.approx(np.full(vacuum.sum(), 4000), rel=0.1)


def test_a_scan_is_repeatable(scan, tmp_path):
    again = simulate_polycrystal("linio2", tmp_path / "again.h5", (20, 26), 9, _settings(dose=4000), seed=1)
    with Store.open(scan) as one, Store.open(again) as two:
        assert np.array_equal(one.patterns, two.patterns)
        assert np.array_equal(one.orientation, two.orientation, equal_nan=True)


@pytest.mark.parametrize(("shape", "grains"), [((4, 30), 3), ((20, 20), 0), ((10, 10), 60)])
def test_impossible_scans(tmp_path, shape, grains):
    with pytest.raises(UserError, match="grains"):
        simulate_polycrystal("", tmp_path / "h.h5", shape, grains, _settings())
