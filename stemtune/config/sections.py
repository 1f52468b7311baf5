"""Every knob once, section by section."""

from __future__ import annotations

from dataclasses import dataclass

from stemtune.config.setting import Span, cuts, flag, flag_or_path, integer, number, span, text


@dataclass(frozen=True)
class DataConfig:
    """Where patterns come from and how they enter the network."""

    source: str = text(
        "store",
        "patterns from a store, simulated afresh, or drawn afresh from a store of beams (simulate --beams)",
        ("store", "simulate", "beams"),
    )
    store: str = text("", "path of the training store, or of the store of beams (HDF5)")
    cif: str = text("", "CIF of the phase for data.source simulate; empty means LiNiO2")
    patterns_per_epoch: int = integer(8192, "fresh patterns in one epoch of data.source simulate and beams", "[1, inf)")
    validation_patterns: int = integer(1024, "validation patterns of data.source simulate and beams", "[1, inf)")
    seed: int = integer(0, "seed of the validation and test patterns of data.source simulate and beams", "[0, inf)")
    validation_store: str = text(
        "", "validate on all labels of this store, a scan with known truth for instance; empty: data.store's own"
    )
    split: str = text(
        "groups",
        "what stays on one side of the split: the store's groups (grains, scan blocks), or nothing: then neighbours"
        " stand on both sides and validation flatters, as in the reference study",
        ("groups", "random"),
    )
    guard: int = integer(
        1, "leave out training patterns this near to one of validation or test", "[0, 1000]", unit="scan px"
    )
    score: str = text(
        "confidence", "what min_confidence, keep_fraction and order go by: confidence or a score of the store"
    )
    min_confidence: float = number(0.0, "drop training labels whose data.score is below this", "[0, inf)")
    keep_fraction: float = number(1.0, "keep this part of the training labels, the best by data.score", "(0, 1]")
    cut: str = cuts("", "drop training labels that fail one of these, as Q>0.2 R>5")
    order: str = text("shuffled", "order of training patterns", ("shuffled", "confidence"))
    mix: float = number(0.0, "share of other patterns in every training batch", "[0, 0.95]")
    mix_store: str = text(
        "", "where the share data.mix comes from; empty: simulated afresh by simulate.* at data.store's geometry"
    )
    gamma: float = number(0.25, "power that intensities are raised to", "(0, 1]")
    augment: str = text("flips", "exact augmentations by the pattern's symmetry", ("none", "flips", "rotate"))


@dataclass(frozen=True)
class SimulateConfig:
    """The microscope that is simulated. A range low:high is drawn from anew for every pattern."""

    kv: float = number(200.0, "acceleration voltage", "[20, 1500]", unit="kV")
    size: int = integer(128, "pattern width and height", "[16, 1024]", unit="px")
    scale: float = number(0.025, "reciprocal length of one pixel", "[0.0001, 1]", unit="1/Å")
    thickness: Span = span(20, 120, "crystal thickness", "(0, 5000]", unit="nm")
    precession: Span = span(0, 1, "precession semi-angle", "[0, 5]", unit="deg")
    convergence: Span = span(0.5, 2, "convergence semi-angle (disk radius)", "[0, 50]", unit="mrad")
    dose: Span = span(300, 100_000, "electrons per pattern, log-uniform; 0 is noise-free", "[0, inf)")
    physics: str = text("kinematic", "single scattering, or dynamical (Bloch waves)", ("kinematic", "bloch"))
    beams: int = integer(160, "bloch: most beams of one pattern, the strongest coupled", "[2, 4000]")
    beam_error: float = number(0.05, "bloch: largest excitation error of a beam", "(0, 1]", unit="1/Å")
    absorption: str = text("thermal", "bloch: loss to thermal diffuse scattering, or none", ("thermal", "none"))
    tilts: int = integer(12, "bloch: beam directions that precession and convergence are averaged over", "[1, 1000]")
    shape: str = text("sinc2", "kinematic: fall-off of intensity with excitation error", ("sinc2", "gaussian"))
    shape_width: Span = span(0.005, 0.03, "kinematic: width of the gaussian shape factor", "(0, 1]", unit="1/Å")
    intensity_power: Span = span(1, 1, "power of the intensities; below 1 imitates dynamical equalising", "[0.05, 2]")
    direct_beam: Span = span(0.2, 0.8, "kinematic: share of the direct beam in what the background leaves", "[0, 1]")
    background: Span = span(0, 0.3, "share of the amorphous background in the dose", "[0, 0.95]")
    blur: Span = span(0.3, 1, "detector blur (Gaussian sigma)", "[0, 10]", unit="px")
    centre_error: float = number(1.5, "largest error of the centre", "[0, 50]", unit="px")
    ellipticity: float = number(0.04, "largest relative difference of the axes", "[0, 0.5]")
    scale_error: float = number(0.015, "largest relative error of the scale", "[0, 0.5]")
    beam_stop: Span = span(0, 0, "radius of the beam stop", "[0, 512]", unit="px")
    dead_pixels: float = number(0.0002, "share of pixels that read zero", "[0, 0.5]")
    overlap: float = number(0.0, "share of patterns (in a scan: of those at boundaries) with several grains", "[0, 1]")
    overlap_grains: int = integer(2, "most grains of such a pattern", "[2, 3]")
    overlap_weight: Span = span(0.1, 1, "strength of a further grain beside the strongest", "(0, 1]")


