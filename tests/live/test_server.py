"""The model behind Ray Serve: tokens and arguments, and the real server under load."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from listening import LOOPBACK, listening

from stemtune import cli
from stemtune.config import Config
from stemtune.crystal.phase import linio2
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError
from stemtune.indexing.predictor import Indexer
from stemtune.learning.checkpoint import load_model, save_model
from stemtune.learning.models import build
from stemtune.live.server import MAX_MIB, Refusal, Service, allowed, limited, parsed, token_from, written

SECRET = "a token of some length"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"model.name": "matched", "model.grid_step": 6, "model.angles": 60, "model.radii": 24}
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(build(Config.from_flat(settings), linio2(), Geometry(64, 0.05, 200.0)), folder, {}, "")
    return folder


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(0).poisson(2.0, (5, 64, 64)).astype(np.uint16)


def npy(array: np.ndarray) -> bytes:
    body = io.BytesIO()
    np.save(body, array)
    return body.getvalue()


def test_token_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("STEMTUNE_TOKEN", raising=False)
    assert cli.main(["serve", "--model", "gone"]) == 2
    assert "set STEMTUNE_TOKEN, or give --token-file FILE" in capsys.readouterr().err
    file = tmp_path / "token.txt"
    made = token_from(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert len(made) > 40
    assert token_from(file) == made
    file.chmod(0o640)
    with pytest.raises(UserError, match="the token of the service lies in .*others can read; chmod 600"):
        token_from(file)
    monkeypatch.setenv("STEMTUNE_TOKEN", "short")
    with pytest.raises(UserError, match="16 ASCII characters or more"):
        token_from(None)
    monkeypatch.setenv("STEMTUNE_TOKEN", SECRET)
    shown = hashlib.sha256(token_from(None).encode()).digest()
    for header, let_in in ((f"Bearer {SECRET}", True), (SECRET, False), (f"Bearer {SECRET}x", False), (None, False)):
        assert allowed(header, shown) is let_in


def test_missing_ray_serve_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stemtune.live import server

    monkeypatch.setitem(sys.modules, "ray.serve", None)
    monkeypatch.delattr("ray.serve", raising=False)
    with pytest.raises(UserError, match=r"pip install 'stemtune\[serve\]'"):
        server.serve_until_stopped(str(model), SECRET)


def test_bodies_are_arrays_and_nothing_else(frames: np.ndarray) -> None:
    msgpack = pytest.importorskip("msgpack")
    np.testing.assert_array_equal(parsed(npy(frames), "application/x-npy"), frames)
    packed = msgpack.packb({"shape": frames.shape, "dtype": "<u2", "data": frames.tobytes()})
    np.testing.assert_array_equal(parsed(packed, "application/msgpack"), frames)
    pickled = io.BytesIO()
    np.save(pickled, np.array([print], dtype=object), allow_pickle=True)
    for body, kind in (
        (b"", ""),
        (pickled.getvalue(), ""),
        (npy(frames)[:-9], ""),
        (npy(frames), "application/msgpack"),
    ):
        with pytest.raises(UserError, match="neither"):
            parsed(body, kind)
    with pytest.raises(UserError, match="no array of numbers"):
        parsed(npy(np.array(["text"])), "")
    columns = {"orientation": np.eye(4), "indexed": np.ones(4, bool)}
    table = np.load(io.BytesIO(written(columns, "application/x-npy")[0]))
    np.testing.assert_array_equal(table["orientation"], np.eye(4))
    assert json.loads(written(columns, "*/*")[0])["indexed"] == [True] * 4


def test_requests_are_checked_and_answered_apart(model: Path, frames: np.ndarray) -> None:
    service = Service(str(model))
    for array, query, said in (
        (frames[:, :50], {}, r"\(n, size, size\)"),
        (frames[:0], {}, "1 to 4096 frames"),
        (frames.astype(float) - 9, {}, "finite and 0 or more"),
        (frames, {"sacle": "1"}, "'sacle' is no part"),
        (frames, {"scale": "x"}, "scale is 'x'"),
        (frames, {"scale": "0.005"}, "reach"),
        (frames[:, :48, :48], {}, "need .scale="),
    ):
        with pytest.raises(UserError, match=said):
            service.check(array, query)
    requests = [service.check(*request) for request in ((frames[:2], {}), (frames, {"scale": "0.04"}), (frames[2], {}))]
    found = service.answer(requests)
    assert [len(one["orientation"]) for one in found] == [2, 5, 1]
    alone = Indexer(load_model(model), Geometry(64, 0.05, 200.0), 1).index(frames[:3])
    np.testing.assert_allclose(
        np.concatenate([found[0]["orientation"], found[2]["orientation"]]), alone.candidates[:, 0], atol=1e-5
    )


def test_calibrations_that_are_dropped_and_made_at_once_cost_nobody_an_answer(
    model: Path, frames: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More calibrations than are kept ready, checked by several threads while others are answered."""
    made: list[Geometry] = []

    def slow(model: object, geometry: Geometry, **options: int) -> Indexer:
        made.append(geometry)
        time.sleep(0.01)
        return Indexer(model, geometry, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("stemtune.live.server.Indexer", slow)
    service = Service(str(model))
    scales = [f"{0.04 + 0.001 * number:.3f}" for number in range(12)]

    def one(number: int) -> int:
        request = service.check(frames, {"scale": scales[number % len(scales)]})
        return len(service.answer([request])[0]["orientation"])

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(one, range(48))) == [len(frames)] * 48
    made.clear()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: service.check(frames, {"scale": "0.06"}), range(8)))
    assert len(made) == 1


