"""cluster/mlflow/start.sh: MLflow on PostgreSQL with passwords, two sweeps at once, and a server killed among them.

Needs PostgreSQL's programs and the packages of the extra `server`, and says so where it skips.

    pytest -m slow tests/cluster/test_mlflow_server.py -s
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import feed
from layout import TINY
from records import ADMIN_PASSWORD, DATABASE_PASSWORD, ROOT, Mlflow, Postgres, missing

from stemtune.tracking import Address, read_sweep, resolve_model
from stemtune.tracking.client import client

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(missing()), reason=missing() or "all there"),
]

USERS = {"ann": "anns-s3cret-123", "bob": "bobs-s3cret-123"}
EPOCHS = 8


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="stemtune-postgres-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        made = Postgres(Path(folder) / "postgres")
        made.start()
        try:
            yield made
        finally:
            made.stop()


@pytest.fixture(scope="module")
def server(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mlflow]:
    made = Mlflow(tmp_path_factory.mktemp("mlflow"), postgres.url("mlflow"))
    made.start()
    try:
        for name, password in USERS.items():
            done = made.add_user(name, password)
            assert done.returncode == 0, done.stderr
        yield made
    finally:
        made.kill()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("MLFLOW_TRACKING_URI", "STEMTUNE_SWEEPS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def become(monkeypatch: pytest.MonkeyPatch, server: Mlflow, user: str, password: str = "") -> None:
    for key, value in server.as_user(user, password or USERS[user]).items():
        monkeypatch.setenv(key, value)


def sweep(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stemtune.sweep", *arguments], capture_output=True, text=True, timeout=600, check=False
    )


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_two_sweeps_log_at_once_and_a_killed_server_loses_nothing(
    here: Path, server: Mlflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    feeds = {}
    for name in USERS:
        environment = {**os.environ, **server.as_user(name, USERS[name])}
        with (here / f"{name}.log").open("wb") as log:
            feeds[name] = subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "feed.py"), f"sweep-{name}", str(EPOCHS), "1.0"],
                env=environment,
                stdout=log,
                stderr=log,
            )
    journals = [here / "sweeps" / f"sweep-{name}" for name in USERS]
    deadline = time.monotonic() + 240
    while not all(sent(journal) > 0.3 for journal in journals):
        assert time.monotonic() < deadline, [sent(journal) for journal in journals]
        assert all(process.poll() is None for process in feeds.values()), "ended before the server was killed"
        time.sleep(0.1)
    server.kill()
    assert any(sent(journal) < 0.9 for journal in journals), "nothing was left to lose"
    time.sleep(3)
    server.start()
    for name, process in feeds.items():
        assert process.wait(timeout=600) == 0, (here / f"{name}.log").read_text()
        check(server, name, monkeypatch)


def sent(folder: Path) -> float:
    """Return the part of a sweep's events that MLflow has, of all that there will be."""
    total = 2 + feed.TRIALS * (EPOCHS + 2) + 1
    try:
        position = int((folder / "tracking.sent").read_text())
        return (folder / "tracking.jsonl").read_bytes()[:position].count(b"\n") / total
    except (OSError, ValueError):
        return 0.0


