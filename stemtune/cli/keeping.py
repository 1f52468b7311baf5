"""A map's report and pictures, kept with the MLflow runs of the models that made the map."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from stemtune.errors import UserError

KEPT = ("report.html", "*.png", "summary.json")
"""What of a map folder is logged."""


def keep(models: Sequence[str], folder: Path) -> None:
    """Log a map's report and pictures to the runs of its models; that MLflow does not take them is worth a note."""
    from stemtune.tracking import log_files

    for model in models:
        try:
            address = log_files(model, folder, KEPT)
        except UserError as problem:
            print(f"note: report and pictures are not logged to MLflow: {problem}", file=sys.stderr)
        else:
            if address is not None:
                print(f"logged report and pictures to {address}")


def keep_again(path: str) -> None:
    """Log a map folder, or the one that a `map.h5` is in, to the runs that it says its models came from."""
    from stemtune.map_folder.rework import made_by

    given = Path(path)
    keep([f"runs:/{run}" for run in made_by(given)], given.parent if given.is_file() else given)


__all__ = ["keep", "keep_again"]
