"""Several hosts on one machine: Linux namespaces joined by a bridge, each with a name, an address and an sshd.

A host has its own network, processes, mounts, name, home, shared memory and `/tmp/ray`; the disk is shared, as a
network file system would be, and so is the processor. Nothing of it touches the machine's own network but the bridge,
and all of it goes when the `Hosts` are closed, for the first process of a host takes every other one with it.

Used by the tests of this folder, and by hand (as root):

    python tests/cluster/hosts.py 3            # makes three hosts, says how to log in, and waits for Ctrl-C
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

TOOLS = ("unshare", "nsenter", "ip", "ssh", "ssh-keygen", "rsync")

UNSHARED = ("unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "--kill-child")

FIRST_PROCESS = """\
set -eu
hostname "$NAME"
mkdir -p /tmp/ray /run/sshd
mount -t tmpfs -o size=64m tmpfs /run
mkdir -p /run/sshd /run/munge /run/lock
mount -t tmpfs -o size=2g tmpfs /dev/shm
mount --bind "$HOST/ray" /tmp/ray
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$HOST/etc,workdir=$HOST/work" /etc
ip link set lo up
while ! ip link show "$DEVICE" >/dev/null 2>&1; do sleep 0.1; done
ip address add "$ADDRESS/24" dev "$DEVICE"
ip link set "$DEVICE" up
ip route add default via "$GATEWAY"
exec "$SSHD" -D -e -f "$HOST/sshd_config" >"$HOST/sshd.log" 2>&1
"""


def missing() -> str:
    """Return why such hosts cannot be made here, or an empty string."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts in namespaces need Linux and root"
    absent = [tool for tool in TOOLS if not shutil.which(tool)] + ([] if sshd() else ["sshd"])
    if absent:
        return f"{', '.join(absent)} is not installed (apt-get install openssh-server iproute2 rsync)"
    made = subprocess.run(["unshare", "-n", "-m", "-p", "-u", "-i", "--fork", "true"], capture_output=True, check=False)
    return "" if made.returncode == 0 else f"no namespaces here: {made.stderr.decode().strip()}"


def sshd() -> str | None:
    """Return the path of sshd, which insists on being called by its whole name."""
    return shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@dataclass
