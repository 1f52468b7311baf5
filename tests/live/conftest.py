"""Patterns that tests let another process write as a scan, and a model that answers them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import sample_maps

from stemtune.config import Config, SimulateConfig
from stemtune.crystal.phase import linio2
from stemtune.dataset.simulate import simulate_polycrystal
from stemtune.dataset.store import Store
from stemtune.diffraction.geometry import Geometry
from stemtune.learning.checkpoint import save_model
from stemtune.learning.models import build

MICROSCOPE = dataclasses.replace(sample_maps.MICROSCOPE, centre_error=0.0, ellipticity=SimulateConfig().ellipticity)
SHAPE = (24, 24)


@pytest.fixture(scope="module")
def patterns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the patterns (24, 24, 64, 64) of a simulated polycrystal."""
    folder = tmp_path_factory.mktemp("patterns")
    simulate_polycrystal("", folder / "scan.h5", SHAPE, 4, MICROSCOPE, seed=1)
    with Store.open(folder / "scan.h5") as store:
        counts = np.array(store.patterns).reshape(*SHAPE, 64, 64).astype(np.uint16)
    np.save(folder / "patterns.npy", counts)
    return folder / "patterns.npy"


@pytest.fixture(scope="module")
def small(patterns: Path) -> Path:
    """A file of (6, 10, 64, 64) of them."""
    path = patterns.with_name("small.npy")
    np.save(path, np.load(patterns)[:6, :10])
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"model.name": "matched", "model.grid_step": 4, "model.angles": 90, "model.radii": 24}
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(build(Config.from_flat(settings), linio2(), Geometry(64, 0.05, 200.0)), folder, {}, "")
    return folder
