"""Stores of beams, and the patterns that training draws from them."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import shutil

import h5py
import numpy as np
import pytest
import torch

import stemtune
from stemtune.cli.inspect import describe
from stemtune.config import Config
from stemtune.crystal.phase import Phase, linio2
from stemtune.crystal.rotations import rotate
from stemtune.crystal.sampling import random_orientations
from stemtune.dataset import beam_store
from stemtune.dataset.beam_store import BeamStore, simulate_beams
from stemtune.dataset.fresh_patterns import BeamPatterns
from stemtune.dataset.loaders import held_out_loader, loaders
from stemtune.dataset.store import Store
from stemtune.diffraction.bloch import BlochSimulator
from stemtune.diffraction.conditions import draw_conditions
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import Interrupted, UserError
from tests.laue_phases import crystal

MICROSCOPE = {
    "simulate.size": 32,
    "simulate.scale": 0.08,
    "simulate.thickness": "20:60",
    "simulate.precession": "0:0.3",
    "simulate.convergence": "0.3:1.2",
    "simulate.tilts": 4,
    "simulate.beam_error": 0.04,
}
PLAIN = {"simulate.dose": 0, "simulate.background": 0, "simulate.centre_error": 0, "simulate.ellipticity": 0,
         "simulate.scale_error": 0, "simulate.blur": 0.5, "simulate.dead_pixels": 0}  # fmt: skip
BLOCH = {"simulate.physics": "bloch"}


def settings(**changed):
    return Config.from_flat({**MICROSCOPE, **changed}).simulate


FEW = settings(**BLOCH, **{"simulate.beam_error": 0.002})  # beams, so that it is fast


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    out = tmp_path_factory.mktemp("beams") / "beams.h5"
    return simulate_beams("linio2", out, 80, settings(**BLOCH), thicknesses=3, tilt_groups=2, seed=4)


@pytest.fixture(scope="module")
def store(path):
    return BeamStore.open(path)


def test_what_is_kept(store):
    assert store.n == 80 and store.intensity.shape == (len(store.reflection), 2, 3)
    assert store.first[0] == 0 and store.first[-1] == len(store.reflection) and (np.diff(store.first) > 3).all()
    assert store.phase == linio2() and store.kv == 200 and str(store.span("thickness")) == "20:60"
    parts = np.sort((store.thickness_nm - 20) / 40, axis=1) * 3
    assert (np.floor(parts) == [0, 1, 2]).all()  # one from each third of the range
    order = store.thickness_nm.argsort(axis=1)
    assert len(np.unique(order, axis=0)) == 6
    assert ((store.direct_beam > 0) & (store.direct_beam <= 1)).all()
    assert "data.source=beams" in describe(store.path)


def test_a_fixed_draw_is_the_simulation(store):
    """Thickness, tilts and detector given, the patterns are those of Bloch waves simulated for them."""
    simulate = settings(**BLOCH, **PLAIN)
    drawn = BeamPatterns(store, simulate)
    as_stored = settings(**BLOCH, **{"simulate.dose": 0, "simulate.dead_pixels": 0})  # it reaches as far
    simulator = BlochSimulator(linio2(), drawn.geometry, as_stored)
    row, generator = np.arange(24), torch.Generator().manual_seed(1)
    group, thickness = row % 2, row % 3
    convergence = torch.from_numpy(store.convergence_mrad[row, group]) * 1e-3
    conditions = dataclasses.replace(
        draw_conditions(simulate, drawn.geometry, len(row), generator, torch.device("cpu")),
        thickness_angstrom=10 * torch.from_numpy(store.thickness_nm[row, thickness]),
        precession_rad=torch.from_numpy(store.precession_deg[row, group]) * (math.pi / 180),
        convergence_rad=convergence,
        disk_px=convergence / (drawn.geometry.wavelength_angstrom * drawn.geometry.scale_inv_angstrom),
    )
    orientation = torch.from_numpy(store.orientation[row])
    exact = simulator.expose(orientation, conditions, generator, noise=False)
    ours = drawn._patterns(
        row, group, thickness, orientation.float(), torch.zeros(len(row), dtype=torch.bool), generator
    )
    apart = (ours - exact).abs().sum((1, 2)) / exact.sum((1, 2))
    assert apart.max() < 0.02 and apart.median() < 0.004


def test_turns_and_mirrors_are_exact(tmp_path):
    """Without tilts, whose directions do not turn along, a turned crystal gives the turned and mirrored pattern."""
    still = {"simulate.precession": 0, "simulate.convergence": 0, "simulate.thickness": 40, **PLAIN, **BLOCH}
    simulate = settings(**still)
    drawn = BeamPatterns(BeamStore.open(simulate_beams("linio2", tmp_path / "b.h5", 40, simulate, 1, 1)), simulate)
    simulator, generator = BlochSimulator(linio2(), drawn.geometry, simulate), torch.Generator().manual_seed(3)
    batch = drawn.draw(30, generator, "training")
    exact = simulator.patterns(batch.orientation, generator, noise=False)
    apart = (batch.patterns - exact).abs().sum((1, 2)) / exact.sum((1, 2))
    assert apart.max() < 0.02


def test_equal_in_distribution_to_a_direct_simulation(store):
    """Means and spreads over many patterns: of their sums, of the direct beam, and radius by radius."""
    simulate = settings(**BLOCH, **{"simulate.dose": "1000:4000"})
    generator = torch.Generator().manual_seed(7)
    drawn = BeamPatterns(store, simulate)
    simulator = BlochSimulator(linio2(), drawn.geometry, simulate)
    ours = torch.cat([drawn.draw(512, generator, "training").patterns for _ in range(3)])
    theirs = simulator.patterns(random_orientations(384, generator), generator)
    line = torch.arange(32) - 15.5
    ring = torch.hypot(line[:, None], line).long().clamp_max(18)

    def moments(patterns):
        radial = torch.stack([patterns[:, ring == radius].sum(1) for radius in range(19)], dim=1)
        radial = radial / patterns.sum((1, 2))[:, None]
        columns = torch.cat((patterns.sum((1, 2))[:, None] / 2000, radial), dim=1).double()
        return columns.mean(0), columns.std(0)

    (mean, spread), (other, width) = moments(ours), moments(theirs)
    error = (spread**2 / 76 + width**2 / 384).sqrt()  # 76 orientations stand behind ours
    assert ((mean - other).abs() < 4 * error + 1e-4).all()
    assert ((spread / width - 1).abs() < 0.5)[spread > 1e-3].all()


def test_a_crystal_without_a_centre_is_not_mirrored(store, monkeypatch):
    assert linio2().is_centrosymmetric
    drawn = BeamPatterns(store, settings())
    seen = []
    monkeypatch.setattr(drawn, "_patterns", lambda *given: seen.append(given[4]) or torch.zeros(len(given[0]), 32, 32))
    drawn.draw(200, torch.Generator().manual_seed(0), "training")
    assert 0.3 < torch.cat(seen).float().mean() < 0.7
    seen.clear()
    vars(drawn.phase)["is_centrosymmetric"] = False
    drawn.draw(200, torch.Generator().manual_seed(0), "training")
    del vars(drawn.phase)["is_centrosymmetric"]
    assert not torch.cat(seen).any()


def test_loaders(path, store):
    config = Config.from_flat(
        {**MICROSCOPE, "data.source": "beams", "data.store": str(path), "data.patterns_per_epoch": 96,
         "data.validation_patterns": 40, "train.batch_size": 32}
    )  # fmt: skip
    train, validation = loaders(config)
    assert train.batches_per_epoch == 3 and train.source_sha256 == store.sha256
    first, again, later = (list(train.epoch(number)) for number in (0, 0, 1))
    assert all(torch.equal(a.patterns, b.patterns) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].patterns, later[0].patterns)
    assert sum(len(batch.orientation) for batch in validation.epoch(0)) == 40
    # Of the held-out orientations, the last four, two are those of validation and two of the test, whatever the turn.
    parts = {"validation": validation, "test": held_out_loader(config, torch.device("cpu"))[0], "training": train}
    rows = {"validation": slice(-4, -2), "test": slice(-2, None), "training": slice(0, -4)}
    for name, loader in parts.items():
        drawn = next(iter(loader.epoch(0))).orientation
        for other, place in rows.items():
            inside = near_beam(drawn, torch.from_numpy(store.orientation[place]).float())
            assert inside.all() if other == name else not inside.any(), (name, other)


def near_beam(orientation, held):
    """Return whether the beam runs along a held orientation's, or along its mirror image."""
    beam = torch.tensor([0.0, 0.0, 1.0])
    ours, theirs = rotate(orientation, beam), rotate(held, beam)
    return ((ours @ theirs.T).abs() > 1 - 1e-5).any(1)


