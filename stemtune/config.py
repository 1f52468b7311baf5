"""Every knob once: its name, default, unit, range and meaning.

A knob has one name from end to end: the dataclass field here, the key in a search space, the name Optuna sees,
the parameter MLflow keeps and the key of `--set` are all the same dotted word, `optim.lr` for instance.
`Config.from_flat` is the only way in, and it checks every value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

from stemtune.errors import UserError, did_you_mean

Scalar = bool | int | float | str

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
    "train/samples_per_s",
)
"""What a trial reports after every epoch; a search space may optimise any of them."""


@dataclass(frozen=True)
class Span:
    """A closed range that is drawn from at random; a single number is a range of no width."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g}:{self.high:g}"


@dataclass(frozen=True)
class Knob:
    """What is known about one setting: the place `key`, the default, the allowed values and the meaning."""

    key: str
    kind: str
    default: Any
    about: str
    unit: str = ""
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    choices: tuple[str, ...] = ()

    def parse(self, value: object) -> Any:
        """Return `value` as this knob's type, or raise a `UserError` that names key, value and range."""
        if isinstance(value, str) and self.kind != "text":
            value = _from_text(value, self.kind)
        if self.kind == "flag":
            if not isinstance(value, bool):
                raise self._refuse(value, "true or false")
            return value
        if self.kind == "text":
            if isinstance(value, bool) or not isinstance(value, str):
                raise self._refuse(value, f"one of {', '.join(self.choices)}" if self.choices else "text")
            if self.choices and value not in self.choices:
                raise self._refuse(value, f"one of {', '.join(self.choices)}{did_you_mean(value, self.choices)}")
            return value
        if self.kind == "flag_or_path":
            if not isinstance(value, bool | str):
                raise self._refuse(value, "true, false or a path")
            return value
        if self.kind == "span":
            span = _span(value)
            if span is None or span.low > span.high:
                raise self._refuse(value, "a number or low:high")
            self._in_range(span.low, value)
            self._in_range(span.high, value)
            return span
        return self._number(value)

    def _number(self, value: object) -> int | float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._refuse(value, "a whole number" if self.kind == "int" else "a number")
        if self.kind == "int" and value != int(value):
            raise self._refuse(value, "a whole number")
        self._in_range(value, value)
        return int(value) if self.kind == "int" else float(value)

    def _in_range(self, number: float, shown: object) -> None:
        above = number > self.low if self.open_low else number >= self.low
        if not (above and number <= self.high) or math.isnan(number):
            raise self._refuse(shown, f"in {self.range_text}")

    @property
    def range_text(self) -> str:
        """The allowed range in mathematical notation, `(0, 1]` for instance."""
        left = "(" if self.open_low or math.isinf(self.low) else "["
        right = ")" if math.isinf(self.high) else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"

    def _refuse(self, value: object, wanted: str) -> UserError:
        return UserError(f"`{self.key}` is {value!r}, but must be {wanted}")


def _from_text(text: str, kind: str) -> object:
    """Read a number or a flag that came as text (from `--set`, or YAML's 1e-5); leave other text as it is."""
    lowered = text.strip().lower()
    if kind in ("flag", "flag_or_path") and lowered in ("true", "false"):
        return lowered == "true"
    if kind in ("int", "float"):
        try:
            return float(lowered) if kind == "float" else int(lowered)
        except ValueError:
            return text
    return text


def _span(value: object) -> Span | None:
    if isinstance(value, Span):
        return value
    if isinstance(value, str):
        parts: list[Any] = value.split(":")
    elif isinstance(value, list | tuple):
        parts = list(value)
    else:
        parts = [value]
    if len(parts) not in (1, 2) or any(isinstance(part, bool) for part in parts):
        return None
    try:
        return Span(float(parts[0]), float(parts[-1]))
    except (TypeError, ValueError):
        return None


def _knob(kind: str, default: Any, about: str, **limits: Any) -> Any:
    return field(default=default, metadata={"kind": kind, "about": about, **limits})


@dataclass(frozen=True)
class DataConfig:
    """Where patterns come from and how they enter the network."""

    source: str = _knob("text", "store", "patterns from a store, or simulated afresh", choices=("store", "simulate"))
    store: str = _knob("text", "", "path of the training store (HDF5)")
    cif: str = _knob("text", "", "CIF of the phase for data.source simulate; empty means LiNiO2")
    patterns_per_epoch: int = _knob("int", 8192, "fresh patterns in one epoch of data.source simulate", low=1)
    validation_patterns: int = _knob("int", 1024, "validation patterns of data.source simulate", low=1)
    min_confidence: float = _knob("float", 0.0, "drop training labels below this confidence", low=0)
    keep_fraction: float = _knob(
        "float", 1.0, "keep this most confident part of the training labels", low=0, open_low=True, high=1
    )
    order: str = _knob("text", "shuffled", "order of training patterns", choices=("shuffled", "confidence"))
    gamma: float = _knob("float", 0.25, "power that intensities are raised to", low=0, open_low=True, high=1)
    augment: str = _knob(
        "text", "flips", "exact augmentations by the pattern's symmetry", choices=("none", "flips", "rotate")
    )


