"""What every command's parser shares: one-line errors, an example in the help, options that several commands take."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from stemtune.config import knobs_of
from stemtune.config.sections import FORMER_NAMES
from stemtune.errors import UserError

if TYPE_CHECKING:
    from stemtune._parallel import Spread

Command = Callable[[argparse.Namespace], int | None]
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"

Settings = TypeVar("Settings")


class Parser(argparse.ArgumentParser):
    more_help: Callable[[], str] | None = None
    """Returns what stands below the help, where that takes a heavy import."""

    def format_help(self) -> str:
        return super().format_help() + (self.more_help() if self.more_help else "")

    def option(self, name: str, help: str | None = None, metavar: str | None = None, **settings: Any) -> None:
        """Take an option or an argument; `metavar` is what the help calls its value."""
        if metavar:
            settings["metavar"] = metavar
        self.add_argument(name, help=help, **settings)

    def flag(self, name: str, help: str) -> None:
        self.add_argument(name, help=help, action="store_true")

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message}; see {self.prog} --help")


def command(does: str, example: str) -> Callable[[Callable[[Parser], Command]], Callable[[Commands], None]]:
    """Make a command of a function of that name, which gives a parser its options and returns what they call."""

    def made(describe: Callable[[Parser], Command]) -> Callable[[Commands], None]:
        def add(commands: Commands) -> None:
            parser = commands.add_parser(
                describe.__name__,
                help=does,
                description=does[0].upper() + does[1:] + ".",
                epilog=f"example:\n  {example}",
                formatter_class=argparse.RawDescriptionHelpFormatter,
                allow_abbrev=False,
            )
            parser.set_defaults(call=describe(parser))

        return add

    return made


def settings_options(
    parser: Parser, title: str, group: str, kind: type[Any], prefix: str = "", without: Sequence[str] = ()
) -> None:
    """Give every knob of the settings class `kind`, `without` some, as an option of its name behind the `prefix`."""
    place = parser.add_argument_group(title)
    for key, knob in knobs_of(group, kind).items():
        if key in without:
            continue
        name = prefix + key.split(".", 1)[1].replace("_", "-")
        unit = f" [{knob.unit}]" if knob.unit else ""
        text = f"{knob.about}{unit}; default {knob.default}"
        place.add_argument(f"--{name}", dest=key, metavar="X", help=text.replace("%", "%%"))
        if key in FORMER_NAMES:
            place.add_argument(f"--{prefix}{FORMER_NAMES[key]}", dest=key, help=argparse.SUPPRESS)


def settings_given(options: argparse.Namespace, group: str, kind: type[Settings]) -> Settings:
    """Return the settings that `settings_options` of the same group were given, each value checked."""
    known = knobs_of(group, kind)
    given = {key: value for key, value in vars(options).items() if key in known and value is not None}
    return kind(**{key.split(".", 1)[1]: known[key].parse(value) for key, value in given.items()})


def scan_options(parser: Parser) -> None:
    group = parser.add_argument_group("the scan's calibration, where the file does not say")
    group.add_argument("--kv", type=finite, help="acceleration voltage in kV")
    group.add_argument("--scale", type=finite, help="1/Å per pixel of the file")
    group.add_argument("--centre", default="auto", metavar="Y,X", help="direct beam in pixels; default auto")
    group.add_argument("--shape", metavar="NY,NX", help="scan shape of a file that is only a stack of frames")
    group.add_argument("--size", type=positive, help="resample the patterns to this size")
    group.add_argument("--keep", metavar="0:NY,0:NX", help="the part of the scan to keep")
    group.add_argument("--dataset", metavar="PATH", help="the array of an HDF5 or .npz file, where there are several")
    group.add_argument(
        "--calibrate",
        metavar="CIF",
        help="the crystal (a CIF, or linio2): scale and ellipse are fitted to its rings; a scale that is given or in"
        " the file may be up to 8%% off",
    )
    group = parser.add_argument_group(
        "what is corrected in the patterns, in the picture as the file has it (x right, y up)"
    )
    group.add_argument(
        "--descan",
        choices=("off", "auto", "on"),
        help="centre every pattern by a smooth surface through the beam's measured places; default auto: where the beam"
        " drifts by more than 0.5 px",
    )
    group.add_argument(
        "--ellipse",
        metavar="E,AZIMUTH",
        help="take an ellipse out: relative difference of its axes, azimuth of the long one in degrees; or off; default"
        " auto: what --calibrate finds",
    )
    group.add_argument("--bad-pixels", choices=("off", "on"), help="correct hot and dead pixels; default on")
    group.add_argument(
        "--beam-stop",
        metavar="R[,SIDE[,WIDTH]]",
        help="hidden pixels, which become 0: a radius in px, with the side and width of a bar, as 8,left,4; or auto:"
        " found in the patterns; default off",
    )
    group.add_argument("--background", choices=("off", "on"), help="subtract the radial median; default off")
    group.add_argument(
        "--flip",
        choices=("none", "x", "y", "transpose"),
        help="undo a mirror of the detector: left-right, up-down, or rows and columns exchanged; default none",
    )
    group.add_argument(
        "--scan-rotation",
        type=finite,
        metavar="DEG",
        help="angle from the (flipped) pattern's x to the scan's x, anticlockwise; the map's orientations are turned"
        " into the scan's frame; default 0",
    )


def scan_arguments(options: argparse.Namespace) -> dict[str, Any]:
    calibration = ("kv", "scale", "centre", "shape", "size", "keep", "dataset", "calibrate")
    corrections = ("descan", "ellipse", "bad_pixels", "beam_stop", "background", "flip", "scan_rotation")
    return {key: getattr(options, key) for key in (*calibration, *corrections)}


def ray_option(parser: Parser) -> None:
    """Let a command spread its work over the nodes of a Ray cluster."""
    parser.option(
        "--ray",
        "spread the work over the nodes of a Ray cluster, the result is the same; without ADDRESS the Ray of"
        " RAY_ADDRESS or of this machine. Files must lie where every node sees them",
        "ADDRESS",
        nargs="?",
        const="",
    )


def over_ray(options: argparse.Namespace, device: str) -> Spread | None:
    """Join the Ray that `--ray` names, if it is given, and return what spreads work over its CPUs or GPUs."""
    if options.ray is None:
        return None
    from stemtune.tune.cluster.map_tasks import over_ray as join

    return join(options.ray or None, device)


def whole_number(low: int, high: int | None = None, says: str = "") -> Callable[[str], int]:
    """Return what reads a whole number of at least `low`, and at most `high`."""

    def read(text: str) -> int:
        number = int(text) if text.isdecimal() else low - 1
        if number < low or (high is not None and number > high):
            raise argparse.ArgumentTypeError(f"'{text}' must be a whole number {says or f'of at least {low}'}")
        return number

    return read


seed, positive = whole_number(0), whole_number(1)
port = whole_number(0, 65535, "from 0 (any free port) to 65535")


def finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"'{text}' must be a finite number")
    return number


def above_zero(text: str) -> float:
    """Read a number above 0."""
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"'{text}' must be a number above 0")
    return value


def seconds(text: str) -> float:
    number = finite(text)
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"'{text}' must be a number of seconds above 0")
    return number


def pair(text: str, option: str) -> tuple[int, int]:
    try:
        first, second = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} {text}: write two whole numbers, 23,18 for instance") from None
    return first, second
