"""From what a user calls a model to the folder that holds it, and files that are kept with a model's run."""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stemtune._files import shipped_models, shipped_or
from stemtune.errors import UserError
from stemtune.tracking.client import Address, address, ask, open_client, short_reason
from stemtune.tracking.events import CHAMPION, CROWNED, DEPOSED, ID_TAG


@dataclass(frozen=True)
class ResolvedModel:
    """A model's folder, and the id of the MLflow run that made it; None where it is a folder of no run."""

    folder: Path
    run: str | None = None


@dataclass(frozen=True)
class Champion:
    """A model that a sweep has crowned."""

    address: str  # models:/NAME/VERSION
    sweep: str
    since: float  # when it was crowned, in seconds since 1970
    tags: dict[str, str]
    reigns: bool  # whether its sweep's alias names it
    deposed: bool  # whether its crown was taken back

    def __str__(self) -> str:
        tags = self.tags
        tested = tags.get("stemtune.champion_test", "")
        facts = (
            f"{self.sweep}, trial {tags.get('stemtune.trial_name', 'unknown')}",
            f"{tags.get('stemtune.champion_metric', '')} {tags.get('stemtune.champion_value', '')}".strip(),
            f"test split {tested}" if tested else "never tested",
            tags.get("stemtune.crystal", "crystal not recorded"),
            time.strftime("since %Y-%m-%d %H:%M", time.localtime(self.since)),
        )
        return ", ".join(filter(None, facts))


def resolve(spec: str) -> ResolvedModel:
    """Return the model that `spec` names, folder and run from one look at MLflow: an alias may move on meanwhile.

    `spec` is a model folder, an MLflow address (`models:/NAME@champion`, `runs:/ID/model`), the word `champion`, which
    is the champion that a sweep crowned last (a line on stderr says which), or a model that ships with the package
    (`linio2`). A model that has to be fetched from a server is removed again when the process ends. A `UserError` says
    that nothing of that name is there, or that it holds no model.
    """
    folder = shipped_or(spec)
    if spec.startswith(("models:/", "runs:/")):
        return _from_mlflow(spec, spec)
    if spec == CHAMPION and not folder.exists():
        champions = reigning()
        if not champions:
            raise UserError(f"no sweep has crowned a champion at {address().shown}; run `stemtune sweep` first")
        print(f"champion: {champions[0]}", file=sys.stderr)
        return _from_mlflow(champions[0].address, spec)
    if not folder.exists():
        raise UserError(
            f"there is no model '{spec}'; give a model folder, models:/NAME@champion, runs:/ID/model, champion or "
            + ", ".join(shipped_models())
        )
    inner = folder / "model"
    is_inner = not (folder / "model.json").exists() and (inner / "model.json").exists()
    return ResolvedModel(inner if is_inner else folder)


def resolve_model(spec: str) -> Path:
    """Return the model folder that `spec` names; see `resolve`."""
    return resolve(spec).folder


def _from_mlflow(address: str, spec: str) -> ResolvedModel:
    api, where = open_client()
    import mlflow

    try:
        if address.startswith("models:/"):
            version = _version(api, where, address)
            run, source = version.run_id or None, str(version.source)
            place = source
        else:
            run, source = address.removeprefix("runs:/").partition("/")[0], address
            place = str(api.get_run(run).info.artifact_uri)
        copy = None
        # What MLflow copies goes when the process ends; a registered model on this machine is read where it lies.
        if source == address or urlsplit(place).scheme not in ("", "file"):
            copy = tempfile.mkdtemp(prefix="stemtune-model-")
            atexit.register(shutil.rmtree, copy, ignore_errors=True)
        folder = Path(mlflow.artifacts.download_artifacts(source, dst_path=copy, tracking_uri=where.uri))
    except UserError:
        raise
    except Exception as problem:
        raise UserError(f"cannot fetch the model '{address}' from {where.shown}: {short_reason(problem)}") from None
    if not (folder / "model.json").is_file():
        raise UserError(f"what MLflow keeps as '{spec}' is no model of stemtune: it has no model.json")
    return ResolvedModel(folder, run)


def _version(api: Any, where: Address, address: str) -> Any:
    """Return what MLflow knows of the registered model at a `models:/` address."""
    name, at, alias = address.removeprefix("models:/").partition("@")
    try:
        if at:
            return api.get_model_version_by_alias(name, alias)
        name, _, number = name.partition("/")
        return api.get_model_version(name, number)
    except Exception as problem:
        known = ", ".join(model.name for model in ask(api.search_registered_models, where)) or "none"
        raise UserError(
            f"no model '{address}' at {where.shown} ({short_reason(problem)}); registered are: {known}"
        ) from None


def champions() -> list[Champion]:
    """Return every model that a sweep has crowned, the newest first."""
    api, where = open_client()
    found = []
    for model in ask(api.search_registered_models, where):
        alias = str(dict(model.aliases).get(CHAMPION))
        for version in ask(api.search_model_versions, where, f"name = '{model.name}'"):
            if ID_TAG in version.tags:
                since = float(version.tags.get(CROWNED, version.creation_timestamp)) / 1000
                address, tags = f"models:/{model.name}/{version.version}", dict(version.tags)
                named = str(version.version) == alias
                found.append(Champion(address, model.name, since, tags, named, DEPOSED in tags))
    return sorted(found, key=lambda champion: -champion.since)


def reigning() -> list[Champion]:
    """Return the champions that their sweeps' aliases name, the newest first; of a crystal the first one reigns."""
    return [champion for champion in champions() if champion.reigns]


def roll_back(sweep: str | None = None) -> tuple[Champion, Champion | None]:
    """Take the crown from the champion of `sweep`, or from the newest; return it and the one that reigns now."""
    api, where = open_client()
    every = champions()
    last = next((one for one in every if one.reigns and sweep in (None, one.sweep)), None)
    if last is None:
        raise UserError(f"no champion{f' of {sweep}' if sweep else ''} reigns at {where.shown}")
    name, number = last.address.removeprefix("models:/").split("/")
    ask(api.set_model_version_tag, where, name, number, DEPOSED, str(int(1000 * time.time())))
    before = next((one for one in every if one.sweep == last.sweep and not one.deposed and one is not last), None)
    if before is None:
        ask(api.delete_registered_model_alias, where, name, CHAMPION)
    else:
        ask(api.set_registered_model_alias, where, name, CHAMPION, before.address.rpartition("/")[2])
    return last, next(iter(reigning()), None)


def log_files(run: str, folder: Path, names: Sequence[str], place: str) -> str:
    """Log files of `folder` whose names match `names` as artifacts `place/` of an MLflow run; return their address.

    A `UserError` says that MLflow does not take them: its server is away, or the run was deleted.
    """
    api, where = open_client()
    chosen = [path for path in sorted(folder.iterdir()) if any(fnmatch(path.name, name) for name in names)]
    try:
        for path in chosen:
            api.log_artifact(run, str(path), place)
    except Exception as problem:
        raise UserError(f"{where.shown} did not take the files for the run {run}: {short_reason(problem)}") from None
    return f"runs:/{run}/{place}"
