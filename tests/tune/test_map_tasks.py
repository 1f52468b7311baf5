"""Work spread over a real Ray: the same results as at home, in order, within bounds, whatever dies."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stemtune import cli
from stemtune._parallel import Spread
from stemtune.config import Config
from stemtune.crystal.phase import linio2
from stemtune.crystal_map.io import read_map_h5
from stemtune.dataset.simulate import BLOCK, simulate_polycrystal, simulate_store
from stemtune.dataset.store import Store
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError
from stemtune.indexing.pseudo_labels import label_by_model
from stemtune.indexing.template_matching import label_by_templates
from stemtune.learning.checkpoint import save_model
from stemtune.learning.models import build
from stemtune.map_folder.predict import predict
from stemtune.tune.cluster.map_tasks import UNDER_WAY, over_ray

LARGE = 2**22
"""Bytes of a result that goes through Ray's object store: Ray passes small ones on at once."""

COARSE = Config.from_flat({"simulate.size": 32, "simulate.scale": 0.1, "simulate.dose": 3000}).simulate


@pytest.fixture(scope="module")
def spread() -> Iterator[Spread]:
    """Two nodes of one CPU each."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # workers import the functions below from here
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield over_ray()
        ray.shutdown()
        cluster.shutdown()


def prepared(given: Any) -> Any:
    return given, os.getpid()


def tell(state: Any, item: Path | int) -> Any:
    """Say who works; a worker that is told a file's path dies there, once."""
    given, pid = state
    if isinstance(item, Path) and not item.exists():
        item.touch()
        os.kill(pid, signal.SIGKILL)
    return given, pid


def large(state: Any, item: int) -> Any:
    return np.full(LARGE, item, dtype=np.uint8)


def count(state: Any, item: tuple[Path, int]) -> Any:
    """Leave a mark for each time that the item is worked on."""
    folder, number = item
    (folder / f"{number}.{uuid.uuid4().hex}").touch()
    time.sleep(0.1)
    return np.full(LARGE, number, dtype=np.uint8)


def refuse(state: Any, item: int) -> Any:
    raise UserError(f"{item} is refused")


def mark(state: Any, item: Path) -> Path:
    item.touch()
    return item


def test_simulations_are_the_same_byte_for_byte(tmp_path: Path, spread: Spread) -> None:
    here = simulate_store("linio2", tmp_path / "here.h5", 3 * BLOCK + 5, COARSE, seed=7)
    there = simulate_store("linio2", tmp_path / "there.h5", 3 * BLOCK + 5, COARSE, seed=7, spread=spread)
    assert here.read_bytes() == there.read_bytes()
    here = simulate_polycrystal("linio2", tmp_path / "here.h5", (24, 24), 5, COARSE, seed=7)
    there = simulate_polycrystal("linio2", tmp_path / "there.h5", (24, 24), 5, COARSE, seed=7, spread=spread)
    assert here.read_bytes() == there.read_bytes()


def test_maps_are_the_same(tmp_path: Path, spread: Spread) -> None:
    store = simulate_polycrystal("linio2", tmp_path / "scan.h5", (12, 12), 4, COARSE, seed=7)
    settings = {"model.name": "matched", "model.grid_step": 6}
    save_model(build(Config.from_flat(settings), linio2(), Geometry.of(COARSE)), tmp_path / "model", {}, "")
    for name, how in (("here", None), ("there", spread)):
        summary = predict(store, tmp_path / "model", tmp_path / name, batch=50, refine=True, spread=how)
        assert summary["patterns"] == 144
    here, there = (read_map_h5(tmp_path / name) for name in ("here", "there"))
    np.testing.assert_allclose(here.answers, there.answers, atol=1e-6)
    np.testing.assert_array_equal(here.indexed, there.indexed)
    assert here.ncc is not None and there.ncc is not None
    np.testing.assert_allclose(here.ncc, there.ncc, atol=1e-5)


def test_labels_are_the_same(tmp_path: Path, spread: Spread) -> None:
    store = simulate_polycrystal("linio2", tmp_path / "scan.h5", (12, 12), 4, COARSE, seed=7)
    settings = {"model.grid_step": 6}
    for refine in (False, True):
        for name, how in (("here", None), ("there", spread)):
            out = tmp_path / f"{name}.h5"
            done = label_by_templates(store, [], out, settings=settings, batch=50, refine=refine, spread=how)
            assert done["patterns"] == 144
        assert (tmp_path / "here.h5").read_bytes() == (tmp_path / "there.h5").read_bytes()
    model = build(Config.from_flat({"model.name": "matched", **settings}), linio2(), Geometry.of(COARSE))
    save_model(model, tmp_path / "model", {}, "")
    for name, how in (("here", None), ("there", spread)):
        label_by_model(store, tmp_path / "model", tmp_path / f"{name}.h5", min_confidence=0.1, batch=50, spread=how)
    assert (tmp_path / "here.h5").read_bytes() == (tmp_path / "there.h5").read_bytes()


