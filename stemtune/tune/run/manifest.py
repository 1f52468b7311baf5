"""What a sweep writes down about itself in its folder, and how its space is read back, wherever its files lie."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stemtune._files import whole_file
from stemtune._version import __version__
from stemtune.config import Scalar
from stemtune.errors import UserError, did_you_mean, masked
from stemtune.tune.formatting import STATUS_WORDS
from stemtune.tune.run.trial_state import TrialState, recorded_trials
from stemtune.tune.space.describe import describe_space
from stemtune.tune.space.forms import Branch, Choice, Constant, Form
from stemtune.tune.space.space import SearchSpace, space_from_text, walk

MANIFEST = "sweep.json"
DRIVER = "driver.lock"  # held by the process that drives a sweep, in the sweep's folder
PATHS = ("data.store", "data.mix_store", "data.validation_store", "data.cif", "model.pretrained")
"""Settings that name a file."""

SHIPPED = ("linio2",)  # names that stand for files of ours


def sweeps_folder() -> Path:
    """Return where sweeps live: `STEMTUNE_SWEEPS`, or `sweeps` in the working folder."""
    given = os.environ.get("STEMTUNE_SWEEPS") or "sweeps"
    if "://" in given:  # locks, renames and Optuna's journal need a file system
        raise UserError(
            f"STEMTUNE_SWEEPS is '{masked(given)}', but must be a folder that every node sees: mount the store (s3fs,"
            " NFS) and name the folder"
        )
    return Path(given).expanduser().absolute()


def checked_name(name: str) -> str:
    """Return `name` if it can name a folder, an experiment and a model."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UserError(f"the name '{name}' of a sweep may hold letters, digits, '.', '_' and '-' only")
    return name


def check_name_free(folder: Path) -> None:
    if (folder / MANIFEST).exists():
        raise UserError(
            f"there is a sweep called '{folder.name}' already; --resume {folder.name} goes on with it, --name NAME"
            " starts another"
        )


