"""Where the records go, a client that talks to MLflow there, whether the server takes them, and which code ran."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from stemtune._files import refuse_readable
from stemtune._version import __version__
from stemtune.errors import UserError, masked

KIND_OF_EXPERIMENT = {"mlflow.experimentKind": "custom_model_development"}  # the UI then opens on training runs

UNAVAILABLE = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "UNAUTHENTICATED", "PERMISSION_DENIED")
"""MLflow's codes for a server that does not answer, or not us."""

_ARTIFACT_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Where MLflow's own database keeps the places of artifacts."""

_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "file", "databricks", "uc")


@dataclass(frozen=True)
class Address:
    """An MLflow tracking address."""

    uri: str  # what MLflow calls the tracking URI
    artifacts: Path | None = None  # folder of the artifacts where we choose it; None leaves it to the server

    @property
    def is_server(self) -> bool:
        """Whether records travel over the network."""
        return self.uri.startswith(("http:", "https:"))

    @property
    def file(self) -> Path | None:
        """The SQLite file, where the records go into one."""
        scheme, _, path = self.uri.partition(":///")
        return Path(unquote(path.partition("?")[0])).absolute() if scheme.split("+")[0] == "sqlite" else None

    @property
    def shown(self) -> str:
        """The address without name and password."""
        return masked(self.uri)


def address(folder: Path | None = None) -> Address:
    """Return the tracking address in force; the default lies in `folder`, else in the working folder.

    A `MLFLOW_TRACKING_URI` that MLflow has no store for, or a password that others can read, is refused.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    here = (folder or Path.cwd()).absolute()
    if not given:
        name, driver = str(here / "mlflow.db"), "sqlite"
        if "%" in name or "?" in name:  # which begin something else in an address
            # With the driver named, MLflow does not make a folder that is called as the escapes are.
            name, driver = name.replace("%", "%25").replace("?", "%3F"), "sqlite+pysqlite"
        return Address(f"{driver}:///{name}", here / "mlartifacts")
    scheme = given.split(":", 1)[0].split("+", 1)[0] if ":" in given else ""
    if scheme and scheme not in _SCHEMES:
        raise UserError(
            f"MLFLOW_TRACKING_URI is '{masked(given)}', but must be http://HOST:PORT, sqlite:///FILE, another database,"
            " or unset"
        )
    secret = Path.home() / ".mlflow" / "credentials"  # where MLflow looks when the environment holds no password
    if scheme in ("http", "https") and "MLFLOW_TRACKING_PASSWORD" not in os.environ and secret.is_file():
        refuse_readable(secret, "the password of the MLflow server")
    beside = Address(given).file
    return Address(given, beside.parent / "mlartifacts" if beside else None)


def client(where: Address) -> Any:
    """Return an MLflow client that is quiet and gives up on an absent server within seconds."""
    for name, value in (
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "15"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
        ("MLFLOW_ALLOW_FILE_STORE", "true"),
    ):
        os.environ.setdefault(name, value)
    _quiet_loggers()
    import mlflow

    _quiet_loggers()  # MLflow has set its own level
    _move_artifacts(where)
    return mlflow.MlflowClient(tracking_uri=where.uri, registry_uri=where.uri)


def _quiet_loggers() -> None:
    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)


def open_client() -> tuple[Any, Address]:
    """Return a client for reading, and the address; an MLflow file that is not there is the user's mistake."""
    where = address()
    if where.file is not None and not where.file.exists():
        raise UserError(
            f"there is no MLflow file {where.file}; go to the folder where the sweep ran, or set MLFLOW_TRACKING_URI"
        )
    return ask(client, where, where), where


