"""The architectures, by name: one entry in `BACKBONES` or `MODELS` makes another one known everywhere.

Each entry loads its module only when it is used, so that a trial does not pay for timm unless it needs it.
A new name is also to be added to `stemtune.config.MODEL_NAMES`.
"""

from __future__ import annotations

from collections.abc import Callable

from stemtune.config import Config, ModelConfig
from stemtune.crystal.phase import Phase
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError, did_you_mean
from stemtune.learning.model import Backbone, Network, OrientationModel


def _cnn(config: ModelConfig, size: int) -> Backbone:
    from stemtune.learning.models.cnn import Cnn

    return Cnn(config, size)


def _densenet(config: ModelConfig, size: int) -> Backbone:
    from stemtune.learning.models.densenet import DenseNet

    return DenseNet(config, size)


def _swin(config: ModelConfig, size: int) -> Backbone:
    from stemtune.learning.models.swin import Swin

    return Swin(config, size)


def _matched(config: Config, phase: Phase, geometry: Geometry) -> OrientationModel:
    from stemtune.learning.models.matched import Matched

    return Matched(config, phase, geometry)


def _polar(config: Config, phase: Phase, geometry: Geometry) -> OrientationModel:
    from stemtune.learning.models.polar import Polar

    return Polar(config, phase, geometry)


def _rerank(config: Config, phase: Phase, geometry: Geometry) -> OrientationModel:
    from stemtune.learning.models.rerank import Rerank

    return Rerank(config, phase, geometry)


BACKBONES: dict[str, Callable[[ModelConfig, int], Backbone]] = {"cnn": _cnn, "densenet": _densenet, "swin": _swin}
"""Feature extractors that any head can sit on: (settings, pattern size in pixels) -> backbone."""

MODELS: dict[str, Callable[[Config, Phase, Geometry], OrientationModel]] = {
    "matched": _matched,
    "polar": _polar,
    "rerank": _rerank,
}
"""Whole models that bring their own head."""


def build(config: Config, phase: Phase, geometry: Geometry, start: bool = True) -> OrientationModel:
    """Build the model that `config.model` names, with its weights at their start.

    Parameters
    ----------
    config
        Every setting; `train.seed` does not act here, the caller seeds torch.
    phase
        The crystal whose orientations are wanted.
    geometry
        Size and calibration of the patterns the model is made for.
    start
        False skips `model.pretrained`, for a model whose own weights are about to be loaded.

    Raises
    ------
    UserError
        For an unknown name, pretrained weights that cannot be had, or settings that no pattern fits.
    """
    name = config.model.name
    if name not in BACKBONES and name not in MODELS:
        known = (*BACKBONES, *MODELS)
        raise UserError(f"`model.name` is '{name}', but must be one of {', '.join(known)}{did_you_mean(name, known)}")
    if name in MODELS:
        model = MODELS[name](config, phase, geometry)
    else:
        from stemtune.learning.heads import make_head

        backbone = BACKBONES[name](config.model, config.model.input_size or geometry.size)
        head = make_head(config.head, phase.symmetry, backbone.features)
        model = Network(config, phase, geometry, backbone, head)
    if start and config.model.pretrained not in (False, "") and model.trainable:
        from stemtune.learning.weights import start_from

        start_from(model, config.model.pretrained)
    return model
