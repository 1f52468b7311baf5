"""The architectures, by name: one entry in `BACKBONES` or `MODELS` makes another one known everywhere.

A new name is also to be added to `stemtune.config.MODEL_NAMES`. timm is loaded only by what is built from it.
"""

from __future__ import annotations

from collections.abc import Callable

from stemtune.config import Config, ModelConfig
from stemtune.crystal.phase import Phase
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError, did_you_mean
from stemtune.learning.heads import make_head
from stemtune.learning.model import Backbone, Network, OrientationModel, start_from
from stemtune.learning.models.circular import Circular
from stemtune.learning.models.convolutional import Cnn, DenseNet
from stemtune.learning.models.matched import Matched
from stemtune.learning.models.polar import Polar
from stemtune.learning.models.polar_head import PolarNetwork
from stemtune.learning.models.rerank import Rerank
from stemtune.learning.models.swin import Swin

BACKBONES: dict[str, Callable[[ModelConfig, int], Backbone]] = {
    "cnn": Cnn,
    "densenet": DenseNet,
    "swin": Swin,
    "circular": Circular,
}
"""Feature extractors that any head can sit on: (settings, pattern size in pixels) -> backbone."""

ON_POLAR_VIEW = {"circular"}
"""Those that see the polar view whatever `model.view` says."""

Maker = Callable[[Config, Phase, Geometry], OrientationModel]
MODELS: dict[str, Maker] = {"matched": Matched, "polar": Polar, "rerank": Rerank}
"""Whole models that bring their own head."""


def build(config: Config, phase: Phase, geometry: Geometry, start: bool = True) -> OrientationModel:
    """Build the model that `config.model` names, with its weights at their start.

    `train.seed` does not act here, the caller seeds torch. Without `start` `model.pretrained` is skipped, for a model
    whose own weights are about to be loaded.

    Raises a `UserError` for an unknown name, pretrained weights that cannot be had, or settings that no pattern fits.
    """
    name = config.model.name
    if name not in BACKBONES and name not in MODELS:
        known = (*BACKBONES, *MODELS)
        raise UserError(f"`model.name` is '{name}', but must be one of {', '.join(known)}{did_you_mean(name, known)}")
    if name in MODELS:
        model = MODELS[name](config, phase, geometry)
    else:
        backbone = BACKBONES[name](config.model, config.model.input_size or geometry.size)
        if name in ON_POLAR_VIEW or config.model.view == "polar":
            model = PolarNetwork(config, phase, geometry, backbone)
        else:
            head = make_head(config.head, phase.symmetry, backbone.features)
            model = Network(config, phase, geometry, backbone, head)
    if start and config.model.pretrained not in (False, "") and model.trainable:
        start_from(model, config.model.pretrained)
    return model
