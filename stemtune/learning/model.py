"""What every model of an orientation shares: preparation of the pattern, loss, candidates and starting weights.

Weights come from timm's hub, a local file or another stemtune model's folder; nothing here runs code from a file.

Shape legend: B patterns, H x W pixels, S x S pixels after resampling, F features, n candidates per pattern.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from stemtune._files import existing, shipped_or
from stemtune.config import Config
from stemtune.crystal.phase import Phase
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError
from stemtune.learning.calibration import Calibration

Output = Tensor | dict[str, Tensor]

DIFFERENT_DEG = 5.0  # two candidates count as different when their disorientation is larger than this angle, in degrees


class Candidates(NamedTuple):
    """The best orientations of each pattern, best first.

    `orientation` (B, n, 4) float32 are unit quaternions, lab-to-crystal, scalar first, reduced to the fundamental zone,
    more than 5 degrees apart modulo the crystal's symmetry; where a model has fewer than n different ones to offer, the
    rest are NaN. `confidence` (B, n) float32 is in [0, 1], and 0 where the candidate is NaN.
    """

    orientation: Tensor
    confidence: Tensor


class OrientationModel(nn.Module):
    """A model from diffraction patterns to crystal orientations.

    The preparation of the pattern (`prepare`) is part of the model, so that training and prediction cannot differ in
    it. A subclass defines `forward`, `loss` and `candidates`. The model reads the settings `model`, `head` and
    `data.gamma`; `geometry` is that of the patterns it is made for.

    A model that has nothing to learn is not `trainable`; the epoch loop then evaluates it once. Of one that has, the
    methods called `fixed` learn nothing, and are left out where it is compiled. `spread_deg` says how far off its right
    candidates are, in degrees about each axis: refinement looks that far around them; of a model that
    `measures_spread`, validation finds it. `input_size` is the width and height of the pattern after preparation, in
    pixels. `calibration` makes the model's own confidence a probability; `learning.inference` applies it, `candidates`
    does not. `pretrained` names the weights that `model.pretrained` loaded.
    """

    trainable: bool = True
    fixed: tuple[str, ...] = ()
    spread_deg: float = 0.5
    measures_spread: bool = True

    def __init__(self, config: Config, phase: Phase, geometry: Geometry) -> None:
        super().__init__()
        self.config = config
        self.phase = phase
        self.geometry = geometry
        self.calibration = Calibration()
        self.pretrained: frozenset[str] = frozenset()
        self.input_size = config.model.input_size or geometry.size

    def prepare(self, patterns: Tensor) -> Tensor:
        """Return patterns (B, H, W) of counts as the network sees them: (B, 1, S, S) float32.

        Counts below zero (and NaN) become zero; the pattern is resampled to `model.input_size`, raised to the power
        `data.gamma`, and shifted and scaled to mean 0 and standard deviation 1. A constant pattern, vacuum for
        instance, becomes zero everywhere.
        """
        x_B1HW = patterns.to(torch.float32).nan_to_num(nan=0.0, posinf=0.0).clamp_min(0.0).unsqueeze(1)
        size = self.input_size
        if x_B1HW.shape[-1] > size or x_B1HW.shape[-2] > size:
            x_B1HW = functional.interpolate(x_B1HW, size=(size, size), mode="area")
        elif x_B1HW.shape[-1] != size or x_B1HW.shape[-2] != size:
            x_B1HW = functional.interpolate(x_B1HW, size=(size, size), mode="bilinear", align_corners=False)
        x_B1HW = x_B1HW.pow(self.config.data.gamma)
        spread, centre = torch.std_mean(x_B1HW, dim=(-2, -1), keepdim=True)
        return (x_B1HW - centre) / spread.clamp_min(1e-6)

    def forward(self, patterns: Tensor) -> Output:
        """Return the raw output, a tensor or a dictionary of tensors, for (B, H, W) patterns of any dtype."""
        raise NotImplementedError

    def loss(self, output: Any, orientation: Tensor) -> Tensor:
        """Return the scalar loss of a raw `output` against (B, 4) true orientations."""
        raise NotImplementedError

    def candidates(self, output: Any, n: int = 1) -> Candidates:
        """Return the `n` best different orientations of a raw `output`, best first, with the model's own confidence."""
        raise NotImplementedError

    def channels_last(self, device: torch.device) -> bool:
        """Return `train.channels_last`; false where group normalisation runs on a CPU, ten times slower that way."""
        slow = device.type == "cpu" and any(isinstance(part, nn.GroupNorm) for part in self.modules())
        return self.config.train.channels_last and not slow


