"""Every knob once, section by section."""

from __future__ import annotations

from dataclasses import dataclass

from stemtune.config.setting import Span, define


@dataclass(frozen=True)
class DataConfig:
    """Where patterns come from and how they enter the network."""

    source: str = define("text", "store", "patterns from a store, or simulated afresh", choices=("store", "simulate"))
    store: str = define("text", "", "path of the training store (HDF5)")
    cif: str = define("text", "", "CIF of the phase for data.source simulate; empty means LiNiO2")
    patterns_per_epoch: int = define("int", 8192, "fresh patterns in one epoch of data.source simulate", low=1)
    validation_patterns: int = define("int", 1024, "validation patterns of data.source simulate", low=1)
    validation_store: str = define(
        "text",
        "",
        "validate on all labels of this store, a scan with known truth for instance; empty: data.store's own",
    )
    split: str = define(
        "text",
        "groups",
        "what stays on one side of the split: the store's groups (grains, scan blocks), or nothing: then neighbours"
        " stand on both sides and validation flatters, as in the reference study",
        choices=("groups", "random"),
    )
    guard: int = define(
        "int", 1, "leave out training patterns this near to one of validation or test", unit="scan px", low=0, high=1000
    )
    score: str = define(
        "text", "confidence", "what min_confidence, keep_fraction and order go by: confidence or a score of the store"
    )
    min_confidence: float = define("float", 0.0, "drop training labels whose data.score is below this", low=0)
    keep_fraction: float = define(
        "float", 1.0, "keep this part of the training labels, the best by data.score", low=0, open_low=True, high=1
    )
    cut: str = define("cuts", "", "drop training labels that fail one of these, as Q>0.2 R>5")
    order: str = define("text", "shuffled", "order of training patterns", choices=("shuffled", "confidence"))
    mix: float = define("float", 0.0, "share of other patterns in every training batch", low=0, high=0.95)
    mix_store: str = define(
        "text",
        "",
        "where the share data.mix comes from; empty: simulated afresh by simulate.* at data.store's geometry",
    )
    gamma: float = define("float", 0.25, "power that intensities are raised to", low=0, open_low=True, high=1)
    augment: str = define(
        "text", "flips", "exact augmentations by the pattern's symmetry", choices=("none", "flips", "rotate")
    )


@dataclass(frozen=True)
class SimulateConfig:
    """The microscope that is simulated. A range low:high is drawn from anew for every pattern."""

    kv: float = define("float", 200.0, "acceleration voltage", unit="kV", low=20, high=1500)
    size: int = define("int", 128, "pattern width and height", unit="px", low=16, high=1024)
    scale: float = define("float", 0.025, "reciprocal length of one pixel", unit="1/Å", low=1e-4, high=1)
    thickness: Span = define("span", Span(20, 120), "crystal thickness", unit="nm", low=0, open_low=True, high=5000)
    precession: Span = define("span", Span(0, 1), "precession semi-angle", unit="deg", low=0, high=5)
    convergence: Span = define(
        "span", Span(0.5, 2), "convergence semi-angle (disk radius)", unit="mrad", low=0, high=50
    )
    dose: Span = define("span", Span(300, 100_000), "electrons per pattern, log-uniform; 0 is noise-free", low=0)
    physics: str = define(
        "text", "kinematic", "single scattering, or dynamical (Bloch waves)", choices=("kinematic", "bloch")
    )
    beams: int = define("int", 160, "bloch: most beams of one pattern, the strongest coupled", low=2, high=4000)
    beam_error: float = define(
        "float", 0.05, "bloch: largest excitation error of a beam", unit="1/Å", low=0, open_low=True, high=1
    )
    absorption: str = define(
        "text", "thermal", "bloch: loss to thermal diffuse scattering, or none", choices=("thermal", "none")
    )
    tilts: int = define(
        "int", 12, "bloch: beam directions that precession and convergence are averaged over", low=1, high=1000
    )
    shape: str = define(
        "text", "sinc2", "kinematic: fall-off of intensity with excitation error", choices=("sinc2", "gaussian")
    )
    shape_width: Span = define(
        "span",
        Span(0.005, 0.03),
        "kinematic: width of the gaussian shape factor",
        unit="1/Å",
        low=0,
        open_low=True,
        high=1,
    )
    intensity_power: Span = define(
        "span", Span(1, 1), "power of the intensities; below 1 imitates dynamical equalising", low=0.05, high=2
    )
    direct_beam: Span = define(
        "span", Span(0.2, 0.8), "kinematic: share of the direct beam in what the background leaves", low=0, high=1
    )
    background: Span = define("span", Span(0, 0.3), "share of the amorphous background in the dose", low=0, high=0.95)
    blur: Span = define("span", Span(0.3, 1), "detector blur (Gaussian sigma)", unit="px", low=0, high=10)
    centre_error: float = define("float", 1.5, "largest error of the centre", unit="px", low=0, high=50)
    ellipticity: float = define("float", 0.04, "largest relative difference of the axes", low=0, high=0.5)
    scale_error: float = define("float", 0.015, "largest relative error of the scale", low=0, high=0.5)
    beam_stop: Span = define("span", Span(0, 0), "radius of the beam stop", unit="px", low=0, high=512)
    dead_pixels: float = define("float", 0.0002, "share of pixels that read zero", low=0, high=0.5)
    overlap: float = define(
        "float", 0.0, "share of patterns (in a scan: of those at boundaries) with several grains", low=0, high=1
    )
    overlap_grains: int = define("int", 2, "most grains of such a pattern", low=2, high=3)
    overlap_weight: Span = define(
        "span", Span(0.1, 1), "strength of a further grain beside the strongest", low=0, open_low=True, high=1
    )


