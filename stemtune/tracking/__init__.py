"""What happened, kept in MLflow: one experiment per sweep name, a run per sweep, a child run per trial.

`Tracker` writes (one thread, through a journal on disk, so that an absent server loses nothing), `NullTracker` writes
nothing, `read_sweep` reads back, `resolve_model` turns an MLflow address or a folder into a model folder, `log_files`
keeps what a model made with its run.
MLflow itself is imported only when one of them is used.
"""

from __future__ import annotations

from stemtune.tracking.address import Address, address
from stemtune.tracking.artifacts import log_files
from stemtune.tracking.client import greet
from stemtune.tracking.provenance import code_version
from stemtune.tracking.query import SweepRecord, TrialRecord, newest_sweep, read_sweep
from stemtune.tracking.registry import resolve_model
from stemtune.tracking.writer import NullTracker, Tracker

__all__ = [
    "Address",
    "NullTracker",
    "SweepRecord",
    "Tracker",
    "TrialRecord",
    "address",
    "code_version",
    "greet",
    "log_files",
    "newest_sweep",
    "read_sweep",
    "resolve_model",
]
