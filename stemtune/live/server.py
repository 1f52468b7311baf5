"""A model behind Ray Serve: requests are let in by a token, put together to batches, and turned away when too many.

What is served is a function of a module, as in `processes.Spread`; this room knows only HTTP, arrays and Ray. POST a
stack of frames (n, height, width) or one frame to `/`, as the bytes of a .npy file or, where msgpack is installed, as
a map of `shape`, `dtype` and `data`; `Authorization: Bearer TOKEN`. The answer is JSON, or with
`Accept: application/x-npy` the bytes of a .npy file with a field for each column.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stemtune._files import refuse_readable
from stemtune.errors import UserError

TOKEN = "STEMTUNE_TOKEN"
"""The environment's variable that holds the token."""

LARGEST_MIB = 64
"""Largest body of a request."""

_LEAST_TOKEN = 16  # characters
_NPY, _MSGPACK = "application/x-npy", "application/msgpack"

Columns = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Served:
    """What is served: three functions of a module, which travel to Ray by name.

    Attributes
    ----------
    prepare
        Makes the state from `given`, once.
    given
        What it is made from.
    check
        Returns what `work` needs of an array and the query of a request, or raises a `UserError`, which becomes a 400.
    work
        Returns the columns of the answers to several requests, in their order.
    """

    prepare: Callable[[Any], Any]
    given: Any
    check: Callable[[Any, npt.NDArray[Any], Mapping[str, str]], Any]
    work: Callable[[Any, list[Any]], list[Columns]]


@dataclass(frozen=True)
class Limits:
    """How many requests are worked on together, for how long one waits for others, and how many wait in line."""

    batch: int = 16
    wait_s: float = 0.01
    queue: int = 64


def token_from(file: str | os.PathLike[str] | None) -> str:
    """Return the token of the environment's `STEMTUNE_TOKEN`, or of `file`, which is made where it does not exist.

    Raises
    ------
    UserError
        When there is neither, others may read the file, or the token is too short to be one.
    """
    if file is None:
        token = os.environ.get(TOKEN, "").strip()
        if not token:
            raise UserError(f"a token is needed: set {TOKEN}, or give --token-file FILE (made if it does not exist)")
        return _long_enough(token, TOKEN)
    path = Path(file).expanduser()
    try:
        made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        pass
    except OSError as problem:
        raise UserError(f"the token file '{file}' cannot be written: {problem.strerror}; choose another") from None
    else:
        with os.fdopen(made, "w") as new:
            new.write(secrets.token_urlsafe(32) + "\n")
    try:
        refuse_readable(path, "the token of the service")
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"the token file '{file}' cannot be read; give another") from None
    return _long_enough(token, f"the file '{file}'")


def _long_enough(token: str, place: str) -> str:
    if len(token) < _LEAST_TOKEN or not token.isascii():
        raise UserError(f"the token in {place} must be of {_LEAST_TOKEN} ASCII characters or more")
    return token


