"""Every knob once: its name, default, unit, range and meaning.

A knob has one name from end to end: the dataclass field in `sections.py`, the key in a search space, the name Optuna
sees, the parameter MLflow keeps and the key of `--set` are all the same dotted word, `optim.lr` for instance.
`Config.from_flat` is the only way in, and it checks every value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

from stemtune.config.sections import (
    HEAD_NAMES,
    MODEL_NAMES,
    CleanConfig,
    DataConfig,
    GrainsConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    SimulateConfig,
    TrainConfig,
)
from stemtune.config.setting import Cut, Knob, Scalar, Span, read_cuts
from stemtune.errors import UserError, did_you_mean

METRICS = (
    "val/disorientation_median_deg",
    "val/disorientation_mean_deg",
    "val/within_2deg",
    "val/within_5deg",
    "val/disorientation_median_deg_beam180",
    "val/within_5deg_beam180",
    "val/pseudo_symmetry_fraction",
    "val/ece",
    "val/loss",
    "train/loss",
    "train/learning_rate",
    "train/samples_per_s",
    "train/peak_memory_mb",
    "model/ms_per_pattern",
    "model/parameters",
)
"""What a trial reports after every epoch; a search space may optimise any of them."""

_GROUPS = {
    "data": DataConfig,
    "simulate": SimulateConfig,
    "model": ModelConfig,
    "head": HeadConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
}


@cache
def knobs() -> dict[str, Knob]:
    """Return every knob of a trial by its dotted name."""
    return {key: known for group, kind in _GROUPS.items() for key, known in knobs_of(group, kind).items()}


def knobs_of(group: str, kind: type[Any]) -> dict[str, Knob]:
    """Return the knobs of the settings class `kind` by their dotted names, which start with `group`."""
    return {
        f"{group}.{item.name}": Knob(key=f"{group}.{item.name}", default=item.default, **item.metadata)
        for item in fields(kind)
    }


def knob(key: str) -> Knob:
    """Return the knob called `key`, or raise a `UserError` that suggests the nearest name."""
    if key not in knobs():
        raise UserError(f"no setting is called '{key}'{did_you_mean(key, knobs())}")
    return knobs()[key]


@dataclass(frozen=True)
class Config:
    """All settings of one training run; made by `Config.from_flat`, which checks them."""

    data: DataConfig = field(default_factory=DataConfig)
    simulate: SimulateConfig = field(default_factory=SimulateConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @classmethod
    def from_flat(cls, flat: Mapping[str, object]) -> Config:
        """Build from `{"optim.lr": 1e-3, ...}`; keys left out keep their defaults.

        Raises
        ------
        UserError
            For an unknown key (with the nearest known one) or a value outside its range.
        """
        return cls().replace(flat)

    def replace(self, flat: Mapping[str, object]) -> Config:
        """Return a copy with the dotted keys in `flat` changed, each value checked."""
        changed: dict[str, dict[str, Any]] = {group: {} for group in _GROUPS}
        for key, value in flat.items():
            parsed = knob(key).parse(value)
            group, name = key.split(".", 1)
            changed[group][name] = parsed
        parts = {group: dataclasses.replace(getattr(self, group), **new) for group, new in changed.items()}
        config = dataclasses.replace(self, **parts)
        if config.model.kernel_size % 2 == 0:
            raise UserError(f"`model.kernel_size` is {config.model.kernel_size}, but must be odd")
        return config

    def to_flat(self) -> dict[str, Scalar]:
        """Return every setting under its dotted name; ranges become text `low:high`."""
        flat: dict[str, Scalar] = {}
        for group in _GROUPS:
            for item in fields(getattr(self, group)):
                value = getattr(getattr(self, group), item.name)
                flat[f"{group}.{item.name}"] = str(value) if isinstance(value, Span) else value
        return flat


def parse_assignments(pairs: list[str]) -> dict[str, object]:
    """Turn `["optim.lr=1e-3", ...]` from `--set` into a flat mapping of checked values."""
    flat: dict[str, object] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair}: write it as key=value, optim.lr=1e-3 for instance")
        flat[key.strip()] = knob(key.strip()).parse(text.strip())
    return flat


__all__ = [
    "HEAD_NAMES",
    "METRICS",
    "MODEL_NAMES",
    "CleanConfig",
    "Config",
    "Cut",
    "DataConfig",
    "GrainsConfig",
    "HeadConfig",
    "Knob",
    "ModelConfig",
    "OptimConfig",
    "Scalar",
    "SimulateConfig",
    "Span",
    "TrainConfig",
    "knob",
    "knobs",
    "knobs_of",
    "parse_assignments",
    "read_cuts",
]
