"""Knobs: one name each, every value checked, every mistake named."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stemtune.config import METRICS, Config, Span, knobs, parse_assignments
from stemtune.errors import UserError


def test_defaults_are_inside_their_own_ranges() -> None:
    for key, knob in knobs().items():
        assert knob.parse(knob.default) == knob.default, key
        assert knob.about, key


def test_flat_and_back_gives_the_same_settings() -> None:
    config = Config.from_flat({"optim.lr": 0.01, "simulate.thickness": "20:80", "model.pretrained": "w.safetensors"})
    assert Config.from_flat(config.to_flat()) == config
    assert config.simulate.thickness == Span(20, 80)


@given(st.floats(1e-9, 1.0, exclude_min=True))
def test_any_learning_rate_in_range_survives_text(lr: float) -> None:
    assert Config.from_flat(parse_assignments([f"optim.lr={lr!r}"])).optim.lr == lr


@pytest.mark.parametrize(
    ("flat", "says"),
    [
        ({"optim.lr": 3}, "`optim.lr` is 3, but must be in (0, 1]"),
        ({"optim.lrr": 1}, "no setting is called 'optim.lrr'; did you mean 'optim.lr'?"),
        ({"model.name": "swim"}, "did you mean 'swin'?"),
        ({"train.epochs": 1.5}, "a whole number"),
        ({"train.epochs": True}, "a whole number"),
        ({"optim.lr": float("nan")}, "`optim.lr` is nan"),
        ({"simulate.thickness": "80:20"}, "low:high"),
        ({"simulate.thickness": 0}, "`simulate.thickness` is 0"),
        ({"model.adjusted": "no"}, "true or false"),
        ({"model.kernel_size": 4}, "must be odd"),
    ],
)
def test_mistakes_are_named(flat: dict[str, object], says: str) -> None:
    with pytest.raises(UserError) as caught:
        Config.from_flat(flat)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value", [math.inf, -math.inf, math.nan, "inf", "-inf", "nan", "1e999", "1:inf", (1, math.nan)]
)
def test_no_number_may_be_infinite_or_none(value: object) -> None:
    numbers = [key for key, knob in knobs().items() if knob.kind in ("int", "float", "span")]
    assert len(numbers) > 30
    for key in numbers:
        with pytest.raises(UserError, match=f"`{key}` is "):
            Config.from_flat({key: value})
    with pytest.raises(UserError, match="`data.cut` is 'Q>1e999'"):
        Config.from_flat({"data.cut": "Q>1e999"})


def test_assignments_need_an_equals_sign() -> None:
    with pytest.raises(UserError, match="key=value"):
        parse_assignments(["optim.lr"])


def test_text_from_yaml_becomes_a_number() -> None:
    assert Config.from_flat({"optim.lr": "1e-5"}).optim.lr == 1e-5


def test_metric_names_are_unique() -> None:
    assert len(set(METRICS)) == len(METRICS)
