"""What is known about one setting: its name, default, unit, range and meaning."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from stemtune.errors import UserError, did_you_mean

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Span:
    """A closed range that is drawn from at random; a single number is a range of no width."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g}:{self.high:g}"


class Cut(NamedTuple):
    """What the score called `score` must be: above `limit`, or where `equal` at least that."""

    score: str
    limit: float
    equal: bool

    def __str__(self) -> str:
        return f"{self.score}{'>=' if self.equal else '>'}{self.limit:g}"


@dataclass(frozen=True)
class Knob:
    """What is known about one setting: the place `key`, the default, the allowed values and the meaning."""

    key: str
    kind: str
    default: Any
    about: str
    unit: str = ""
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    choices: tuple[str, ...] = ()

    def parse(self, value: object) -> Any:
        """Return `value` as this knob's type, or raise a `UserError` that names key, value and range."""
        if isinstance(value, str) and self.kind != "text":
            value = _from_text(value, self.kind)
        if self.kind == "flag":
            if not isinstance(value, bool):
                raise self._refuse(value, "true or false")
            return value
        if self.kind == "text":
            if isinstance(value, bool) or not isinstance(value, str):
                raise self._refuse(value, f"one of {', '.join(self.choices)}" if self.choices else "text")
            if self.choices and value not in self.choices:
                raise self._refuse(value, f"one of {', '.join(self.choices)}{did_you_mean(value, self.choices)}")
            return value
        if self.kind == "flag_or_path":
            if not isinstance(value, bool | str):
                raise self._refuse(value, "true, false or a path")
            return value
        if self.kind == "cuts":
            cuts = read_cuts(value) if isinstance(value, str) else None
            if cuts is None or not all(math.isfinite(cut.limit) for cut in cuts):
                raise self._refuse(value, "scores and what they must exceed, Q>0.2 R>5 for instance")
            return " ".join(str(cut) for cut in cuts)
        if self.kind == "span":
            span = _span(value)
            if span is None or span.low > span.high:
                raise self._refuse(value, "a number or low:high")
            self._in_range(span.low, value)
            self._in_range(span.high, value)
            return span
        return self._number(value)

    def _number(self, value: object) -> int | float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._refuse(value, "a whole number" if self.kind == "int" else "a number")
        if not math.isfinite(value):
            raise self._refuse(value, "a finite number")
        if self.kind == "int" and value != int(value):
            raise self._refuse(value, "a whole number")
        self._in_range(value, value)
        return int(value) if self.kind == "int" else float(value)

    def _in_range(self, number: float, shown: object) -> None:
        above = number > self.low if self.open_low else number >= self.low
        below = number < self.high if self.open_high else number <= self.high
        if not (above and below and math.isfinite(number)):
            raise self._refuse(shown, f"in {self.range_text}")

    @property
    def range_text(self) -> str:
        """The allowed range in mathematical notation, `(0, 1]` for instance."""
        left = "(" if self.open_low or math.isinf(self.low) else "["
        right = ")" if self.open_high or math.isinf(self.high) else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"

    def _refuse(self, value: object, wanted: str) -> UserError:
        return UserError(f"`{self.key}` is {value!r}, but must be {wanted}")


def _from_text(text: str, kind: str) -> object:
    """Read a number or a flag that came as text (from `--set`, or YAML's 1e-5); leave other text as it is."""
    lowered = text.strip().lower()
    if kind in ("flag", "flag_or_path") and lowered in ("true", "false"):
        return lowered == "true"
    if kind in ("int", "float"):
        try:
            return float(lowered) if kind == "float" else int(lowered)
        except ValueError:
            return text
    return text


_CUT = re.compile(r"\s*([A-Za-z_]\w*)\s*(>=?)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?:\s*,|\s+and\b|\s|$)\s*")


def read_cuts(text: str) -> list[Cut] | None:
    """Return the cuts that `text` lists, parted by spaces, commas or "and"; None when it is not such a list."""
    cuts, place = [], 0
    while place < len(text.rstrip()):
        found = _CUT.match(text, place)
        if found is None:
            return None
        name, sign, number = found.groups()
        cuts.append(Cut(name, float(number), sign == ">="))
        place = found.end()
    return cuts


def _span(value: object) -> Span | None:
    if isinstance(value, Span):
        return value
    if isinstance(value, str):
        parts: list[Any] = value.split(":")
    elif isinstance(value, list | tuple):
        parts = list(value)
    else:
        parts = [value]
    if len(parts) not in (1, 2) or any(isinstance(part, bool) for part in parts):
        return None
    try:
        return Span(float(parts[0]), float(parts[-1]))
    except (TypeError, ValueError):
        return None


def number(default: float, about: str, limits: str = "(-inf, inf)", unit: str = "", kind: str = "float") -> Any:
    """Return a field that holds a number within `limits`, "(0, 1]" for instance."""
    left, low, high, right = _LIMITS.fullmatch(limits).groups()  # type: ignore[union-attr]
    bounds = {"low": float(low), "high": float(high), "open_low": left == "(" and low != "-inf"}
    bounds["open_high"] = right == ")" and high != "inf"
    return _field(kind, default, about, unit=unit, **bounds)


def integer(default: int, about: str, limits: str = "(-inf, inf)", unit: str = "") -> Any:
    """Return a field that holds a whole number; see `number`."""
    return number(default, about, limits, unit, "int")


def span(low: float, high: float, about: str, limits: str, unit: str = "") -> Any:
    """Return a field that holds a range of numbers within `limits`; see `number`."""
    return number(Span(low, high), about, limits, unit, "span")  # type: ignore[arg-type]


def text(default: bool | str, about: str, choices: tuple[str, ...] = (), kind: str = "text") -> Any:
    """Return a field that holds text, one of `choices` where there are any."""
    return _field(kind, default, about, choices=choices)


flag, flag_or_path, cuts = (partial(text, kind=kind) for kind in ("flag", "flag_or_path", "cuts"))

_LIMITS = re.compile(r"([(\[])(.+), (.+)([)\]])")


def _field(kind: str, default: Any, about: str, **limits: Any) -> Any:
    return field(default=default, metadata={"kind": kind, "about": about, **limits})
