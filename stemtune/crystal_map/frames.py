"""The frames that maps of other programs come in, for `stemtune label --frame`; `frame_rotations` has the mathematics.

The names have a module of their own so that the help of the command line loads neither numpy nor torch.
"""

from __future__ import annotations

from typing import NamedTuple

from stemtune.errors import UserError

_RIGHT, _UP, _OUT = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
_LEFT, _DOWN = (-1.0, 0.0, 0.0), (0.0, -1.0, 0.0)


class Frame(NamedTuple):
    """One program's frames.

    - `lab`: the file's lab axes x, y, z in our lab frame.
    - `crystal`: "a": e1 along a, e3 along c*. "a*": e1 along a*, e3 along c. "edax": as "a*" for monoclinic cells, else
      "a".
    - `about`: what it is, for the help.
    """

    lab: tuple[tuple[float, float, float], ...]
    crystal: str
    about: str


FRAMES = {
    "orix": Frame((_RIGHT, _UP, _OUT), "a", "ours and orix's: x right, y up; X || a, Z || c*; nothing is turned"),
    "oxford": Frame((_RIGHT, _UP, _OUT), "a*", "any .ctf: x right, y up; X || a*, Z || c"),
    "edax1": Frame(
        (_DOWN, _RIGHT, _OUT), "edax", "EDAX .ang, setting 1: x down, y right; X || a (monoclinic: X || a*)"
    ),
    "edax2": Frame((_UP, _LEFT, _OUT), "edax", "EDAX .ang, setting 2, its default: x up, y left; crystal as edax1"),
    "edax3": Frame((_RIGHT, _UP, _OUT), "edax", "EDAX .ang, setting 3: x right, y up; crystal as edax1"),
    "edax4": Frame((_LEFT, _DOWN, _OUT), "edax", "EDAX .ang, setting 4: x left, y down; crystal as edax1"),
    "astar": Frame((_DOWN, _RIGHT, _OUT), "edax", "NanoMEGAS ASTAR .ang: x down, y right; crystal as edax1"),
    "py4dstem": Frame((_DOWN, _RIGHT, _OUT), "a", "py4DSTEM .h5: x along the first axis (down), y right; X || a"),
    "py4dstem-ang": Frame(
        (_DOWN, _RIGHT, _OUT),
        "a",
        "py4DSTEM's save_ang_file: its angles turned by half a turn about y, rows and columns swapped",
    ),
}
"""What --frame takes, beside "auto"."""

AUTO = "auto"
AXES_SWAPPED = ("py4dstem-ang",)
"""Frames of files whose rows are the scan's columns."""


def checked_frame(name: str) -> str:
    """Return `name` if it is "auto" or a key of `FRAMES`."""
    if name != AUTO and name not in FRAMES:
        raise UserError(f"--frame {name}: no frame is called that; there are {', '.join((AUTO, *FRAMES))}")
    return name


def describe_frames() -> str:
    """Return a line per frame, for the help."""
    lines = [f"  {AUTO:<13} the frame of the program that the header names"]
    lines += [f"  {name:<13} {frame.about}" for name, frame in FRAMES.items()]
    return "\n".join(lines)