def serve_until_stopped(
    served: Served,
    token: str,
    host: str = "127.0.0.1",
    port: int = 8500,
    limits: Limits | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until Ctrl-C, on a Ray of our own.

    Parameters
    ----------
    served
        What is served.
    token
        What requests have to show.
    host, port
        Where to listen; the default is this machine alone.
    limits
        How much is taken in.
    ready
        Is told the address once requests are answered.

    Raises
    ------
    UserError
        When Ray Serve is not installed, or the port is taken.
    """
    serve = _ray_serve()
    _free(host, port)
    import ray

    from stemtune.tune.cluster.connect import connect

    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    cpus = max(1, int(connect(local=True).get("CPU", 1)))
    try:
        serve.start(http_options={"host": host, "port": port}, proxy_location="HeadOnly")
        serve.run(_application(served, token, limits or Limits(), cpus), name="stemtune", route_prefix="/")
        if ready is not None:
            ready(f"http://{host}:{port}/")
        while True:
            time.sleep(1)
    finally:
        serve.shutdown()
        ray.shutdown()


def _ray_serve() -> Any:
    try:
        from ray import serve
    except ImportError:
        raise UserError("Ray Serve is not installed; pip install 'stemtune[serve]'") from None
    return serve


def _free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError as problem:
            raise UserError(f"cannot listen at {host}:{port}: {problem.strerror}; choose another --port") from None


def _application(served: Served, token: str, limits: Limits, cpus: int) -> Any:
    serve = _ray_serve()
    shown = hashlib.sha256(token.encode()).digest()  # the token itself does not travel

    @serve.deployment(  # type: ignore[untyped-decorator, unused-ignore]
        max_ongoing_requests=2 * limits.batch,
        max_queued_requests=limits.queue,
        ray_actor_options={"num_cpus": cpus},
        logging_config={"log_level": "ERROR", "enable_access_log": False},
    )
    class Answering:
        def __init__(self) -> None:
            import torch

            torch.set_num_threads(cpus)
            self.state = served.prepare(served.given)

        @serve.batch(max_batch_size=limits.batch, batch_wait_timeout_s=limits.wait_s)  # type: ignore[untyped-decorator, unused-ignore]
        async def together(self, asked: list[Any]) -> list[Columns]:
            import asyncio

            return await asyncio.get_running_loop().run_in_executor(None, served.work, self.state, asked)

        async def __call__(self, request: Any) -> Any:
            from starlette.responses import Response

            try:
                if not allowed(request.headers.get("authorization"), shown):
                    raise Refused(401, "show the token: Authorization: Bearer TOKEN")
                if request.method != "POST":
                    raise Refused(405, "POST frames as a .npy")
                if int(request.headers.get("content-length") or 0) > LARGEST_MIB * 2**20:
                    raise Refused(413, f"a request may have {LARGEST_MIB} MiB; send fewer frames at a time")
                array = parsed(await request.body(), request.headers.get("content-type") or "")
                asked = served.check(self.state, array, dict(request.query_params))
            except Refused as refusal:
                return Response(f"{refusal}\n", refusal.status, media_type="text/plain")
            except UserError as mistake:
                return Response(f"{mistake}\n", 400, media_type="text/plain")
            body, kind = written(await self.together(asked), request.headers.get("accept") or "")
            return Response(body, media_type=kind)

    deployment: Any = Answering
    return deployment.bind()


class Refused(Exception):
    """A request that is not answered, with the HTTP status that says so."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


def allowed(header: str | None, shown: bytes) -> bool:
    """Return whether an Authorization header shows the token with the sha256 `shown`."""
    kind, _, token = (header or "").partition(" ")
    given = hashlib.sha256(token.strip().encode(errors="replace")).digest()
    return hmac.compare_digest(given, shown) and kind.lower() == "bearer"


def parsed(body: bytes, kind: str) -> npt.NDArray[Any]:
    """Return the array in the body of a request; nothing in it is run.

    Raises
    ------
    UserError
        When it holds none, or one that is no array of numbers.
    """
    try:
        if kind.startswith(_MSGPACK):
            import msgpack

            told = msgpack.unpackb(body)
            dtype = np.dtype(str(told["dtype"]))
            array = np.frombuffer(told["data"], dtype=dtype).reshape([int(length) for length in told["shape"]])
        else:
            array = np.load(io.BytesIO(body), allow_pickle=False)
    except ImportError:
        raise UserError("the server has no msgpack; send the bytes of a .npy file") from None
    except Exception:  # whatever a damaged body makes a parser raise
        raise UserError("the body is neither the bytes of a .npy file nor msgpack of shape, dtype, data") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "buif":
        raise UserError("the body holds no array of numbers")
    return array


def written(columns: Columns, accept: str) -> tuple[bytes, str]:
    """Return answers as a body and its media type: JSON, or .npy where that is accepted."""
    if _NPY not in accept:
        return json.dumps({name: column.tolist() for name, column in columns.items()}).encode(), "application/json"
    fields = [(name, column.dtype, column.shape[1:]) for name, column in columns.items()]
    table = np.zeros(len(next(iter(columns.values()))), dtype=fields)
    for name, column in columns.items():
        table[name] = column
    body = io.BytesIO()
    np.save(body, table)
    return body.getvalue(), _NPY
