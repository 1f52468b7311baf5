"""The measurement of speed runs, and finds us faster than the peer in the same run."""

from importlib.util import find_spec

import pytest

from benchmarks.simulation_rates import bloch_rate, simulation_rate


def test_simulation_is_faster_than_diffsims():
    rates = simulation_rate(seconds=0.5)
    assert rates["size"] == 128 and rates["device"] == "cpu"
    assert 0 < rates["cpu_ms_per_pattern"] < 50
    assert rates["times_faster"] == rates["patterns_per_s"] / rates["diffsims_patterns_per_s"] > 1


def test_bloch_waves_are_measured_with_about_a_hundred_beams():
    rates = bloch_rate(seconds=0.3)
    assert rates["beams"] == pytest.approx(100, abs=3) and rates["thicknesses"] == 4
    assert rates["orientations_per_s"] > 0 and 0 < rates["cpu_ms_per_orientation"] < 100
    if find_spec("py4DSTEM") is None:
        assert rates["py4dstem"].startswith("not installed")
    else:
        assert rates["py4dstem_beams"] == pytest.approx(100, abs=15)
        assert rates["times_faster"] == rates["orientations_per_s"] / rates["py4dstem_orientations_per_s"]