class Backbone(nn.Module):
    """A feature extractor (B, 1, S, S) -> (B, `features`), the base class of all backbones.

    `stock` is the timm name whose published weights it can start from, empty when there are none; `inner` the name of
    the submodule that those weights belong to, empty when that is the backbone itself.

    On the polar view a pattern is (B, 1, R, A), and a backbone with a `feature_map` keeps a turn of it a shift.
    `vector_parts` are the submodules that only the vector of features needs, not the map.
    """

    features: int
    stock: str = ""
    inner: str = ""
    vector_parts: tuple[str, ...] = ()

    def feature_map(self, x: Tensor) -> Tensor:
        """Return the map (B, C, R', A') of polar views (B, 1, R, A), A a multiple of A'."""
        raise UserError(f"{type(self).__name__} has no feature map: `head.name` cannot be 'grid' on the polar view")

    def convert(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Bring published weights into the shapes of the `inner` module where that can be done without learning."""
        return weights


class Network(OrientationModel):
    """A backbone (B, 1, S, S) -> (B, F) that turns the pattern into features, and a head of `heads` on them."""

    def __init__(self, config: Config, phase: Phase, geometry: Geometry, backbone: Backbone, head: nn.Module) -> None:
        super().__init__(config, phase, geometry)
        self.backbone = backbone
        self.dropout = nn.Dropout(config.model.dropout)
        self.head = head

    def forward(self, patterns: Tensor) -> Output:
        return self.from_view(self.prepare(patterns))

    def from_view(self, x: Tensor) -> Output:
        """Return the raw output for prepared patterns."""
        if self.channels_last(x.device):
            x = x.contiguous(memory_format=torch.channels_last)
        output: Output = self.head(self.dropout(self.features(x)))
        return output

    def features(self, x: Tensor) -> Tensor:
        """Return what the head sees of prepared patterns."""
        features: Tensor = self.backbone(x)
        return features

    def loss(self, output: Any, orientation: Tensor) -> Tensor:
        loss: Tensor = self.head.loss(output, orientation)  # type: ignore[operator]
        return loss

    def candidates(self, output: Any, n: int = 1) -> Candidates:
        candidates: Candidates = self.head.candidates(output, n)  # type: ignore[operator]
        return candidates


log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"  # name of the weights inside a model folder
_OLD_NAMES = (("judges.", "rerankers."), (".mend.", ".correction."))
"""Parts of weights' names up to version 0.1, and what they are called now."""


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a weights file (.safetensors, or anything `torch.load` takes) or of a model folder.

    `path` may also be the name of a model that ships with the package.

    Raises a `UserError` when the file is absent, damaged, or holds no tensors by name.
    """
    file = existing(shipped_or(path), "the weights file or model folder")
    if file.is_dir():
        file = existing(file / WEIGHTS, "the weights file")
    try:
        if file.suffix == ".safetensors":
            return {_new_name(name): value for name, value in load_file(file).items()}
        read = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as problem:
        reason = str(problem).strip().splitlines()[:1] or [type(problem).__name__]
        raise UserError(f"'{file}' cannot be read as weights ({reason[0][:120]})") from None
    for key in ("state_dict", "model"):
        if isinstance(read, dict) and isinstance(read.get(key), dict):
            read = read[key]
    named = read.items() if isinstance(read, dict) else ()
    tensors = {str(name): value for name, value in named if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"'{file}' holds no weights by name")
    return tensors


def _new_name(name: str) -> str:
    for old, new in _OLD_NAMES:
        name = name.replace(old, new)
    return name


def hub_weights(stock: str) -> dict[str, Tensor]:
    """Return timm's published weights of the model called `stock`, for one input channel.

    Raises a `UserError` when neither the hub nor its cache on this machine has them.
    """
    import timm
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = offline or not _reachable(str(constants.ENDPOINT))
        net: nn.Module = timm.create_model(stock, pretrained=True, in_chans=1, num_classes=0)
    except (OSError, RuntimeError, ValueError):
        raise UserError(
            f"`model.pretrained` is true, but timm's weights of {stock} cannot be fetched from here; "
            "download them elsewhere and give the file as model.pretrained: PATH"
        ) from None
    finally:
        constants.HF_HUB_OFFLINE = offline
    return dict(net.state_dict())


def _reachable(address: str) -> bool:
    """Tell quickly whether a server can be reached; with a proxy set, leave the question to it."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    parts = urlsplit(address)
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 443), timeout=5):
            return True
    except OSError:
        return False


