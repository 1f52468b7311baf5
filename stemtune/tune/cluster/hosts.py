"""Whether the hosts of a cluster file can be reached and are fit, asked by ssh before `ray up` tries for minutes."""

from __future__ import annotations

import ipaddress
import subprocess
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stemtune._files import existing, refuse_readable
from stemtune.errors import UserError

ENVIRONMENT = Path(__file__).resolve().parents[3] / "cluster" / "environment.sh"
"""What names the shared folder and the Python environment; it lies beside the cluster file, else in the checkout."""

HOST_SCRIPT = """
set -u
python="$STEMTUNE_VENV/bin/python"
[ -x "$python" ] || python="$(command -v python3)" || { echo 'bad no Python'; exit; }
command -v rsync >/dev/null || { echo 'bad no rsync'; exit; }
mkdir -p "$STEMTUNE_SWEEPS" 2>/dev/null && [ -w "$STEMTUNE_SWEEPS" ] ||
    { echo "bad no folder $STEMTUNE_SWEEPS to write to (STEMTUNE_SHARED in cluster/environment.sh)"; exit; }
marker="$STEMTUNE_SWEEPS/.seen-$WORD"
if [ "$ROLE" = first ]; then echo "$WORD" >"$marker"; fi
if [ "$ROLE" = last ]; then rm -f "$marker"; exit; fi
[ "$(cat "$marker" 2>/dev/null)" = "$WORD" ] ||
    { echo "bad another $STEMTUNE_SWEEPS than the head node: the folder is not shared"; exit; }
echo "good $(hostname)|$("$python" -c 'import platform; print(platform.python_version())')|$(nproc)|$(date +%s)"
"""

CLOCKS_S = 30.0  # how far the hosts' clocks may lie apart; the questions are asked within this time


@dataclass(frozen=True)
class ClusterFile:
    """What a cluster file says about logging in."""

    hosts: tuple[str, ...]
    user: str
    key: Path
    environment: str


@dataclass(frozen=True)
class HostReport:
    """What a host answered."""

    address: str
    name: str
    python: str
    cpus: int
    clock: float


def check_cluster(path: str | Path, content: Mapping[Any, Any]) -> str:
    """Log into every host of the cluster file `path` and say what it has.

    What is missing in the file or here, and the hosts that cannot be reached or are not fit, are named in one line.
    """
    cluster = _read(Path(path), content)
    token = Path.home() / ".ray" / "auth_token"
    if not token.is_file():
        raise UserError(f"there is no token in {token}; make one with: (umask 077; ray get-auth-token --generate)")
    refuse_readable(token, "the token of Ray")
    word = uuid.uuid4().hex
    head, *rest = cluster.hosts
    try:
        answers = [_ask(cluster, head, word, "first")]
        if isinstance(answers[0], HostReport):
            with ThreadPoolExecutor(16) as threads:
                answers += threads.map(lambda host: _ask(cluster, host, word, "next"), rest)
    finally:
        _ask(cluster, head, word, "last")
    fit = [answer for answer in answers if isinstance(answer, HostReport)]
    faults = [answer for answer in answers if isinstance(answer, str)] or _differences(fit)
    if faults:
        raise UserError(f"{path}: {'; '.join(faults)}")
    lines = [f"{host.address}  {host.name}  Python {host.python}  {host.cpus} CPUs" for host in fit]
    return "\n".join([f"{path}: fine, {len(lines)} host(s) can be reached and share their folder", *lines])


def _read(path: Path, content: Mapping[Any, Any]) -> ClusterFile:
    provider, auth = content.get("provider") or {}, content.get("auth") or {}
    if provider.get("type") != "local":
        raise UserError(f"{path}: provider.type is {provider.get('type')!r}, but only 'local' can be checked")
    hosts = [str(provider.get("head_ip", "")), *(str(host) for host in provider.get("worker_ips") or [])]
    if not hosts[0]:
        raise UserError(f"{path}: provider.head_ip is missing")
    for host in hosts:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise UserError(f"{path}: '{host}' in provider is no IP address; Ray takes no names there") from None
    if len(set(hosts)) < len(hosts):
        raise UserError(f"{path}: provider names an address twice")
    key = Path(str(auth.get("ssh_private_key", "")))
    if not key.is_absolute():
        raise UserError(f"{path}: auth.ssh_private_key is '{key}', but must be the whole path of a key")
    refuse_readable(existing(key, f"{path}: auth.ssh_private_key"), "the ssh key")
    beside = path.parent / "environment.sh"
    environment = beside if beside.is_file() else ENVIRONMENT
    return ClusterFile(tuple(hosts), str(auth.get("ssh_user", "")), key, existing(environment, "the file").read_text())


def _ask(cluster: ClusterFile, host: str, word: str, role: str) -> HostReport | str:
    """Return what `host` answered, or why it cannot be used."""
    options = "BatchMode=yes StrictHostKeyChecking=no UserKnownHostsFile=/dev/null LogLevel=ERROR ConnectTimeout=10"
    login = [item for option in [*options.split(), "IdentitiesOnly=yes"] for item in ("-o", option)]
    try:
        done = subprocess.run(
            ["ssh", *login, "-i", str(cluster.key), f"{cluster.user}@{host}", "bash -s"],
            input=f"WORD={word}\nROLE={role}\n{cluster.environment}\n{HOST_SCRIPT}",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{host} does not answer ssh within 60 s"
    except FileNotFoundError:
        raise UserError("ssh is not installed here; install the OpenSSH client") from None
    answer = done.stdout.strip().splitlines()[-1:] or [""]
    kind, _, rest = answer[0].partition(" ")
    if kind == "good":
        name, python, cpus, clock = rest.split("|")
        return HostReport(host, name, python, int(cpus), float(clock))
    if kind == "bad":
        return f"{host} has {rest}"
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return f"cannot log into {cluster.user}@{host} with {cluster.key} ({reason})"


def _differences(answers: list[HostReport]) -> list[str]:
    """Return what differs between hosts that must not."""
    head = answers[0]
    faults = []
    for other in answers[1:]:
        if other.python != head.python:
            versions = f"Python {other.python}, but the head node {head.python}"
            faults.append(f"{other.address} has {versions}: Ray refuses that")
        if abs(other.clock - head.clock) > CLOCKS_S:
            faults.append(f"the clock of {other.address} is {other.clock - head.clock:+.0f} s off the head node's")
    return faults
