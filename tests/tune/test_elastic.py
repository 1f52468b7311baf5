"""A trial that goes on with fewer workers when a node is lost, on two nodes of one CPU each."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stemtune.errors import UserError
from stemtune.tune.run.checkpoints import stored_checkpoints
from stemtune.tune.run.sweep import run_sweep
from stemtune.tune.space.describe import describe_space
from stemtune.tune.space.space import space_from_text

EPOCHS = 12

SPACE = f"""\
budget: {{trials: 1, epochs: {EPOCHS}, grace_epochs: {EPOCHS}}}
resources: {{workers: 2, workers_least: 1, cpus_per_worker: 1}}
fixed:
  data.source: simulate
  data.patterns_per_epoch: 512
  data.validation_patterns: 64
  simulate.size: 32
  simulate.scale: 0.1
  model.name: cnn
  model.width: 4
  head.step: 20
"""


def test_what_a_space_may_ask_for() -> None:
    space = space_from_text(SPACE, "elastic")
    assert space.resources.workers_least == 1
    assert "2 worker(s) of 1 CPU and 0 GPU, 1 at least when a node is lost" in describe_space(space, "elastic.yaml")
    with pytest.raises(UserError, match="`resources.workers_least` is 3, but a trial has 2 worker.s. at most"):
        space_from_text(SPACE.replace("workers_least: 1", "workers_least: 3"), "elastic")
    with pytest.raises(UserError, match="`resources.cpus_per_worker` is 0.5, but must be whole with resources.workers"):
        space_from_text(SPACE.replace("cpus_per_worker: 1", "cpus_per_worker: 0.5"), "elastic")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """A Ray of two nodes, and the second of them."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = made.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    yield made, second
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_trial_goes_on_with_one_worker(
    tmp_path: Path, cluster: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second node goes after two epochs; one worker ends the trial from its checkpoint, and no epoch is lost."""
    import ray

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    folder = tmp_path / "sweeps" / "elastic"
    made, second = cluster
    gone: list[int] = []

    def lose() -> None:
        while not gone:
            epochs = [int(metrics["epoch"]) for metrics, _ in _stored_checkpoints(folder)]
            if epochs and max(epochs) >= 2:
                made.remove_node(second, allow_graceful=False)
                gone.append(max(epochs))
            time.sleep(0.2)

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    outcome = run_sweep(space_from_text(SPACE, "elastic"), "elastic")
    assert gone and gone[0] < EPOCHS - 2, "the node was to go while the trial ran"
    assert [(state.status, state.epoch) for state in outcome.trials] == [("finished", EPOCHS)]
    assert ray.cluster_resources()["CPU"] == 1  # no room for a second worker: one ended it

    from stemtune.tracking import read_sweep

    (trial,) = read_sweep("elastic", ("train/loss",)).trials
    assert trial.status == "finished"
    assert len(trial.tags["stemtune.nodes"].split()) == 1
    assert [step for step, _ in trial.curves["train/loss"]] == list(range(1, EPOCHS + 1))  # each epoch, and once


def _stored_checkpoints(folder: Path) -> list[Any]:
    return [
        (entry.metrics, entry.folder / "model")
        for run in folder.glob("train/train-*")
        for entry in stored_checkpoints(run)
    ]
