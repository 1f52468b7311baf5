"""Files that are kept with a run: a map's report with the model that made it, a comparison with its sweep."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from stemtune.errors import UserError, masked
from stemtune.tracking.query import _connect
from stemtune.tracking.registry import run_of


def log_files(spec: str, folder: Path, names: Sequence[str]) -> str | None:
    """Log files of `folder` as artifacts `maps/FOLDER/` of the run of a model; return where they are.

    Parameters
    ----------
    spec
        The model, as `resolve_model` takes it.
    folder
        The folder.
    names
        Names (* for any letters) of the files.

    Returns
    -------
    str or None
        Their address, `runs:/ID/maps/FOLDER`; None where the model comes from no run.

    Raises
    ------
    UserError
        When MLflow does not take them: its server is away, or the run was deleted.
    """
    run = run_of(spec)
    if run is None:
        return None
    place = f"maps/{folder.resolve().name}"
    put_files(run, folder, names, place)
    return f"runs:/{run}/{place}"


def put_files(run: str, folder: Path, names: Sequence[str], place: str) -> None:
    """Log files of `folder` as artifacts `place/` of the run with the id `run`.

    Raises
    ------
    UserError
        When MLflow does not take them.
    """
    api, where = _connect()
    chosen = [path for path in sorted(folder.iterdir()) if any(fnmatch(path.name, name) for name in names)]
    try:
        for path in chosen:
            api.log_artifact(run, str(path), place)
    except Exception as problem:
        reason = (masked(str(problem)) or type(problem).__name__).splitlines()[0][:200]
        raise UserError(f"{where.shown} did not take the files for the run {run}: {reason}") from None
