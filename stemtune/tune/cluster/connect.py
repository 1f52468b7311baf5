"""Joining or starting Ray, quietly, and whether it holds what a trial asks for."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from stemtune._files import refuse_readable
from stemtune.errors import UserError
from stemtune.tune.cluster import ENVIRONMENT, ray_internals
from stemtune.tune.cluster.node_check import workers_that_fit
from stemtune.tune.space.space import SearchSpace

HEAD = "node:__internal_head__"
"""Ray's own resource of the head node: trial drivers take a thousandth of it, and so no CPU from the workers."""

LOCAL = "use --local to run on this machine alone"

QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "5",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}

_TOKEN = secrets.token_hex(32)
"""Of every Ray of our own that this process starts: Ray remembers the first one that it shows."""

_joined: dict[str, Any] = {}
"""The Ray that `connect` started or joined in this process: its addresses, and whether it is ours."""


def connect(local: bool = False, address: str | None = None) -> dict[str, float]:
    """Start Ray on this machine, or join the Ray that runs here, and return its resources.

    A Ray of our own listens on the loopback address alone and asks for a token that only this process and its
    children know (or for the user's own token, where there is one). It stays until the process ends, or until the next
    call asks for another Ray. A Ray that the caller joined with `ray.init` is taken as it is.

    `local` asks for a Ray of our own even where one is running. Without it the Ray at `address`, or of `RAY_ADDRESS`,
    else the one that was started on this machine last (as on a cluster's head node), is joined, and only where there is
    none is one started. A `UserError` says that the Ray to join does not answer, refuses the token, or is of another
    version.
    """
    for name, value in {**QUIET, **ENVIRONMENT}.items():
        os.environ.setdefault(name, value)
    _quiet_loggers()
    if ray.is_initialized() and _joined and not _is_wanted(local, address):
        ray.shutdown()  # which ends a Ray of our own
        if _joined["ours"]:
            ray_internals.clusters_again()
    if not ray.is_initialized():
        _joined.clear()
        where = None if local else running(address)
        options: dict[str, Any] = {
            "logging_level": logging.ERROR,
            "log_to_driver": bool(os.environ.get("STEMTUNE_RAY_LOGS")),
            "runtime_env": {"env_vars": dict(ENVIRONMENT)},
        }
        with _answers_sigterm():
            if where is None:
                _start(options)
            else:
                _join(where, options)
        gcs = ray.get_runtime_context().gcs_address
        _joined.update(gcs=gcs, where=where or gcs, ours=where is None)
    _quiet_loggers()
    resources: dict[str, float] = ray.cluster_resources()
    return resources


def _is_wanted(local: bool, address: str | None) -> bool:
    """Whether the Ray that an earlier call started or joined is the one that this call asks for."""
    if ray.get_runtime_context().gcs_address != _joined["gcs"]:
        return True  # the caller has joined another one since
    where = None if local else running(address)
    return bool(_joined["ours"]) if where is None else where == _joined["where"]


def _join(where: str, options: dict[str, Any]) -> None:
    check_address(where)
    try:
        ray.init(address=where, **options)
    except Exception as problem:
        raise UserError(f"cannot join the Ray at {where} ({_first_line(problem)}); {LOCAL}") from None


def _start(options: dict[str, Any]) -> None:
    """Start a Ray of our own, which listens on the loopback address.

    Its processes take variable and token from our environment as they start; afterwards it is as it was.
    """
    changed = ray_internals.loopback_only()
    if os.environ.get("RAY_AUTH_MODE", "token") == "token" and not token_file().exists():
        changed["RAY_AUTH_TOKEN"] = os.environ.get("RAY_AUTH_TOKEN") or _TOKEN
    before = {name: os.environ[name] for name in changed if name in os.environ}
    os.environ.update(changed)
    try:
        ray.init(address="local", include_dashboard=False, **options)
    except Exception as problem:
        remedy = "try again when it is less busy, or see Ray's own logs in /tmp/ray/session_latest/logs"
        if "AF_UNIX" in str(problem):  # a socket's path has 107 bytes at most
            remedy = "set RAY_TMPDIR to a folder with a shorter name"
        raise UserError(f"Ray did not start on this machine ({_first_line(problem)}); {remedy}") from None
    finally:
        for name in changed:
            os.environ.pop(name, None)
        os.environ.update(before)


