"""The search as a script: `python stemtune/sweep.py SPACE.yaml ...` is `stemtune sweep SPACE.yaml ...`.

`ray submit cluster.yaml stemtune/sweep.py -- SPACE.yaml ...` copies this one file to the head node and runs it
there, so it leans on the installed package alone, wherever it lies and whatever the working folder is.
"""

from __future__ import annotations

import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
if __name__ == "__main__" and (_HERE / "py.typed").exists():
    # Run as a script, Python puts the package's own folder first on the path, where its modules would pass for
    # top-level ones; the folder that holds the package takes its place, so that a checkout runs as it is.
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != _HERE]
    sys.path.insert(0, str(_HERE.parent))

import inspect  # noqa: E402
import types  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from typing import Any  # noqa: E402

from stemtune import cli  # noqa: E402


class _Callable(types.ModuleType):
    """Python binds this module to the name `stemtune.sweep`, where `import stemtune` promises a function."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        from stemtune.api import sweep

        return sweep(*arguments, **named)

    @property
    def __signature__(self) -> inspect.Signature:
        from stemtune.api import sweep

        return inspect.signature(sweep)


sys.modules[__name__].__class__ = _Callable


def main(argv: Sequence[str] | None = None) -> int:
    """Run `stemtune sweep` with these arguments and return its exit code (see `stemtune.cli.main`)."""
    return cli.main(["sweep", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
