"""The trials of `benchmarks sweep` as a plain function of Ray Tune's public interface: no records, nothing kept.

What any sweep costs at least: Optuna proposes, ASHA looks on, processes are kept from trial to trial.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from ray import init, tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

METRIC = "val/disorientation_median_deg"


def train(config: dict[str, Any]) -> None:
    """Train one trial in Tune's process, and report every epoch."""
    import torch

    from stemtune.config import Config
    from stemtune.learning.fit import fit

    torch.set_num_threads(1)

    def report(metrics: dict[str, float], _: Path | None) -> None:
        tune.report({METRIC: metrics[METRIC]})

    with tempfile.TemporaryDirectory() as scratch:
        fit(Config.from_flat({**config["fixed"], "optim.lr": config["optim.lr"]}), report, Path(scratch))


def main() -> None:
    """Run the trials that the command line asks for."""
    from stemtune.tune.space.space import load_space

    parser = argparse.ArgumentParser()
    parser.add_argument("space")
    parser.add_argument("folder")
    given = parser.parse_args()
    space = load_space(given.space)
    os.environ["RAY_TRAIN_ENABLE_V2"] = "1"
    init(address="local", include_dashboard=False, log_to_driver=False)
    found = tune.Tuner(
        tune.with_resources(train, {"CPU": 1}),
        param_space={
            "fixed": {**space.fixed, "train.epochs": space.budget.epochs},
            "optim.lr": tune.loguniform(1e-4, 1e-2),
        },
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="min",
            search_alg=tune.search.ConcurrencyLimiter(OptunaSearch(), space.budget.concurrent or 1),
            scheduler=ASHAScheduler(max_t=space.budget.epochs or 1, grace_period=space.budget.grace_epochs),
            num_samples=space.budget.trials,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(storage_path=given.folder, name="plain", verbose=0),
    ).fit()
    if found.errors:
        raise SystemExit(str(found.errors[0]))


if __name__ == "__main__":
    main()
