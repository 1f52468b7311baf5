"""`ray up`, `ray submit`, `ray exec` and `ray down` with cluster/hpc.yaml, for real: three hosts, sshd, tokens.

The hosts are namespaces of this machine (`hosts.py`), so the test needs Linux, root, openssh-server, iproute2 and
rsync, and says so where it skips. It runs the commands that cluster/hpc.yaml gives, one after the other; most of its
minutes are Ray's start-up.

    pytest -m slow tests/cluster/test_ray_up.py -s
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from hosts import Host, Hosts, missing
from layout import checkout, edit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(bool(missing()), reason=missing() or "all there"),
]


@dataclass
class Site:
    """Three hosts and the checkout, home and token of the user who submits to them."""

    hosts: Hosts
    checkout: Path
    shared: Path
    environment: dict[str, str]

    def run(self, *command: str, wait_s: float = 1500, **extra: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the checkout, as the user would at a terminal."""
        done = subprocess.run(
            command,
            cwd=self.checkout,
            env={**self.environment, **extra},
            capture_output=True,
            text=True,
            timeout=wait_s,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        print(f"\n$ {' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        return done

    def stemtune(self, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "stemtune.cli", *arguments, **extra)

    def submit(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("ray", "submit", "cluster/hpc.yaml", "stemtune/sweep.py", "--", *arguments)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Hosts(3) as made:
        shared = made.folder / "shared"
        code = checkout(made.folder, shared)
        file = code / "cluster" / "hpc.yaml"
        head, *workers = [host.address for host in made.hosts]
        edit(file, r"head_ip: 192\.168\.1\.10", f"head_ip: {head}")
        edit(file, r"worker_ips: \[.*\]", f"worker_ips: [{', '.join(workers)}]")
        edit(file, r"ssh_user: me", "ssh_user: root")
        edit(file, r"/home/me/\.ssh/id_ed25519", str(made.key))
        edit(code / "cluster" / "environment.sh", r"STEMTUNE_RAY_OPTIONS:---", "STEMTUNE_RAY_OPTIONS:---num-cpus=1 --")
        home = made.folder / "user"
        home.mkdir()
        environment = {
            "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
            "HOME": str(home),
            "RAY_TMPDIR": str(home),
            "RAY_AUTH_MODE": "token",
            "PYTHONPATH": str(code),
            "PYTHONDONTWRITEBYTECODE": "1",
            "LANG": "C.UTF-8",
        }
        ready = Site(made, code, shared, environment)
        assert ready.run("bash", "-c", "umask 077; ray get-auth-token --generate").returncode == 0
        yield ready


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the message of a command that a mistake of the user ended."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("stemtune:")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def test_the_hosts_are_asked_before_ray_is(site: Site) -> None:
    nobody = site.stemtune("check", "cluster/hpc.yaml", HOME=str(site.hosts.folder))
    assert "ray get-auth-token --generate" in one_line(nobody)
    fine = site.stemtune("check", "cluster/hpc.yaml")
    assert fine.returncode == 0, fine.stderr
    assert "3 host(s) can be reached and share their folder" in fine.stdout
    assert [line.split()[1] for line in fine.stdout.splitlines()[1:]] == ["node1", "node2", "node3"]

    # A folder that one host does not share, then no ssh on it.
    third = site.hosts.hosts[2]
    third.enter(f"mount -t tmpfs tmpfs {site.shared}")
    message = one_line(site.stemtune("check", "cluster/hpc.yaml"))
    assert f"{third.address} has another {site.shared}/sweeps than the head node: the folder is not shared" in message
    third.enter(f"umount {site.shared}")
    allowed = third.home / ".ssh" / "authorized_keys"
    allowed.rename(allowed.with_suffix(".away"))
    message = one_line(site.stemtune("check", "cluster/hpc.yaml"))
    assert f"cannot log into root@{third.address} with {site.hosts.key}" in message
    allowed.with_suffix(".away").rename(allowed)
    token = Path(site.environment["HOME"]) / ".ray" / "auth_token"
    token.chmod(0o644)
    assert f"chmod 600 {token}" in one_line(site.stemtune("check", "cluster/hpc.yaml"))
    token.chmod(0o600)


def test_up_submit_exec_down(site: Site) -> None:
    for _ in range(4):  # Ray gives a node 15 s to start its helpers, which a busy machine takes longer for
        up = site.run("ray", "up", "-y", "cluster/hpc.yaml")
        if up.returncode == 0:
            break
    assert up.returncode == 0, up.stderr
    token = (Path(site.environment["HOME"]) / ".ray" / "auth_token").read_text()
    assert token not in up.stdout + up.stderr

    done = site.submit("search_spaces/tiny.yaml", "--nodes", "3", "--name", "spread")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on the test split: trial" in done.stdout
    from stemtune.tracking import read_sweep

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{site.shared}/mlflow.db")
        record = read_sweep("spread")
    statuses = [trial.status for trial in record.trials]
    assert len(statuses) == 4 and set(statuses) <= {"finished", "stopped"} and "finished" in statuses  # stopped by ASHA
    where = {trial.name: trial.tags["stemtune.nodes"] for trial in record.trials}
    assert len(set(where.values())) >= 2, where  # three nodes of one CPU each
    assert set(where.values()) <= {"node1", "node2", "node3"}

    shown = site.run("ray", "exec", "cluster/hpc.yaml", "stemtune compare spread; ls -l .ray/auth_token; hostname")
    assert "node1" in shown.stdout
    assert "-rw-------" in shown.stdout
    for path in site.shared.rglob("*"):
        if path.is_file():
            assert token.encode() not in path.read_bytes(), f"{path} holds the token"


def test_attach_is_a_shell_on_the_head_node(site: Site) -> None:
    """It has stemtune's environment: Ray's token, the code that was sent, the shared folder."""
    count = "import ray; ray.init(logging_level='ERROR'); print('nodes', sum(node['Alive'] for node in ray.nodes()))"
    typed = f'echo; hostname; stemtune sweep --resume nothing; echo $RAY_AUTH_MODE; python -c "{count}"; exit 0\n'
    done = subprocess.run(
        ["ray", "attach", "cluster/hpc.yaml"],
        cwd=site.checkout,
        env={**site.environment, "TERM": "dumb"},
        input=typed,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line.strip() for line in done.stdout.splitlines()]
    assert "node1" in said and "token" in said, done.stdout
    assert f"there is no sweep called 'nothing' in {site.shared}/sweeps; there are spread" in done.stdout
    assert "nodes 3" in said, done.stdout  # the token is taken, three nodes answer


def test_who_has_no_token_is_refused(site: Site) -> None:
    head = f"{site.hosts.hosts[0].address}:6379"
    sweep = (sys.executable, str(site.checkout / "stemtune" / "sweep.py"), "search_spaces/tiny.yaml")
    wrong = site.run(*sweep, RAY_ADDRESS=head, RAY_AUTH_TOKEN="0" * 64)
    assert f"the Ray at {head} refuses us: the token is missing or wrong" in one_line(wrong)
    without = site.run(*sweep, RAY_ADDRESS=head, RAY_AUTH_MODE="disabled")
    assert f"the Ray at {head} refuses us" in one_line(without)
    nobody = site.run(*sweep, RAY_ADDRESS=f"{site.hosts.hosts[0].address}:6399")
    assert "no Ray answers at" in one_line(nobody)
    listening = site.hosts.hosts[0].enter("ss -Hltn").stdout
    assert ":8265" not in listening.replace("127.0.0.1:8265", "")  # the dashboard, where there is one


def test_a_node_that_differs_is_named(site: Site) -> None:
    second, third = site.hosts.hosts[1:]
    second.enter(f"mount -t tmpfs tmpfs {site.shared}")
    blind = site.submit("search_spaces/tiny.yaml", "--name", "blind")
    assert blind.returncode != 0
    assert f"node node2 ({second.address}) does not see the sweep's folder" in blind.stdout + blind.stderr
    assert not (site.shared / "sweeps" / "blind").exists()
    second.enter(f"umount {site.shared}")

    huge = site.submit("search_spaces/tiny.yaml", "--name", "huge", "--set", "train.workers=8")
    assert "a trial of 8 worker(s) asks for 1 CPUs each, but Ray has 3 CPUs on 3 nodes" in huge.stdout + huge.stderr

    # Another version of Ray on the third node: its version file is another one there.
    import ray

    version = Path(ray.__file__).parent / "_version.py"
    other = site.hosts.folder / "_version.py"
    other.write_text(version.read_text().replace(ray.__version__, "2.59.0"))
    third.enter(f"mount --bind {other} {version}")
    again = (
        ". ~/stemtune-src/cluster/environment.sh; ray stop; "
        f"ray start --address={site.hosts.hosts[0].address}:6379 --num-cpus=1"
    )
    refused = third.enter(again, wait_s=900, check=False)
    assert refused.returncode != 0
    assert "Version mismatch" in refused.stdout + refused.stderr
    environment = site.hosts.hosts[0].home / "stemtune-src" / "cluster" / "environment.sh"
    with environment.open("a") as file:
        file.write("export STEMTUNE_NODES_WAIT_S=20\n")
    alone = site.submit("search_spaces/tiny.yaml", "--name", "alone", "--nodes", "3")
    assert "only 2 of 3 nodes joined within 20 s" in alone.stdout + alone.stderr
    third.enter(f"umount {version}")


def test_down_leaves_no_ray(site: Site) -> None:
    """`ray down` stops Ray on the head node; the other nodes notice and end theirs, the trials' processes first."""
    assert site.run("ray", "down", "-y", "cluster/hpc.yaml").returncode == 0
    assert rays(site.hosts.hosts[0]) == []
    deadline = time.monotonic() + 300  # a minute until a raylet gives the head up, another for its agents
    while left := {host.name: rays(host) for host in site.hosts.hosts if rays(host)}:
        assert time.monotonic() < deadline, left
        time.sleep(5)
    assert site.run("ray", "down", "-y", "cluster/hpc.yaml").returncode == 0  # once more does no harm


def rays(host: Host) -> list[str]:
    """Return Ray's processes on a host."""
    listed = host.enter("ps axww -o args").stdout.splitlines()
    return [line for line in listed if "ray::" in line or "site-packages/ray/" in line]
