"""Which code ran: version, git commit, and whether the checkout had changes of its own."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

from stemtune._version import __version__


@cache
def code_version() -> dict[str, str]:
    """Return the package's version and, in a git checkout, its commit and state, as tags."""
    tags = {"stemtune.version": __version__}
    commit = _git("rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = commit
        tags["stemtune.commit"] = commit
        tags["stemtune.changed_files"] = str(len((_git("status", "--porcelain", "-uno") or "").splitlines()))
    return tags


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
