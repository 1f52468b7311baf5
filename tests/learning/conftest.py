"""A tiny simulated store and settings small enough for a test, shared by the tests of learning."""

from collections.abc import Callable
from pathlib import Path

import pytest

from stemtune.config import Config, SimulateConfig
from stemtune.dataset.simulate import simulate_store

CLEAN = {"simulate.size": 32, "simulate.scale": 0.08, "simulate.dose": 0}


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 simulated LiNiO2 patterns of 32 x 32 px with their exact orientations."""
    path = tmp_path_factory.mktemp("learning") / "tiny.h5"
    simulate: SimulateConfig = Config.from_flat(CLEAN).simulate
    simulate_store("", path, 160, simulate, seed=3)
    return path


@pytest.fixture(scope="session")
def tiny(tiny_store: Path) -> Callable[..., Config]:
    """Make settings of a run of seconds: a two-stage CNN with a coarse grid on the tiny store."""

    def settings(**changes: object) -> Config:
        flat: dict[str, object] = {
            "data.store": str(tiny_store),
            "model.name": "cnn",
            "model.width": 8,
            "model.depth": 2,
            "head.step": 30,
            "train.epochs": 2,
            "train.batch_size": 32,
            "train.precision": "fp32",
        }
        return Config.from_flat(flat | {key.replace("__", "."): value for key, value in changes.items()})

    return settings
