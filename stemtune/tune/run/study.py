"""Where Optuna's study of a search lies: in the sweep's folder, or where several sweeps share it.

Several drivers that share a study propose from what all of them have learned. Each trial of a study carries the id of
the sweep that runs it, so that a driver that comes back after a crash ends its own lost trials and nobody else's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from stemtune.errors import UserError, masked
from stemtune.tune.space.space import SearchSpace

STUDY = "study.journal"
SWEEP, SETTINGS = "stemtune.sweep", "stemtune.settings"
"""User attributes of a trial: the sweep that runs it, the digest of its settings."""

SPACE, AGAIN = "stemtune.space", "stemtune.again"
"""User attributes of a study: what it searches; with a sweep's id, which trials that planned anew after a crash."""

_LOCK = 0x5354454D  # number of the database's lock, any that nobody else uses


@dataclass(frozen=True)
class Study:
    """A study's name, and the database or the journal file that holds it."""

    name: str
    url: str = ""
    file: Path | None = None

    @property
    def shown(self) -> str:
        """Where it lies, without secrets."""
        return masked(self.url) if self.url else str(self.file)


def find_study(given: str, folder: Path, space: SearchSpace) -> Study:
    """Return the study of the sweep in `folder`.

    `given` is empty for a study of its own; the name of another sweep, whose study is shared; or
    `postgresql://USER@HOST/DATABASE[#NAME]`, where NAME is the space's own name unless given. An address of another
    kind, or one that holds a password, is refused.
    """
    if "://" not in given:
        name = given or folder.name
        return Study(name, file=folder.parent / name / STUDY)
    url, _, name = given.partition("#")
    scheme, _, rest = url.partition("://")
    parts = urlsplit(url)
    if parts.password or "password=" in parts.query:
        raise UserError("the address of a study must hold no password; put it into ~/.pgpass (mode 600) or PGPASSWORD")
    if scheme.split("+")[0] == "postgresql":
        return Study(name or space.name, url=f"postgresql+psycopg://{rest}")
    raise UserError(f"--study is '{masked(given)}', but must be a sweep's name or postgresql://USER@HOST/DATABASE")


def open_storage(study: Study) -> BaseStorage:
    """Open what holds the study; refuse a database that does not answer, refuses us, or is MLflow's."""
    if study.file is not None:
        study.file.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(os.fspath(study.file)))
    import sqlalchemy

    try:
        engine = sqlalchemy.create_engine(study.url)
        with contextlib.ExitStack() as last:
            last.callback(engine.dispose)
            connection = last.enter_context(engine.connect())
            # Whoever comes first makes the tables; two at once would each find none and one would fail.
            connection.execute(sqlalchemy.text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
            tables = set(sqlalchemy.inspect(connection).get_table_names())
            if "alembic_version" in tables and "studies" not in tables:
                raise UserError(
                    f"the database {study.shown} holds other tables, MLflow's perhaps, and a study needs one of its"
                    " own: createdb --owner USER optuna"
                )
            return RDBStorage(study.url, engine_kwargs={"pool_pre_ping": True})
    except (ModuleNotFoundError, sqlalchemy.exc.SQLAlchemyError, RuntimeError) as problem:
        hint = "; pip install -e '.[server]'" if isinstance(problem, ModuleNotFoundError) else ""
        reason = masked(str(problem)).strip().splitlines()[0][:300] or type(problem).__name__
        raise UserError(f"cannot open the study at {study.shown}: {reason}{hint}") from None


def join(study: Study, storage: BaseStorage, space: SearchSpace) -> bool:
    """Return whether the study is there already; refuse it when it searches anything else than `space`."""
    try:
        number = storage.get_study_id_from_name(study.name)
    except KeyError:
        return False
    theirs = storage.get_study_user_attrs(number).get(SPACE)
    if theirs is not None and theirs != search_digest(space):
        raise UserError(
            f"the study '{study.name}' at {study.shown} searches another space or by another metric; sweeps that share"
            " a study need the same metric, mode and search"
        )
    return True


def search_digest(space: SearchSpace) -> str:
    """Return a digest of what two sweeps must have in common to share a study."""
    return digest([*map(list, space.objectives), {key: repr(form) for key, form in space.search.items()}])


def digest(value: Any) -> str:
    """Return a short digest of anything that JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
