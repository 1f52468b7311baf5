"""What happened, kept in MLflow: one experiment per sweep name, a run per sweep, a child run per trial.

`Tracker` writes (one thread, through a journal on disk, so that an absent server loses nothing), `NullTracker` writes
nothing, `read_sweep` reads back, `resolve` turns an MLflow address or a folder into a model folder, `log_files` keeps
files with a run.
MLflow itself is imported only when one of them is used.
"""

from __future__ import annotations

from stemtune.tracking.client import Address, address, check_server, code_version
from stemtune.tracking.query import SweepRecord, TrialRecord, newest_sweep, read_sweep
from stemtune.tracking.registry import (
    Champion,
    ResolvedModel,
    champions,
    log_files,
    reigning,
    resolve,
    resolve_model,
    roll_back,
)
from stemtune.tracking.writer import NullTracker, Tracker, resend

__all__ = [
    "Address",
    "Champion",
    "NullTracker",
    "ResolvedModel",
    "SweepRecord",
    "Tracker",
    "TrialRecord",
    "address",
    "champions",
    "check_server",
    "code_version",
    "log_files",
    "newest_sweep",
    "read_sweep",
    "reigning",
    "resend",
    "resolve",
    "resolve_model",
    "roll_back",
]
