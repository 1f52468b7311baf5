"""How good models are on patterns that neither training nor selection has seen, and how sure that is.

The figure of the epoch that validates best, of the best of many trials, is a lucky one. What can be believed is
measured on the test split, with an interval; and two models are compared on the same patterns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from stemtune.config import Config
from stemtune.crystal.sampling import random_orientations
from stemtune.crystal.symmetry import Symmetry, disorientation_deg
from stemtune.dataset.loaders import held_out_loader, resampled_to
from stemtune.errors import UserError
from stemtune.learning.checkpoint import load_model, read_description
from stemtune.learning.fit import default_device
from stemtune.learning.metrics import ERRORS, Angles, errors_deg, model_figures, score_patterns, summarise
from stemtune.learning.model import OrientationModel
from stemtune.learning.models import build
from stemtune.learning.trainer import chosen_precision

_RESAMPLES = 1000
_FEWEST_GROUPS = 8  # fewer groups than that say nothing about another draw of groups
_DRAWN = 20_000  # random orientations from which chance is measured
MEAN, MEDIAN = "disorientation_mean_deg", "disorientation_median_deg"
_MATCHED = Config.from_flat({"model.name": "matched"})


@dataclass(frozen=True)
class HeldOut:
    """What a model reads of the test patterns."""

    figures: dict[str, float]  # `test/...`, and `model/ms_per_pattern` measured while nothing else runs
    value: float  # the figure that decides
    drawn: npt.NDArray[np.float64]  # the same of (1000,) bootstrap samples of the patterns, the same for every model
    learned: bool  # whether it is surely better than random orientations
    patterns: int

    @property
    def interval(self) -> tuple[float, float]:
        """The central 95 % of the bootstrap samples."""
        return interval(self.drawn)


def interval(drawn: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return the bounds of the central 95 % of bootstrap samples."""
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(low), float(high)


@cache
def chance_deg(symmetry: Symmetry) -> dict[str, float]:
    """Return mean and median disorientation, in degrees, between random orientations of a crystal."""
    drawn = random_orientations(_DRAWN, torch.Generator().manual_seed(0))
    angles = disorientation_deg(drawn, torch.eye(4, dtype=drawn.dtype)[:1], symmetry).double().numpy()
    return {name: ERRORS[name](angles, angles) for name in (MEAN, MEDIAN)}


def resamples(groups: npt.NDArray[np.integer]) -> Iterator[npt.NDArray[np.intp]]:
    """Yield bootstrap samples of patterns, as their numbers: whole groups (n,) are drawn, with replacement.

    Patterns of a grain are right or wrong together, so that single patterns would promise too much; where there are
    too few groups they are drawn all the same.
    """
    number = np.unique(groups, return_inverse=True)[1]
    count = int(number.max()) + 1
    if count < _FEWEST_GROUPS:
        number, count = np.arange(len(groups)), len(groups)
    dice, every = np.random.default_rng(0), np.arange(len(groups))
    for _ in range(_RESAMPLES):
        times = np.bincount(dice.integers(count, size=count), minlength=count)
        yield np.repeat(every, times[number])


def score_held_out(folders: Sequence[Path | None], rival: Path | None, metric: str) -> list[HeldOut | None]:
    """Return what the models in `folders`, then the `rival`, read of the test patterns of the first one's settings.

    None in `folders` stands for the matched filter with its defaults; a rival that cannot read these patterns, or that
    there is not, comes out as None. `metric` is the figure that decides, one of `ERRORS`. A `UserError` says that a
    model cannot be read, or that there are no test patterns.
    """
    first = next(folder for folder in folders if folder is not None)
    config, device = Config.from_flat(read_description(first)["config"]), default_device()
    loader, groups = held_out_loader(config, device)
    for _ in loader.epoch(0):  # fresh patterns are made once, and files read, before anything is timed
        pass
    samples = list(resamples(groups))

    def read(model: OrientationModel) -> HeldOut:
        precision = chosen_precision(model.config.train.precision, device)
        scores = score_patterns(model.to(device), resampled_to(loader, model.geometry), device, precision)
        figures = {key.replace("val/", "test/"): value for key, value in summarise(scores).items()}
        figures["model/ms_per_pattern"] = model_figures(model, scores)["model/ms_per_pattern"]
        return _judged(errors_deg(scores), samples, metric, figures, model)

    found: list[HeldOut | None] = [
        read(load_model(folder) if folder else build(_MATCHED, loader.phase, loader.geometry)) for folder in folders
    ]
    try:
        return [*found, read(load_model(rival)) if rival else None]
    except UserError:
        return [*found, None]


def _judged(
    angles: tuple[Angles, Angles],
    samples: Sequence[npt.NDArray[np.intp]],
    metric: str,
    figures: dict[str, float],
    model: OrientationModel,
) -> HeldOut:
    drawn = {
        name: np.array([ERRORS[name](angles[0][rows], angles[1][rows]) for rows in samples])
        for name in dict.fromkeys((metric, MEAN, MEDIAN))
    }
    chance = chance_deg(model.phase.symmetry)
    learned = any(interval(drawn[name])[1] < chance[name] for name in (MEAN, MEDIAN))
    low, high = interval(drawn[metric])
    figures |= {f"test/{metric}_low": low, f"test/{metric}_high": high, "test/patterns": float(len(angles[0]))}
    return HeldOut(figures, ERRORS[metric](*angles), drawn[metric], learned, len(angles[0]))
