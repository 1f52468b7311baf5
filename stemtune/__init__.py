"""stemtune: crystal orientations from STEM diffraction patterns, by the best network a cluster can find.

Importing the package loads neither torch nor ray, so that the command line answers at once.

>>> import stemtune
>>> store = stemtune.simulate("linio2", "train.h5", 6000, dynamical=True, precession=0.5)
>>> stemtune.train("train.h5", "model", {"model.name": "rerank", "train.epochs": 5})
>>> found = stemtune.predict("scan.h5", "model", "map")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stemtune._version import __version__ as __version__

if TYPE_CHECKING:
    from stemtune.api import compare as compare
    from stemtune.api import evaluate as evaluate
    from stemtune.api import export as export
    from stemtune.api import ingest as ingest
    from stemtune.api import label as label
    from stemtune.api import load as load
    from stemtune.api import overlay as overlay
    from stemtune.api import predict as predict
    from stemtune.api import simulate as simulate
    from stemtune.api import sweep as sweep
    from stemtune.api import train as train
    from stemtune.errors import UserError as UserError

__all__ = [
    "UserError",
    "compare",
    "evaluate",
    "export",
    "ingest",
    "label",
    "load",
    "overlay",
    "predict",
    "simulate",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    """Fetch a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'stemtune' has no attribute '{name}'")
    if name == "sweep":  # the module of this name, which can be called: so it is one thing, whoever imports it first
        return import_module("stemtune.sweep")
    return getattr(import_module("stemtune.errors" if name == "UserError" else "stemtune.api"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
