"""Reading a search space's YAML without the surprises of YAML 1.1.

PyYAML reads `1e-5` as text, `no` as False, `20:80` as the base-60 number 1280 and keeps the last of two equal keys.
Here `1e-5` is a number, `20:80` is text, and a bare `no` or a repeated key is an error that names its line.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from stemtune._files import existing
from stemtune.errors import UserError

_AMBIGUOUS = {"yes", "no", "on", "off"}
_NUMBER = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")


class _PlainLoader(yaml.SafeLoader):
    """A SafeLoader whose bare words are only: true and false, null, whole and decimal numbers, text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


_PlainLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), None)
_PlainLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?\d+$"), None)
_PlainLoader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, None)
_PlainLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|)$"), None)


def _whole_number(loader: _PlainLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))  # PyYAML would read 010 as octal


def _word(loader: _PlainLoader, node: yaml.ScalarNode) -> str:
    text = str(loader.construct_scalar(node))
    if node.style is None and text.lower() in _AMBIGUOUS:
        flag = "true" if text.lower() in ("yes", "on") else "false"
        raise UserError(
            f"line {node.start_mark.line + 1}: the bare word {text} means {flag} to some readers of YAML"
            f" and text to others; write {flag}, or '{text}' in quotes for the text"
        )
    return text


def _mapping(loader: _PlainLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"line {line}: a key must be a single word")
        if key.value in seen:
            raise UserError(f"line {line}: duplicate key '{key.value}', first in line {seen[key.value]}")
        seen[key.value] = line
    return loader.construct_mapping(node, deep=True)


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _whole_number)
_PlainLoader.add_constructor("tag:yaml.org,2002:str", _word)
_PlainLoader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read_yaml(path: Path) -> dict[Any, Any]:
    """Return the mapping in the YAML file `path`; refuse what is no mapping, or holds a word with two meanings."""
    found = existing(path, "the search space")
    try:
        text = found.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"cannot read the search space '{path}': {problem}") from None
    return read_yaml_text(text, str(path))


def read_yaml_text(text: str, place: str) -> dict[Any, Any]:
    """Return the mapping in `text`; `place` names it in errors."""
    try:
        content = yaml.load(text, Loader=_PlainLoader)
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        what = getattr(problem, "problem", None) or "not readable"
        raise UserError(f"'{place}'{line} is not valid YAML: {what}") from None
    except UserError as mistake:
        raise UserError(f"{place}: {mistake}") from None
    if not isinstance(content, dict):
        raise UserError(f"'{place}' holds no search space; it needs the blocks metric, budget and search")
    return content
