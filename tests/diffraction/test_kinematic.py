"""Spots against diffsims for four Laue classes, the shape factor against quadrature, and the exact augmentations."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import dblquad, quad

from stemtune.config import SimulateConfig, Span
from stemtune.crystal import rotations
from stemtune.crystal.phase import DEFAULT_U_ISO, Phase, linio2
from stemtune.crystal.sampling import random_orientations
from stemtune.diffraction.detector import CHUNK
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator
from stemtune.errors import UserError

CIF = """data_{name}
_cell_length_a {a}
_cell_length_b {b}
_cell_length_c {c}
_cell_angle_alpha {alpha}
_cell_angle_beta {beta}
_cell_angle_gamma {gamma}
_space_group_name_H-M_alt '{group}'
_space_group_IT_number {number}
loop_
_space_group_symop_operation_xyz
{operations}
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
{atoms}
"""

NI_ATOMS = "Ni1 Ni 0 0 0 1"
MG_ATOMS = "Mg1 Mg 0.333333333333 0.666666666667 0.25 1"
TRICLINIC_ATOMS = "Cu1 Cu 0.1 0.2 0.3 1\nS1 S 0.62 0.35 0.81 1"


def _cif(name, cell, group, number, atoms):
    from diffpy.structure.spacegroups import GetSpaceGroup

    operations = [str(_xyz(op)) for op in GetSpaceGroup(number).iter_symops()]
    keys = ("a", "b", "c", "alpha", "beta", "gamma")
    return CIF.format(
        name=name,
        group=group,
        number=number,
        atoms=atoms,
        operations="\n".join(operations),
        **dict(zip(keys, cell, strict=True)),
    )


def _xyz(operation):
    """Write a symmetry operation as CIFs do: 'x-y,x,z+1/2'."""
    from fractions import Fraction

    parts = []
    for row, shift in zip(operation.R, operation.t, strict=True):
        terms = "".join(f"{'+' if f > 0 else '-'}{axis}" for f, axis in zip(row, "xyz", strict=True) if f)
        fraction = Fraction(float(shift)).limit_denominator(24)
        parts.append(terms.removeprefix("+") + (f"+{fraction}" if fraction else ""))
    return f"'{','.join(parts)}'"


PHASES = {
    "m-3m": lambda: _cif("Ni", (3.52, 3.52, 3.52, 90, 90, 90), "F m -3 m", 225, NI_ATOMS),
    "6/mmm": lambda: _cif("Mg", (3.21, 3.21, 5.21, 90, 90, 120), "P 63/m m c", 194, MG_ATOMS),
    "-3m": lambda: linio2().cif,
    "-1": lambda: _cif("CuS", (4.1, 5.3, 6.7, 83, 98, 107), "P -1", 2, TRICLINIC_ATOMS),
}


def _orix_phase(text, folder):
    from orix.crystal_map import Phase as OrixPhase

    path = folder / "phase.cif"
    path.write_text(text)
    phase = OrixPhase.from_cif(path)
    phase.expand_asymmetric_unit()
    return phase


def _simulator(phase, **settings):
    simulate = SimulateConfig(**{"scale": 0.02, **settings})
    return KinematicSimulator(phase, Geometry.of(simulate), simulate)


def _exact(**settings):
    """Settings without any randomness."""
    still = {
        "dose": Span(0, 0),
        "thickness": Span(40, 40),
        "precession": Span(0.4, 0.4),
        "convergence": Span(1.2, 1.2),
        "direct_beam": Span(0.5, 0.5),
        "background": Span(0, 0),
        "blur": Span(0.6, 0.6),
        "centre_error": 0.0,
        "ellipticity": 0.0,
        "scale_error": 0.0,
        "dead_pixels": 0.0,
    }
    return {**still, **settings}


@pytest.mark.parametrize("laue", list(PHASES))
def test_spots_agree_with_diffsims(laue, tmp_path):
    from diffsims.generators.simulation_generator import SimulationGenerator
    from orix.quaternion import Rotation

    text = PHASES[laue]()
    phase = Phase.from_cif_text(text)
    assert phase.symmetry.laue == laue
    orientation = random_orientations(8, 11)
    thickness_nm, reach = 15.0, 1.25
    simulator = _simulator(phase)
    spots = simulator.spots(orientation, thickness_nm)
    minima = 5  # diffsims' sin2c puts its fifth zero at the given width
    theirs = SimulationGenerator(accelerating_voltage=200, shape_factor_model="sin2c").calculate_diffraction2d(
        _orix_phase(text, tmp_path),
        Rotation(orientation.numpy()),
        reciprocal_radius=reach,
        with_direct_beam=False,
        max_excitation_error=0.3,
        shape_factor_width=minima / (10 * thickness_nm),
        debye_waller_factors=dict.fromkeys(set(phase.elements), 8 * math.pi**2 * DEFAULT_U_ISO),
    )
    compared = 0
    for row, vectors in enumerate(theirs.coordinates):
        strong = vectors.intensity > max(0.02 * vectors.intensity.max(), 3e-5 * float(simulator.strength.max()))
        expected = np.asarray(vectors.data)[strong]
        ours = torch.stack((spots.x[row], spots.y[row]), dim=1).numpy()
        distance = np.linalg.norm(expected[:, None, :2] - ours[None], axis=2)
        # Two reflections may share a position in projection; the intensity says which is meant.
        ratio = spots.intensity[row].numpy()[None] / vectors.intensity[strong][:, None]
        matched = (distance < 1e-6) & (np.abs(ratio - 1) < 1e-3)
        assert matched.any(axis=1).all()
        compared += len(expected)
        reachable = np.hypot(*ours.T) < reach - 0.1
        bright = reachable & (spots.intensity[row].numpy() > 0.1 * vectors.intensity.max())
        assert distance[:, bright].min(axis=0).max(initial=0) < 1e-6, "a spot that diffsims does not have"
    assert compared > 20


def test_a_single_number_type_is_kept():
    simulator = _simulator(linio2())
    double = simulator.spots(random_orientations(4, 0))
    single = simulator.spots(random_orientations(4, 0).float())
    assert double.x.dtype == torch.float64 and single.x.dtype == torch.float32
    assert double.hkl_index.equal(single.hkl_index)
    assert torch.allclose(double.x, single.x.double(), atol=1e-6)


def test_spots_stand_at_the_inverse_of_the_orientation():
    simulator = _simulator(linio2())
    orientation = random_orientations(6, 3)
    spots = simulator.spots(orientation)
    real = spots.hkl_index >= 0
    assert (spots.intensity[~real] == 0).all() and real.sum() > 30
    lab = rotations.rotate(rotations.inverse(orientation)[:, None], simulator.g[spots.hkl_index.clamp_min(0)])
    assert torch.allclose(lab[..., 0][real], spots.x[real], atol=1e-12)
    assert torch.allclose(lab[..., 1][real], spots.y[real], atol=1e-12)


@pytest.mark.parametrize("shape", ["sinc2", "gaussian"])
def test_precession_and_convergence_average_the_shape_factor(shape):
    """The 32 sampled beams against the integral over the cone and the disk."""
    simulator = _simulator(linio2(), shape=shape)
    orientation = random_orientations(3, 8)
    thickness, width, cone, disk = 25.0, 0.004, math.radians(0.35), 1.5e-3
    spots = simulator.spots(orientation, thickness, math.degrees(cone), disk * 1e3, shape_width=width)
    lab = rotations.rotate(rotations.inverse(orientation)[:, None], simulator.g[spots.hkl_index.clamp_min(0)])
    radius = 1 / simulator.geometry.wavelength_angstrom
    checked = 0
    for row in range(len(orientation)):
        for slot in spots.intensity[row].argsort(descending=True)[:6].tolist():
            x, y, z = lab[row, slot].tolist()
            across = math.hypot(x, y)
            error = radius - math.sqrt(radius**2 - across**2) - z

            def factor(s):
                return np.sinc(10 * thickness * s) ** 2 if shape == "sinc2" else math.exp(-((s / width) ** 2))

            def over_disk(theta, u, error=error, across=across):
                s = error + across * (cone * math.cos(theta) + disk * u)
                return factor(s) * 2 / math.pi * math.sqrt(1 - u * u) / math.pi

            mean, _ = dblquad(over_disk, -1, 1, 0, math.pi, epsabs=1e-5)
            expected = mean * float(simulator.strength[spots.hkl_index[row, slot]])
            assert float(spots.intensity[row, slot]) == pytest.approx(expected, rel=0.12)
            checked += 1
    assert checked == 18


def test_precession_agrees_with_quadrature_of_palatinus():
    """Without convergence, against diffsims' own integral over the cone."""
    from diffsims.utils.shape_factor_models import _shape_factor_precession, sin2c

    simulator = _simulator(linio2())
    orientation = random_orientations(2, 21)
    thickness, cone = 20.0, 0.2
    spots = simulator.spots(orientation, thickness, cone)
    lab = rotations.rotate(rotations.inverse(orientation)[:, None], simulator.g[spots.hkl_index.clamp_min(0)])
    across = torch.hypot(lab[..., 0], lab[..., 1])
    radius = 1 / simulator.geometry.wavelength_angstrom
    error = radius - (radius**2 - across**2).sqrt() - lab[..., 2]
    order = spots.intensity[0].argsort(descending=True)[:8]
    expected = _shape_factor_precession(
        error[0, order].numpy(), across[0, order].numpy(), math.radians(cone), sin2c, 5 / (10 * thickness)
    )
    got = spots.intensity[0, order] / simulator.strength[spots.hkl_index[0, order]]
    assert got.numpy() == pytest.approx(expected, rel=0.02)


