"""`stemtune train`: a whole model folder or none, and a worker's mistake as one line."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.training import training_throughput
from stemtune.config import Config
from stemtune.errors import UserError
from stemtune.learning import train as train_module
from stemtune.learning.checkpoint import load_model, read_description
from stemtune.learning.train import run_workers, train

Settings = Callable[..., Config]


def test_training_leaves_the_best_epoch_and_prints_a_line_for_each(
    tiny: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stemtune.learning.fit.default_device", lambda: __import__("torch").device("cpu"))
    kept = train(tiny(train__epochs=3), tmp_path / "model")
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed[:3]] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    described = read_description(tmp_path / "model")
    assert described["metrics"] == kept
    assert described["store_sha256"]
    medians = [float(line.split("median ")[1].split("°")[0]) for line in printed[:3]]
    assert kept["val/disorientation_median_deg"] == pytest.approx(min(medians), abs=0.006)
    assert load_model(tmp_path / "model").config.train.epochs == 3


def test_an_error_leaves_no_folder(tiny: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said_before_training(tiny: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the folder"):
        train(tiny(), tmp_path / "file" / "model")


def _complain(rank: int, world: int, what: str) -> None:
    if rank == 1:
        if what == "user":
            raise UserError("the store is empty")
        raise ZeroDivisionError
    time.sleep(60)


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("user", UserError, "the store is empty"),
        pytest.param("fault", RuntimeError, "ZeroDivisionError", marks=pytest.mark.slow),
    ],
)
def test_the_mistake_of_one_worker_ends_all(what: str, error: type[Exception], message: str) -> None:
    began = time.monotonic()
    with pytest.raises(error, match=message):
        run_workers(_complain, 2, (what,))
    assert time.monotonic() - began < 55  # the other worker would have slept for a minute


@pytest.mark.slow
def test_two_workers_leave_one_model(tiny: Settings, tmp_path: Path) -> None:
    kept = train(tiny(), tmp_path / "model", workers=2)
    assert read_description(tmp_path / "model")["metrics"] == kept
    assert load_model(tmp_path / "model")


@pytest.mark.slow
def test_batches_that_workers_cannot_share_are_a_user_error(tiny: Settings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be a multiple of the 2 workers"):
        train(tiny(train__batch_size=31), tmp_path / "model", workers=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time\n"
        "from pathlib import Path\n"
        "from stemtune.learning.train import run_workers\n"
        "def task(rank, world):\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(300)\n"
        "if __name__ == '__main__':\n"
        "    run_workers(task, 2, ())\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = [Path("/proc") / process.stdout.readline().strip() for _ in range(2)]
    assert all(worker.is_dir() for worker in workers)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(worker.is_dir() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(worker.is_dir() for worker in workers)


@pytest.mark.slow
def test_ctrl_c_leaves_no_half_model(tiny: Settings, tmp_path: Path) -> None:
    pairs = [f"{key}={value}" for key, value in tiny(train__epochs=500).to_flat().items() if value != ""]
    sets = [word for pair in pairs for word in ("--set", pair)]
    command = [sys.executable, "-m", "stemtune.cli", "train", *sets, "--out", str(tmp_path / "model")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_the_loop_is_measured_against_the_bare_step(tiny: Settings) -> None:
    rates = training_throughput(tiny(), rounds=2, steps=3)
    assert set(rates) == {"loop_samples_per_s", "plain_samples_per_s", "ratio", "ratio_of_processor_time"}
    assert 0.05 < rates["ratio"] < 20 and rates["plain_samples_per_s"] > 1