class Host:
    """One host: its name, its address, its folder on the shared disk, and its first process."""

    name: str
    address: str
    folder: Path
    process: subprocess.Popen[bytes]
    inside: int = 0

    @property
    def home(self) -> Path:
        """Home of root on this host."""
        return self.folder / "home"

    def enter(self, command: str, wait_s: float = 60, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a shell command on this host without ssh, as its console would."""
        spaces = ["nsenter", "-t", str(self.inside), "-n", "-m", "-p", "-u", "-i"]
        clean = {"PATH": os.environ["PATH"], "HOME": str(self.home), "LANG": "C.UTF-8"}
        done = subprocess.run(
            [*spaces, "bash", "-c", command], capture_output=True, text=True, timeout=wait_s, check=False, env=clean
        )
        if check and done.returncode:
            raise RuntimeError(f"{command} on {self.name}: {done.stdout} {done.stderr}")
        return done


@dataclass
class Hosts:
    """Hosts `node1` to `nodeN` on a network of their own; a context manager.

    Parameters
    ----------
    count
        Number of hosts.
    folder
        Where homes, logs and keys go; a temporary folder by default.
    """

    count: int
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="stemtune-hosts-", dir="/tmp")))
    hosts: list[Host] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bridge = f"stm{os.getpid() % 100000}"
        self.network = free_network()
        self.gateway = f"{self.network}.254"
        self.key = self.folder / "key"

    def __enter__(self) -> Hosts:
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self) -> None:
        run("ip", "link", "add", self.bridge, "type", "bridge")
        run("ip", "address", "add", f"{self.gateway}/24", "dev", self.bridge)
        run("ip", "link", "set", self.bridge, "up")
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key))
        names = [f"node{number}" for number in range(1, self.count + 1)]
        table = "127.0.0.1 localhost\n" + "".join(
            f"{self.network}.{number} {name}\n" for number, name in enumerate(names, 1)
        )
        for number, name in enumerate(names, 1):
            self.hosts.append(self._host(number, name, table))
        for host in self.hosts:
            self._wait(host)

    def _host(self, number: int, name: str, table: str) -> Host:
        folder = self.folder / name
        for part in ("home/.ssh", "ray", "etc", "work"):
            (folder / part).mkdir(parents=True)
        (folder / "home" / ".ssh").chmod(0o700)
        shutil.copy(self.key.with_suffix(".pub"), folder / "home" / ".ssh" / "authorized_keys")
        (folder / "home" / ".profile").write_text('[ -n "$BASH" ] && . ~/.bashrc\n')
        (folder / "home" / ".bashrc").touch()
        users = Path("/etc/passwd").read_text().replace(":/root:", f":{folder / 'home'}:", 1)
        (folder / "etc" / "passwd").write_text(users)
        (folder / "etc" / "hosts").write_text(table)
        address = f"{self.network}.{number}"
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key"))
        (folder / "sshd_config").write_text(
            f"ListenAddress {address}\nHostKey {folder / 'host_key'}\nPidFile none\nUsePAM no\nStrictModes no\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nMaxStartups 50\n"
            f"SetEnv PATH={os.environ['PATH']}\n"
        )
        device, far = f"{self.bridge}h{number}", "eth0"
        run("ip", "link", "add", device, "type", "veth", "peer", "name", f"{device}x")
        run("ip", "link", "set", device, "master", self.bridge, "up")
        process = subprocess.Popen(
            [*UNSHARED, "bash", "-c", FIRST_PROCESS],
            env={
                "PATH": os.environ["PATH"],
                "NAME": name,
                "HOST": str(folder),
                "ADDRESS": address,
                "GATEWAY": self.gateway,
                "DEVICE": far,
                "SSHD": str(sshd()),
            },
            stdout=(folder / "first.log").open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        host = Host(name, address, folder, process)
        host.inside = child_of(process)
        run("ip", "link", "set", f"{device}x", "netns", str(host.inside), "name", far)
        return host

    def _wait(self, host: Host) -> None:
        """Wait until a login works."""
        for _ in range(100):
            if host.process.poll() is not None:
                break
            if self.ssh(host, "true", check=False).returncode == 0:
                return
            time.sleep(0.2)
        logs = "".join(
            path.read_text() for path in (host.folder / "first.log", host.folder / "sshd.log") if path.exists()
        )
        raise RuntimeError(f"{host.name} does not answer: {logs}")

    def ssh(self, host: Host, command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command on a host over ssh."""
        options = "BatchMode=yes StrictHostKeyChecking=no UserKnownHostsFile=/dev/null ConnectTimeout=5 LogLevel=ERROR"
        flags = [word for option in options.split() for word in ("-o", option)]
        return subprocess.run(
            ["ssh", *flags, "-i", str(self.key), f"root@{host.address}", command],
            capture_output=True,
            text=True,
            timeout=120,
            check=check,
        )

    def close(self) -> None:
        """End the hosts and remove the bridge and the folder."""
        for host in self.hosts:
            with contextlib.suppress(ProcessLookupError):
                os.kill(host.inside or host.process.pid, signal.SIGKILL)
            host.process.wait(timeout=30)
        for link in subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=False).stdout.split(
            "\n"
        ):
            name = link.split(": ")[1].split("@")[0] if ": " in link else ""
            if name.startswith(f"{self.bridge}h"):
                subprocess.run(["ip", "link", "delete", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "delete", self.bridge], capture_output=True, check=False)
        if not os.environ.get("STEMTUNE_KEEP_HOSTS"):
            shutil.rmtree(self.folder, ignore_errors=True)


def child_of(process: subprocess.Popen[bytes]) -> int:
    """Return the process that `unshare` forked: the first one of the new host."""
    listing = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    for _ in range(100):
        if process.poll() is None and listing.read_text().strip():
            return int(listing.read_text().split()[0])
        time.sleep(0.1)
    raise RuntimeError("a host did not start")


def free_network() -> str:
    """Return the first three numbers of a /24 network that nothing here uses."""
    taken = run("ip", "-4", "-o", "address")
    return next(f"10.77.{third}" for third in range(os.getpid() % 200, 255) if f" 10.77.{third}." not in taken)


def run(*command: str) -> str:
    """Run a command that must succeed, and return what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _ended(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Make hosts and keep them until Ctrl-C."""
    reason = missing()
    if reason:
        print(reason, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _ended)
    with Hosts(int(sys.argv[1]) if len(sys.argv) > 1 else 3) as made, contextlib.suppress(KeyboardInterrupt):
        for host in made.hosts:
            print(f"ssh -i {made.key} root@{host.address}    # {host.name}, home {host.home}")
        print("Ctrl-C ends them", flush=True)
        signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
