"""Files that are either whole or absent: work goes to a temporary name and is renamed at the end."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from stemtune.errors import UserError


def existing(path: str | os.PathLike[str], what: str) -> Path:
    """Return `path` if it exists, else raise a one-line `UserError` that calls it `what`."""
    found = Path(path).expanduser()
    if not found.exists():
        raise UserError(f"{what} '{path}' does not exist")
    return found


def refuse_readable(path: Path, what: str) -> None:
    """Refuse a file with a secret that others than its owner can read."""
    if path.stat().st_mode & 0o077:
        raise UserError(f"{what} lies in '{path}', which others can read; chmod 600 {path}")


SHIPPED = Path(__file__).parent / "shipped"
"""Where the models that come with the package lie, a folder each."""


def shipped_models() -> list[str]:
    """Return the names of the models that come with the package."""
    return sorted(entry.name for entry in SHIPPED.glob("*") if (entry / "model.json").is_file())


def shipped_or(spec: str | os.PathLike[str]) -> Path:
    """Return the folder of the shipped model called `spec`; where none is, or such a path exists, `spec` as a path."""
    path = Path(spec).expanduser()
    return SHIPPED / str(spec) if not path.exists() and str(spec) in shipped_models() else path


def writable_folder(path: str | os.PathLike[str]) -> Path:
    """Create the folder `path` if need be and make sure that files can be made in it."""
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        reason = problem.strerror or problem
        raise UserError(f"cannot write to the folder '{folder}': {reason}; choose another --out") from None
    return folder


def replaceable_folder(final: str | os.PathLike[str], made: Sequence[str], what: str) -> Path:
    """Return the folder `final`, which may be replaced: it is absent, empty, or holds only what stemtune makes.

    `made` are the names, * for any letters, of the files that such an output, `what` (a map, a model), consists of. A
    `UserError` says when anything else lies there, for replacing the folder would delete it, or nothing can be written.
    """
    target = Path(final).expanduser().resolve()
    writable_folder(target.parent)
    _refuse_file(target)
    held = sorted(entry.name for entry in target.iterdir()) if target.exists() else []
    foreign = [name for name in held if not any(fnmatch(name, pattern) for pattern in made)]
    if foreign:
        raise UserError(f"the folder '{final}' holds '{foreign[0]}', which is no part of {what}; choose another --out")
    return target


def _refuse_file(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"'{target}' is a file, but a folder is to be written there; choose another --out")


def replaceable_file(final: str | os.PathLike[str]) -> Path:
    """Return the path `final` after making sure that a file can be written there: its folder is made if need be."""
    target = Path(final).expanduser()
    writable_folder(target.parent)
    if target.is_dir():
        raise UserError(f"'{target}' is a folder, but a file is to be written there; choose another --out")
    if target.exists() and not target.is_file():  # renaming over /dev/null would take it from the whole machine
        raise UserError(f"'{target}' is no ordinary file, so it cannot be replaced; choose another --out")
    return target


@contextmanager
def whole_file(final: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `final`; rename it to `final` if the block ends well, else remove it.

    No other thread, process or host that shares the disk is given the same path.
    """
    target = replaceable_file(final)
    part = target.parent / f".{target.name}.{secrets.token_hex(8)}.part{target.suffix}"
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(final: str | os.PathLike[str], *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `final`; it replaces `final` if the block ends well, else it goes.

    With `durable` all of it is on the disk, and not only in the machine's memory, before it has its name.
    """
    target = Path(final).expanduser()
    parent = writable_folder(target.parent)
    _refuse_file(target)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=parent))
    try:
        yield part
        part.chmod(0o755)
        if durable:
            sync(*part.rglob("*"), part)
        if target.exists():
            old = part.with_suffix(".old")
            target.rename(old)
            try:
                part.rename(target)
            except BaseException:
                old.rename(target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            part.rename(target)
        if durable:
            sync(parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def sync(*paths: Path) -> None:
    """Have the disk take these files and the names in these folders."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


SUMS = "SHA256SUMS"
"""Name of the file of a sealed folder with the hash of every other; `sha256sum -c SHA256SUMS` reads it too."""


def seal(folder: Path, *also: str) -> None:
    """Write down the hash of every file in `folder`; of those named in `also` only, where the others have theirs."""
    names = also or sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    lines = (folder / SUMS).read_text().splitlines(keepends=True) if also else []
    lines = [line for line in lines if line.rstrip("\n").partition("  ")[2] not in names]
    lines += [f"{_sha256(folder / name)}  {name}\n" for name in names if name != SUMS]
    (folder / SUMS).write_text("".join(lines))


def damage(folder: Path) -> str:
    """Say which file of a sealed folder is not as it was written, and how; an empty string when all are."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except (OSError, ValueError):
        return f"'{folder / SUMS}' is missing or unreadable"
    if not lines:
        return f"'{folder / SUMS}' is empty"
    for line in lines:
        wanted, _, name = line.partition("  ")
        try:
            found = _sha256(folder / name)
        except OSError as problem:
            return f"'{folder / name}' cannot be read ({problem.strerror or problem})"
        if found != wanted:
            return f"'{folder / name}' is not what was written: its hash differs from the one in {SUMS}"
    return ""


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
