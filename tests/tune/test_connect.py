"""Joining Ray: who is let in, what listens where, which node is named when it differs, which cluster file is wrong."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from listening import LOOPBACK, listening

from stemtune import cli
from stemtune.errors import UserError
from stemtune.tune.cluster import connect, node_check

ROOT = Path(__file__).parents[2]

OWN = """\
import sys
from stemtune.tune.cluster.connect import connect
connect(local=True)
import ray
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""

STRANGER = """\
import os, sys
for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
    os.environ.pop(name, None)
os.environ.update(item.split("=", 1) for item in sys.argv[2:])
from stemtune.sweep import main
os.environ["RAY_ADDRESS"] = sys.argv[1]
sys.exit(main(["search_spaces/smoke.yaml"]))
"""


def stranger(tmp_path: Path, address: str, *environment: str) -> subprocess.CompletedProcess[str]:
    """Start a sweep that would join the Ray at `address`, from a home without a token."""
    return subprocess.run(
        [sys.executable, "-c", STRANGER, address, f"HOME={tmp_path}", *environment],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=tmp_path,
    )


@pytest.mark.timeout(900)
def test_a_ray_of_our_own_is_for_us_alone(tmp_path: Path) -> None:
    """Its ports are on the loopback address, and who has not its token, or another one, is refused at once."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    try:
        assert owner.stdout is not None
        address = owner.stdout.readline().strip()
        assert address.startswith("127.0.0.1:")
        found = listening(owner.pid)
        assert {name for name, _, _ in found} >= {"gcs_server", "raylet"}
        assert {place for _, place, _ in found} <= LOOPBACK, found
        for environment in ((), ("RAY_AUTH_MODE=token", f"RAY_AUTH_TOKEN={'0' * 64}")):
            began = time.monotonic()
            refused = stranger(tmp_path, address, *environment)
            assert refused.returncode == 2, refused.stderr
            assert f"the Ray at {address} refuses us: the token is missing or wrong" in refused.stderr
            assert len(refused.stderr.splitlines()) == 1
            assert time.monotonic() - began < 120  # Ray itself would try for 20 s and then say less
    finally:
        assert owner.stdin is not None
        owner.stdin.close()
        owner.wait(timeout=120)


TURNS = """\
import os, ray
from stemtune.tune.cluster.connect import connect
def joined(local):
    connect(local)
    tokens = [name for name in os.environ if name == "RAY_AUTH_TOKEN" or "CLUSTER" in name and "RAY_ENABLE" in name]
    print(ray.get_runtime_context().gcs_address, ray.get(ray.remote(lambda: 7).remote()), tokens, flush=True)