@dataclass(frozen=True)
class SimulateConfig:
    """The microscope that is simulated. A range low:high is drawn from anew for every pattern."""

    kv: float = _knob("float", 200.0, "acceleration voltage", unit="kV", low=20, high=1500)
    size: int = _knob("int", 128, "pattern width and height", unit="px", low=16, high=1024)
    scale: float = _knob("float", 0.025, "reciprocal length of one pixel", unit="1/Å", low=1e-4, high=1)
    thickness: Span = _knob("span", Span(20, 120), "crystal thickness", unit="nm", low=0, open_low=True, high=5000)
    precession: Span = _knob("span", Span(0, 1), "precession semi-angle", unit="deg", low=0, high=5)
    convergence: Span = _knob("span", Span(0.5, 2), "convergence semi-angle (disk radius)", unit="mrad", low=0, high=50)
    dose: Span = _knob("span", Span(300, 100_000), "electrons per pattern, log-uniform; 0 is noise-free", low=0)
    physics: str = _knob(
        "text", "kinematic", "single scattering, or dynamical (Bloch waves)", choices=("kinematic", "bloch")
    )
    beams: int = _knob("int", 160, "bloch: most beams of one pattern, the strongest coupled", low=2, high=4000)
    beam_error: float = _knob(
        "float", 0.05, "bloch: largest excitation error of a beam", unit="1/Å", low=0, open_low=True, high=1
    )
    absorption: str = _knob(
        "text", "thermal", "bloch: loss to thermal diffuse scattering, or none", choices=("thermal", "none")
    )
    tilts: int = _knob(
        "int", 12, "bloch: beam directions that precession and convergence are averaged over", low=1, high=1000
    )
    shape: str = _knob(
        "text", "sinc2", "kinematic: fall-off of intensity with excitation error", choices=("sinc2", "gaussian")
    )
    shape_width: Span = _knob(
        "span",
        Span(0.005, 0.03),
        "kinematic: width of the gaussian shape factor",
        unit="1/Å",
        low=0,
        open_low=True,
        high=1,
    )
    intensity_power: Span = _knob(
        "span", Span(1, 1), "power of the intensities; below 1 imitates dynamical equalising", low=0.05, high=2
    )
    direct_beam: Span = _knob(
        "span", Span(0.2, 0.8), "kinematic: share of the direct beam in what the background leaves", low=0, high=1
    )
    background: Span = _knob("span", Span(0, 0.3), "share of the amorphous background in the dose", low=0, high=0.95)
    blur: Span = _knob("span", Span(0.3, 1), "detector blur (Gaussian sigma)", unit="px", low=0, high=10)
    centre_error: float = _knob("float", 1.5, "largest error of the centre", unit="px", low=0, high=50)
    ellipticity: float = _knob("float", 0.04, "largest relative difference of the axes", low=0, high=0.5)
    scale_error: float = _knob("float", 0.015, "largest relative error of the scale", low=0, high=0.5)
    beam_stop: Span = _knob("span", Span(0, 0), "radius of the beam stop", unit="px", low=0, high=512)
    dead_pixels: float = _knob("float", 0.0002, "share of pixels that read zero", low=0, high=0.5)
    overlap: float = _knob(
        "float", 0.0, "share of patterns (in a scan: of those at boundaries) with several grains", low=0, high=1
    )
    overlap_grains: int = _knob("int", 2, "most grains of such a pattern", low=2, high=3)
    overlap_weight: Span = _knob(
        "span", Span(0.1, 1), "strength of a further grain beside the strongest", low=0, open_low=True, high=1
    )


MODEL_NAMES = ("cnn", "densenet", "swin", "matched", "polar", "rerank")
"""The architectures that ship; `stemtune/learning/models/` holds one module each."""