@contextlib.contextmanager
def single_driver(folder: Path) -> Iterator[None]:
    """Be the only driver of the sweep in `folder`: two would each take the other's trials for lost."""
    with (folder / DRIVER).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip() or "elsewhere"
            raise UserError(f"the sweep '{folder.name}' is running ({who}); wait for its end, or stop it") from None
        except OSError:
            pass  # a file system that knows no locks
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def new_manifest(space: SearchSpace, name: str) -> dict[str, Any]:
    """Return what a sweep writes down about itself when it starts."""
    return {
        "name": name,
        "sweep_id": uuid.uuid4().hex,
        "version": __version__,
        "started": time.time(),
        "status": "running",
        "space": space.text,
        "space_name": space.name,
        "fixed": dict(space.fixed),
        "home": str(Path.cwd()),
        "folder": str(sweeps_folder() / name),
        "trials": space.budget.trials,
        "hours": space.budget.hours,
    }


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    with whole_file(folder / MANIFEST) as part:
        part.write_text(json.dumps(manifest, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read what the sweep in `folder` wrote down when it started."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        known = sorted(found.parent.name for found in folder.parent.glob(f"*/{MANIFEST}"))
        hint = did_you_mean(folder.name, known) or (f"; there are {', '.join(known)}" if known else "")
        raise UserError(f"there is no sweep called '{folder.name}' in {folder.parent}{hint}") from None
    except (OSError, ValueError) as problem:
        raise UserError(f"'{folder / MANIFEST}' is corrupt: {problem}") from None
    return manifest


def space_from_manifest(manifest: dict[str, Any]) -> SearchSpace:
    """Return the space of a sweep with the budget in force, `--set`, `--trials` and `--hours` included."""
    space = space_from_text(manifest["space"], manifest["space_name"])
    changed = {key: value for key, value in manifest["fixed"].items() if space.fixed.get(key) != value}
    return space.with_settings(changed).with_budget(trials=int(manifest["trials"]), hours=manifest.get("hours"))


def extended(
    manifest: dict[str, Any], states: Sequence[TrialState], trials: int | None, hours: float | None
) -> dict[str, Any]:
    """Return the manifest with another number of trials or hours; fewer trials than have begun are refused."""
    if trials is not None and trials < len(states):
        raise UserError(f"--trials is {trials}, but {len(states)} trials of '{manifest['name']}' have begun; give more")
    return manifest | ({"trials": trials} if trials else {}) | ({"hours": hours} if hours else {})


def located(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest as it is right for a sweep that lies in `folder`, which may be a copy or have been moved.

    Files that the sweep names and that are gone are looked for where the copy has them. Where the original is still
    there and writes to the same MLflow, the records of the copy are a sweep of their own, sent from the start.
    """
    old = Path(manifest.get("folder") or Path(manifest.get("home", ".")) / "sweeps" / str(manifest["name"]))
    if old == folder or (old.exists() and old.samefile(folder)):
        return manifest
    root, new_root = old, folder
    while root.name == new_root.name and root != root.parent and new_root != new_root.parent:
        root, new_root = root.parent, new_root.parent
    moved = {**manifest, "folder": str(folder), "name": folder.name}
    fixed = {key: _found_again(key, value, root, new_root) for key, value in manifest["fixed"].items()}
    moved |= {"fixed": fixed, "home": str(Path.cwd())}
    shared = os.environ.get("MLFLOW_TRACKING_URI") or manifest.get("home") == str(Path.cwd())
    with contextlib.suppress(OSError, ValueError):
        if shared and json.loads((old / MANIFEST).read_text()).get("sweep_id") == manifest["sweep_id"]:
            moved["records_id"] = uuid.uuid4().hex
    return moved


def _found_again(key: str, value: Scalar, root: Path, new_root: Path) -> Scalar:
    if key in PATHS and isinstance(value, str) and Path(value).is_relative_to(root) and not Path(value).exists():
        there = new_root / Path(value).relative_to(root)
        return str(there) if there.exists() else value
    return value


def describe_resume(name: str, trials: int | None = None, hours: float | None = None) -> str:
    """Say what `--resume` would do with the sweep `name`."""
    folder = sweeps_folder() / checked_name(name)
    manifest = located(folder, read_manifest(folder))
    space = absolute(space_from_manifest(manifest), Path(manifest.get("home", ".")))
    states = recorded_trials(folder, space.metric, space.mode)
    space = space_from_manifest(extended(manifest, states, trials, hours))
    ended = Counter(state.status for state in states)
    words = ", ".join(f"{count} {STATUS_WORDS[status]}" for status, count in ended.items()) or "none begun"
    again = sum(ended[status] for status in ("running", "interrupted", "failed"))
    left = max(0, space.budget.trials - ended.total())
    does = f"would go on with {again} and start {left} more" if again or left else "has nothing left to run"
    return f"{describe_space(space, folder)}\n  trials so far: {words}; --resume {does}"


def unfinished() -> list[str]:
    """Return the names of the sweeps here that did not finish, the newest first."""
    manifests = [read_manifest(file.parent) for file in sweeps_folder().glob(f"*/{MANIFEST}")]
    open_ones = [manifest for manifest in manifests if manifest.get("status") != "finished"]
    return [str(one["name"]) for one in sorted(open_ones, key=lambda one: float(one["started"]), reverse=True)]


def absolute(space: SearchSpace, home: Path) -> SearchSpace:
    """Return the space with every path absolute, whether constant, searched or in `first`: trials run elsewhere.

    Relative paths start from the folder `home`; a file that is not there is refused.
    """
    fixed = {key: _absolute_path(key, value, home) for key, value in space.fixed.items()}
    search = {key: _absolute_form(key, form, home) for key, form in space.search.items()}
    first = tuple({key: _absolute_path(key, value, home) for key, value in point.items()} for point in space.first)
    return replace(space, fixed=fixed, search=search, first=first)


def _absolute_path(key: str, value: Scalar, home: Path) -> Scalar:
    if key not in PATHS or not isinstance(value, str) or not value or value in SHIPPED:
        return value
    found = home / Path(value).expanduser()
    if not found.exists():
        raise UserError(f"`{key}` '{value}' does not exist")
    return str(found.absolute())


def _absolute_form(key: str, form: Form, home: Path) -> Form:
    if isinstance(form, Constant):
        return Constant(_absolute_path(key, form.value, home))
    if isinstance(form, Choice):
        return Choice(tuple(_absolute_path(key, value, home) for value in form.values))
    if isinstance(form, Branch):
        branches = {
            name: {inner: _absolute_form(inner, kind, home) for inner, kind in inside.items()}
            for name, inside in form.branches.items()
        }
        return replace(form, branches=branches)
    return form


def named_files(space: SearchSpace) -> list[str]:
    """Return the files that the space names, each once."""
    values = {point.get(key) for point in (space.fixed, *space.first) for key in PATHS}
    for key, form, _ in walk(space.search):
        if key in PATHS and isinstance(form, Choice | Constant):
            values.update(form.values)
    return sorted(value for value in values if isinstance(value, str) and Path(value).is_file())
