"""Starting weights from elsewhere: timm's hub, a local file, or another stemtune model's folder.

Nothing here runs code from a file: safetensors, or `torch.load` with `weights_only`.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stemtune._files import existing, shipped_or
from stemtune.errors import UserError
from stemtune.learning.model import Backbone, OrientationModel

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
"""Name of the weights inside a model folder."""

_OLD_NAMES = (("judges.", "rerankers."), (".mend.", ".correction."))
"""Parts of weights' names up to version 0.1, and what they are called now."""


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a weights file (.safetensors, or anything `torch.load` takes) or of a model folder.

    `path` may also be the name of a model that ships with the package.

    Raises
    ------
    UserError
        When the file is absent, damaged, or holds no tensors by name.
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
    if not isinstance(read, dict):
        raise UserError(f"'{file}' holds no weights by name")
    tensors = {str(name): value for name, value in read.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"'{file}' holds no weights by name")
    return tensors


def _new_name(name: str) -> str:
    for old, new in _OLD_NAMES:
        name = name.replace(old, new)
    return name


def hub_weights(stock: str) -> dict[str, Tensor]:
    """Return timm's published weights of the model called `stock`, for one input channel.

    Raises
    ------
    UserError
        When neither the hub nor its cache on this machine has them.
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

    Raises
    ------
    UserError
        When the weights cannot be had, or none of them fits.
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
    fresh, unused = sorted(learned - loaded), sorted(set(weights) - set(fitting))
    if fresh or unused:
        log.warning(
            "%d of %d weights start from %s; new: %s; not used: %s",
            len(loaded),
            len(learned),
            source,
            _shown(fresh),
            _shown(unused),
        )


def _placed(weights: dict[str, Tensor], model: OrientationModel, backbone: Backbone) -> dict[str, Tensor]:
    """Give weights the names they have inside `model`, and the shapes of its backbone where that can be done."""
    inner = f"backbone.{backbone.inner}." if backbone.inner else "backbone."
    if any(key.startswith("backbone.") for key in weights):
        mine = {key.removeprefix(inner): value for key, value in weights.items() if key.startswith(inner)}
        other = {key: value for key, value in weights.items() if not key.startswith(inner)}
    else:
        mine, other = weights, {}
    return {**{inner + key: value for key, value in backbone.convert(mine).items()}, **other}


def _shown(names: list[str]) -> str:
    """Return a few module names that stand for many weights."""
    modules = list(dict.fromkeys(name.rsplit(".", 1)[0] for name in names))
    more = f" and {len(modules) - 6} more" if len(modules) > 6 else ""
    return (", ".join(modules[:6]) + more) or "none"