def start_from(model: OrientationModel, pretrained: bool | str) -> None:
    """Load into `model` what fits of published weights, a weights file or another model's folder (`model.pretrained`).

    What does not fit (a head of another grid, a stage that is not there) keeps its start; the log says which.

    Raises a `UserError` when the weights cannot be had, or none of them fits.
    """
    backbone = getattr(model, "backbone", None)
    name = model.config.model.name
    if pretrained is True:
        if not isinstance(backbone, Backbone) or not backbone.stock:
            raise UserError(f"`model.pretrained` is true, but no weights of '{name}' are published; give a path")
        weights, source = hub_weights(backbone.stock), f"timm's {backbone.stock}"
    else:
        weights, source = read_weights(str(pretrained)), f"'{pretrained}'"
    if isinstance(backbone, Backbone):
        weights = _placed(weights, model, backbone)
    here = model.state_dict()
    fitting = {key: value for key, value in weights.items() if key in here and here[key].shape == value.shape}
    learned = {key for key, _ in model.named_parameters()}
    loaded = learned & set(fitting)
    if not any(not key.startswith("head.") for key in loaded):
        raise UserError(f"nothing in {source} fits the model '{name}' (`model.pretrained`)")
    model.load_state_dict(fitting, strict=False)
    model.pretrained = frozenset(loaded)
    fresh, unused = learned - loaded, set(weights) - set(fitting)
    if fresh or unused:
        facts = len(loaded), len(learned), source, _shown(fresh), _shown(unused)
        log.warning("%d of %d weights start from %s; new: %s; not used: %s", *facts)


def _placed(weights: dict[str, Tensor], model: OrientationModel, backbone: Backbone) -> dict[str, Tensor]:
    """Give weights the names they have inside `model`, and the shapes of its backbone where that can be done."""
    inner = f"backbone.{backbone.inner}." if backbone.inner else "backbone."
    if any(key.startswith("backbone.") for key in weights):
        mine = {key.removeprefix(inner): value for key, value in weights.items() if key.startswith(inner)}
        other = {key: value for key, value in weights.items() if not key.startswith(inner)}
    else:
        mine, other = weights, {}
    return {**{inner + key: value for key, value in backbone.convert(mine).items()}, **other}


def _shown(names: set[str]) -> str:
    """Return a few module names that stand for many weights."""
    modules = list(dict.fromkeys(name.rsplit(".", 1)[0] for name in sorted(names)))
    more = f" and {len(modules) - 6} more" if len(modules) > 6 else ""
    return (", ".join(modules[:6]) + more) or "none"