@pytest.mark.parametrize("length", [None, "10", "-5", "many", str(2**40)])
def test_a_body_without_a_length_or_with_a_wrong_one_is_limited(length: str | None) -> None:
    read: list[int] = []

    async def stream(size: int) -> AsyncIterator[bytes]:
        for _ in range(size):
            read.append(1)
            yield bytes(2**20)

    with pytest.raises(Refusal, match=f"{MAX_MIB} MiB; send fewer frames") as refused:
        asyncio.run(limited(stream(200), length))
    assert refused.value.status == 413
    assert len(read) <= MAX_MIB + 1
    if length != str(2**40):
        assert len(asyncio.run(limited(stream(3), length))) == 3 * 2**20


class Client:
    """One connection to the server."""

    def __init__(self, port: int, token: str | None = SECRET) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        self.headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    def post(self, body: bytes, place: str = "/", **headers: str) -> tuple[int, bytes]:
        self.connection.request("POST", place, body, {**self.headers, **headers})
        answer = self.connection.getresponse()
        return answer.status, answer.read()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("grpc") is None, reason="Ray Serve is not installed")
def test_server_answers_refuses_and_recovers(model: Path, frames: np.ndarray, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "stemtune.cli", "serve", "--model", str(model), "--port", str(port)]
    with (tmp_path / "said").open("wb") as said:
        server = subprocess.Popen(
            [*command, "--requests", "4", "--queue", "8"],
            stdout=said,
            stderr=said,
            env={**os.environ, "STEMTUNE_TOKEN": SECRET},
            start_new_session=True,
        )
    try:
        until = time.monotonic() + 180
        while b"serving" not in (tmp_path / "said").read_bytes():
            assert server.poll() is None and time.monotonic() < until, (tmp_path / "said").read_text()
            time.sleep(0.5)
        beyond = [name for name, address, _ in listening(server.pid) if address not in LOOPBACK]
        assert all("ServeReplica" in name for name in beyond) and len(beyond) <= 1  # Ray Serve's own, see the guide
        client, body = Client(port), npy(frames)
        alone = Indexer(load_model(model), Geometry(64, 0.05, 200.0), 1).index(frames)
        status, text = client.post(body)
        assert status == 200
        np.testing.assert_allclose(json.loads(text)["orientation"], alone.candidates[:, 0], atol=1e-5)
        status, raw = client.post(body, Accept="application/x-npy")
        np.testing.assert_array_equal(np.load(io.BytesIO(raw))["indexed"], alone.indexed)
        assert Client(port, None).post(body)[0] == 401
        assert Client(port, SECRET + "x").post(body)[0] == 401
        for bad, place in ((b"no array", "/"), (npy(frames[:, :50]), "/"), (body, "/?scale=-1")):
            status, text = client.post(bad, place)
            assert (status, text.count(b"\n")) == (400, 1)
        pieces = (bytes(2**20) for _ in range(MAX_MIB + 1))  # chunks: there is no Content-Length
        client.connection.request("POST", "/", pieces, client.headers, encode_chunked=True)
        assert client.connection.getresponse().status == 413
        client = Client(port)
        waits, statuses = load(port, body, clients=4, requests=25)
        assert set(statuses) == {200}
        print(
            f"4 clients: {len(waits) * len(frames) / waits.seconds:.0f} frames/s, p50 {np.percentile(waits, 50):.3f} s,"
            f" p99 {np.percentile(waits, 99):.3f} s"
        )
        large = npy(np.repeat(frames, 40, axis=0))
        waits, statuses = load(port, large, clients=48, requests=2)
        print(f"48 clients at once: {dict(statuses)}")
        assert statuses[503] and statuses[200] and set(statuses) == {200, 503}
        waits, statuses = load(port, body, clients=2, requests=10)
        assert set(statuses) == {200}
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 130
    with pytest.raises(OSError):
        Client(port).post(b"")


class Waits(list[float]):
    """Seconds that requests took, and `seconds` that all of them took together."""

    seconds = 0.0


def load(port: int, body: bytes, clients: int, requests: int) -> tuple[Waits, Counter[int]]:
    """Let `clients` at a time send `requests` each."""
    waits, statuses = Waits(), Counter[int]()

    def run() -> None:
        client = Client(port)
        for _ in range(requests):
            started = time.perf_counter()
            status, _ = client.post(body)
            waits.append(time.perf_counter() - started)
            statuses[status] += 1

    begun = time.perf_counter()
    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    waits.seconds = time.perf_counter() - begun
    return waits, statuses
