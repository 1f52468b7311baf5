"""What dies in a sweep, one kind per run, and that nothing is lost by it (`pytest -m slow tests/faults`)."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import (
    FIRST,
    SEED,
    SPACE,
    TRIAL,
    WORKER,
    Sweep,
    check,
    kill,
    trained,
    unfinished_checkpoints,
)
from mlflow_server import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture
def sweep(here: Path) -> Iterator[Sweep]:
    made = Sweep(here)
    yield made
    made.stop()


@pytest.mark.parametrize(
    ("workers", "kind"),
    [(1, TRIAL), (2, WORKER), (2, TRIAL)],
    ids=["the process of a trial", "one of its two workers", "the driver of its workers"],
)
def test_one_process_of_a_trial_dies(here: Path, workers: int, kind: str) -> None:
    """The trial goes on by itself from its last checkpoint."""
    space = copy.deepcopy(SPACE)
    space["resources"] |= {"workers": workers, "cpus_per_worker": 1 / workers}
    sweep = Sweep(here, space)
    try:
        sweep.begin()
        sweep.random_moment(kind)
        victims = sweep.until(lambda: sweep.members(kind))
        sweep.kill([random.Random(SEED).choice(victims)])
        killed = time.time()
        sweep.ends()
        check(sweep)
        begun_later = sorted(span for span in trained(sweep) if span[0] > killed)
        side_by_side = [one for one, other in pairwise(begun_later) if other[0] < one[1]]
        assert side_by_side, f"the place of the dead was not given back: {killed:.0f}, {begun_later}"
    finally:
        sweep.stop()


def test_the_driver_dies(sweep: Sweep) -> None:
    sweep.begin()
    sweep.random_moment("driver")
    sweep.kill_driver()
    sweep.resume()
    check(sweep)


def test_the_driver_dies_twice_and_at_once(sweep: Sweep) -> None:
    """First before any trial has reported, then in the middle."""
    sweep.begin()
    sweep.until(lambda: "trial 1 starts" in sweep.said())
    sweep.kill_driver()
    sweep.start("--resume", sweep.name)
    sweep.random_moment("driver again")
    sweep.kill_driver()
    sweep.resume()
    check(sweep)


def test_a_checkpoint_is_damaged(sweep: Sweep) -> None:
    """A trial whose newest checkpoint is not what was written goes on from the one before, and says so."""
    sweep.begin()
    sweep.random_moment("damage")
    sweep.until(lambda: unfinished_checkpoints(sweep), 0.02)
    sweep.kill_driver()
    while not (unfinished := unfinished_checkpoints(sweep)):  # a trial came to its end while its driver was killed
        sweep.start("--resume", sweep.name)
        sweep.until(lambda: unfinished_checkpoints(sweep), 0.02)
        sweep.kill_driver()
    for folder in unfinished:
        weights = folder / "model" / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-100:-50] = bytes(50)
        weights.write_bytes(content)
        sweep.note(f"damaged {folder.parent.name}/{folder.name}")
    sweep.resume()
    check(sweep)
    assert "is not what was written: its hash differs" in sweep.said()


def test_the_tracking_server_dies(here: Path) -> None:
    """The sweep goes on; the server is told everything when it is back."""
    server = Server(here)
    server.start()
    made = Sweep(here, environment={"MLFLOW_TRACKING_URI": server.uri})
    try:
        made.begin()
        made.random_moment("server")
        server.kill()
        gone = made.ended()
        made.until(lambda: made.ended() >= gone + 3)
        server.start()
        made.ends()
        check(made, server.uri)
    finally:
        made.stop()
        server.kill()


class Nodes:
    """A Ray of two nodes of one CPU each, on this machine."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self.other = self.cluster.add_node(num_cpus=1)

    def kill(self, node: Any) -> None:
        """Kill everything on a node at once."""
        for name in ("raylet", "gcs_server"):
            for info in node.all_processes.get(name, []):
                with contextlib.suppress(psutil.NoSuchProcess):  # killed before
                    root = psutil.Process(info.process.pid)
                    for one in [*root.children(recursive=True), root]:
                        kill(one)
                info.process.wait(timeout=60)

    def close(self) -> None:
        for node in (self.other, self.cluster.head_node):
            self.kill(node)


def test_a_node_dies(here: Path) -> None:
    """Its trials go on elsewhere; another node joins."""
    nodes = Nodes()
    made = Sweep(here, local=False, environment={"RAY_ADDRESS": nodes.cluster.address})
    try:
        made.begin()
        made.random_moment("node")
        nodes.kill(nodes.other)
        made.note("killed a node")
        time.sleep(15)
        nodes.other = nodes.cluster.add_node(num_cpus=1)
        made.ends()
        check(made)
    finally:
        made.stop()
        nodes.close()


