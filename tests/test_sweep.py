"""The search as users start it: as a script, copied alone, interrupted, killed and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stemtune import sweep
from stemtune.tracking import read_sweep, reigning, resolve_model

ROOT = Path(__file__).parents[1]

TINY = """\
about: Does a sweep run?
metric: val/disorientation_median_deg
budget: {trials: 3, epochs: 2, grace_epochs: 1, reduction: 2}
resources: {cpus_per_worker: 1}
fixed: {data.store: small.h5, train.batch_size: 32, head.step: 20}
search:
  optim.lr: {log: [1e-4, 1e-2]}
  train.workers: [1, 2]
  model.name:
    one_of:
      cnn: {model.kernel_size: [3, 5], model.width: {log_int: [4, 8]}}
first:
  - {model.name: matched, model.grid_step: 6}
  - {model.name: cnn, train.workers: 2, optim.lr: 1e-3, model.kernel_size: 3}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small store and a tiny space."""
    from stemtune.config import Config
    from stemtune.dataset.simulate import simulate_store

    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "STEMTUNE_SWEEPS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    clear = {"size": 32, "scale": 0.1, "dose": 0, "background": 0, "centre_error": 0, "thickness": 20}
    settings = Config.from_flat({f"simulate.{name}": value for name, value in clear.items()}).simulate
    simulate_store("linio2", tmp_path / "small.h5", 600, settings, 0)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def script(*arguments: str, file: Path | None = None, wait_s: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(file or ROOT / "stemtune" / "sweep.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=wait_s,
        check=False,
    )


def started(here: Path, name: str) -> subprocess.Popen[bytes]:
    with (here / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "stemtune" / "sweep.py"), "tiny.yaml", "--local", "--name", name],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def wait_for(words: str, log: Path, process: subprocess.Popen[bytes], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if words in log.read_text():
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.3)
    raise AssertionError(f"'{words}' did not come in {seconds} s:\n{log.read_text()}")


def test_help_is_quick_and_loads_neither_torch_nor_ray() -> None:
    code = "import sys; from stemtune.sweep import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'ray', 'mlflow', 'optuna'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--resume" in done.stdout


def test_copied_alone_it_finds_spaces_here_then_in_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "sweep.py"
    shutil.copy(ROOT / "stemtune" / "sweep.py", copy)
    done = script("--check", file=copy)
    assert done.returncode == 0, done.stderr
    assert str(ROOT / "search_spaces" / "smoke.yaml") in done.stdout
    (tmp_path / "search_spaces").mkdir()
    (tmp_path / "search_spaces" / "smoke.yaml").write_text("about: mine\nsearch: {optim.lr: [0.1, 0.2]}\n")
    assert "mine" in script("--check", file=copy).stdout
    missing = script("nothing.yaml", file=copy)
    assert missing.returncode == 2
    assert str(tmp_path) in missing.stderr
    assert str(ROOT) in missing.stderr
    assert len(missing.stderr.splitlines()) == 1


def test_as_a_script_its_own_folder_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = (
        "import runpy, sys; sys.argv = ['sweep.py', '--check']; sys.path.insert(0, sys.argv.pop() and PATH)\n"
        "sys.argv.append('--check')\n"
        "try: runpy.run_path(PATH + '/sweep.py', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert PATH not in sys.path, sys.path"
    ).replace("PATH", repr(str(ROOT / "stemtune")))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["tiny.yaml", "--set", "optim.lrr=1"], "did you mean 'optim.lr'?"),
        (["tiny.yaml", "--set", "data.store=gone.h5", "--local"], "`data.store` 'gone.h5' does not exist"),
        (["tiny.yaml", "--name", "a/b"], "the name 'a/b' of a sweep may hold"),
        (["tiny.yaml", "--trials", "0"], "--trials: '0' must be a whole number of at least 1"),
        (["--resume", "nothing"], "there is no sweep called 'nothing'"),
        (["--resume"], "no interrupted sweep is in"),
        (["--resume", "x", "--set", "optim.lr=1"], "--set cannot change it"),
        (["tiny.yaml", "--hours", "0"], "--hours: '0' must be a number above 0"),
        (["--resume", "x", "--study", "y"], "--study cannot change it"),
        (["tiny.yaml", "--study", "a/b"], "the name 'a/b' of a sweep may hold"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["tiny.yaml", "--name", "taken"], "there is a sweep called 'taken' already; --resume taken"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    wanted: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "small.h5").touch()
    (tmp_path / "sweeps" / "taken").mkdir(parents=True)
    (tmp_path / "sweeps" / "taken" / "sweep.json").write_text('{"name": "taken", "started": 1, "status": "finished"}')
    assert sweep.main(arguments) == 2
    message = capsys.readouterr().err
    assert wanted in message
    assert len(message.splitlines()) == 1


def test_a_foreign_store_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "small.h5").write_bytes(b"not HDF5")
    assert sweep.main(["tiny.yaml", "--local"]) == 2
    assert "small.h5" in capsys.readouterr().err
    assert not (tmp_path / "sweeps").exists()


def test_a_trial_that_asks_for_more_than_there_is() -> None:
    from stemtune.errors import UserError
    from stemtune.tune.cluster.connect import concurrency
    from stemtune.tune.space.space import space_from_text

    def space(text: str) -> object:
        return space_from_text(text, "test")

    there = [{"CPU": 8.0, "GPU": 1.0}]
    with pytest.raises(UserError, match=r"3 worker\(s\) asks for 4 CPUs each, but Ray has 8 CPUs; lower"):
        concurrency(space("resources: {workers: 3, cpus_per_worker: 4}\nfixed: {train.batch_size: 66}"), there)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="asks for 1 CPUs and 1 GPUs each, but Ray has 8 CPUs and 1 GPUs"):
        concurrency(space("resources: {workers: 2, gpus_per_worker: 1}"), there)  # type: ignore[arg-type]
    quarter = "budget: {trials: 50}\nresources: {gpus_per_worker: 0.25, cpus_per_worker: 1}"
    assert concurrency(space(quarter), there) == 4  # type: ignore[arg-type]
    assert concurrency(space(quarter.replace("50}", "50, concurrent: 3}")), there) == 3  # type: ignore[arg-type]
    assert concurrency(space("resources: {cpus_per_worker: 0.5}\nbudget: {trials: 3}"), there) == 3  # type: ignore[arg-type]
    # A worker stands on one node: two nodes of 4 hold two workers of 3 and none of 6, whatever their sum says.
    split = [{"CPU": 4.0}, {"CPU": 4.0}]
    assert concurrency(space("resources: {cpus_per_worker: 3}"), split) == 2  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"Ray has 8 CPUs on 2 nodes, which hold 0 such worker\(s\)"):
        concurrency(space("resources: {cpus_per_worker: 6}"), split)  # type: ignore[arg-type]


def test_a_whole_sweep_with_two_workers(here: Path) -> None:
    """Three trials: the matched filter, a network on two data-parallel workers, and one that the sampler proposes."""
    done = script("tiny.yaml", "--local", "--name", "whole")
    assert done.returncode == 0, done.stderr
    assert not any(word in done.stderr for word in ("Traceback", "(raylet)"))
    assert "champion: trial 0 (matched)" in done.stdout
    assert "nothing learned (chance is 69°)" in done.stdout
    record = read_sweep("whole", curves=("val/disorientation_median_deg",))
    assert record.status == "finished"
    assert record.params["data.store"] == str(here / "small.h5")
    assert len(record.tags["stemtune.store_sha256"]) == 64
    trials = {int(trial.tags["stemtune.number"]): trial for trial in record.trials}
    assert sorted(trials) == [0, 1, 2]
    epochs = {number: len(trial.curves["val/disorientation_median_deg"]) for number, trial in trials.items()}
    assert trials[0].params["model.name"] == "matched"
    assert (trials[0].status, epochs[0]) == ("finished", 1)
    assert trials[1].params["train.workers"] == "2"
    assert trials[1].params["train.epochs"] == "2"
    for trial in trials.values():
        assert trial.status in ("finished", "stopped")
        assert trial.last["time/wall_s"] > trial.last["time/device_s"] / int(trial.params["train.workers"]) > 0
        kept = list((here / "sweeps" / "whole" / "train" / f"train-{trial.trial}").glob("checkpoint_*/"))
        assert 1 <= len(kept) <= 3  # best, last and the one before
    best = min(value for trial in trials.values() for _, value in trial.curves["val/disorientation_median_deg"])
    champion = json.loads((resolve_model("champion") / "model.json").read_text())
    assert champion["metrics"]["val/disorientation_median_deg"] == pytest.approx(best)
    assert trials[0].last["test/patterns"] > 30
    assert champion["store_sha256"] == record.tags["stemtune.store_sha256"]
    again = script("tiny.yaml", "--local", "--name", "whole")
    assert again.returncode == 2 and "--resume whole" in again.stderr


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(here: Path) -> None:
    process = started(here, "killed")
    log = here / "killed.log"
    try:
        wait_for("trial 0 matched finished", log, process)
        time.sleep(7)  # Tune writes a snapshot every 5 s
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    before = {trial.trial: trial for trial in read_sweep("killed").trials}
    done = script("--resume", "killed", "--local")
    assert done.returncode == 0, done.stderr
    assert "trial 0 starts" not in done.stderr  # a finished trial is not run again
    record = read_sweep("killed", curves=("val/disorientation_median_deg",))
    assert (record.status, len(record.trials)) == ("finished", 3)
    assert set(before) <= {trial.trial for trial in record.trials}
    assert {trial.status for trial in record.trials} <= {"finished", "stopped"}
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(here / "sweeps" / "killed" / "study.journal")))
    study = optuna.load_study(study_name="killed", storage=storage)
    states = [trial.state.name for trial in study.get_trials()]
    assert states.count("COMPLETE") + states.count("PRUNED") == 2
    assert "RUNNING" not in states


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "send"),
    [
        (signal.SIGINT, os.killpg),
        (signal.SIGTERM, os.kill),
        (signal.SIGTERM, os.killpg),
        (signal.SIGHUP, os.killpg),
    ],
)
def test_a_signal_leaves_a_sweep_that_goes_on(
    number: signal.Signals, send: Callable[[int, int], None], here: Path
) -> None:
    process = started(here, "stopped")
    log = here / "stopped.log"
    wait_for("trial 0 matched finished", log, process)
    send(process.pid, number)
    assert process.wait(timeout=90) == 128 + number, log.read_text()
    assert log.read_text().count("stemtune sweep --resume stopped goes on with it") == 1
    assert "Traceback" not in log.read_text()
    assert read_sweep("stopped").status == "interrupted" and not reigning()  # `matched` is there, and not crowned
    done = script("--resume", "--local")  # the newest interrupted one
    assert done.returncode == 0, done.stderr
    assert "trial 0 starts" not in done.stderr
    record = read_sweep("stopped")
    assert (record.status, len(record.trials), len(reigning())) == ("finished", 3, 1)


@pytest.mark.slow
def test_a_sweep_ends_when_its_time_is_over(here: Path) -> None:
    """Trials end with the epoch that they are in, the sweep is finished, nothing is open, resuming does nothing."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    text = TINY.replace("trials: 3, epochs: 2", "trials: 50, epochs: 200, hours: 0.012, concurrent: 2")
    (here / "tiny.yaml").write_text(text.replace("workers: [1, 2]", "workers: [1]").replace("workers: 2", "workers: 1"))
    done = script("tiny.yaml", "--local", "--name", "timed", wait_s=400)
    assert done.returncode == 0, done.stderr
    record = read_sweep("timed")
    assert record.status == "finished"
    assert 2 <= len(record.trials) < 50
    assert {trial.status for trial in record.trials} <= {"finished", "stopped"}
    assert any("out of time: the sweep's 0.012 h are over" in trial.reason for trial in record.trials)
    storage = JournalStorage(JournalFileBackend(str(here / "sweeps" / "timed" / "study.journal")))
    states = {trial.state.name for trial in optuna.load_study(study_name="timed", storage=storage).get_trials()}
    assert "RUNNING" not in states
    again = script("--resume", "timed", "--local")
    assert again.returncode == 0, again.stderr
    assert len(read_sweep("timed").trials) == len(record.trials)