def check(server: Mlflow, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """See that MLflow has every epoch of every trial once, that nothing runs, and that the champion downloads."""
    become(monkeypatch, server, name)
    record = read_sweep(f"sweep-{name}", curves=("val/loss",))
    assert record.status == "finished"
    assert len(record.trials) == feed.TRIALS
    api = client(Address(server.uri))
    for trial in record.trials:
        number = int(trial.tags["stemtune.number"])
        last = EPOCHS - 1 if number % 4 == 1 else EPOCHS
        history = api.get_metric_history(trial.run_id, "val/loss")
        assert sorted(point.step for point in history) == list(range(1, last + 1)), trial.name
        assert {point.step: point.value for point in history} == {
            epoch: pytest.approx(feed.value(number, epoch)) for epoch in range(1, last + 1)
        }
        assert trial.params["optim.lr"] == str(0.001 * (number + 1))
        assert trial.status == ("stopped" if number % 4 == 1 else "finished")
    runs = api.search_runs([api.get_experiment_by_name(f"sweep-{name}").experiment_id])
    assert len(runs) == feed.TRIALS + 1
    assert "RUNNING" not in {run.info.status for run in runs}
    best = f"sweep-{name}-{feed.TRIALS - 1:02d}"
    model = resolve_model(f"models:/sweep-{name}@champion")
    assert (model / "model.safetensors").read_bytes() == f"weights of {best}".encode() * 1000


def test_a_real_sweep_goes_through_the_server(here: Path, server: Mlflow, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "tiny.yaml").write_text(TINY.replace("TRIALS", "2"))
    become(monkeypatch, server, "ann")
    done = sweep("tiny.yaml", "--local", "--name", "real")
    assert done.returncode == 0, done.stderr
    record = read_sweep("real", curves=("val/disorientation_median_deg",))
    assert record.status == "finished"
    assert [len(trial.curves["val/disorientation_median_deg"]) for trial in record.trials] == [2, 2]
    assert all("test/patterns" in trial.last for trial in record.trials)
    for file in (here / "sweeps").rglob("*"):
        if file.is_file():
            assert b"s3cret" not in file.read_bytes(), file

    become(monkeypatch, server, "bob")  # who may read it, and not write
    assert read_sweep("real").run_id == record.run_id
    message = one_line(sweep("tiny.yaml", "--local", "--name", "real-b", "--resume", "real"))
    assert "the experiment 'real' at " in message
    assert "is another user's; choose another --name" in message


@pytest.mark.parametrize(("user", "password"), [("ann", "wrong-s3cret-1"), ("", "")])
def test_without_the_password_nobody_gets_in(
    user: str, password: str, here: Path, server: Mlflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "tiny.yaml").write_text(TINY.replace("TRIALS", "2"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    for key in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(key, raising=False)
    if user:
        become(monkeypatch, server, user, password)
    message = one_line(sweep("tiny.yaml", "--local"))
    assert "refuses us: name or password is missing or wrong" in message
    assert "s3cret" not in message
    assert not (here / "sweeps").exists()


def test_two_drivers_share_a_study_in_postgresql(
    here: Path, postgres: Postgres, server: Mlflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    import optuna

    from stemtune.tune.run.searcher import SWEEP, find_study, open_storage
    from stemtune.tune.space.space import load_space

    monkeypatch.setenv("PGPASSWORD", DATABASE_PASSWORD)
    (here / "tiny.yaml").write_text(TINY.replace("TRIALS", "2"))
    address = postgres.url("optuna")
    words = [sys.executable, "-m", "stemtune.sweep", "tiny.yaml", "--local", "--study", address]
    drivers = [subprocess.Popen([*words, "--name", name]) for name in ("one", "two")]
    assert [driver.wait(timeout=600) for driver in drivers] == [0, 0]
    place = find_study(address, here / "sweeps" / "one", load_space("tiny.yaml"))
    trials = optuna.load_study(study_name=place.name, storage=open_storage(place)).get_trials()
    assert sorted(trial.number for trial in trials) == [0, 1, 2, 3]
    assert {trial.state.name for trial in trials} == {"COMPLETE"}
    owners = [trial.user_attrs[SWEEP] for trial in trials]
    assert sorted(owners.count(owner) for owner in set(owners)) == [2, 2]
    assert len({trial.params["optim.lr"] for trial in trials}) == 4
    for file in (here / "sweeps").rglob("*"):
        if file.is_file():
            assert DATABASE_PASSWORD.encode() not in file.read_bytes(), file

    message = one_line(sweep("tiny.yaml", "--local", "--name", "three", "--study", postgres.url("mlflow")))
    assert "holds other tables, MLflow's perhaps, and a study needs one of its own" in message
    message = one_line(sweep("tiny.yaml", "--local", "--name", "three", "--study", address, "--set", "optim.lr=0.1"))
    assert "searches another space or by another metric" in message
    monkeypatch.setenv("PGPASSWORD", "wrong-s3cret")
    message = one_line(sweep("tiny.yaml", "--local", "--name", "three", "--study", address))
    assert "cannot open the study at " in message
    assert "s3cret" not in message


def test_drivers_that_open_a_new_database_at_once_all_may(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", DATABASE_PASSWORD)
    postgres.sql("create database fresh owner mlflow")
    code = (
        "import sys, time\n"
        "from stemtune.tune.run.searcher import Study, open_storage\n"
        "time.sleep(max(0.0, float(sys.argv[2]) - time.time())); open_storage(Study('one', sys.argv[1]))"
    )
    url = postgres.url("fresh").replace("postgresql://", "postgresql+psycopg://")
    words = [sys.executable, "-c", code, url, str(time.time() + 15)]
    assert [driver.wait(timeout=120) for driver in [subprocess.Popen(words) for _ in range(4)]] == [0] * 4


def test_no_secret_is_on_a_command_line_or_in_a_log(server: Mlflow) -> None:
    secrets = [ADMIN_PASSWORD, *USERS.values(), server.environment["PGPASSWORD"]]
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode(errors="replace")
        except OSError:
            continue
        assert not any(secret in words for secret in secrets), words
    assert not any(secret in (server.folder / "log").read_text() for secret in secrets)
    for file in (server.folder / "home").iterdir():
        assert file.stat().st_mode & 0o077 == 0, file


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"STEMTUNE_MLFLOW_DB": ""}, "name the database: export STEMTUNE_MLFLOW_DB=postgresql://"),
        ({"STEMTUNE_MLFLOW_DB": "sqlite:///a.db"}, "must begin with postgresql://"),
        ({"STEMTUNE_MLFLOW_DB": "postgresql://me:s3cret@host/db"}, "STEMTUNE_MLFLOW_DB holds a password"),
        ({"STEMTUNE_MLFLOW_DB": "postgresql://me@host/db?password=s3cret"}, "STEMTUNE_MLFLOW_DB holds a password"),
        ({"MLFLOW_AUTH_ADMIN_PASSWORD": ""}, "give the administrator a password of 12 characters or more"),
        ({"STEMTUNE_MLFLOW_ARTIFACTS": "", "STEMTUNE_SHARED": ""}, "name the folder"),
        ({"MLFLOW_AUTH_ADMIN_PASSWORD": "", "STEMTUNE_MLFLOW_ADMIN_FILE": "OPEN"}, "which others can read; chmod 600"),
        ({"PGPASSFILE": "OPEN"}, "the password of the database lies in"),
    ],
)
def test_mistakes_of_who_starts_it_are_one_line(change: dict[str, str], wanted: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    secret.chmod(0o644)
    settings = Mlflow(tmp_path, "postgresql://mlflow@127.0.0.1:9/mlflow").environment
    settings |= {key: value.replace("OPEN", str(secret)) for key, value in change.items()}
    done = subprocess.run(
        [str(ROOT / "cluster" / "mlflow" / "start.sh")],
        env=settings, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert wanted in one_line(done)
    assert "s3cret" not in done.stderr
