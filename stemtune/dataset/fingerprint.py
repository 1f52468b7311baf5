"""The sha256 of the files that a scan lies in, whole or followed while they are copied."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

_PIECE = 2**20  # bytes read at a time


class Fingerprint:
    """The sha256 of a scan's files, taken piece by piece beside the copying, so that each byte leaves the disk once.

    Parameters
    ----------
    path
        The file, or the folder that some formats are.
    parts
        Further files of the same scan. With them, or for a folder, names are hashed too.
    """

    def __init__(self, path: Path, parts: Sequence[Path] = ()) -> None:
        files = [part for part in path.rglob("*") if part.is_file()] if path.is_dir() else [path, *parts]
        self._total, self._read = sum(part.stat().st_size for part in files), 0
        self._pieces, self._digest = _pieces(path, parts), hashlib.sha256()

    def advance(self, share: float) -> None:
        """Go on until this share of the bytes, 0 to 1, is done."""
        while self._read < share * self._total and (piece := next(self._pieces, None)) is not None:
            self._digest.update(piece)
            self._read += len(piece)

    def finish(self) -> str:
        """Do what is left and return the digest in hexadecimal digits."""
        for piece in self._pieces:
            self._digest.update(piece)
        return self._digest.hexdigest()


def file_sha256(path: Path, parts: Sequence[Path] = ()) -> str:
    """Return the sha256 of a file, or of all files in a folder by name (some formats are folders)."""
    return Fingerprint(path, parts).finish()


def _pieces(path: Path, parts: Sequence[Path]) -> Iterator[bytes | memoryview]:
    """Yield names and contents; a piece is overwritten by the next one."""
    folder = path.is_dir()
    for part in sorted(path.rglob("*")) if folder else [path, *parts]:
        if folder or parts:
            yield (part.relative_to(path).as_posix() if folder else part.name).encode()
        if part.is_file():
            piece = memoryview(bytearray(_PIECE))
            with part.open("rb", buffering=0) as file:
                while count := file.readinto(piece):
                    yield piece[:count]