@contextlib.contextmanager
def _answers_sigterm() -> Iterator[None]:
    """Keep our answer to SIGTERM, where there is one: Ray replaces it by an exit without a word.

    A batch system sends the signal to every process of the command, and a terminal that goes away SIGHUP. Those of a
    Ray of our own, which start here, hear neither: without them the sweep could not end as it does after Ctrl-C, which
    Ray keeps from them itself.
    """
    before = signal.getsignal(signal.SIGTERM)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _quiet_loggers() -> None:
    for name in ("ray", "ray.tune", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)


def running(given: str | None = None) -> str | None:
    """Return the address of the Ray to join, `given` or that of `RAY_ADDRESS` first, or None where there is none."""
    name = "--ray" if given else "RAY_ADDRESS"
    given = given or os.environ.get("RAY_ADDRESS", "")
    if "://" in given:
        raise UserError(
            f"{name} is '{given}', but stemtune runs on a node of the cluster: give the head node's HOST:PORT, or use"
            " `ray submit cluster/hpc.yaml stemtune/sweep.py -- SPACE.yaml` from elsewhere"
        )
    if given not in ("", "auto", "local"):
        if not given.rpartition(":")[2].isdigit() or ":" not in given:
            raise UserError(f"{name} is '{given}', but must be the head node's HOST:PORT")
        return given
    return ray_internals.running_here()


def check_address(where: str) -> None:
    """See that the Ray at `where` answers and takes our token: Ray itself would try for minutes, and log each time."""
    host, _, port = where.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            pass
    except (OSError, ValueError) as problem:
        raise UserError(f"no Ray answers at {where} ({problem}); start it there, or {LOCAL}") from None
    from ray.exceptions import RayError

    try:
        if not (_accepts_token(where) or (use_token() and _accepts_token(where))):
            raise UserError(
                f"the Ray at {where} refuses us: the token is missing or wrong; copy the head node's ~/.ray/auth_token"
                f" to {token_file()} (mode 600) and set RAY_AUTH_MODE=token"
            )
    except RayError as problem:
        raise UserError(f"what answers at {where} is no Ray that we know ({_first_line(problem)}); {LOCAL}") from None


def _accepts_token(where: str) -> bool:
    """Whether the Ray at `where` takes the token that we show, if any."""
    with _silent_stderr():
        return ray_internals.accepts_token(where)


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keep what Ray's own library writes on stderr, past Python, from the user's eyes: its exception says it again."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def use_token() -> bool:
    """Show the token of the token file from now on, unless `RAY_AUTH_MODE` says otherwise; return whether it does.

    Ray does so by itself only for a cluster that it found by itself. It leaves the file readable for everybody, which
    is changed here, or refused.
    """
    file = token_file()
    if file.exists() and not os.environ.get("RAY_AUTH_TOKEN"):
        with contextlib.suppress(OSError):
            file.chmod(0o600)
        refuse_readable(file, "the token of Ray")
    return ray_internals.show_token()


def token_file() -> Path:
    """Return where Ray looks for the token when the environment does not hold it."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def _first_line(problem: Exception) -> str:
    """Return what Ray says in one line; of a version mismatch all of it, which it spreads over several."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    if not lines:
        return type(problem).__name__
    return " ".join(lines)[:300] if lines[0].startswith("Version mismatch") else lines[0]


def concurrency(space: SearchSpace, nodes: Sequence[Mapping[str, float]]) -> int:
    """Return how many trials can run at a time on `nodes`, each given as its resources.

    A largest trial that fits nowhere, and so would wait for ever, is refused.
    """
    fewest, most, _ = space.extremes
    each = {"CPU": space.resources.cpus_per_worker, "GPU": space.resources.gpus_per_worker}
    room = sum(workers_that_fit(node, each) for node in nodes)
    if most > room:
        asked = " and ".join(f"{need:g} {kind}s" for kind, need in each.items() if need)
        there = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind, need in each.items() if need}
        has = " and ".join(f"{value:g} {kind}s" for kind, value in there.items())
        spread = f" on {len(nodes)} nodes, which hold {room} such worker(s)" if len(nodes) > 1 else ""
        raise UserError(
            f"a trial of {most} worker(s) asks for {asked} each, but Ray has {has}{spread}; lower"
            " resources.cpus_per_worker or resources.gpus_per_worker (fractions share) or the number of workers"
        )
    if most > 1 and 0 < each["GPU"] < 1:
        raise UserError(
            f"a trial of {most} workers with {each['GPU']:g} GPUs each would put two of them on one GPU, which NCCL"
            " refuses; give each a whole one (resources.gpus_per_worker: 1), or take one worker"
        )
    return max(1, min(space.budget.trials, room // fewest, space.budget.concurrent or room))
