"""What the tests of MLflow records share: an empty folder, an empty database in it, a server."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from mlflow_server import Server


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow file with its tables and nothing in them; making one takes seconds."""
    from stemtune.tracking.client import Address, client

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    client(Address(f"sqlite:///{file}")).search_experiments()
    return file


@pytest.fixture
def prepared(here: Path, empty_database: Path) -> Path:
    shutil.copy(empty_database, here / "mlflow.db")
    return here


@pytest.fixture
def server(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server(here)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    try:
        yield made
    finally:
        made.stop()
