"""A small web page about scans that are being answered, for this machine alone: the maps so far, rates, latencies."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from stemtune.errors import UserError

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class ScanStatus:
    """What the page says of a scan: frames `done` and `landed` of `total`, and the worst `latency_s` of late."""

    name: str
    state: str
    note: str = ""
    done: int = 0
    landed: int = 0
    total: int = 0
    rate: float = 0.0
    latency_s: float | None = None
    worst_latency_s: float | None = None
    picture: Path | None = None


class StatusBoard:
    """The scans to show: the watcher puts a new list in the place of the old one, the page's threads read it."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.scans: list[ScanStatus] = []

    def show(self, scans: list[ScanStatus]) -> None:
        self.scans = scans

    def page(self) -> str:
        """Return the page as HTML; it asks for itself again every second."""
        return str(_template().render(title=self.title, scans=self.scans, quote=lambda name: quote(name, safe="")))

    def status(self) -> str:
        """Return the same as JSON."""
        return json.dumps([{**asdict(scan), "picture": scan.picture is not None} for scan in self.scans], indent=2)


@cache
def _template() -> Any:
    from jinja2 import Template  # here, because a watch without a page needs none

    return Template(Path(__file__).with_suffix(".html").read_text(), autoescape=True)


@contextmanager
def serve_page(given: StatusBoard, port: int) -> Iterator[str]:
    """Serve the page on the loopback address while the block runs, and yield its address; port 0: any free one.

    A `UserError` says that the port is taken.
    """

    class Handler(_Page):
        board = given

    try:
        server = ThreadingHTTPServer((LOOPBACK, port), Handler)
    except OSError as problem:
        reason = problem.strerror or problem
        raise UserError(f"the page cannot be served at port {port}: {reason}; choose another --port") from None
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield f"http://{LOOPBACK}:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Page(BaseHTTPRequestHandler):
    """Answers GET: the page, its figures as JSON, the pictures; nothing else, and to this machine's name only."""

    board: StatusBoard

    def do_GET(self) -> None:
        path, host = self.path.split("?", 1)[0], (self.headers.get("Host") or "").rsplit(":", 1)[0]
        status, kind = HTTPStatus.OK, "text/plain; charset=utf-8"
        if host not in (LOOPBACK, "localhost"):  # a foreign page that had its own name point here
            status, body = HTTPStatus.FORBIDDEN, b"this page is for this machine alone\n"
        elif path == "/":
            kind, body = "text/html; charset=utf-8", self.board.page().encode()
        elif path == "/status.json":
            kind, body = "application/json", self.board.status().encode()
        elif (picture := self._picture(path)) is not None:
            kind, body = "image/png", picture
        else:
            status, body = HTTPStatus.NOT_FOUND, b"there is nothing here\n"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def _picture(self, path: str) -> bytes | None:
        """Return the picture of the scan that is named in the path; only those on the board are known."""
        known = {scan.name: scan.picture for scan in self.board.scans}
        picture = known.get(unquote(path.removeprefix("/picture/"))) if path.startswith("/picture/") else None
        try:
            return None if picture is None else picture.read_bytes()
        except OSError:
            return None

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the page asks every second."""
