"""The measurement of speed runs, and finds us faster than the peer in the same run."""

from stemtune.diffraction.rates import simulation_rate


def test_simulation_is_faster_than_diffsims():
    rates = simulation_rate(seconds=0.5)
    assert rates["size"] == 128 and rates["device"] == "cpu"
    assert 0 < rates["cpu_ms_per_pattern"] < 50
    assert rates["times_faster"] == rates["patterns_per_s"] / rates["diffsims_patterns_per_s"] > 1
