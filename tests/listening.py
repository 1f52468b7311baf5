"""What listens for connections: asked of the system, for a process and all that it started."""

from __future__ import annotations

import psutil

LOOPBACK = {"127.0.0.1", "::1"}


def listening(pid: int) -> list[tuple[str, str, int]]:
    """Return the name of the process, the address and the port of every TCP port that is open."""
    found = []
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            links = process.net_connections("tcp")
        except psutil.NoSuchProcess:
            continue
        for link in links:
            if link.status == psutil.CONN_LISTEN:
                address = link.laddr.ip.removeprefix("::ffff:")  # IPv4 as IPv6 writes it
                found.append((process.name(), address, int(link.laddr.port)))
    return found
