"""`stemtune bench`: names are checked before anything is measured, and a measurement prints its figures."""

from __future__ import annotations

import pytest

from stemtune import bench
from stemtune.errors import UserError


def test_an_unknown_measurement_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="did you mean 'simulate'.*loading"):
        bench.run(["simulat"])


def test_figures_are_printed_under_their_measurement(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bench._MEASUREMENTS, "simulate", ("how fast", lambda folder: {"rate": 1234.5, "device": "cpu"}))
    bench.run(["simulate"])
    assert capsys.readouterr().out == (
        "simulate: how fast\n  rate                             1,234\n  device                           cpu\n"
    )