MODEL_NAMES = ("cnn", "densenet", "swin", "matched", "polar", "rerank")
"""The architectures that ship; `stemtune/learning/models/` holds one module each."""


@dataclass(frozen=True)
class ModelConfig:
    """The network. A knob that an architecture does not have leaves it unchanged; 0 means its own default."""

    name: str = define("text", "polar", "architecture", choices=MODEL_NAMES)
    pretrained: bool | str = define(
        "flag_or_path", False, "true: timm's weights from the hub; a path: local weights or a stemtune model folder"
    )
    adjusted: bool = define("flag", False, "swin: patch, window and depths fitted to sparse 128 px patterns")
    input_size: int = define("int", 0, "resample patterns to this size first; 0 keeps the store's", unit="px", low=0)
    kernel_size: int = define("int", 3, "cnn, polar: convolution kernel, odd", low=1, high=31)
    width: int = define("int", 0, "channels of the first stage", low=0, high=1024)
    depth: int = define("int", 0, "cnn, polar: number of stages or layers", low=0, high=64)
    patch_size: int = define("int", 0, "swin: pixels per patch edge", low=0, high=32)
    window: int = define("int", 0, "swin: attention window", low=0, high=32)
    depths: str = define("text", "", "swin: blocks per stage, as 2-2-4-2")
    drop_path: float = define("float", 0.0, "stochastic depth", low=0, high=0.9)
    dropout: float = define("float", 0.0, "dropout before the head", low=0, high=0.9)
    grid_step: float = define(
        "float", 0.0, "matched (2), polar (3): spacing of beam directions", unit="deg", low=0, high=20
    )
    angles: int = define("int", 120, "matched, polar: in-plane angles of the polar pattern", low=16, high=720)
    radii: int = define("int", 40, "matched, polar: radii of the polar pattern", low=8, high=256)
    template_power: float = define(
        "float", 0.15, "matched: power of the template intensities", low=0, open_low=True, high=1
    )
    template_width: float = define(
        "float", 0.03, "matched: width of the templates' shape factor", unit="1/Å", low=1e-4, high=1
    )
    template_spot: float = define(
        "float", 0.055, "matched: radius (Gaussian sigma) of the templates' spots", unit="1/Å", low=1e-3, high=1
    )
    reach: float = define(
        "float", 1.3, "matched, polar: outer radius, in half widths of the pattern (corners at 1.41)", low=0.1, high=1.5
    )
    centring: bool = define("flag", True, "matched, polar: move each pattern's direct beam to the middle first")
    test_time: str = define(
        "text", "none", "views of a pattern whose answers are merged: itself, or its 8 flips", choices=("none", "flips")
    )
    start: str = define("text", "matched", "polar: first layer from templates or random", choices=("matched", "random"))


HEAD_NAMES = ("grid", "mixture", "sixd", "quaternion", "euler")
"""What can sit on a backbone: `stemtune/learning/heads.py` and `mixture.py`."""