MODEL_NAMES = ("cnn", "densenet", "swin", "circular", "matched", "polar", "rerank")
"""The architectures that ship; see `stemtune/learning/models/`."""


@dataclass(frozen=True)
class ModelConfig:
    """The network. A knob that an architecture does not have leaves it unchanged; 0 means its own default."""

    name: str = text("polar", "architecture", MODEL_NAMES)
    pretrained: bool | str = flag_or_path(
        False, "true: timm's weights from the hub; a path: local weights or a stemtune model folder"
    )
    view: str = text(
        "pixels",
        "what cnn, densenet and swin see: the pattern, or its polar view, a turn of which is a shift of the answer;"
        " circular always sees the polar view",
        ("pixels", "polar"),
    )
    adjusted: bool = flag(False, "swin: patch, window and depths fitted to sparse 128 px patterns")
    input_size: int = integer(
        0, "pixels: resample patterns to this size first; 0 keeps the store's", "[0, inf)", unit="px"
    )
    kernel_size: int = integer(3, "cnn, polar, circular (9 and 13 where this is 3): convolution kernel, odd", "[1, 31]")
    width: int = integer(0, "channels of the first stage", "[0, 1024]")
    depth: int = integer(0, "cnn, polar, circular: number of stages, layers or blocks", "[0, 64]")
    patch_size: int = integer(0, "swin: pixels, or radii, per patch edge", "[0, 32]")
    window: int = integer(0, "swin: attention window", "[0, 32]")
    depths: str = text("", "swin, densenet: blocks per stage, as 2-2-4-2")
    drop_path: float = number(0.0, "stochastic depth", "[0, 0.9]")
    dropout: float = number(0.0, "dropout before the head", "[0, 0.9]")
    grid_step: float = number(
        0.0,
        "matched (2), polar (3), circular and model.view polar (4): spacing of beam directions",
        "[0, 20]",
        unit="deg",
    )
    angles: int = integer(120, "in-plane angles of the polar pattern", "[16, 720]")
    radii: int = integer(40, "radii of the polar pattern", "[8, 256]")
    template_power: float = number(0.15, "matched: power of the template intensities", "(0, 1]")
    template_width: float = number(0.03, "matched: width of the templates' shape factor", "[0.0001, 1]", unit="1/Å")
    template_spot: float = number(
        0.055, "matched: radius (Gaussian sigma) of the templates' spots", "[0.001, 1]", unit="1/Å"
    )
    reach: float = number(
        1.3, "outer radius of the polar pattern, in half widths of the pattern (corners at 1.41)", "[0.1, 1.5]"
    )
    centring: bool = flag(True, "polar pattern: move the direct beam to the middle first")
    test_time: str = text(
        "none", "views of a pattern whose answers are merged: itself, or its 8 flips", ("none", "flips")
    )
    start: str = text("matched", "polar: first layer from templates or random", ("matched", "random"))


HEAD_NAMES = ("grid", "mixture", "sixd", "quaternion", "euler")
"""What can sit on a backbone: `stemtune/learning/heads.py` and `mixture.py`."""


