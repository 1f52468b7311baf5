"""The five forms in which a setting varies in a search space, and what each draws.

scalar = constant; list = choice; `{uniform|log|int|log_int: [low, high], step: s}` = range;
`{one_of: {name: {...}}}` = branch whose name is the choice. The fifth, the blocks `fixed:` and `first:`, belongs to
the whole space (`stemtune.tune.space.space`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from stemtune.config import Scalar, Span, knob
from stemtune.errors import UserError, did_you_mean

RANGES = ("uniform", "log", "int", "log_int")


class Draw(Protocol):
    """What proposes values: an Optuna trial, or a plain random generator in `stemtune check`."""

    def suggest_categorical(self, name: str, choices: list[Scalar]) -> Scalar: ...
    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...


class Dice:
    """A plain random generator with the face of an Optuna trial."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def suggest_categorical(self, name: str, choices: list[Scalar]) -> Scalar:
        return self._random.choice(choices)

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        if step:
            return low + step * self._random.randint(0, round((high - low) / step))
        return low * (high / low) ** self._random.random() if log else self._random.uniform(low, high)

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        if log:
            return min(high, int(low * ((high + 1) / low) ** self._random.random()))
        return low + step * self._random.randint(0, (high - low) // step)


@dataclass(frozen=True)
class Constant:
    """A value that every trial, or every trial of a branch, shares."""

    value: Scalar

    @property
    def values(self) -> tuple[Scalar, ...]:
        return (self.value,)

    def draw(self, name: str, source: Draw) -> Scalar:
        return self.value

    def holds(self, value: Scalar) -> bool:
        return value == self.value

    def __str__(self) -> str:
        return f"{self.value}"


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    values: tuple[Scalar, ...]

    def draw(self, name: str, source: Draw) -> Scalar:
        return source.suggest_categorical(name, list(self.values))

    def holds(self, value: Scalar) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return "one of " + ", ".join(str(value) for value in self.values)


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    whole: bool
    log: bool
    step: float | None = None

    def draw(self, name: str, source: Draw) -> Scalar:
        if self.whole:
            return source.suggest_int(name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        return source.suggest_float(name, self.low, self.high, step=self.step, log=self.log)

    def holds(self, value: Scalar) -> bool:
        if isinstance(value, bool | str) or not self.low <= value <= self.high:
            return False
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return abs(steps - round(steps)) < 1e-6

    def __str__(self) -> str:
        step = f" in steps of {self.step:g}" if self.step else ""
        return f"{self.low:g} to {self.high:g}{step}{', logarithmic' if self.log else ''}"


@dataclass(frozen=True)
class Branch:
    """A choice of name; each name brings settings of its own."""

    branches: Mapping[str, Mapping[str, Form]]
    values: Mapping[str, Scalar]

    def __str__(self) -> str:
        return "one of " + ", ".join(self.branches)


Form = Constant | Choice | Range | Branch


def read_form(key: str, written: object) -> Form:
    """Turn what stands behind `key` in the file into a form, or raise a one-line `UserError`."""
    knob(key)
    if isinstance(written, list):
        return _choice(key, written)
    if not isinstance(written, Mapping):
        return Constant(checked(key, written))
    if "one_of" in written:
        return _branch(key, written)
    kinds = [kind for kind in RANGES if kind in written]
    if len(kinds) != 1:
        given = ", ".join(str(word) for word in written) or "nothing"
        near = did_you_mean(str(next(iter(written), "")), (*RANGES, "one_of"))
        raise UserError(f"`{key}` has {given}, but a range needs one of {', '.join(RANGES)}, a branch one_of{near}")
    return _range(key, kinds[0], written)


def checked(key: str, value: object) -> Scalar:
    """Return `value` as the knob `key` takes it; a range of a knob stays text `low:high`."""
    if value is None or isinstance(value, list | Mapping):
        raise UserError(f"`{key}` is {value!r}, but must be one value")
    parsed = knob(key).parse(value)
    return str(parsed) if isinstance(parsed, Span) else parsed


def _choice(key: str, written: list[Any]) -> Choice:
    values = tuple(checked(key, value) for value in written)
    if not values:
        raise UserError(f"`{key}` is an empty list, but a choice needs at least one value")
    for index, value in enumerate(values):
        if value in values[:index]:
            raise UserError(f"`{key}` lists {value!r} twice")
    return Choice(values)


def _range(key: str, kind: str, written: Mapping[Any, Any]) -> Range:
    for word in written:
        if word not in (kind, "step"):
            raise UserError(f"`{key}` has '{word}' beside {kind}, but only step may stand there")
    ends = written[kind]
    if not isinstance(ends, list) or len(ends) != 2:
        raise UserError(f"`{key}` has {kind}: {ends!r}, but must have {kind}: [low, high]")
    if knob(key).kind not in ("int", "float", "span"):
        raise UserError(f"`{key}` is not a number, so it cannot be {kind}; write a list of choices")
    whole, log = kind in ("int", "log_int"), kind in ("log", "log_int")
    low, high = (_end(key, end, whole) for end in ends)
    if low >= high:
        raise UserError(f"`{key}` has the empty range {kind}: [{low:g}, {high:g}]; the first end must be the smaller")
    if log and low <= 0:
        raise UserError(f"`{key}` has {kind}: [{low:g}, {high:g}], but a logarithmic range must start above 0")
    if not whole and knob(key).kind == "int":
        raise UserError(f"`{key}` takes whole numbers, so write {'log_int' if log else 'int'} instead of {kind}")
    return Range(low, high, whole, log, _step(key, kind, written.get("step"), low, high))


def _end(key: str, end: object, whole: bool) -> float:
    value = checked(key, end)
    number = float(value) if not isinstance(value, str) or ":" not in value else math.nan
    if math.isnan(number):
        raise UserError(f"`{key}` has the end {end!r} of a range, but it must be a number")
    if whole and number != int(number):
        raise UserError(f"`{key}` has the end {end!r} of a range of whole numbers")
    return number


def _step(key: str, kind: str, step: object, low: float, high: float) -> float | None:
    if step is None:
        return None
    if isinstance(step, str):
        try:
            step = float(step)
        except ValueError:
            raise UserError(f"`{key}` has step: {step!r}, but it must be a number") from None
    if isinstance(step, bool) or not isinstance(step, int | float) or not 0 < step <= high - low:
        raise UserError(f"`{key}` has step: {step!r}, but must be in (0, {high - low:g}]")
    if kind in ("log", "log_int"):
        raise UserError(f"`{key}` has a step in a {kind} range, which has none; leave it out or write a list")
    if kind == "int" and step != int(step):
        raise UserError(f"`{key}` has step: {step!r}, but whole numbers need a whole step")
    steps = (high - low) / step
    if abs(steps - round(steps)) > 1e-6:
        last = low + math.floor(steps) * step
        raise UserError(f"`{key}` cannot reach {high:g} from {low:g} in steps of {step:g}; end the range at {last:g}")
    return float(step)


def _branch(key: str, written: Mapping[Any, Any]) -> Branch:
    if len(written) > 1:
        extra = next(word for word in written if word != "one_of")
        raise UserError(f"`{key}` has '{extra}' beside one_of, but nothing may stand there")
    names = written["one_of"]
    if not isinstance(names, Mapping) or not names:
        raise UserError(f"`{key}` has a one_of without branches; write one_of: {{name: {{...}}}}")
    branches: dict[str, dict[str, Form]] = {}
    values: dict[str, Scalar] = {}
    for name, inside in names.items():
        value = checked(key, name)
        if not isinstance(inside, Mapping | None):
            raise UserError(f"`{key}` has the branch {name}: {inside!r}, but a branch is {{setting: form, ...}}")
        label = str(value)
        values[label] = value
        branches[label] = {inner: read_form(inner, form) for inner, form in (inside or {}).items()}
    return Branch(branches, values)


def combinations_count(forms: Mapping[str, Form]) -> float:
    """Return how many combinations `combinations` would return; infinity where a setting has a range."""
    total = 1.0
    for form in forms.values():
        if isinstance(form, Range):
            return math.inf
        inside = form.branches.values() if isinstance(form, Branch) else ()
        total *= sum(map(combinations_count, inside)) if isinstance(form, Branch) else len(form.values)
    return total


def combinations(forms: Mapping[str, Form]) -> list[dict[str, Scalar]]:
    """Return every combination of the values of a space, the last setting changing fastest; a range is refused."""
    points: list[dict[str, Scalar]] = [{}]
    for key, form in forms.items():
        if isinstance(form, Range):
            raise UserError(f"`{key}` has a range, but a grid needs lists; write the values, or leave `design` out")
        if isinstance(form, Branch):
            inner = {label: combinations(inside) for label, inside in form.branches.items()}
            choices = [{key: form.values[label], **point} for label, points_in in inner.items() for point in points_in]
        else:
            choices = [{key: value} for value in form.values]
        points = [{**point, **choice} for point in points for choice in choices]
    return points
