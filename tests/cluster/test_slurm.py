"""cluster/slurm.sh on a real Slurm: two nodes, a sweep in an array, pre-emption, requeue, and what is left of it.

Needs Linux, root, slurm-wlm and munge besides what `hosts.py` needs, and says so where it skips.

    pytest -m slow tests/cluster/test_slurm.py -s
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import slurm
from hosts import Host, Hosts
from layout import checkout

from stemtune.tracking import SweepRecord, read_sweep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing() or "all there"),
]


@dataclass
class Site:
    """Two nodes under Slurm and the checkout of the user who submits to them."""

    head: Host
    checkout: Path
    shared: Path

    def submit(self, *words: str) -> int:
        """Submit cluster/slurm.sh and return the job's number."""
        line = f"cd {self.checkout} && sbatch --parsable --cpus-per-task=1 --time=2:00:00 {' '.join(words)}"
        return int(self.head.enter(line).stdout.split(";")[0])

    def log(self) -> str:
        """Return what all jobs wrote."""
        return "".join(path.read_text() for path in sorted(self.checkout.glob("*.log")))

    def state(self, job: int) -> str:
        """Return the state of a job, empty when Slurm has forgotten it."""
        shown = self.head.enter(f"scontrol show job -o {job}", check=False).stdout
        return shown.split("JobState=")[1].split()[0] if "JobState=" in shown else ""

    def states(self, job: int) -> list[str]:
        """Return the states of the tasks of an array."""
        shown = self.head.enter(f"scontrol show job -o {job}", check=False).stdout
        return re.findall(r"JobState=(\w+)", shown)

    def record(self, name: str) -> SweepRecord:
        """Return what MLflow knows of a sweep."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{self.shared}/mlflow.db")
            return read_sweep(name, ("train/loss",))

    def sheet(self, name: str) -> str:
        """Return a sweep's own word on how it stands."""
        file = self.shared / "sweeps" / name / "sweep.json"
        return str(json.loads(file.read_text())["status"]) if file.exists() else ""

    def wait(self, what: str, done: Callable[[], bool], seconds: float = 1500) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, f"{what} did not come in {seconds:g} s:\n{self.log()[-6000:]}"
            time.sleep(2)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Hosts(2) as made:
        slurm.start(made)
        shared = made.folder / "shared"
        yield Site(made.hosts[0], checkout(made.folder, shared), shared)


def test_a_preempted_sweep_goes_on_when_the_nodes_come_back(site: Site) -> None:
    """A job of the partition `high` takes the nodes from a sweep; the sweep's job waits and then ends what it began."""
    job = site.submit("--array=7", "cluster/slurm.sh", "search_spaces/tiny.yaml")
    site.wait("the first trial's end", lambda: "finished after epoch" in site.log())
    other = site.submit("--partition=high", "--nodes=2", "--exclusive", "--wrap='sleep 20'")
    site.wait("the requeued job", lambda: "the nodes are wanted back" in site.log())
    site.wait("the other job", lambda: site.state(other) == "COMPLETED")
    assert site.sheet("tiny-7") == "interrupted"
    site.wait("the sweep's end", lambda: site.sheet("tiny-7") == "finished")
    site.wait("the job's end", lambda: site.state(job) == "COMPLETED")
    assert "Restarts=1" in site.head.enter(f"scontrol show job -o {job}").stdout

    record = site.record("tiny-7")
    assert len(record.trials) == 4
    assert {trial.status for trial in record.trials} <= {"finished", "stopped"}  # by ASHA, after its last epoch
    assert record.params["train.seed"] == "7"
    assert {trial.tags["stemtune.nodes"] for trial in record.trials} == {"node1", "node2"}
    for trial in record.trials:  # every epoch once: what had been done before counts
        assert [step for step, _ in trial.curves["train/loss"]] == [1, 2], trial
    before, after = site.log().split("the nodes are wanted back")
    ended = re.findall(r"^trial (\d) cnn .* after epoch", before, re.MULTILINE)
    begun = re.findall(r"^trial (\d) starts", after, re.MULTILINE)
    assert ended and not set(ended) & set(begun), (ended, begun)  # what had ended did not run again
    assert not any((site.shared / "jobs").iterdir())  # the job's token is gone


def test_an_array_is_a_sweep_per_seed(site: Site) -> None:
    """Two tasks of one node each, side by side, and each a sweep of its own."""
    job = site.submit("--array=1-2", "--nodes=1", "cluster/slurm.sh", "search_spaces/tiny.yaml", "--trials", "1")
    for seed in (1, 2):
        site.wait(f"the end of sweep {seed}", lambda seed=seed: site.sheet(f"tiny-{seed}") == "finished")  # type: ignore[misc]
    site.wait("the job's end", lambda: set(site.states(job)) == {"COMPLETED"})
    for seed in (1, 2):
        record = site.record(f"tiny-{seed}")
        assert record.params["train.seed"] == str(seed)
        assert [trial.status for trial in record.trials] == ["finished"]


def test_a_job_that_fails_says_so(site: Site) -> None:
    """A mistake of the user gives the job its exit code and one line in its log."""
    job = site.submit("cluster/slurm.sh", "search_spaces/tiny.yaml", "--set", "optim.lrr=1")
    site.wait("the job's end", lambda: site.state(job) == "FAILED")
    assert "ExitCode=2:0" in site.head.enter(f"scontrol show job -o {job}").stdout
    assert "did you mean 'optim.lr'?" in site.log()
    assert site.log().count("stemtune: no setting is called") == 1