def test_the_command_labels_over_ray(
    tmp_path: Path, spread: Spread, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    simulate_store("linio2", "scan.h5", 40, COARSE, seed=7)
    options = ["--set", "model.grid_step=8", "--batch", "16"]
    assert cli.main(["label", "scan.h5", *options, "--out", "here.h5"]) == 0
    assert cli.main(["label", "scan.h5", *options, "--out", "there.h5", "--ray"]) == 0
    assert Path("here.h5").read_bytes() == Path("there.h5").read_bytes()
    capsys.readouterr()
    Path("silicon.cif").write_text("rubbish")
    assert cli.main(["label", "scan.h5", "--cif", "silicon.cif", "--ray"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert cli.main(["label", "scan.h5", "--from", "map.ang", "--ray"]) == 2
    assert "--ray has nothing to do with a map made elsewhere" in capsys.readouterr().err


def test_every_node_works_and_prepares_once(spread: Spread) -> None:
    told = list(spread(prepared, "this", tell, range(40)))
    assert {given for given, _ in told} == {"this"}
    assert 2 <= len({pid for _, pid in told}) <= 4
    assert {given for given, _ in spread(prepared, "that", tell, range(4))} == {"that"}


def test_a_dead_worker_costs_its_block_alone(tmp_path: Path, spread: Spread) -> None:
    items: list[Any] = [0, 1, tmp_path / "died", 3, 4]
    assert [given for given, _ in spread(prepared, "all", tell, items)] == ["all"] * 5
    assert (tmp_path / "died").exists()


def test_a_slow_reader_holds_the_work_up(tmp_path: Path, spread: Spread) -> None:
    items = [tmp_path / str(number) for number in range(30)]
    results = spread(prepared, None, mark, items)
    next(results)
    time.sleep(2)
    assert sum(item.exists() for item in items) <= 2 * UNDER_WAY + 1  # two CPUs
    assert list(results) == items[1:]


def test_results_do_not_fill_the_memory(spread: Spread) -> None:
    """What waits to be read is a few results per worker, however many there are and however slow the reader is."""
    import ray

    whole, most = ray.cluster_resources()["object_store_memory"], 0.0
    for number, result in enumerate(spread(prepared, None, large, range(60))):
        assert result[0] == number
        del result
        time.sleep(0.05)
        most = max(most, whole - ray.available_resources()["object_store_memory"])
    assert LARGE <= most <= (2 * UNDER_WAY + 4) * LARGE, most / LARGE  # two CPUs; without bounds up to 60


def test_a_mistake_on_a_node_is_one_line(spread: Spread) -> None:
    with pytest.raises(UserError) as caught:
        list(spread(prepared, None, refuse, [3]))
    assert str(caught.value) == "3 is refused"


def test_no_gpu_is_said(spread: Spread) -> None:
    with pytest.raises(UserError, match="has no GPU, but each block takes one"):
        over_ray(device="cuda")


@pytest.fixture
def losing() -> Iterator[tuple[Spread, Any]]:
    """What spreads over two nodes of one CPU each, and what takes the second one away."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        node = cluster.add_node(num_cpus=1)
        patch.setenv("RAY_ADDRESS", cluster.address)
        whole = over_ray()

        def lose() -> None:
            cluster.remove_node(node, allow_graceful=False)

        yield whole, lose
        ray.shutdown()
        cluster.shutdown()


def losing_after(spread: Spread, lose: Any, results: int) -> Any:
    """Return what spreads work and loses a node when so many results have come."""

    def spread_and_lose(prepare: Any, given: Any, work: Any, items: Any) -> Any:
        for number, result in enumerate(spread(prepare, given, work, items)):
            if number == results:
                lose()
            yield result

    return spread_and_lose


@pytest.mark.slow
def test_a_lost_node_costs_its_blocks_alone(tmp_path: Path, losing: tuple[Spread, Any]) -> None:
    items = [(tmp_path, number) for number in range(40)]
    told = [int(result[0]) for result in losing_after(*losing, 10)(prepared, None, count, items)]
    assert told == list(range(40))
    times = [len(list(tmp_path.glob(f"{number}.*"))) for number in range(40)]
    assert min(times) == 1
    again = [number for number, often in enumerate(times) if often > 1]
    assert again and set(again) <= set(range(10, 10 + 2 * UNDER_WAY + 2)), times  # what was under way when it went


@pytest.mark.slow
def test_a_simulation_survives_a_lost_node(tmp_path: Path, losing: tuple[Spread, Any]) -> None:
    wanted = simulate_store("linio2", tmp_path / "here.h5", 12 * BLOCK, COARSE, seed=3)
    out = simulate_store("linio2", tmp_path / "there.h5", 12 * BLOCK, COARSE, seed=3, spread=losing_after(*losing, 3))
    assert out.read_bytes() == wanted.read_bytes()
    with Store.open(out) as store:
        assert store.n == 12 * BLOCK


@pytest.mark.slow
def test_labels_survive_a_lost_node(tmp_path: Path, losing: tuple[Spread, Any]) -> None:
    store = simulate_store("linio2", tmp_path / "scan.h5", 400, COARSE, seed=3)
    for name, how in (("here", None), ("there", losing_after(*losing, 3))):
        label_by_templates(store, [], tmp_path / f"{name}.h5", settings={"model.grid_step": 6}, batch=20, spread=how)
    assert (tmp_path / "here.h5").read_bytes() == (tmp_path / "there.h5").read_bytes()
