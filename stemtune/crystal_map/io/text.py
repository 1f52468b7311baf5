"""Text files of EBSD programs: headers in any encoding, numbers with decimal points or commas, one error per file."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from stemtune.crystal.rotations import from_euler_deg
from stemtune.errors import UserError


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file; what is no UTF-8 counts as Latin-1, which such programs write."""
    try:
        raw = path.read_bytes()
    except OSError as problem:
        raise UserError(f"'{path}' cannot be read: {problem.strerror or problem}") from None
    if b"\0" in raw[:4096]:
        raise UserError(f"'{path}' is no text file, so it is no map; give an .ang, .ctf or .h5 file")
    try:
        return raw.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        return raw.decode("latin-1").splitlines()


def number(text: str) -> float:
    """Return the number in `text`, written with a decimal point or a decimal comma.

    Raises
    ------
    ValueError
        When it is none.
    """
    return float(text.strip().replace(",", "."))


def numbers(text: str) -> list[float]:
    """Return the numbers in `text`, separated by spaces, tabs or semicolons."""
    return [number(word) for word in re.split(r"[;\s]+", text.strip()) if word]


def table(lines: list[str], first: int, source: str) -> npt.NDArray[np.float64]:
    """Return the numbers (m, columns) of `lines` from index `first` on; decimal commas are read as points.

    Raises `UserError` naming the line that is no row of numbers, or that has another number of them.
    """
    rows = [line.replace(",", ".") for line in lines[first:]]
    filled = [row for row in rows if row.strip()]
    if not filled:
        raise UserError(f"{source} holds a header but no points; export it again")
    try:
        return np.loadtxt(filled, dtype=np.float64, ndmin=2, comments=None)
    except ValueError:
        width = len(filled[0].split())
        for place, row in enumerate(rows, start=first + 1):
            words = row.split()
            if words and (len(words) != width or not all(map(_is_number, words))):
                shown = " ".join(row.split())[:60]
                raise UserError(
                    f"{source} has '{shown}' in line {place}, which is no row of {width} numbers; export it again"
                ) from None
        raise


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def from_euler(euler_deg: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the orientations (m, 4) of Bunge's Euler angles (m, 3) in degrees, as the file means them."""
    return np.asarray(from_euler_deg(torch.from_numpy(np.ascontiguousarray(euler_deg))).numpy())
