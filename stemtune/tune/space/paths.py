"""Files that a search space names: found from where the sweep was started, since its trials run elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from stemtune.config import Scalar
from stemtune.errors import UserError
from stemtune.tune.space.forms import Branch, Choice, Constant, Form
from stemtune.tune.space.space import SearchSpace

PATHS = ("data.store", "data.mix_store", "data.validation_store", "data.cif", "model.pretrained")
"""Settings that name a file."""

SHIPPED = ("linio2",)
"""Names that stand for files of ours."""


def absolute(space: SearchSpace, home: Path) -> SearchSpace:
    """Return the space with every path absolute, whether constant, searched or in `first`.

    Parameters
    ----------
    space
        The space.
    home
        The folder that relative paths start from.

    Raises
    ------
    UserError
        For a file that is not there.
    """
    fixed = {key: _there(key, value, home) for key, value in space.fixed.items()}
    search = {key: _moved(key, form, home) for key, form in space.search.items()}
    first = tuple({key: _there(key, value, home) for key, value in point.items()} for point in space.first)
    return replace(space, fixed=fixed, search=search, first=first)


def _there(key: str, value: Scalar, home: Path) -> Scalar:
    if key not in PATHS or not isinstance(value, str) or not value or value in SHIPPED:
        return value
    found = home / Path(value).expanduser()
    if not found.exists():
        raise UserError(f"`{key}` '{value}' does not exist")
    return str(found.absolute())


def _moved(key: str, form: Form, home: Path) -> Form:
    if isinstance(form, Constant):
        return Constant(_there(key, form.value, home))
    if isinstance(form, Choice):
        return Choice(tuple(_there(key, value, home) for value in form.values))
    if isinstance(form, Branch):
        branches = {
            name: {inner: _moved(inner, kind, home) for inner, kind in inside.items()}
            for name, inside in form.branches.items()
        }
        return replace(form, branches=branches)
    return form


def named_files(space: SearchSpace) -> list[str]:
    """Return the files that the space names, each once."""
    values = {value for key in PATHS for value in [space.fixed.get(key), *_values(key, space.search)]}
    values |= {point.get(key) for point in space.first for key in PATHS}
    return sorted(value for value in values if isinstance(value, str) and Path(value).is_file())


def _values(key: str, search: Mapping[str, Form]) -> Iterator[Scalar]:
    for name, form in search.items():
        if isinstance(form, Branch):
            for inside in form.branches.values():
                yield from _values(key, inside)
        elif name == key and isinstance(form, Choice):
            yield from form.values
        elif name == key and isinstance(form, Constant):
            yield form.value