@dataclass(frozen=True)
class ModelConfig:
    """The network. A knob that an architecture does not have leaves it unchanged; 0 means its own default."""

    name: str = _knob("text", "polar", "architecture", choices=MODEL_NAMES)
    pretrained: bool | str = _knob(
        "flag_or_path", False, "true: timm's weights from the hub; a path: local weights or a stemtune model folder"
    )
    adjusted: bool = _knob("flag", False, "swin: patch, window and depths fitted to sparse 128 px patterns")
    input_size: int = _knob("int", 0, "resample patterns to this size first; 0 keeps the store's", unit="px", low=0)
    kernel_size: int = _knob("int", 3, "cnn, polar: convolution kernel, odd", low=1, high=31)
    width: int = _knob("int", 0, "channels of the first stage", low=0, high=1024)
    depth: int = _knob("int", 0, "cnn, polar: number of stages or layers", low=0, high=64)
    patch_size: int = _knob("int", 0, "swin: pixels per patch edge", low=0, high=32)
    window: int = _knob("int", 0, "swin: attention window", low=0, high=32)
    depths: str = _knob("text", "", "swin: blocks per stage, as 2-2-4-2")
    drop_path: float = _knob("float", 0.0, "stochastic depth", low=0, high=0.9)
    dropout: float = _knob("float", 0.0, "dropout before the head", low=0, high=0.9)
    grid_step: float = _knob(
        "float", 0.0, "matched (2), polar (3): spacing of beam directions", unit="deg", low=0, high=20
    )
    angles: int = _knob("int", 120, "matched, polar: in-plane angles of the polar pattern", low=16, high=720)
    radii: int = _knob("int", 40, "matched, polar: radii of the polar pattern", low=8, high=256)
    template_power: float = _knob(
        "float", 0.15, "matched: power of the template intensities", low=0, open_low=True, high=1
    )
    template_width: float = _knob(
        "float", 0.03, "matched: width of the templates' shape factor", unit="1/Å", low=1e-4, high=1
    )
    template_spot: float = _knob(
        "float", 0.055, "matched: radius (Gaussian sigma) of the templates' spots", unit="1/Å", low=1e-3, high=1
    )
    reach: float = _knob(
        "float", 1.3, "matched, polar: outer radius, in half widths of the pattern (corners at 1.41)", low=0.1, high=1.5
    )
    centring: bool = _knob("flag", True, "matched, polar: move each pattern's direct beam to the middle first")
    test_time: str = _knob(
        "text", "none", "views of a pattern whose answers are merged: itself, or its 8 flips", choices=("none", "flips")
    )
    start: str = _knob("text", "matched", "polar: first layer from templates or random", choices=("matched", "random"))


HEAD_NAMES = ("grid", "mixture", "sixd", "quaternion", "euler")
"""What can sit on a backbone: `stemtune/learning/heads.py` and `mixture.py`."""


@dataclass(frozen=True)
class HeadConfig:
    """How features become an orientation."""

    name: str = _knob("text", "grid", "kind of output", choices=HEAD_NAMES)
    step: float = _knob(
        "float", 8.0, "grid: spacing of beam directions and in-plane angles", unit="deg", low=1, high=45
    )
    residual: bool = _knob("flag", True, "grid: predict the offset inside a grid cell as well")
    softness: float = _knob("float", 0.5, "grid: width of the soft labels, in grid steps", low=0, high=3)
    components: int = _knob("int", 64, "mixture: orientations in the mixture", low=1, high=4096)
    clamp: bool = _knob("flag", False, "euler: clamp the angles to their ranges")


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser (AdamW) and its learning rate over time."""

    lr: float = _knob("float", 1e-3, "peak learning rate", low=0, open_low=True, high=1)
    lr_decay: float = _knob("float", 0.97, "factor on the learning rate per epoch", low=0, open_low=True, high=1)
    schedule: str = _knob("text", "exponential", "learning rate over time", choices=("exponential", "cosine"))
    warmup: float = _knob("float", 0.5, "linear warm-up", unit="epochs", low=0, high=1000)
    weight_decay: float = _knob("float", 0.01, "AdamW weight decay", low=0, high=10)
    grad_clip: float = _knob("float", 1.0, "largest gradient norm; 0 does not clip", low=0)


@dataclass(frozen=True)
class TrainConfig:
    """The training run."""

    epochs: int = _knob("int", 30, "passes over the training data", low=1)
    batch_size: int = _knob("int", 64, "patterns per step, over all workers together", low=1)
    workers: int = _knob("int", 1, "data-parallel processes", low=1, high=4096)
    precision: str = _knob(
        "text", "auto", "number format of the forward pass", choices=("auto", "fp32", "bf16", "fp16")
    )
    channels_last: bool = _knob("flag", True, "memory layout that convolutions prefer")
    seed: int = _knob("int", 0, "seed of weights, order, simulation and augmentation", low=0)


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
    """Return every knob by its dotted name."""
    return {
        f"{group}.{item.name}": Knob(key=f"{group}.{item.name}", default=item.default, **item.metadata)
        for group, kind in _GROUPS.items()
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