def test_template_spots():
    simulator = _simulator(linio2())
    orientation = random_orientations(5, 2)
    spots = simulator.template_spots(orientation, width=0.025, max_inv_angstrom=1.0)
    real = spots.hkl_index >= 0
    assert torch.hypot(spots.x, spots.y)[real].max() <= 1.0
    lab = rotations.rotate(rotations.inverse(orientation)[:, None], simulator.g[spots.hkl_index.clamp_min(0)])
    radius = 1 / simulator.geometry.wavelength_angstrom
    error = radius - (radius**2 - lab[..., 0] ** 2 - lab[..., 1] ** 2).sqrt() - lab[..., 2]
    expected = simulator.strength[spots.hkl_index.clamp_min(0)] * torch.exp(-((error / 0.025) ** 2))
    assert torch.allclose(spots.intensity[real], expected[real], rtol=1e-9)
    # Nothing bright is missing: every reflection within one width of the sphere is there.
    everything = rotations.rotate(rotations.inverse(orientation)[:1, None], simulator.g)[0]
    across = torch.hypot(everything[:, 0], everything[:, 1])
    near = (radius - (radius**2 - across**2).sqrt() - everything[:, 2]).abs() < 0.025
    strong = simulator.strength > 1e-2 * simulator.strength.max()
    wanted = (near & strong & (across < 1.0)).nonzero().squeeze(1).tolist()
    assert len(wanted) >= 5 and set(wanted) <= set(spots.hkl_index[0].tolist())


