"""Memory and speed of loading: one copy for all processes, and no slower than an array."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.loading import loading_throughput, sharing
from stemtune.dataset.store import StoreWriter
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError

N, SIZE = 1600, 96


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("measure") / "s.h5"
    with StoreWriter(found, N, Geometry(SIZE, 0.03, 200.0), dtype=np.uint16) as writer:
        writer.write(0, np.random.default_rng(0).integers(0, 9, (N, SIZE, SIZE)))
    return found


def test_processes_share_one_copy(path: Path) -> None:
    found = sharing(path, processes=2)
    megabytes = N * SIZE * SIZE * 2 / 2**20
    assert found["store_mib"] == pytest.approx(megabytes)
    assert found["resident_mib_each"] == pytest.approx(megabytes, rel=0.02)  # each process has read everything
    assert found["proportional_mib_total"] == pytest.approx(megabytes, rel=0.02)  # and yet it is there once
    assert found["copies"] == pytest.approx(1, abs=0.02)
    assert found["private_mib_each"] < megabytes * 0.75


def test_mapped_batches_are_about_as_fast_as_an_array(path: Path) -> None:
    """The figure that counts is taken on a quiet machine by `make bench NAME=loading`; this catches a blunder."""
    found = loading_throughput(path, rounds=5)
    assert found["patterns"] == N
    assert found["cpu_ratio"] > 0.6
    assert min(found["mapped_patterns_per_s"], found["memory_patterns_per_s"], found["cold_patterns_per_s"]) > 100


def test_store_smaller_than_a_batch_is_refused(path: Path) -> None:
    with pytest.raises(UserError, match="holds 1600 patterns, fewer than one batch of 2000"):
        loading_throughput(path, batch_size=2000)
