"""Where the records go: `MLFLOW_TRACKING_URI`, or a SQLite file in the working folder with artifacts beside it."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stemtune._files import refuse_readable
from stemtune.errors import UserError, masked

_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "file", "databricks", "uc")


@dataclass(frozen=True)
class Address:
    """An MLflow tracking address.

    Attributes
    ----------
    uri
        What MLflow calls the tracking URI.
    artifacts
        Folder of the artifacts where we choose it; None leaves it to the server.
    """

    uri: str
    artifacts: Path | None = None

    @property
    def is_server(self) -> bool:
        """Whether records travel over the network."""
        return self.uri.startswith(("http:", "https:"))

    @property
    def shown(self) -> str:
        """The address without name and password."""
        return masked(self.uri)


def address(folder: Path | None = None) -> Address:
    """Return the tracking address in force; the default lies in `folder`, else in the working folder.

    Raises
    ------
    UserError
        When `MLFLOW_TRACKING_URI` is set to something that MLflow has no store for, or others can read the file
        with the password of the server.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    here = (folder or Path.cwd()).absolute()
    if not given:
        return Address(f"sqlite:///{here / 'mlflow.db'}", here / "mlartifacts")
    scheme = given.split(":", 1)[0].split("+", 1)[0] if ":" in given else ""
    if scheme and scheme not in _SCHEMES:
        raise UserError(
            f"MLFLOW_TRACKING_URI is '{masked(given)}', but must be http://HOST:PORT, sqlite:///FILE, another database,"
            " or unset"
        )
    secret = Path.home() / ".mlflow" / "credentials"  # where MLflow looks when the environment holds no password
    if scheme in ("http", "https") and "MLFLOW_TRACKING_PASSWORD" not in os.environ and secret.is_file():
        refuse_readable(secret, "the password of the MLflow server")
    beside = Path(given.removeprefix("sqlite:///")).absolute().parent if scheme == "sqlite" else None
    return Address(given, beside / "mlartifacts" if beside else None)


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
    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import mlflow

    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return mlflow.MlflowClient(tracking_uri=where.uri, registry_uri=where.uri)
