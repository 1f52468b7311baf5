"""The command line: quick help, one line for a mistake, a log for a fault."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stemtune import cli
from stemtune.errors import UserError

COMMANDS = (
    "simulate",
    "ingest",
    "inspect",
    "train",
    "check",
    "compare",
    "predict",
    "grains",
    "clean",
    "export",
    "evaluate",
    "demo",
)


def test_help_loads_nothing_heavy() -> None:
    """Help must answer in well under half a second, which torch and ray alone would use up."""
    code = (
        "import sys\nfrom stemtune.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'ray', 'mlflow', 'matplotlib', 'orix', 'h5py', 'scipy', 'timm', 'optuna', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"example:\n  stemtune {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["predict"], "required"),
        (["simulat"], "invalid choice"),
        (["simulate", "linio2", "--out", "x.h5", "--patterns", "0"], "at least 1"),
        (["simulate", "linio2", "--out", "x.h5", "--kv", "abc"], "`simulate.kv` is 'abc', but must be a number"),
        (["train", "--out", "m", "--set", "optim.lrr=1"], "did you mean 'optim.lr'?"),
        (["simulate", "linio2", "--out", "x.h5", "--kv", "inf"], "`simulate.kv` is inf, but must be a finite number"),
        (["train", "--out", "m", "--set", "train.epochs=nan"], "`train.epochs` is 'nan', but must be a whole number"),
        (["ingest", "scan.npy", "--out", "x.h5", "--scale", "nan"], "'nan' must be a finite number"),
        (["simulate", "linio2", "--out", "x.h5", "--scan", "9"], "two whole numbers"),
        (["check", "nowhere.yaml"], "nowhere.yaml"),
        (["inspect", "nowhere.h5"], "does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_fault_goes_to_a_log_that_the_message_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stemtune.config.Config.from_flat", lambda flat: 1 / 0)
    assert cli.main(["train", "--out", "m"]) == 1
    (log,) = tmp_path.glob("*.log")
    assert str(log) in capsys.readouterr().err
    assert "ZeroDivisionError" in log.read_text()


def test_ctrl_c_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(flat: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stemtune.config.Config.from_flat", stop)
    assert cli.main(["train", "--out", "m"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


SWALLOWS = """
import os, signal
try:
    os.kill(os.getpid(), signal.{name})
    sum(range(100_000))
except BaseException:
    pass
"""
COMMAND = """
import signal, sys, time
from stemtune import cli
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, which the tests may run under, has it ignored
def run(argv):
    import swallows
    try:
        time.sleep(30)
    except KeyboardInterrupt:
        return cli.INTERRUPTED
cli._run = run
sys.exit(cli.main([]))
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_module_that_swallows_an_interrupt_does_not_swallow_ours(name: str, code: int, tmp_path: Path) -> None:
    """As numpy.random does, and any extension module may, while it is imported."""
    (tmp_path / "swallows.py").write_text(SWALLOWS.format(name=name))
    assert subprocess.run([sys.executable, "-c", COMMAND], cwd=tmp_path, timeout=20).returncode == code


def test_user_errors_are_one_line() -> None:
    assert "\n" not in str(UserError("a"))


def test_the_help_of_simulate_states_the_displacement_of_a_cif_without(capsys: pytest.CaptureFixture[str]) -> None:
    from stemtune.crystal.phase import DEFAULT_U_ISO

    with pytest.raises(SystemExit):
        cli.main(["simulate", "--help"])
    assert f"{DEFAULT_U_ISO:g} Å²" in " ".join(capsys.readouterr().out.split())