def _move_artifacts(where: Address) -> None:
    """Have an MLflow file that was copied or moved with its folder name the artifacts that lie beside it now.

    MLflow keeps absolute paths and has no call to change them: reading would look where the folder was, and writing
    would add to the original.
    """
    file, artifacts = where.file, where.artifacts
    if file is None or artifacts is None or not file.exists() or not artifacts.is_dir():
        return
    with contextlib.closing(sqlite3.connect(file, timeout=30)) as database:
        tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        columns = [column for column in _ARTIFACT_COLUMNS if column[0] in tables]
        roots = set()
        for (location,) in database.execute("SELECT artifact_location FROM experiments") if columns else ():
            root, found, name = str(location).rpartition(f"/{artifacts.name}/")
            # Of an experiment that was never beside this file the artifacts are where they always were.
            if found and root.startswith("file://") and (artifacts / unquote(name)).is_dir():
                roots.add(f"{root}/{artifacts.name}")
        for root in roots - {artifacts.as_uri()}:
            old = Path(unquote(urlsplit(root).path))
            if old.exists() and old.samefile(artifacts):
                continue  # one folder under two names
            for table, column in columns:
                # Names of ours, no one else's.
                change = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?"
                start = root + "/"
                database.execute(change, (artifacts.as_uri() + "/", len(start) + 1, len(start), start))
        database.commit()


def ask(call: Callable[..., Any], where: Address, *arguments: Any, **named: Any) -> Any:
    """Call MLflow; a server that does not answer becomes a `UserError`."""
    try:
        return call(*arguments, **named)
    except Exception as problem:
        _refuse_other_version(problem, where)
        if error_code(problem) in UNAVAILABLE:
            raise UserError(
                f"the MLflow server {where.shown} does not answer as it should: {short_reason(problem)}"
            ) from None
        raise


def _refuse_other_version(problem: Exception, where: Address) -> None:
    """Say what to do about a database of an older or newer MLflow, which this one does not open."""
    if where.file is not None and "mlflow db upgrade" in str(problem):
        raise UserError(
            f"{where.file} was made by another version of MLflow; if it is older, keep a copy and run"
            f" mlflow db upgrade '{where.uri}'; else install that version, or move the file away"
        ) from None


def error_code(problem: Exception) -> str:
    """Return MLflow's code of a failure; an empty string for any other."""
    return str(getattr(problem, "error_code", ""))


def short_reason(problem: Exception) -> str:
    """Return what MLflow says in one line without secrets."""
    return (masked(str(problem)).strip() or type(problem).__name__).splitlines()[0][:200]


def check_server(where: Address, name: str) -> None:
    """See that the server at `where` lets us write the experiment `name`, before the first trial begins.

    An absent server is no obstacle, for records wait for it in the sweep's folder; one that refuses us would have
    them wait for ever, and so does an experiment of another user, or a file of another MLflow: all are a `UserError`.
    """
    if not where.is_server:
        if where.file is not None and where.file.exists():
            ask(lambda: client(where).get_experiment_by_name(name), where)
        return
    api = client(where)
    try:
        found = api.get_experiment_by_name(name)
    except Exception as problem:
        if error_code(problem) in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise UserError(
                f"the MLflow server {where.shown} refuses us: name or password is missing or wrong; set"
                " MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or ~/.mlflow/credentials (mode 600)"
            ) from None
        return
    if found is None or found.lifecycle_stage == "deleted":
        return
    try:  # what every sweep writes there: whether we may is only known by trying
        for key, value in KIND_OF_EXPERIMENT.items():
            api.set_experiment_tag(found.experiment_id, key, value)
    except Exception as problem:
        if error_code(problem) == "PERMISSION_DENIED":
            raise UserError(
                f"the experiment '{name}' at {where.shown} is another user's; choose another --name, or have its"
                " owner give you the right to edit it"
            ) from None


@cache
def code_version() -> dict[str, str]:
    """Return the package's version and, in a git checkout, its commit and state, as tags."""
    tags = {"stemtune.version": __version__}
    commit = _git("rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = commit
        tags["stemtune.commit"] = commit
        tags["stemtune.changed_files"] = str(len((_git("status", "--porcelain", "-uno") or "").splitlines()))
    return tags


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
