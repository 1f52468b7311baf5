"""The search as a script and as a module: `stemtune sweep`, `python stemtune/sweep.py`, `ray submit`.

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

import argparse  # noqa: E402
import types  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from typing import Any  # noqa: E402

from stemtune.config import parse_assignments  # noqa: E402
from stemtune.errors import UserError, fault_line  # noqa: E402

DEFAULT_SPACE = "search_spaces/smoke.yaml"

EPILOG = """\
examples:
  stemtune sweep search_spaces/smoke.yaml --local --trials 4 --name first
  stemtune sweep --resume first
  stemtune sweep search_spaces/smoke.yaml --name second --study first
  ray submit cluster/hpc.yaml stemtune/sweep.py -- search_spaces/architectures.yaml --nodes 3 --name big \\
    --set data.store=/shared/linio2.h5

Without --local the Ray of RAY_ADDRESS, or the one that was started on this machine, is joined; where there is
none, one is started. A space is looked up in the working folder and then in the checkout.
"""


class _Callable(types.ModuleType):
    """Python binds this module to the name `stemtune.sweep`, where `import stemtune` promises a function."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        from stemtune.api import sweep

        return sweep(*arguments, **named)


sys.modules[__name__].__class__ = _Callable


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="stemtune sweep",
        description="Search over architectures and training settings; keep every trial in MLflow.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("space", nargs="?", metavar="SPACE.yaml", help=f"the search space; default {DEFAULT_SPACE}")
    parser.add_argument("--local", action="store_true", help="a Ray of our own on this machine, whatever else runs")
    parser.add_argument("--trials", type=int, metavar="N", help="number of trials, instead of the space's")
    parser.add_argument("--name", metavar="NAME", help="name of the sweep; default the space's file name")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="NAME",
        help="go on with the interrupted sweep NAME, by default the newest; finished trials are not run again",
    )
    parser.add_argument(
        "--study",
        default="",
        metavar="NAME",
        help="search together with the sweep NAME of the same space, or with all that name the same"
        " postgresql://USER@HOST/DATABASE: each proposes from what all have learned",
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="wait until N nodes of the cluster are there")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="fix any setting of a trial")
    parser.add_argument("--check", action="store_true", help="validate the space, print what would run, and stop")
    return parser


def find_space(given: str | None) -> Path:
    """Return the file of a search space: in the working folder, else in the checkout that the package lies in.

    Raises
    ------
    UserError
        When neither holds it; the message names both places.
    """
    import stemtune

    name = Path(given or DEFAULT_SPACE).expanduser()
    root = Path(stemtune.__file__).resolve().parents[1]
    places = [Path.cwd() / name, root / name]
    if name.parent == Path():
        places += [Path.cwd() / "search_spaces" / name, root / "search_spaces" / name]
    for place in places:
        if place.is_file():
            return place
    raise UserError(f"there is no search space '{name}' in {Path.cwd()}, nor in the checkout {root}")


def connect(local: bool = False) -> dict[str, float]:
    """Start Ray on this machine (`local`), or join the one that is there; return its resources."""
    from stemtune.tune.cluster.connect import connect as join

    return join(local)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sweep and return its exit code: 0 done, 2 the user's mistake, 130 interrupted, 1 a fault of ours."""
    try:
        options = _parser().parse_args(argv)
        return _sweep(options)
    except UserError as mistake:
        print(f"stemtune: {mistake}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stemtune: interrupted before any trial began; start the sweep again", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, `head` for instance, has seen enough
        return 0
    except Exception as fault:
        print(f"stemtune: {fault_line(fault)}", file=sys.stderr)
        return 1


def _sweep(options: argparse.Namespace) -> int:
    from stemtune.tune.space.space import load_space

    if options.resume is not None:
        return _resume(options)
    file = find_space(options.space)
    space = load_space(file)
    if options.set:
        space = space.with_settings(parse_assignments(options.set))
    if options.trials is not None and options.trials < 1:
        raise UserError(f"--trials is {options.trials}, but must be at least 1")
    if options.check:
        from stemtune.tune.space.describe import described

        print(described(space, file))
        return 0
    from stemtune.tune.run.sweep import run_sweep

    return _report(
        run_sweep(
            space,
            options.name,
            local=options.local,
            trials=options.trials,
            nodes=options.nodes,
            study=options.study,
        )
    )


def _resume(options: argparse.Namespace) -> int:
    from stemtune.tune.run.sweep import read_sheet, run_sweep, space_from_sheet, sweeps_folder, unfinished

    for option in ("trials", "set", "study"):
        if getattr(options, option):
            raise UserError(f"--resume goes on with the sweep as it began, so --{option} cannot change it")
    name = options.resume or options.name
    if name and name.endswith((".yaml", ".yml")) and not options.space:
        name = Path(name).stem  # `--resume SPACE.yaml`
    if not name and options.space:
        name = Path(options.space).stem
    if not name:
        waiting = unfinished()
        if not waiting:
            raise UserError(f"no interrupted sweep is in {sweeps_folder()}; --resume NAME names one elsewhere")
        name = waiting[0]
    space = space_from_sheet(read_sheet(sweeps_folder() / name))
    return _report(run_sweep(space, name, local=options.local, resume=True, nodes=options.nodes))


def _report(outcome: object) -> int:
    from stemtune.tracking import address
    from stemtune.tune.run.progress import table
    from stemtune.tune.run.sweep import SweepOutcome, space_of
    from stemtune.tune.run.trial_state import figure

    assert isinstance(outcome, SweepOutcome)
    space = space_of(outcome.folder)
    print(table(outcome.trials, space.metric, space.mode))
    if outcome.champion and outcome.model:
        print(
            f"champion: trial {outcome.champion.number} ({outcome.champion.label}) with {space.metric}"
            f" {figure(space.metric, outcome.value)}, model {outcome.model}"
        )
    where = address().shown
    if outcome.unsent:
        print(
            f"the tracking server {where} is away: {outcome.unsent} records wait in {outcome.folder};"
            f" stemtune sweep --resume {outcome.name} sends them",
            file=sys.stderr,
        )
    refused = outcome.folder / "tracking.refused.jsonl"
    if refused.exists():
        print(f"MLflow refused some records; they and the reasons are in {refused}", file=sys.stderr)
    if outcome.status == "interrupted":
        print(f"interrupted: stemtune sweep --resume {outcome.name} goes on with it", file=sys.stderr)
        return 130
    print(f"records: {where}, experiment {outcome.name}; stemtune compare {outcome.name} shows them")
    return 0 if outcome.model else 1


if __name__ == "__main__":
    sys.exit(main())
