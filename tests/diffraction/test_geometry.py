"""The geometry of a pattern: wavelength against diffsims, pixels, and its plain form."""

import json

import pytest

from stemtune.diffraction.geometry import Geometry, wavelength_angstrom
from stemtune.errors import UserError


@pytest.mark.parametrize("kv", [60, 80, 200, 300, 1000])
def test_wavelength_agrees_with_diffsims(kv):
    from diffsims.utils.sim_utils import get_electron_wavelength

    assert wavelength_angstrom(kv) == pytest.approx(get_electron_wavelength(kv), rel=1e-8)


def test_centre_is_the_middle_unless_given():
    assert Geometry(128, 0.0235, 300).centre_px == (63.5, 63.5)
    assert Geometry(5, 0.02, 300, (1, 2.5)).centre_px == (1.0, 2.5)


def test_x_is_right_and_y_is_up():
    row, column = Geometry(128, 0.02, 200, (60, 70)).pixel_of([0.2, 0.0], [0.0, 0.4])
    assert row == pytest.approx([60, 40])
    assert column == pytest.approx([80, 70])


def test_reach():
    geometry = Geometry(100, 0.01, 200)
    assert geometry.radius_inv_angstrom == pytest.approx(0.5)
    assert geometry.corner_inv_angstrom == pytest.approx(0.5 * 2**0.5)


def test_plain_form_survives_json():
    geometry = Geometry(64, 0.03, 120, (30.25, 33))
    assert Geometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry


@pytest.mark.parametrize("bad", [(0, 0.02, 200), (128, -0.02, 200), (128, float("nan"), 200), (128, 0.02, 0)])
def test_impossible_geometry_is_the_users_mistake(bad):
    with pytest.raises(UserError, match="must be above 0"):
        Geometry(*bad)


def test_missing_calibration_is_named():
    with pytest.raises(UserError, match="scale_inv_angstrom"):
        Geometry.from_dict({"size": 4, "kv": 200})
