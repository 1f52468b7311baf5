"""A checkout set up for the hosts of `hosts.py`, by the edits that the comments of cluster/ ask a user for."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

TINY = """\
about: Does a sweep run on a cluster?
budget: {trials: TRIALS, epochs: 2, grace_epochs: 2}
resources: {cpus_per_worker: 1}
fixed:
  data.source: simulate
  data.patterns_per_epoch: 128
  data.validation_patterns: 64
  simulate.size: 32
  simulate.scale: 0.1
  model.name: cnn
  model.width: 4
  head.step: 20
search:
  optim.lr: {log: [1.0e-4, 1.0e-2]}
"""


BUSY = """
# Several hosts on one small machine start slowly.
export RAY_raylet_start_wait_time_s=90 RAY_NUM_REDIS_GET_RETRIES=90
export RAY_gcs_rpc_server_connect_timeout_s=60 RAY_health_check_timeout_ms=60000
export RAY_health_check_period_ms=10000 RAY_health_check_failure_threshold=20
"""


def checkout(place: Path, shared: Path, trials: int = 4) -> Path:
    """Copy the code to `place`/checkout, name the shared folder and this Python's environment, and add `tiny.yaml`."""
    made = place / "checkout"
    for part in ("stemtune", "search_spaces", "cluster"):
        shutil.copytree(ROOT / part, made / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "constraints.txt", "README.md"):
        shutil.copy(ROOT / part, made / part)
    (made / "search_spaces" / "tiny.yaml").write_text(TINY.replace("TRIALS", str(trials)))
    environment = made / "cluster" / "environment.sh"
    edit(environment, r":-/shared/stemtune\}", f":-{shared}}}")
    # Every host sees the same disk here, so they share the environment that runs the tests instead of making their own.
    edit(environment, r":-\$HOME/stemtune-venv\}", f":-{sys.prefix}}}")
    edit(
        made / "cluster" / "environment.sh",
        r"STEMTUNE_RAY_OPTIONS:-\}",
        "STEMTUNE_RAY_OPTIONS:---object-store-memory=100000000}",
    )
    with environment.open("a") as file:
        file.write(BUSY)
    shared.mkdir(exist_ok=True)
    return made


def edit(file: Path, pattern: str, to: str) -> None:
    """Replace the one place in `file` that matches `pattern`."""
    text, count = re.subn(pattern, lambda _: to, file.read_text())
    if count != 1:
        raise ValueError(f"{file} has {count} places like {pattern}, not one")
    file.write_text(text)
