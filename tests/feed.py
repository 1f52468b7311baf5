"""Sixteen trials at once through a sweep's callback and Tracker, without training: `feed.py NAME EPOCHS [PAUSE_S]`.

Everything between a trial's report and MLflow is what a sweep uses, its end included; only the reports are made up,
by a thread per trial, so that two cores are enough for sixteen trials at a time.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stemtune._files import seal
from stemtune.tracking import Tracker, address
from stemtune.tune.run.callback import SweepCallback
from stemtune.tune.run.checkpoints import annotate, train_folder
from stemtune.tune.run.manifest import new_manifest, sweeps_folder
from stemtune.tune.run.sweep import SweepOutcome, _finish
from stemtune.tune.space.space import space_from_text

TRIALS = 16
SPACE = f"""\
metric: val/loss
budget: {{trials: {TRIALS}, epochs: EPOCHS}}
search: {{optim.lr: [0.001, 0.002]}}
replicates: {{seeds: 2}}  # so that nobody is judged: made-up models read no patterns
"""


def value(number: int, epoch: int) -> float:
    """Return the figure that trial `number` reports after `epoch`: the champion is the last trial."""
    return (TRIALS - number) + 1.0 / epoch


def run_trial(watch: SweepCallback, number: int, epochs: int, pause_s: float) -> None:
    knobs = {"model.name": "cnn", "optim.lr": 0.001 * (number + 1), "train.epochs": epochs}
    trial = SimpleNamespace(trial_id=f"{watch.name}-{number:02d}", config={"knobs": knobs, "number": number})
    watch.on_trial_start(0, [], trial)
    ends_early = number % 4 == 1
    for epoch in range(1, epochs + 1):
        time.sleep(pause_s * random.Random(number * 1000 + epoch).uniform(0.5, 1.5))
        stop = ends_early and epoch == epochs - 1
        watch.on_trial_result(0, [], trial, {"val/loss": value(number, epoch), "epoch": epoch, "done": stop})
        if stop:
            break
    folder = train_folder(watch.folder, trial.trial_id) / "checkpoint_000000"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.json").write_text('{"schema": 1}')
    (folder / "model" / "model.safetensors").write_bytes(f"weights of {trial.trial_id}".encode() * 1000)
    seal(folder)
    annotate(folder, [{"epoch": past, "val/loss": value(number, past)} for past in range(1, epoch + 1)])
    watch.on_trial_complete(0, [], trial)


def run(name: str, epochs: int, pause_s: float = 0.2, wait_s: float = 300.0) -> SweepOutcome:
    """Run a sweep of sixteen made-up trials at once; wait for the tracking server as `--resume` would."""
    space = space_from_text(SPACE.replace("EPOCHS", str(epochs)), name)
    folder = sweeps_folder() / name
    folder.mkdir(parents=True)
    sheet: dict[str, Any] = new_manifest(space, name)
    watch = SweepCallback(space, folder, name, sheet["sweep_id"], True, "")
    watch.setup()
    threads = [threading.Thread(target=run_trial, args=(watch, number, epochs, pause_s)) for number in range(TRIALS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Crowned here and not by its figures.
    last = f"{name}-{TRIALS - 1:02d}"
    watch.tracker.champion(last, str(train_folder(folder, last) / "checkpoint_000000" / "model"), {})
    outcome = _finish(watch, folder, sheet, False)
    if outcome.unsent:
        left = Tracker(folder, name, sheet["sweep_id"], address()).close(wait_s)
        assert left == 0, f"{left} records were not sent"
    return outcome


if __name__ == "__main__":
    done = run(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 0.2)
    assert not (Path(done.folder) / "tracking.refused.jsonl").exists()
    print(done.status, done.champion.trial if done.champion else None)