for local in (True, True, False, False, True):
    joined(local)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_call_gets_the_ray_that_it_asks_for(tmp_path: Path) -> None:
    """`sweep(local=True)`, then `sweep(local=False)`, in one Python; no token is left in its environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--include-dashboard=false"]
    head = subprocess.Popen(
        [*ray, f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=1"],
        env={**environment, "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        time.sleep(15)
        environment |= {"RAY_ADDRESS": f"127.0.0.1:{port}", "HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", TURNS], env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr
        lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
        assert [rest for _, rest in lines] == ["7 []"] * 5
        own, again, cluster, same, new = (address for address, _ in lines)
        assert own == again and cluster == same and new not in (own, cluster)
        assert cluster.endswith(f":{port}") and not own.endswith(f":{port}")
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(timeout=60)


SWEEP = """\
budget: {trials: 1, epochs: 500, grace_epochs: 500}
resources: {workers: 2, cpus_per_worker: 1}
fixed:
  data.source: simulate
  data.patterns_per_epoch: 256
  data.validation_patterns: 64
  simulate.size: 32
  simulate.scale: 0.1
  model.name: cnn
  model.width: 4
  head.step: 20
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_at_home_listens_to_nobody_else(tmp_path: Path) -> None:
    """Ray, its drivers and workers, and where data-parallel workers meet: all on the loopback address."""
    (tmp_path / "two.yaml").write_text(SWEEP)
    sweep = subprocess.Popen(
        [sys.executable, "-m", "stemtune.cli", "sweep", "two.yaml", "--local"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 600
        while not list(tmp_path.glob("sweeps/two/train/*/checkpoint*")):
            assert sweep.poll() is None and time.monotonic() < deadline
            time.sleep(0.5)
        found = listening(sweep.pid)
        workers = [place for name, place, _ in found if name.startswith("ray::RayTrain")]
        assert len(workers) >= 5, found  # two of Ray's, two of gloo's, and one where the two workers meet
        assert {place for _, place, _ in found} <= LOOPBACK, found
        (agent,) = (port for name, _, port in found if name.startswith("ray::RuntimeEnv"))
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://127.0.0.1:{agent}/get_runtime_envs_info", data=b"", timeout=30)
        assert refused.value.code in (401, 403)
    finally:
        sweep.send_signal(signal.SIGINT)
        assert sweep.wait(120) == 130


def test_nothing_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(UserError, match="no Ray answers at 127.0.0.1:9 .*refused.*--local"):
        connect.connect()
    monkeypatch.setenv("RAY_ADDRESS", "ray://somewhere:10001")
    with pytest.raises(UserError, match="RAY_ADDRESS is .* runs on a node of the cluster"):
        connect.connect()
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with pytest.raises(UserError, match="RAY_ADDRESS is 'nonsense'"):
        connect.connect()
    with pytest.raises(UserError, match="--ray is 'ray://head:10001'"):
        connect.running("ray://head:10001")


def test_the_token_file_is_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "auth_token"
    token.write_text("0" * 64)
    token.chmod(0o644)  # as `ray get-auth-token --generate` leaves it
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    connect.use_token()
    assert token.stat().st_mode & 0o777 == 0o600
    token.chmod(0o644)
    monkeypatch.setattr(Path, "chmod", lambda *_: None)  # the file is somebody else's
    with pytest.raises(UserError, match=f"others can read; chmod 600 {token}"):
        connect.use_token()


def test_the_node_that_differs_is_named(tmp_path: Path) -> None:
    (tmp_path / "marker").write_text("word")
    (tmp_path / "store.h5").write_bytes(b"12345")
    files = [str(tmp_path / "store.h5")]
    wanted = node_check.inspect_node(str(tmp_path), "marker", files)
    node_check.compare_reports("node2 (10.0.0.2)", wanted, wanted, "word", tmp_path)
    elsewhere = node_check.inspect_node(str(tmp_path / "absent"), "marker", [str(tmp_path / "store.h5")])
    with pytest.raises(UserError, match=r"node node2 \(10.0.0.2\) does not see the sweep's folder .*STEMTUNE_SWEEPS"):
        node_check.compare_reports("node2 (10.0.0.2)", elsewhere, wanted, "word", tmp_path)
    from dataclasses import replace

    for changed, message in (
        ({"marker": "another"}, "does not see the sweep's folder"),
        ({"ray": "2.59.0"}, "runs ray 2.59.0, but the sweep's own node 2."),
        ({"stemtune": "0.0.9"}, "runs stemtune 0.0.9"),
        ({"writable": "Read-only file system"}, "cannot write to the sweep's folder .*: Read-only file system"),
        ({"sizes": {files[0]: None}}, "does not see .*store.h5'; copy it to storage"),
        ({"sizes": {files[0]: 4}}, "has another file"),
    ):
        with pytest.raises(UserError, match=message):
            node_check.compare_reports("node3", replace(wanted, **changed), wanted, "word", tmp_path)  # type: ignore[arg-type]
    assert list(tmp_path.glob("marker.*")) == []


def test_a_worker_stands_on_one_node() -> None:
    assert node_check.workers_that_fit({"CPU": 4, "GPU": 1}, {"CPU": 1, "GPU": 0.25}) == 4
    assert node_check.workers_that_fit({"CPU": 3, "GPU": 1}, {"CPU": 1, "GPU": 0.25}) == 3
    assert node_check.workers_that_fit({"CPU": 64}, {"CPU": 1, "GPU": 1}) == 0
    assert node_check.workers_that_fit({"CPU": 0.3}, {"CPU": 0.1, "GPU": 0}) == 3


def test_the_cluster_file_is_one_that_ray_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / "cluster" / "hpc.yaml").read_text())
    validate_config(prepare_config(config))
    for local in config["file_mounts"].values():
        assert local.startswith("~/") or (ROOT / local).exists(), local
    assert not any(remote.rstrip("/") == "~/stemtune" for remote in config["file_mounts"])  # would hide the package
    for script in sorted((ROOT / "cluster").glob("*.sh")):
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("type: local", "type: aws"), "provider.type is 'aws', but only 'local' can be checked"),
        (("head_ip: 192.168.1.10", "head_ip: node1"), "'node1' in provider is no IP address"),
        (("192.168.1.12]", "192.168.1.10]"), "provider names an address twice"),
        (("/home/me/.ssh/id_ed25519", "id_ed25519"), "must be the whole path of a key"),
        (("/home/me/.ssh/id_ed25519", "/nowhere/key"), "auth.ssh_private_key '/nowhere/key' does not exist"),
        (("/home/me/.ssh/id_ed25519", "OPEN"), "the ssh key lies in"),
        (("/home/me/.ssh/id_ed25519", "KEY"), "there is no token in"),
        (("/home/me/.ssh/id_ed25519", "TOKEN"), "cannot log into me@127.0.0.9 with"),
    ],
)
def test_what_a_cluster_file_lacks(
    change: tuple[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    key = tmp_path / "key"
    key.touch()
    key.chmod(0o644 if change[1] == "OPEN" else 0o600)
    if change[1] == "TOKEN":
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").touch(mode=0o600)
    new = str(key) if change[1] in ("OPEN", "KEY", "TOKEN") else change[1]
    text = (ROOT / "cluster" / "hpc.yaml").read_text()
    assert change[0] in text
    text = text.replace(change[0], new)
    if change[1] == "TOKEN":
        text = text.replace("192.168.1.10", "127.0.0.9").replace("[192.168.1.11, 192.168.1.12]", "[]")
    (tmp_path / "hpc.yaml").write_text(text)
    assert cli.main(["check", str(tmp_path / "hpc.yaml")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