@pytest.mark.slow
def test_a_trial_that_fails_does_not_end_the_sweep(here: Path) -> None:
    (here / "broken.pth").write_text("no weights")
    (here / "tiny.yaml").write_text(
        TINY.replace("    one_of:\n", "    one_of:\n      densenet: {model.pretrained: [broken.pth]}\n").replace(
            "model.name: cnn, train.workers: 2, optim.lr: 1e-3, model.kernel_size: 3", "model.name: densenet"
        )
    )
    done = script("tiny.yaml", "--local", "--name", "failing", "--trials", "2", "--set", "train.workers=1")
    assert done.returncode == 0, done.stderr
    record = read_sweep("failing")
    failed = [trial for trial in record.trials if trial.status == "failed"]
    assert len(failed) == 1
    assert "broken.pth" in failed[0].reason
    assert record.status == "finished"


@pytest.mark.slow
def test_a_sweep_with_two_metrics_and_what_beats_what(here: Path) -> None:
    """Both metrics reach the sampler, ASHA and champion go by the first, compare draws the front."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    metrics = ("val/disorientation_median_deg", "model/ms_per_pattern")
    text = TINY.replace(f"metric: {metrics[0]}", f"metric: [{', '.join(metrics)}]\nmode: [min, min]")
    text = (
        text.replace("trials: 3", "trials: 5").replace("[1, 2]", "[1]").replace("train.workers: 2", "train.workers: 1")
    )
    (here / "tiny.yaml").write_text(text)
    done = script("tiny.yaml", "--local", "--name", "both", wait_s=600)
    assert done.returncode == 0, done.stderr
    record = read_sweep("both", curves=metrics)
    assert (record.status, len(record.trials)) == ("finished", 5)
    best = {trial.name: min(value for _, value in trial.curves[metrics[0]]) for trial in record.trials}
    champion = json.loads((resolve_model("models:/both@champion") / "model.json").read_text())
    assert champion["metrics"][metrics[0]] == pytest.approx(min(best.values()))

    storage = JournalStorage(JournalFileBackend(str(here / "sweeps" / "both" / "study.journal")))
    study = optuna.load_study(study_name="both", storage=storage)
    told = [trial for trial in study.get_trials() if trial.state.name == "COMPLETE"]
    assert len(study.directions) == 2 and len(told) == 4  # the matched filter is not the sampler's
    assert all(len(trial.values) == 2 and trial.values[1] > 0 for trial in told)
    figures = json.loads((here / "sweeps" / "both" / "comparison" / "compare.json").read_text())
    front = figures["pareto"]["ms_per_pattern"]
    rows = {row["number"]: row for row in figures["trials"]}
    for number in front:  # by hand, from the rows themselves
        assert not any(
            other["best"] < rows[number]["best"] and other["ms_per_pattern"] < rows[number]["ms_per_pattern"]
            for other in rows.values()
        )


@pytest.mark.slow
def test_a_trial_that_gets_no_better_is_finished(here: Path) -> None:
    """The number of weights never changes, so patience of an epoch ends after two of six."""
    text = TINY.replace("val/disorientation_median_deg", "model/parameters").replace("epochs: 2", "epochs: 6")
    (here / "tiny.yaml").write_text(text.replace("fixed: {", "fixed: {train.patience: 1, "))
    done = script("tiny.yaml", "--local", "--trials", "2", "--name", "patient")
    reasons = {one.params["model.name"]: (one.status, one.reason) for one in read_sweep("patient").trials}
    why = "no better model/parameters for 1 epoch"
    assert reasons == {"matched": ("finished", ""), "cnn": ("finished", why)}, done.stderr[-3000:]
    assert f"finished: {why}" in done.stdout
