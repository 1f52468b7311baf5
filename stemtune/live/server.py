"""A model behind Ray Serve: requests are let in by a token, put together to batches, and turned away when too many.

POST a stack of frames (n, height, width) or one frame to `/`, as the bytes of a .npy file or, where msgpack is
installed, as a map of `shape`, `dtype` and `data`; `Authorization: Bearer TOKEN`. The answer is JSON, or with
`Accept: application/x-npy` the bytes of a .npy file with a field for each column.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import io
import itertools
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stemtune._files import refuse_readable
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError
from stemtune.indexing.predictor import Indexer
from stemtune.learning.checkpoint import load_model
from stemtune.scan.readers.scan import stored_type, valid_counts

TOKEN = "STEMTUNE_TOKEN"  # the environment's variable that holds the token
MAX_MIB = 64  # largest body of a request
_MIN_TOKEN = 16  # characters
_CALIBRATIONS = 8  # that are kept ready
_MAX_FRAMES = 4096  # of a request
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_NPY, _MSGPACK = "application/x-npy", "application/msgpack"

Columns = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Limits:
    """How many requests are worked on together, for how long one waits for others, and how many wait in line."""

    batch: int = 16
    wait_s: float = 0.01
    queue: int = 64


def token_from(file: str | os.PathLike[str] | None) -> str:
    """Return the token of the environment's `STEMTUNE_TOKEN`, or of `file`, which is made where it does not exist.

    A `UserError` says that there is neither, that others may read the file, or that the token is too short to be one.
    """
    if file is None:
        token, place = os.environ.get(TOKEN, "").strip(), TOKEN
        if not token:
            raise UserError(f"a token is needed: set {TOKEN}, or give --token-file FILE (made if it does not exist)")
    else:
        path, place = Path(file).expanduser(), f"the file '{file}'"
        try:
            with suppress(FileExistsError), os.fdopen(os.open(path, _NEW_FILE, 0o600), "w") as new:
                new.write(secrets.token_urlsafe(32) + "\n")
        except OSError as problem:
            raise UserError(f"the token file '{file}' cannot be written: {problem.strerror}; choose another") from None
        try:
            refuse_readable(path, "the token of the service")
            token = path.read_text().strip()
        except (OSError, UnicodeDecodeError):
            raise UserError(f"the token file '{file}' cannot be read; give another") from None
    if len(token) < _MIN_TOKEN or not token.isascii():
        raise UserError(f"the token in {place} must be of {_MIN_TOKEN} ASCII characters or more")
    return token


def serve_until_stopped(
    folder: str,
    token: str,
    host: str = "127.0.0.1",
    port: int = 8500,
    limits: Limits | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the model in `folder` to whoever shows the `token` until Ctrl-C, on a Ray of our own.

    It listens at `host` and `port`, by default for this machine alone, and calls `ready` with the address once
    requests are answered. A `UserError` says that Ray Serve is not installed, or that the port is taken.
    """
    try:
        from ray import serve
    except ImportError:
        raise UserError("Ray Serve is not installed; pip install 'stemtune[serve]'") from None
    _check_port(host, port)
    import ray

    from stemtune.tune.cluster.connect import connect

    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    cpus = max(1, int(connect(local=True).get("CPU", 1)))
    try:
        serve.start(http_options={"host": host, "port": port}, proxy_location="HeadOnly")
        serve.run(_application(folder, token, limits or Limits(), cpus), name="stemtune", route_prefix="/")
        if ready is not None:
            ready(f"http://{host}:{port}/")
        while True:
            time.sleep(1)
    finally:
        serve.shutdown()
        ray.shutdown()


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as problem:
            raise UserError(f"cannot listen at {host}:{port}: {problem.strerror}; choose another --port") from None


def _application(folder: str, token: str, limits: Limits, cpus: int) -> Any:
    from ray import serve

    digest = hashlib.sha256(token.encode()).digest()  # the token itself does not travel

    @serve.deployment(  # type: ignore[untyped-decorator, unused-ignore]
        max_ongoing_requests=2 * limits.batch,
        max_queued_requests=limits.queue,
        ray_actor_options={"num_cpus": cpus},
        logging_config={"log_level": "ERROR", "enable_access_log": False},
    )
    class Endpoint:
        def __init__(self) -> None:
            import torch

            torch.set_num_threads(cpus)
            self.service = Service(folder)
            self.service.warm_up()

        @serve.batch(max_batch_size=limits.batch, batch_wait_timeout_s=limits.wait_s)  # type: ignore[untyped-decorator, unused-ignore]
        async def together(self, requests: list[Request]) -> list[Columns]:
            return await asyncio.to_thread(self.service.answer, requests)

        async def __call__(self, request: Any) -> Any:
            from starlette.responses import Response

            try:
                if not allowed(request.headers.get("authorization"), digest):
                    raise Refusal(401, "show the token: Authorization: Bearer TOKEN")
                if request.method != "POST":
                    raise Refusal(405, "POST frames as a .npy")
                body = await limited(request.stream(), request.headers.get("content-length"))
                array = parsed(body, request.headers.get("content-type") or "")
                # In a thread: a calibration that is new takes a while, and other requests are let in meanwhile.
                checked = await asyncio.to_thread(self.service.check, array, dict(request.query_params))
            except Refusal as refusal:
                return Response(f"{refusal}\n", refusal.status, media_type="text/plain")
            except UserError as mistake:
                return Response(f"{mistake}\n", 400, media_type="text/plain")
            body, kind = written(await self.together(checked), request.headers.get("accept") or "")
            return Response(body, media_type=kind)

    deployment: Any = Endpoint
    return deployment.bind()