@dataclass(frozen=True)
class HeadConfig:
    """How features become an orientation."""

    name: str = text("grid", "kind of output", HEAD_NAMES)
    step: float = number(8.0, "grid: spacing of beam directions and in-plane angles", "[1, 45]", unit="deg")
    residual: bool = flag(True, "grid: predict the offset inside a grid cell as well")
    softness: float = number(0.5, "grid: width of the soft labels, in grid steps", "[0, 3]")
    components: int = integer(64, "mixture: orientations in the mixture", "[1, 4096]")
    clamp: bool = flag(False, "euler: clamp the angles to their ranges")


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser (AdamW) and its learning rate over time."""

    lr: float = number(1e-3, "peak learning rate", "(0, 1]")
    lr_decay: float = number(0.97, "factor on the learning rate per epoch", "(0, 1]")
    schedule: str = text("exponential", "learning rate over time", ("exponential", "cosine"))
    warmup: float = number(0.5, "linear warm-up", "[0, 1000]", unit="epochs")
    weight_decay: float = number(0.01, "AdamW weight decay", "[0, 10]")
    grad_clip: float = number(1.0, "largest gradient norm; 0 does not clip", "[0, inf)")
    pretrained_lr: float = number(
        1.0,
        "factor on the learning rate of what model.pretrained loaded; for fine-tuning usually 0.1",
        "(0, 1]",
    )


@dataclass(frozen=True)
class TrainConfig:
    """The training run."""

    epochs: int = integer(30, "passes over the training data", "[1, inf)")
    patience: int = integer(
        0,
        "end after so many without a better val/disorientation_median_deg (trials: the sweep's metric); 0 is off",
        "[0, inf)",
        unit="epochs",
    )
    batch_size: int = integer(64, "patterns per step, over all workers together", "[1, inf)")
    accumulate: int = integer(
        1, "micro-batches of a step, for batches that do not fit into memory; doubled where they do not", "[1, inf)"
    )
    ema: float = number(
        0.999, "decay per step of the averaged weights, which are kept; 0 keeps the last", "[0, 0.99999]"
    )
    workers: int = integer(1, "data-parallel processes", "[1, 4096]")
    precision: str = text("auto", "number format of the forward pass", ("auto", "fp32", "bf16", "fp16"))
    channels_last: bool = flag(True, "memory layout that convolutions prefer")
    compile: bool = flag(False, "compile model and loss (torch.compile): minutes at the start, faster steps after it")
    seed: int = integer(0, "seed of weights, order, training patterns and augmentation", "[0, inf)")


@dataclass(frozen=True)
class GrainsConfig:
    """How a map is divided into grains and what is measured on it. Not part of a trial: a map's own settings."""

    threshold: float = number(5.0, "neighbours that differ by less belong to one grain", "(0, 60]", unit="deg")
    min_size: int = integer(4, "smaller patches are no grain, but gaps in what surrounds them", "[1, inf)", unit="px")
    max_gap: int = integer(
        2, "pixels without a grain that a grain reaches across, along rows and columns", "[0, 50]", unit="px"
    )
    connectivity: int = integer(4, "neighbours of a pixel: 4, or 8 with those at its corners", "[4, 8]")
    kam_radius: int = integer(1, "kernel of the average misorientation: its half width", "[1, 8]", unit="px")
    kam_limit: float = number(5.0, "larger misorientations do not count for it", "(0, 60]", unit="deg")
    low_angle: float = number(15.0, "boundaries of less are low-angle ones", "[0, 90]", unit="deg")
    tolerance: float = number(
        5.0,
        "how far from a twin or a pseudo-symmetric variant a boundary may be that counts as one",
        "(0, 30]",
        unit="deg",
    )


@dataclass(frozen=True)
class CleanConfig:
    """How a map is cleaned up by what neighbours say; nothing is unless it is asked for."""

    patch: int = integer(4, "patches of agreeing pixels that are larger are never changed", "[1, inf)", unit="px")
    min_agreeing: int = integer(5, "neighbours, of eight, that must agree on what a pixel becomes", "[3, 8]")
    tolerance: float = number(5.0, "disorientation below which two pixels agree", "(0, 20]", unit="deg")
    fill: bool = flag(True, "fill single pixels that are not indexed")
    min_indexed: int = integer(7, "indexed neighbours, of eight, of a pixel that is filled", "[3, 8]")


FORMER_NAMES = {
    "grains.min_size": "least",
    "grains.max_gap": "gap",
    "clean.min_agreeing": "agree",
    "clean.min_indexed": "surrounded",
}
"""Names of settings up to version 0.1, which the command line still takes."""
