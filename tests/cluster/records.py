"""A PostgreSQL and an MLflow server of a test's own, on loopback, and what fills them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATABASE_PASSWORD, ADMIN_PASSWORD = "pg-s3cret", "admin-s3cret-12"


def binaries() -> Path | None:
    """Return the folder of PostgreSQL's programs, the newest where there are several."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    there = shutil.which("initdb")
    return Path(there).parent if there else None


def missing() -> str:
    """Say what this machine lacks for a server, or nothing."""
    if binaries() is None:
        return "no PostgreSQL here (apt-get install postgresql)"
    for module in ("psycopg", "flask_wtf"):
        if importlib.util.find_spec(module) is None:
            return f"no {module} here (pip install -e '.[server]')"
    return ""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Postgres:
    """A PostgreSQL in a folder, with the role mlflow, which owns the databases mlflow and optuna."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self._bin = binaries()

    def start(self) -> None:
        self.folder.mkdir(parents=True)
        (self.folder / "password").write_text(DATABASE_PASSWORD)
        if os.geteuid() == 0:  # PostgreSQL refuses root
            shutil.chown(self.folder, "postgres")
            shutil.chown(self.folder / "password", "postgres")
        data, log = self.folder / "data", self.folder / "log"
        self._run(f"{self._bin}/initdb -D {data} -A scram-sha-256 -U postgres --pwfile={self.folder}/password")
        flags = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder} -c fsync=off"
        self._run(f"{self._bin}/pg_ctl -D {data} -l {log} -w -o '{flags}' start")
        self.sql(f"create role mlflow login password '{DATABASE_PASSWORD}'")
        for database in ("mlflow", "optuna"):
            self.sql(f"create database {database} owner mlflow")

    def stop(self) -> None:
        self._run(f"{self._bin}/pg_ctl -D {self.folder}/data -m immediate stop")

    def url(self, database: str) -> str:
        return f"postgresql://mlflow@127.0.0.1:{self.port}/{database}"

    def sql(self, command: str) -> str:
        import psycopg

        at = f"host=127.0.0.1 port={self.port} user=postgres password={DATABASE_PASSWORD} dbname=postgres"
        with psycopg.connect(at, autocommit=True) as connection:
            return str(connection.execute(command.encode()).statusmessage)

    def _run(self, command: str) -> None:
        words = ["su", "postgres", "-c", command] if os.geteuid() == 0 else ["sh", "-c", command]
        done = subprocess.run(words, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        assert done.returncode == 0, done.stdout


class Mlflow:
    """`cluster/mlflow/start.sh` on a port of its own; it can be killed and started again."""

    def __init__(self, folder: Path, database: str) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.environment = {
            **os.environ,
            "STEMTUNE_PYTHON": sys.executable,
            "STEMTUNE_MLFLOW_DB": database,
            "STEMTUNE_MLFLOW_HOME": str(folder / "home"),
            "STEMTUNE_MLFLOW_ARTIFACTS": str(folder / "artifacts"),
            "PGPASSWORD": DATABASE_PASSWORD,
            "MLFLOW_PORT": str(self.port),
            "MLFLOW_WORKERS": "1",
            "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN_PASSWORD,
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(ROOT / "cluster" / "mlflow" / "start.sh")],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log()
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(self.log())

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=30)
            self.process = None

    def log(self) -> str:
        return (self.folder / "log").read_text()[-3000:]

    def as_user(self, name: str, password: str) -> dict[str, str]:
        """Return the environment of somebody who uses the server."""
        account = {"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": password}
        return {"MLFLOW_TRACKING_URI": self.uri, "MLFLOW_HTTP_REQUEST_TIMEOUT": "20", **account}

    def add_user(self, name: str, password: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "cluster" / "mlflow" / "add_user.py"), name],
            input=password + "\n",
            env={**os.environ, **self.as_user("admin", ADMIN_PASSWORD)},
            capture_output=True,
            text=True,
            check=False,
        )
