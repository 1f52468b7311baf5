"""Memory limits of containers and batch jobs are seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stemtune import _parallel

GB = 2**30


def groups(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"memory.{name}").write_text(f"{value}\n")


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(_parallel, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(_parallel, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(_parallel.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 512 * GB // 4096}.get)
    return tmp_path


def test_version_two_takes_the_tightest_group_above(cgroups: Path) -> None:
    (cgroups / "membership").write_text("0::/slurm/job_7/step_0\n")
    root = cgroups / "cgroup"
    groups(root / "slurm" / "job_7" / "step_0", max="max", current=3 * GB, stat="anon 1")
    groups(root / "slurm" / "job_7", max=8 * GB, current=5 * GB, stat=f"anon 1\ninactive_file {4 * GB}")
    groups(root / "slurm", max=64 * GB, current=63 * GB, stat="anon 1\ninactive_file 0")
    assert _parallel.memory_bytes() == 8 * GB
    assert _parallel.free_bytes(torch.device("cpu")) <= GB  # the group above has used all but 1


def test_version_one_and_a_container_that_sees_only_its_root(cgroups: Path) -> None:
    (cgroups / "membership").write_text("5:cpu,cpuacct:/x\n4:memory:/docker/abc\n1:name=systemd:/x\n")
    stat = f"inactive_file 1\ntotal_inactive_file {2 * GB}"
    groups(cgroups / "cgroup" / "memory", limit_in_bytes=4 * GB, usage_in_bytes=5 * GB // 2, stat=stat)
    assert _parallel.memory_bytes() == 4 * GB
    assert _parallel.free_bytes(torch.device("cpu")) <= 7 * GB // 2


@pytest.mark.parametrize("membership", ["0::/\n", "4:memory:/\n", None])
def test_without_a_limit_the_machine_counts(membership: str | None, cgroups: Path) -> None:
    if membership:
        (cgroups / "membership").write_text(membership)
        groups(cgroups / "cgroup" / "memory", limit_in_bytes=2**63 - 4096, usage_in_bytes=GB, stat="cache 1")
    assert _parallel.memory_bytes() == 512 * GB
    assert _parallel.free_bytes(torch.device("cpu")) > 0