@dataclass(frozen=True)
class HeadConfig:
    """How features become an orientation."""

    name: str = define("text", "grid", "kind of output", choices=HEAD_NAMES)
    step: float = define(
        "float", 8.0, "grid: spacing of beam directions and in-plane angles", unit="deg", low=1, high=45
    )
    residual: bool = define("flag", True, "grid: predict the offset inside a grid cell as well")
    softness: float = define("float", 0.5, "grid: width of the soft labels, in grid steps", low=0, high=3)
    components: int = define("int", 64, "mixture: orientations in the mixture", low=1, high=4096)
    clamp: bool = define("flag", False, "euler: clamp the angles to their ranges")


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser (AdamW) and its learning rate over time."""

    lr: float = define("float", 1e-3, "peak learning rate", low=0, open_low=True, high=1)
    lr_decay: float = define("float", 0.97, "factor on the learning rate per epoch", low=0, open_low=True, high=1)
    schedule: str = define("text", "exponential", "learning rate over time", choices=("exponential", "cosine"))
    warmup: float = define("float", 0.5, "linear warm-up", unit="epochs", low=0, high=1000)
    weight_decay: float = define("float", 0.01, "AdamW weight decay", low=0, high=10)
    grad_clip: float = define("float", 1.0, "largest gradient norm; 0 does not clip", low=0)


@dataclass(frozen=True)
class TrainConfig:
    """The training run."""

    epochs: int = define("int", 30, "passes over the training data", low=1)
    batch_size: int = define("int", 64, "patterns per step, over all workers together", low=1)
    workers: int = define("int", 1, "data-parallel processes", low=1, high=4096)
    precision: str = define(
        "text", "auto", "number format of the forward pass", choices=("auto", "fp32", "bf16", "fp16")
    )
    channels_last: bool = define("flag", True, "memory layout that convolutions prefer")
    seed: int = define("int", 0, "seed of weights, order, simulation and augmentation", low=0)


@dataclass(frozen=True)
class GrainsConfig:
    """How a map is divided into grains and what is measured on it. Not part of a trial: a map's own settings."""

    threshold: float = define(
        "float", 5.0, "neighbours that differ by less belong to one grain", unit="deg", low=0, open_low=True, high=60
    )
    min_size: int = define("int", 4, "smaller patches are no grain, but gaps in what surrounds them", unit="px", low=1)
    max_gap: int = define(
        "int",
        2,
        "pixels without a grain that a grain reaches across, along rows and columns",
        unit="px",
        low=0,
        high=50,
    )
    connectivity: int = define("int", 4, "neighbours of a pixel: 4, or 8 with those at its corners", low=4, high=8)
    kam_radius: int = define("int", 1, "kernel of the average misorientation: its half width", unit="px", low=1, high=8)
    kam_limit: float = define(
        "float", 5.0, "larger misorientations do not count for it", unit="deg", low=0, open_low=True, high=60
    )
    low_angle: float = define("float", 15.0, "boundaries of less are low-angle ones", unit="deg", low=0, high=90)
    tolerance: float = define(
        "float",
        5.0,
        "how far from a twin or a pseudo-symmetric variant a boundary may be that counts as one",
        unit="deg",
        low=0,
        open_low=True,
        high=30,
    )


@dataclass(frozen=True)
class CleanConfig:
    """How a map is cleaned up by what neighbours say; nothing is unless it is asked for."""

    patch: int = define("int", 4, "patches of agreeing pixels that are larger are never changed", unit="px", low=1)
    min_agreeing: int = define("int", 5, "neighbours, of eight, that must agree on what a pixel becomes", low=3, high=8)
    tolerance: float = define(
        "float", 5.0, "disorientation below which two pixels agree", unit="deg", low=0, open_low=True, high=20
    )
    fill: bool = define("flag", True, "fill single pixels that are not indexed")
    min_indexed: int = define("int", 7, "indexed neighbours, of eight, of a pixel that is filled", low=3, high=8)


FORMER_NAMES = {
    "grains.min_size": "least",
    "grains.max_gap": "gap",
    "clean.min_agreeing": "agree",
    "clean.min_indexed": "surrounded",
}
"""Names of settings up to version 0.1, which the command line still takes."""