def test_the_image_of_a_spot_is_where_the_geometry_says():
    simulate = SimulateConfig(**_exact(scale=0.02, direct_beam=Span(0, 0), convergence=Span(0, 0)))
    geometry = Geometry(128, 0.02, 200, (60.25, 66.5))
    simulator = KinematicSimulator(linio2(), geometry, simulate)
    orientation = random_orientations(1, 5)
    spots = simulator.spots(orientation, 40, 0.4, 0)
    image = simulator.patterns(orientation)[0].numpy()
    row, column = geometry.pixel_of(spots.x[0].numpy(), spots.y[0].numpy())
    down, right = np.mgrid[:128, :128]
    checked = 0
    for slot in spots.intensity[0].argsort(descending=True).tolist():
        r, c = row[slot], column[slot]
        alone = np.delete(np.hypot(row - r, column - c), slot).min() > 8
        if not (alone and 5 < r < 122 and 5 < c < 122):
            continue
        window = image * (np.hypot(down - r, right - c) < 4)
        assert (window * down).sum() / window.sum() == pytest.approx(r, abs=0.03)
        assert (window * right).sum() / window.sum() == pytest.approx(c, abs=0.03)
        checked += 1
        if checked == 5:
            break
    assert checked == 5


def _turn(axis, angle):
    return rotations.from_axis_angle_deg(torch.tensor(axis, dtype=torch.float64), angle)


@pytest.mark.parametrize(
    ("change", "turn"),
    [
        (lambda image: torch.rot90(image, 1, (-2, -1)), _turn([0.0, 0, 1], -90.0)),
        (lambda image: torch.rot90(image, 3, (-2, -1)), _turn([0.0, 0, 1], 90.0)),
        (lambda image: image.flip(-1), _turn([1.0, 0, 0], 180.0)),
        (lambda image: image.flip(-2), _turn([0.0, 1, 0], 180.0)),
        (lambda image: image.transpose(-2, -1), _turn([1.0, 1, 0], 180.0)),
    ],
    ids=["rotate +90", "rotate -90", "flip x", "flip y", "transpose"],
)
@pytest.mark.parametrize("laue", ["-3m", "-1"])
def test_augmentations_are_exact(laue, change, turn):
    simulator = _simulator(Phase.from_cif_text(PHASES[laue]()), **_exact())
    orientation = random_orientations(6, 9)
    images = simulator.patterns(orientation)
    brightest = images.amax((1, 2))
    turned = simulator.patterns(rotations.multiply(orientation, turn))
    assert ((turned - change(images)).abs().amax((1, 2)) / brightest).max() < 5e-4
    assert ((images - change(images)).abs().amax((1, 2)) / brightest).min() > 0.02  # it is not symmetric anyway


