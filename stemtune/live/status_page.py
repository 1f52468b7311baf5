"""A small web page about scans that are being answered, for this machine alone: the maps so far, rates, latencies."""

from __future__ import annotations

import html
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote

from stemtune.errors import UserError

LOOPBACK = "127.0.0.1"
_AFTER_S = 1  # the page asks again


@dataclass(frozen=True)
class Shown:
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


class Board:
    """What there is to show; written by the watcher, read by the page's threads."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._lock = threading.Lock()
        self._scans: list[Shown] = []

    def show(self, scans: list[Shown]) -> None:
        with self._lock:
            self._scans = scans

    @property
    def scans(self) -> list[Shown]:
        with self._lock:
            return list(self._scans)

    def page(self) -> str:
        """Return the page as HTML; it asks for itself again every second."""
        rows = "\n".join(_section(scan) for scan in self.scans) or "<p>No scan has landed yet.</p>"
        title = html.escape(self.title)
        return (
            "<!DOCTYPE html>\n"
            f'<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="{_AFTER_S}">\n'
            f"<title>{title}</title><style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n{rows}\n</body></html>\n"
        )

    def status(self) -> str:
        """Return the same as JSON."""
        return json.dumps([{**asdict(scan), "picture": scan.picture is not None} for scan in self.scans], indent=2)


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem; background: #14161a; color: #e8e8e8 }
h1 { font-size: 1.15rem; font-weight: 600 } h2 { font-size: 1rem; margin: 0 0 .3rem }
main { display: flex; gap: 1.2rem; margin: 0 0 1.5rem; align-items: flex-start; flex-wrap: wrap }
img { image-rendering: pixelated; width: 320px; background: #1e2128 }
img.whole { image-rendering: auto; width: 560px }
td { padding: .1rem 1rem .1rem 0 } td + td { font-variant-numeric: tabular-nums }
.note { color: #f0b860; max-width: 40rem }
"""


def _section(scan: Shown) -> str:
    facts = [("state", scan.state)]
    if scan.total:
        facts.append(("answered", f"{scan.done:,} of {scan.total:,} frames ({scan.done / scan.total:.0%})"))
        facts.append(("landed", f"{scan.landed:,}"))
    if scan.rate:
        facts.append(("rate", f"{scan.rate:,.0f} frames/s"))
    if scan.latency_s is not None and scan.worst_latency_s is not None:
        facts.append(("latency", f"at most {scan.latency_s:.2f} s lately, {scan.worst_latency_s:.2f} s at worst"))
    table = "".join(f"<tr><td>{name}</td><td>{html.escape(value)}</td></tr>" for name, value in facts)
    picture = ""
    if scan.picture is not None:
        # Of a whole scan the map's own picture, with key, scale bar and words, which pixels of 320 would not show.
        kind = ' class="whole"' if scan.state == "done" else ""
        picture = f'<img{kind} src="/picture/{quote(scan.name, safe="")}?{scan.done}" alt="IPF-z so far">'
    note = f'<p class="note">{html.escape(scan.note)}</p>' if scan.note else ""
    return f"<main>{picture}<div><h2>{html.escape(scan.name)}</h2><table>{table}</table>{note}</div></main>"


@contextmanager
def served(board: Board, port: int) -> Iterator[str]:
    """Serve the page on the loopback address while the block runs, and yield its address; port 0: any free one.

    Raises
    ------
    UserError
        When the port is taken.
    """

    class Answering(_Page):
        shown = board

    try:
        server = ThreadingHTTPServer((LOOPBACK, port), Answering)
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

    shown: Board

    def do_GET(self) -> None:
        path, host = self.path.split("?", 1)[0], (self.headers.get("Host") or "").rsplit(":", 1)[0]
        if host not in (LOOPBACK, "localhost"):  # a foreign page that had its own name point here
            self._send(HTTPStatus.FORBIDDEN, "text/plain; charset=utf-8", b"this page is for this machine alone\n")
        elif path == "/":
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.shown.page().encode())
        elif path == "/status.json":
            self._send(HTTPStatus.OK, "application/json", self.shown.status().encode())
        elif (picture := self._picture(path)) is not None:
            self._send(HTTPStatus.OK, "image/png", picture)
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"there is nothing here\n")

    def _picture(self, path: str) -> bytes | None:
        """Return the picture of the scan that is named in the path; only those on the board are known."""
        name = unquote(path.removeprefix("/picture/")) if path.startswith("/picture/") else ""
        for scan in self.shown.scans:
            if scan.name == name and scan.picture is not None:
                try:
                    return scan.picture.read_bytes()
                except OSError:
                    return None
        return None

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the page asks every second."""