class Request(NamedTuple):
    """Frames (n, size, size) of one request, as a store has them, and what answers them."""

    frames: npt.NDArray[Any]
    indexer: Indexer


class Service:
    """The model in a folder, and what it takes to answer frames of several calibrations, used by several threads."""

    def __init__(self, folder: str) -> None:
        self.model = load_model(folder)
        self._lock = threading.Lock()
        self._kept = lru_cache(_CALIBRATIONS)(lambda geometry: Indexer(self.model, geometry, alternatives=1))

    def indexer(self, geometry: Geometry) -> Indexer:
        """Return what answers frames of this calibration; the latest few are kept, and none is made twice."""
        with self._lock:
            return self._kept(geometry)

    def warm_up(self) -> None:
        """Let the model answer something, so that the first request does not wait for what is made at that."""
        size = self.model.geometry.size
        frames = np.random.default_rng(0).poisson(1.0, (2, size, size)).astype(np.uint16)
        self.indexer(self.model.geometry).index(frames)

    def check(self, frames: npt.NDArray[Any], query: Mapping[str, str]) -> Request:
        """Return the frames of a request, ready to be answered.

        The direct beam is in the middle of each. `scale` (1/Å per pixel) and `kv` of the query say how they are
        calibrated; left out, they are as the model's. A `UserError` says what the model cannot answer.
        """
        if frames.ndim == 2:
            frames = frames[None]
        if frames.ndim != 3 or frames.shape[1] != frames.shape[2] or not 8 <= frames.shape[1] <= 2048:
            shape = " x ".join(map(str, frames.shape)) or "none"
            raise UserError(f"frames must be (n, size, size) of 8 to 2048 pixels, but these are {shape}")
        if not 1 <= len(frames) <= _MAX_FRAMES:
            raise UserError(f"a request has 1 to {_MAX_FRAMES} frames, but this one has {len(frames)}")
        if not valid_counts(frames):
            raise UserError("counts must be finite and 0 or more")
        if unknown := sorted(set(query) - {"scale", "kv"}):
            raise UserError(f"'{unknown[0]}' is no part of a request; scale and kv are")
        own = self.model.geometry
        if frames.shape[1] != own.size and "scale" not in query:
            raise UserError(f"frames of {frames.shape[1]} px need ?scale=, for the model's have {own.size} px")
        scale = _number(query, "scale", own.scale_inv_angstrom, (0, 1))
        geometry = Geometry(frames.shape[1], scale, _number(query, "kv", own.kv, (20, 1500)))
        indexer = self.indexer(geometry)  # refuses what the model cannot look at
        return Request(np.ascontiguousarray(frames, dtype=stored_type(frames.dtype)), indexer)

    def answer(self, requests: list[Request]) -> list[Columns]:
        """Return `orientation` (n, 4), `confidence` (n,) and `indexed` (n,) for each request, in their order."""
        found: list[Columns] = [{} for _ in requests]
        keys = [(request.indexer, request.frames.dtype) for request in requests]
        for key in dict.fromkeys(keys):
            # Frames of one calibration and type are answered together, and given back apart.
            chosen = [number for number, own in enumerate(keys) if own == key]
            answers = key[0].index(np.concatenate([requests[number].frames for number in chosen]))
            ends = itertools.accumulate(len(requests[number].frames) for number in chosen)
            for number, end in zip(chosen, ends, strict=True):
                own = slice(end - len(requests[number].frames), end)
                found[number] = {
                    "orientation": answers.candidates[own, 0],
                    "confidence": answers.confidence[own, 0],
                    "indexed": answers.indexed[own],
                }
        return found


def _number(query: Mapping[str, str], name: str, default: float, between: tuple[float, float]) -> float:
    try:
        value = float(query.get(name, default))
    except ValueError:
        value = float("nan")
    if not between[0] < value <= between[1]:
        raise UserError(f"{name} is '{query[name]}', but must be a number above {between[0]} and up to {between[1]}")
    return value


class Refusal(Exception):
    """A request that is not answered, with the HTTP status that says so."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


def allowed(header: str | None, digest: bytes) -> bool:
    """Return whether an Authorization header shows the token with the sha256 `digest`."""
    kind, _, token = (header or "").partition(" ")
    given = hashlib.sha256(token.strip().encode(errors="replace")).digest()
    return hmac.compare_digest(given, digest) and kind.lower() == "bearer"


async def limited(stream: AsyncIterable[bytes], length: str | None) -> bytes:
    """Return the body of a request, which is refused as soon as it is too large, whatever `length` it states."""
    body = bytearray()
    stated = int(length) if length and length.isdecimal() else 0
    if stated <= MAX_MIB * 2**20:
        async for part in stream:
            body += part
            if len(body) > MAX_MIB * 2**20:
                break
    if max(stated, len(body)) > MAX_MIB * 2**20:
        raise Refusal(413, f"a request may have {MAX_MIB} MiB; send fewer frames at a time")
    return bytes(body)


def parsed(body: bytes, kind: str) -> npt.NDArray[Any]:
    """Return the array in the body of a request; nothing in it is run. A `UserError` says that it holds none."""
    try:
        if kind.startswith(_MSGPACK):
            import msgpack

            packed = msgpack.unpackb(body)
            dtype = np.dtype(str(packed["dtype"]))
            array = np.frombuffer(packed["data"], dtype=dtype).reshape([int(length) for length in packed["shape"]])
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
