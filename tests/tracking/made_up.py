"""A made-up sweep and a made-up model."""

from __future__ import annotations

from pathlib import Path

from stemtune.tracking import NullTracker


def model_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.json").write_text('{"schema": 1}')
    (folder / "model.safetensors").write_bytes(b"weights of " + folder.name.encode())
    return folder


def tell(tracker: NullTracker, trials: int = 2, epochs: int = 3) -> None:
    tracker.sweep({"budget.trials": trials, "metric": "val/loss"}, {"a": "b"}, "metric: val/loss")
    for trial in range(trials):
        tracker.trial(
            f"t{trial}", f"{trial:03d} cnn", {"optim.lr": 1e-3, "model.name": "cnn"}, {"stemtune.number": "0"}
        )
        for epoch in range(1, epochs + 1):
            tracker.metrics(f"t{trial}", epoch, {"val/loss": trial + 1.0 / epoch})
        tracker.end(f"t{trial}", "stopped" if trial else "finished", "stopped by ASHA" if trial else "", {}, {})