def test_ranges_narrower_than_those_stored(store):
    drawn = BeamPatterns(store, settings(**{"simulate.thickness": "30:40"}))
    cells = drawn._cells["training"]
    row, thickness = cells // 6, cells % 3
    chosen = store.thickness_nm[row, thickness]
    assert chosen.min() >= 30 and chosen.max() <= 40 and len(cells) < 76 * 6


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"simulate.kv": 300}, "`simulate.kv` is 300, but the beams in '.*' are those of 200 kV"),
        ({"simulate.size": 64}, "reach 3.*, but the beams in '.*' end at"),
        (
            {"simulate.thickness": "20:61"},
            "`simulate.thickness` is 20:61, but .* for 20:60; set simulate.thickness=20:60",
        ),
        ({"simulate.precession": "0:0.4"}, "`simulate.precession` is 0:0.4, but"),
        ({"simulate.convergence": "0:1"}, "`simulate.convergence` is 0:1, but"),
        ({"simulate.overlap": 0.5}, "`simulate.overlap` is above 0"),
        (
            {"simulate.thickness": "59.99:60", "simulate.precession": 0.299},
            "has no orientation with a thickness and tilts",
        ),
    ],
)
def test_settings_that_the_store_does_not_hold(store, changed, says):
    with pytest.raises(UserError, match=says):
        BeamPatterns(store, settings(**changed))