def test_the_head_node_dies(here: Path) -> None:
    """All of Ray is gone with it; the sweep ends, and goes on when there is a cluster again."""
    nodes = Nodes()
    made = Sweep(here, local=False, environment={"RAY_ADDRESS": nodes.cluster.address})
    try:
        made.begin()
        made.random_moment("head")
        nodes.kill(nodes.cluster.head_node)
        began = time.monotonic()
        code = made.ends(code=None)
        made.note(f"the head node is gone; the sweep ended with {code} after {time.monotonic() - began:.0f} s")
        assert code != 0
        nodes.close()
        nodes = Nodes()
        made.environment["RAY_ADDRESS"] = nodes.cluster.address
        made.resume()
        check(made)
    finally:
        made.stop()
        nodes.close()


def test_the_disk_is_full(here: Path) -> None:
    """The sweep says so in one line and ends; with room again it goes on."""
    store = here / "sweeps"
    store.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", store], check=False).returncode
    ):
        pytest.skip("a small disk takes root and mount")
    made = Sweep(here)
    try:
        made.begin()
        made.random_moment("disk")
        with pytest.raises(OSError, match="No space left"), (store / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(shutil.disk_usage(store).free or 1))
        made.ends(code=2)
        said = [line for line in made.said().splitlines() if line.startswith("stemtune: ")]
        assert len(said) == 1
        assert f"is full; make room there, then stemtune sweep --resume {made.name}" in said[0]
        (store / "filler").unlink()
        made.resume()
        check(made)
    finally:
        made.stop()
        subprocess.run(["umount", "-l", store], check=False)


@pytest.mark.parametrize("hours", [1, -1], ids=["forward", "back"])
def test_the_clock_steps(here: Path, hours: int) -> None:
    """For all Python of the sweep the clock is set an hour forward or back; then its driver is killed."""
    if shutil.which("cc") is None:
        pytest.skip("apt-get install gcc libc6-dev")
    library, step = here / "clock.so", here / "clock"
    source = Path(__file__).with_name("clock.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
    step.write_bytes(bytes(8))
    made = Sweep(here, environment={"LD_PRELOAD": str(library), "STEMTUNE_CLOCK": str(step)})
    try:
        made.begin()
        made.random_moment(f"clock {hours}")
        with step.open("r+b") as file:  # the same file: every process has it mapped
            file.write(struct.pack("q", hours * 3600))
        made.note(f"the clock steps by {hours} h")
        stepped = made.ended()
        made.until(lambda: made.ended() >= stepped + 2)
        made.kill_driver()
        made.resume()
        check(made)
        times = [json.loads(line)["time"] for line in (made.folder / "tracking.jsonl").read_text().splitlines()]
        assert max(times) - min(times) > 3e6, "the clock of the records did not step"
    finally:
        made.stop()


def test_a_trial_without_memory_and_one_that_diverges(here: Path) -> None:
    """One asks for more memory than there is and fails with the reason; one diverges and is the worst."""
    space = copy.deepcopy(SPACE)
    space["fixed"].pop("train.batch_size")
    space["search"] |= {"train.batch_size": [32, 256], "optim.weight_decay": [0.01, 10.0]}
    branch = space["search"]["model.name"]["one_of"]["cnn"]
    branch |= {"model.depth": [0, 1], "model.input_size": [0, 1_000_000], "model.width": [4, 8, 1024]}
    branch["model.kernel_size"] = [3, 5]
    space["search"]["optim.lr"] = {"log": [1e-4, 1.0]}
    plain = {"train.batch_size": 32, "optim.weight_decay": 0.01}
    deep = {"model.depth": 0, "model.input_size": 0}
    planned = [{**plain, **(deep if one["model.name"] == "cnn" else {}), **one} for one in FIRST]
    greedy = {
        **planned[1],
        "model.width": 1024,
        "model.depth": 1,
        "model.input_size": 1_000_000,
        "train.batch_size": 256,
    }
    wild = {**planned[1], "optim.lr": 1.0, "optim.weight_decay": 10.0}
    more = [{**planned[1], "optim.lr": 2e-3}]
    space["first"] = [planned[0], wild, greedy, *planned[1:], *more][: space["budget"]["trials"]]
    made = Sweep(here, space)
    try:
        made.begin()
        made.ends()
        check(made, failed=(2,))
        assert "trial 2 cnn failed" in made.said()
        assert "training diverged; lower `optim.lr`, now 1" in made.said()
        assert "out of memory with one pattern at a time; choose a smaller model" in made.said()
    finally:
        made.stop()
