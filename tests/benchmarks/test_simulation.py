"""The measurement of speed runs, and finds us faster than the peer in the same run."""

from importlib.util import find_spec

import pytest

from benchmarks.simulation import bloch, kinematic


def test_simulation_is_faster_than_diffsims():
    figures = kinematic(seconds=0.5)
    assert figures["size"] == 128 and figures["device"] == "cpu"
    assert 0 < figures["cpu_ms_per_pattern"] < 50
    assert figures["times_faster"] == figures["patterns_per_s"] / figures["diffsims_patterns_per_s"] > 1


def test_bloch_waves_are_measured_with_about_a_hundred_beams():
    figures = bloch(seconds=0.3)
    assert figures["beams"] == pytest.approx(100, abs=3) and figures["thicknesses"] == 4
    assert figures["orientations_per_s"] > 0 and 0 < figures["cpu_ms_per_orientation"] < 100
    if find_spec("py4DSTEM") is None:
        assert figures["py4dstem"].startswith("not installed")
    else:
        assert figures["py4dstem_beams"] == pytest.approx(100, abs=15)
        assert figures["times_faster"] == figures["orientations_per_s"] / figures["py4dstem_orientations_per_s"]