def test_another_crystal(path, tmp_path):
    cif = tmp_path / "other.cif"
    cif.write_text(crystal("m-3m").cif)
    given = {**MICROSCOPE, "data.source": "beams", "data.store": str(path), "data.cif": str(cif)}
    with pytest.raises(UserError, match="`data.cif` is .*, but the beams in '.*' are those of LiNiO2"):
        loaders(Config.from_flat(given))


def test_a_store_of_patterns_is_not_one_of_beams(path, tmp_path):
    with pytest.raises(UserError, match="is a store of beams, which holds no patterns; data.source=beams draws them"):
        Store.open(path)
    patterns = stemtune.simulate("linio2", tmp_path / "p.h5", 4, size=16, scale=0.1)
    with pytest.raises(UserError, match="is not a store of beams .*; `stemtune simulate --beams` makes one"):
        BeamStore.open(patterns.path)
    with pytest.raises(UserError, match="is no store of beams, so it is not replaced"):
        simulate_beams("linio2", patterns.path, 4, settings(**BLOCH))
    damaged = tmp_path / "half.h5"
    damaged.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match="truncated"):
        BeamStore.open(damaged)


def test_an_interrupted_simulation_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(beam_store, "BLOCK", 8)
    work, out = beam_store._block, tmp_path / "b.h5"

    def stops(state, number):
        if number == 2:
            raise KeyboardInterrupt
        return work(state, number)

    monkeypatch.setattr(beam_store, "_block", stops)
    with pytest.raises(Interrupted, match="interrupted; 16 of 20 orientations are kept in '.*b.h5.part'"):
        simulate_beams("linio2", out, 20, FEW, 2, 1, seed=1)
    assert not out.exists()
    with pytest.raises(UserError, match="was begun with other settings \\(`seed` is 1 there and 2 here\\)"):
        simulate_beams("linio2", out, 20, FEW, 2, 1, seed=2)
    calls = []
    monkeypatch.setattr(beam_store, "_block", lambda state, number: calls.append(number) or work(state, number))
    simulate_beams("linio2", out, 20, FEW, 2, 1, seed=1)
    assert calls == [2] and not out.with_name("b.h5.part").exists()
    resumed = BeamStore.open(out)
    monkeypatch.undo()
    assert resumed.n == 20
    with h5py.File(out) as file:
        assert file["intensity"].id.get_offset() is not None  # contiguous, so it can be mapped


def test_workers_make_the_same_store(tmp_path, monkeypatch):
    alone = BeamStore.open(simulate_beams("linio2", tmp_path / "a.h5", 300, FEW, 1, 1, seed=1))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    several = BeamStore.open(simulate_beams("linio2", tmp_path / "b.h5", 300, FEW, 1, 1, 1, workers=2))
    assert multiprocessing.active_children() == []
    assert (alone.orientation == several.orientation).all() and (alone.reflection == several.reflection).all()
    assert np.allclose(alone.intensity.astype(float), several.intensity.astype(float), atol=1)
    shutil.rmtree(tmp_path / "a.h5.part", ignore_errors=True)


@pytest.mark.parametrize(("second", "centre"), [("As", False), ("Ga", True)])
def test_which_crystals_have_a_centre(second, centre):
    """Zincblende has none; diamond, with the same atoms on both sites, has one between them."""
    faces = [(0, 0, 0), (0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0)]
    atoms = [("Ga", face) for face in faces] + [(second, tuple(x + 0.25 for x in face)) for face in faces]
    lines = ["data_x", "_space_group_IT_number 1", *(f"_cell_length_{axis} 5.653" for axis in "abc")]
    lines += [f"_cell_angle_{angle} 90" for angle in ("alpha", "beta", "gamma")]
    lines += ["loop_", "_atom_site_label", "_atom_site_type_symbol", *(f"_atom_site_fract_{axis}" for axis in "xyz")]
    lines += [f"{kind}{n} {kind} {x} {y} {z}" for n, (kind, (x, y, z)) in enumerate(atoms)]
    assert Phase.from_cif_text("\n".join(lines) + "\n").is_centrosymmetric == centre


def test_many_reflections_need_a_larger_number(monkeypatch):
    simulator = BlochSimulator(linio2(), Geometry.of(settings(**BLOCH)), settings(**BLOCH))
    assert beam_store._row_type(simulator) is np.uint16
    monkeypatch.setattr(simulator, "hkl", torch.zeros(65_537, 3))
    assert beam_store._row_type(simulator) is np.uint32
