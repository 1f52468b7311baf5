"""From what a user calls a model to the folder that holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stemtune._files import shipped_models, shipped_or
from stemtune.errors import UserError, masked
from stemtune.tracking.events import CHAMPION, ID_TAG
from stemtune.tracking.query import _connect, reach


def resolve_model(spec: str) -> Path:
    """Return the model folder that `spec` names.

    Parameters
    ----------
    spec
        A model folder, an MLflow address (`models:/NAME@champion`, `runs:/ID/model`), the word `champion`, which is
        the champion of the sweep that crowned one last, or a model that ships with the package (`linio2`).

    Raises
    ------
    UserError
        When nothing of that name is there, or it holds no model.
    """
    folder = shipped_or(spec)
    if spec.startswith(("models:/", "runs:/")):
        return _whole(_fetched(spec), spec)
    if spec == CHAMPION and not folder.exists():
        return _whole(_fetched(_newest_champion()), spec)
    if not folder.exists():
        raise UserError(
            f"there is no model '{spec}'; give a model folder, models:/NAME@champion, runs:/ID/model, champion or "
            + ", ".join(shipped_models())
        )
    inner = folder / "model"
    return inner if not (folder / "model.json").exists() and (inner / "model.json").exists() else folder


def _whole(folder: Path, spec: str) -> Path:
    if not (folder / "model.json").is_file():
        raise UserError(f"what MLflow keeps as '{spec}' is no model of stemtune: it has no model.json")
    return folder


def _fetched(address: str) -> Path:
    api, where = _connect()
    import mlflow

    mlflow.set_tracking_uri(where.uri)
    mlflow.set_registry_uri(where.uri)
    source = _source(api, where, address)
    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=source))
    except Exception as problem:
        reason = (masked(str(problem)) or type(problem).__name__).splitlines()[0][:200]
        raise UserError(f"cannot fetch the model '{address}' from {where.shown}: {reason}") from None


def _source(api: Any, where: Any, address: str) -> str:
    """Return where the files of a registered model lie; `runs:/` addresses pass as they are."""
    return str(_version(api, where, address).source) if address.startswith("models:/") else address


def run_of(spec: str) -> str | None:
    """Return the id of the MLflow run that made the model that `resolve_model` takes by the same name.

    None where the model is a folder, or was registered without a run.

    Raises
    ------
    UserError
        When MLflow knows no such model.
    """
    if spec.startswith("runs:/"):
        return spec.removeprefix("runs:/").split("/")[0]
    if spec == CHAMPION and not shipped_or(spec).exists():
        spec = _newest_champion()
    if not spec.startswith("models:/"):
        return None
    return str(_version(*_connect(), spec).run_id or "") or None


def _version(api: Any, where: Any, address: str) -> Any:
    """Return what MLflow knows of the registered model at a `models:/` address."""
    name, at, alias = address.removeprefix("models:/").partition("@")
    try:
        if at:
            version = api.get_model_version_by_alias(name, alias)
        else:
            name, _, number = name.partition("/")
            version = api.get_model_version(name, number)
    except Exception as problem:
        known = ", ".join(model.name for model in reach(api.search_registered_models, where)) or "none"
        reason = (masked(str(problem)) or type(problem).__name__).splitlines()[0][:160]
        raise UserError(f"no model '{address}' at {where.shown} ({reason}); registered are: {known}") from None
    return version


def _newest_champion() -> str:
    api, where = _connect()
    newest: tuple[int, str] | None = None
    for model in reach(api.search_registered_models, where):
        number = dict(model.aliases).get(CHAMPION)
        if number is None:
            continue
        version = api.get_model_version(model.name, number)
        if ID_TAG in version.tags:
            found = (int(version.creation_timestamp), f"models:/{model.name}@{CHAMPION}")
            newest = max(newest, found) if newest else found
    if newest is None:
        raise UserError(f"no sweep has crowned a champion at {where.shown}; run `stemtune sweep` first")
    return newest[1]