def test_rotation_by_any_angle_turns_the_spots():
    simulator = _simulator(linio2(), **_exact())
    orientation, angle = random_orientations(5, 4), 27.0
    turned = simulator.spots(rotations.multiply(orientation, _turn([0.0, 0, 1], -angle)))
    spots = simulator.spots(orientation)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    assert turned.hkl_index.equal(spots.hkl_index)
    assert torch.allclose(turned.x, cos * spots.x - sin * spots.y, atol=1e-12)
    assert torch.allclose(turned.y, sin * spots.x + cos * spots.y, atol=1e-12)


def test_same_seed_same_patterns_however_they_are_cut():
    simulator = _simulator(linio2())
    orientation = random_orientations(4 * CHUNK, 0)

    def made(*cuts):
        generator = torch.Generator().manual_seed(7)
        return torch.cat([simulator.patterns(part, generator) for part in orientation.split(cuts)])

    whole = made(4 * CHUNK)
    assert (
        whole.equal(made(4 * CHUNK)) and whole.equal(made(CHUNK, 3 * CHUNK)) and whole.equal(made(2 * CHUNK, 2 * CHUNK))
    )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert whole.equal(made(4 * CHUNK))
    finally:
        torch.set_num_threads(threads)
    assert not whole.equal(simulator.patterns(orientation, torch.Generator().manual_seed(8)))


def test_patterns_hold_about_their_dose():
    simulator = _simulator(linio2(), dose=Span(5000, 5000), scale=0.025)
    orientation = random_orientations(48, 1)
    counts = simulator.patterns(orientation, torch.Generator().manual_seed(0))
    assert counts.dtype == torch.float32 and counts.shape == (48, 128, 128)
    assert (counts == counts.round()).all() and (counts >= 0).all()
    total = counts.sum((1, 2))
    assert total.max() < 5000 + 6 * math.sqrt(5000) and total.median() > 4700
    smooth = simulator.patterns(orientation, torch.Generator().manual_seed(0), noise=False)
    assert (smooth != smooth.round()).any()
    assert ((smooth.sum((1, 2)) - total).abs() < 6 * math.sqrt(5000)).all()


def test_noise_free_when_the_dose_is_nought():
    images = _simulator(linio2(), dose=Span(0, 0)).patterns(random_orientations(16, 1), torch.Generator())
    assert images.sum((1, 2)).max() < 1.02 and images.sum((1, 2)).median() > 0.9


def test_thick_crystals_show_fewer_spots():
    simulator = _simulator(linio2())
    orientation = random_orientations(20, 1)

    def bright(thickness):
        intensity = simulator.spots(orientation, thickness).intensity
        return int((intensity > 0.05 * simulator.strength.max()).sum())

    assert bright(5.0) > 2 * bright(50.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 1e-4}, "no reflection of .* falls on a pattern of 128 px at 0.0001 1/Å"),
        ({"dose": Span(-1, 10)}, r"`simulate.dose` is .*, but must be in \[0, "),
        ({"dose": Span(0, 10)}, "`simulate.dose` is 0:10, but a range of doses must start above 0"),
        ({"thickness": Span(0, 10)}, r"`simulate.thickness` is .*, but must be in \(0, 5000\]"),
        ({"thickness": Span(30, 10)}, "`simulate.thickness`"),
        ({"shape": "box"}, "`simulate.shape` is 'box', but must be one of sinc2, gaussian"),
    ],
)
def test_settings_that_cannot_be_simulated(settings, message):
    with pytest.raises(UserError, match=message):
        _simulator(linio2(), **settings)


def test_a_thickness_of_nought_is_refused():
    with pytest.raises(UserError, match="thickness"):
        _simulator(linio2()).spots(random_orientations(1, 0), 0.0)


def test_quad_is_what_the_cone_is_compared_with():
    """The plain average that the sampled one stands for: 32 beams are enough at half the largest precession."""
    from stemtune.diffraction.kinematic import _BEAMS, _beams

    around, aside = _beams(_BEAMS)
    assert float(around.mean()) == pytest.approx(0, abs=1e-12)
    assert float((around**2).mean()) == pytest.approx(0.5, rel=1e-6)
    semicircle, _ = quad(lambda u: u * u * 2 / math.pi * math.sqrt(1 - u * u), -1, 1)
    assert float((aside**2).mean()) == pytest.approx(semicircle, rel=0.03)
    assert float((around * aside).mean()) == pytest.approx(0, abs=0.03)
