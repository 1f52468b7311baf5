"""A phase against a direct sum over its atoms, the reflection conditions, orix's frame and diffsims' intensities."""

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from diffpy.structure import Atom, Lattice, Structure
from diffsims.generators.simulation_generator import SimulationGenerator
from diffsims.utils.lobato_scattering_params import ATOMIC_SCATTERING_PARAMS_LOBATO
from orix.crystal_map import Phase as OrixPhase
from orix.quaternion import Rotation
from orix.vector import Miller

from stemtune.crystal.phase import DEFAULT_U_ISO, Phase, linio2, phase_from
from stemtune.errors import UserError

SHARED = ("cathode/LCO.cif", "cathode/Li2MnO3.cif", "cif/Ni.cif", "cif/Si-Silicon.cif", "cif/GaAs.cif")
Z_OXYGEN = 0.2584
LINIO2_ATOMS = [
    ("Ni", 0, 0, 0), ("Ni", 2 / 3, 1 / 3, 1 / 3), ("Ni", 1 / 3, 2 / 3, 2 / 3),
    ("Li", 0, 0, 1 / 2), ("Li", 2 / 3, 1 / 3, 5 / 6), ("Li", 1 / 3, 2 / 3, 1 / 6),
    ("O", 0, 0, Z_OXYGEN), ("O", 2 / 3, 1 / 3, 1 / 3 + Z_OXYGEN), ("O", 1 / 3, 2 / 3, 2 / 3 + Z_OXYGEN),
    ("O", 0, 0, 1 - Z_OXYGEN), ("O", 2 / 3, 1 / 3, 4 / 3 - Z_OXYGEN), ("O", 1 / 3, 2 / 3, 5 / 3 - Z_OXYGEN),
]  # fmt: skip

TRICLINIC = """data_low
_cell_length_a 4.1
_cell_length_b 5.3
_cell_length_c 6.7
_cell_angle_alpha 78
_cell_angle_beta 99
_cell_angle_gamma 112
_space_group_IT_number 2
loop_
_space_group_symop_operation_xyz
x,y,z
-x,-y,-z
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
_atom_site_U_iso_or_equiv
Ca1 Ca2+ 0.1 0.2 0.3 1 0.01
O1 O2- 0.6 0.15 0.8 0.5 0.02
"""

HEXAGONAL = """data_magnesium
_cell_length_a 3.209
_cell_length_b 3.209
_cell_length_c 5.211
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 120
_space_group_name_H-M_alt 'P 63/m m c'
_space_group_IT_number 194
loop_
_atom_site_label
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
Mg 0.333 0.667 0.25
"""


def rhombohedral_cif() -> str:
    """LiNiO2 on rhombohedral axes: one formula unit, edges and angle from the hexagonal a and c."""
    a, c = 2.878, 14.19
    edge = math.sqrt(3 * a**2 + c**2) / 3
    angle = 2 * math.degrees(math.asin(3 / (2 * math.sqrt(3 + (c / a) ** 2))))
    point = ["x,y,z", "z,x,y", "y,z,x", "-y,-x,-z", "-x,-z,-y", "-z,-y,-x"]
    inverted = ["-x,-y,-z", "-z,-x,-y", "-y,-z,-x", "y,x,z", "x,z,y", "z,y,x"]
    lengths = "".join(f"_cell_length_{axis} {edge:.8f}\n" for axis in "abc")
    angles = "".join(f"_cell_angle_{axis} {angle:.8f}\n" for axis in ("alpha", "beta", "gamma"))
    return (
        f"data_r\n{lengths}{angles}_space_group_IT_number 166\nloop_\n_space_group_symop_operation_xyz\n"
        + "\n".join(point + inverted)
        + "\nloop_\n_atom_site_label\n_atom_site_type_symbol\n_atom_site_fract_x\n_atom_site_fract_y\n"
        + "_atom_site_fract_z\n"
        + f"Ni1 Ni 0 0 0\nLi1 Li 0.5 0.5 0.5\nO1 O {Z_OXYGEN} {Z_OXYGEN} {Z_OXYGEN}\n"
    )


def lobato(element: str, g: float) -> float:
    """The scattering factor of one element, term by term."""
    return sum(a * (2 + b * g**2) / (1 + b * g**2) ** 2 for a, b in ATOMIC_SCATTERING_PARAMS_LOBATO[element])


def orix_phase(phase: Phase) -> OrixPhase:
    """Hand the expanded atoms of ours to orix, in the lattice that it builds itself."""
    atoms = [
        Atom(element, xyz=place, occupancy=float(share))
        for element, place, share in zip(phase.elements, phase.fractional.tolist(), phase.occupancy, strict=True)
    ]
    return OrixPhase(space_group=phase.space_group, structure=Structure(atoms, Lattice(*phase.lattice)))


def diffsims_intensities(phase: OrixPhase, radius: float, factors: dict[str, float]) -> dict[tuple[int, ...], float]:
    """All kinematic intensities up to `radius`: an excitation error that lets everything through, weighted with 1."""
    generator = SimulationGenerator(200, shape_factor_model=lambda error, width: np.ones_like(error))
    simulation = generator.calculate_diffraction2d(
        phase,
        rotation=Rotation.identity(),
        reciprocal_radius=radius,
        with_direct_beam=False,
        max_excitation_error=100,
        debye_waller_factors=factors,
    )
    spots = simulation.coordinates
    return {
        tuple(np.rint(hkl).astype(int)): float(value) for hkl, value in zip(spots.hkl, spots.intensity, strict=True)
    }


def test_linio2_is_the_crystal_of_the_design() -> None:
    phase = linio2()
    assert (phase.name, phase.space_group, phase.symmetry.laue, phase.symmetry.proper) == ("LiNiO2", 166, "-3m", "32")
    assert sorted(phase.elements) == ["Li"] * 3 + ["Ni"] * 3 + ["O"] * 6
    assert phase.volume == pytest.approx(101.8, abs=0.05)
    assert (phase.lattice.a, phase.lattice.c, phase.lattice.gamma) == (2.878, 14.19, 120)
    expected = np.array([atom[1:] for atom in LINIO2_ATOMS]) % 1
    for element, place in zip(phase.elements, phase.fractional.numpy(), strict=True):
        apart = np.abs(expected - place)
        nearest = np.minimum(apart, 1 - apart).max(1).argmin()
        assert np.minimum(apart, 1 - apart).max(1)[nearest] < 1e-9
        assert LINIO2_ATOMS[nearest][0] == element
    cartesian = phase.fractional @ phase.lattice.matrix()
    nickel = cartesian[phase.elements.index("Ni")]
    shifts = torch.cartesian_prod(*[torch.arange(-1.0, 2, dtype=torch.float64)] * 3) @ phase.lattice.matrix()
    oxygen = cartesian[[element == "O" for element in phase.elements]]
    bonds = torch.linalg.vector_norm(oxygen[:, None] + shifts - nickel, dim=-1).flatten().sort().values
    assert bonds[:6].tolist() == pytest.approx([1.973] * 6, abs=5e-4)
    assert float(bonds[6]) > 2.5


def test_linio2_structure_factors_are_the_direct_sum_and_obey_the_conditions() -> None:
    phase = linio2()
    found = phase.reflections(1.5)
    table = {tuple(hkl): value for hkl, value in zip(found.hkl.tolist(), found.structure_factor.tolist(), strict=True)}
    assert (0, 0, 0) not in table
    a_star, c_star = 2 / (math.sqrt(3) * 2.878), 1 / 14.19
    checked = 0
    for h in range(-5, 6):
        for k in range(-5, 6):
            for l in range(-22, 23):  # noqa: E741
                g = math.sqrt((h * h + h * k + k * k) * a_star**2 + (l * c_star) ** 2)
                if g == 0 or g > 1.5:
                    continue
                expected = sum(
                    lobato(element, g)
                    * math.exp(-2 * math.pi**2 * 0.005 * g**2)
                    * np.exp(2j * math.pi * (h * x + k * y + l * z))
                    for element, x, y, z in LINIO2_ATOMS
                )
                if (-h + k + l) % 3:
                    assert abs(expected) < 1e-9
                    assert (h, k, l) not in table
                elif abs(expected) > 0.01:
                    assert table[h, k, l] == pytest.approx(expected, rel=1e-9, abs=1e-9)
                    checked += 1
    assert checked > 400
    assert len(table) == pytest.approx(checked, abs=10)
    assert DEFAULT_U_ISO == 0.005


def test_reflections_come_with_their_vectors_and_friedel_mates() -> None:
    found = phase_from("").reflections(1.0)
    assert found.g.dtype == torch.float64
    assert torch.allclose(found.g, found.hkl.double() @ linio2().reciprocal_matrix)
    lengths = torch.linalg.vector_norm(found.g, dim=-1)
    assert float(lengths.max()) <= 1.0
    assert torch.equal(lengths, lengths.sort().values)
    mates = {tuple(hkl): value for hkl, value in zip(found.hkl.tolist(), found.structure_factor.tolist(), strict=True)}
    for (h, k, l), value in mates.items():  # noqa: E741
        assert mates[-h, -k, -l] == pytest.approx(value.conjugate(), rel=1e-9)
    assert len(phase_from("").reflections(0.01).hkl) == 0


@pytest.mark.parametrize("text", [TRICLINIC, HEXAGONAL], ids=["triclinic", "hexagonal"])
def test_the_crystal_frame_is_that_of_orix(text: str) -> None:
    phase = Phase.from_cif_text(text)
    hkl = torch.randint(-5, 6, (50, 3), generator=torch.Generator().manual_seed(1))
    theirs = Miller(hkl=hkl.numpy(), phase=orix_phase(phase)).data
    assert np.allclose((hkl.double() @ phase.reciprocal_matrix).numpy(), theirs, atol=1e-12)
    directions = Miller(uvw=hkl.numpy(), phase=orix_phase(phase)).data
    assert np.allclose((hkl.double() @ phase.lattice.matrix()).numpy(), directions, atol=1e-12)
    a, c_star = phase.lattice.matrix()[0], phase.reciprocal_matrix[2]
    assert torch.allclose(a / phase.lattice.a, torch.tensor([1.0, 0, 0]).double())
    assert torch.allclose(c_star / c_star.norm(), torch.tensor([0, 0, 1.0]).double(), atol=1e-12)


@pytest.mark.parametrize("case", ["linio2", "triclinic", "hexagonal", *SHARED])
def test_intensities_are_those_of_diffsims(case: str, request: pytest.FixtureRequest) -> None:
    texts = {"triclinic": TRICLINIC, "hexagonal": HEXAGONAL, "linio2": linio2().cif}
    if case in texts:
        phase = Phase.from_cif_text(texts[case])
    else:
        phase = phase_from(request.getfixturevalue("shared_data") / case)
    factors = {  # diffsims knows one B for each element
        element: 8 * math.pi**2 * float(phase.u_iso[phase.elements.index(element)]) for element in set(phase.elements)
    }
    # Simulated far beyond the limit: in oblique cells diffsims' own list misses some reflections near its edge.
    everything = diffsims_intensities(orix_phase(phase), 1.8, factors)
    matrix = phase.reciprocal_matrix.numpy()
    theirs = {hkl: value for hkl, value in everything.items() if np.linalg.norm(np.array(hkl) @ matrix) <= 1.0}
    found = phase.reflections(1.0)
    ours = dict(zip(map(tuple, found.hkl.tolist()), found.structure_factor.abs().square().tolist(), strict=True))
    strongest = max(ours.values())
    assert strongest == pytest.approx(max(theirs.values()), rel=1e-6)
    for hkl in set(ours) | set(theirs):
        assert ours.get(hkl, 0) / strongest == pytest.approx(theirs.get(hkl, 0) / strongest, rel=1e-6, abs=1e-7)
    assert len(ours) > 20


def test_li2mno3_is_monoclinic_about_b_and_layered_oxides_are_trigonal(shared_data: Path) -> None:
    monoclinic = Phase.from_cif(shared_data / "cathode" / "Li2MnO3.cif")
    assert (monoclinic.symmetry.laue, monoclinic.symmetry.proper, len(monoclinic.elements)) == ("2/m", "121", 24)
    layered = Phase.from_cif(shared_data / "cathode" / "LCO.cif")
    assert (layered.symmetry.proper, len(layered.elements)) == ("32", 12)


@pytest.mark.parametrize("case", ["linio2", "triclinic", "hexagonal", *SHARED])
def test_structure_factors_have_the_symmetry_of_the_phase(case: str, request: pytest.FixtureRequest) -> None:
    texts = {"triclinic": TRICLINIC, "hexagonal": HEXAGONAL, "linio2": linio2().cif}
    if case in texts:
        phase = Phase.from_cif_text(texts[case])
    else:
        phase = phase_from(request.getfixturevalue("shared_data") / case)
    from stemtune.crystal.rotations import rotate

    found = phase.reflections(0.8)
    turned = rotate(phase.symmetry.operations[:, None], found.g) @ phase.lattice.matrix().T  # back to indices
    assert torch.allclose(turned, turned.round(), atol=2e-3)
    intensity = phase.structure_factors(turned.round().flatten(0, 1)).abs().square().reshape(turned.shape[:2])
    assert torch.allclose(intensity, found.structure_factor.abs().square().expand_as(intensity), rtol=1e-5, atol=1e-6)


def test_rhombohedral_axes_become_hexagonal() -> None:
    phase, expected = Phase.from_cif_text(rhombohedral_cif()), linio2()
    assert tuple(phase.lattice) == pytest.approx(tuple(expected.lattice), rel=1e-7)
    assert sorted(phase.elements) == sorted(expected.elements)
    assert phase.symmetry == expected.symmetry
    ours, theirs = phase.reflections(1.0), expected.reflections(1.0)
    intensities = {tuple(hkl): abs(f) for hkl, f in zip(ours.hkl.tolist(), ours.structure_factor.tolist(), strict=True)}
    for hkl, factor in zip(theirs.hkl.tolist(), theirs.structure_factor.tolist(), strict=True):
        assert intensities.pop(tuple(hkl)) == pytest.approx(abs(factor), rel=1e-5)
    assert not intensities


def test_atoms_off_the_axis_keep_their_places_on_hexagonal_axes() -> None:
    cell = "".join(f"_cell_length_{axis} 5.0\n" for axis in "abc")
    cell += "".join(f"_cell_angle_{axis} 70\n" for axis in ("alpha", "beta", "gamma"))
    cycles = ["x,y,z", "z,x,y", "y,z,x", "-x,-y,-z", "-z,-x,-y", "-y,-z,-x"]
    loop = "loop_\n_atom_site_label\n_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z\nC 0.1 0.25 0.42\n"
    phase = Phase.from_cif_text(
        "data_r\n" + cell + "loop_\n_symmetry_equiv_pos_as_xyz\n" + "\n".join(cycles) + "\n" + loop
    )
    assert (phase.symmetry.proper, len(phase.elements)) == ("3", 18)
    x, y, z = 0.1, 0.25, 0.42
    places = np.array([[x, y, z], [z, x, y], [y, z, x]])
    cos = math.cos(math.radians(70))
    metric = 25 * (np.full((3, 3), cos) + (1 - cos) * np.eye(3))
    hkl = np.random.default_rng(1).integers(-4, 5, (30, 3))
    lengths = np.sqrt(np.einsum("ni,ij,nj->n", hkl, np.linalg.inv(metric), hkl))
    on_hexagonal = torch.from_numpy(hkl @ np.array([[1, 0, 1], [-1, 1, 1], [0, -1, 1]]))  # obverse setting
    ours = torch.linalg.vector_norm(on_hexagonal.double() @ phase.reciprocal_matrix, dim=-1)
    assert np.allclose(ours.numpy(), lengths, rtol=1e-9)
    expected = [
        3 * lobato("C", g) * math.exp(-2 * math.pi**2 * DEFAULT_U_ISO * g**2) * 2 * np.cos(2 * np.pi * places @ h).sum()
        for h, g in zip(hkl, lengths, strict=True)
    ]
    assert np.allclose(phase.structure_factors(on_hexagonal).numpy(), expected, atol=1e-9)


def test_listed_operations_count_more_than_the_number_of_the_group() -> None:
    text = TRICLINIC.replace("-x,-y,-z", "1/2-x,-y,-z")  # the inversion centre stands at 1/4, 0, 0
    phase = Phase.from_cif_text(text)
    calcium = sorted(phase.fractional[:2].tolist())
    assert np.allclose(calcium, [[0.1, 0.2, 0.3], [0.4, 0.8, 0.7]])


def test_rhombohedral_cell_without_operations_is_refused_or_right() -> None:
    lines = rhombohedral_cif().splitlines()
    first, last = lines.index("_space_group_symop_operation_xyz") - 1, lines.index("z,y,x")
    with pytest.raises(UserError, match="symmetry operations do not fit its cell"):
        Phase.from_cif_text("\n".join(lines[:first] + lines[last + 1 :]))


def test_magnesium_with_coarse_coordinates_has_two_atoms() -> None:
    phase = Phase.from_cif_text(HEXAGONAL)
    assert (phase.symmetry.laue, phase.symmetry.proper) == ("6/mmm", "622")
    assert len(phase.elements) == 2
    indices = phase.reflections(1.0).hkl
    on_axis = indices[(indices[:, 0] == 0) & (indices[:, 1] == 0), 2]
    assert bool((on_axis % 2 == 0).all())


def test_occupancy_and_displacement_count() -> None:
    phase = Phase.from_cif_text(TRICLINIC)
    assert phase.elements == ("Ca", "Ca", "O", "O")
    assert phase.occupancy.tolist() == [1, 1, 0.5, 0.5]
    assert phase.u_iso.tolist() == pytest.approx([0.01, 0.01, 0.02, 0.02])
    g = float(torch.linalg.vector_norm(torch.tensor([1.0, 2, -1]).double() @ phase.reciprocal_matrix))
    expected = sum(
        2 * share * lobato(element, g) * math.exp(-2 * math.pi**2 * u * g**2) * math.cos(2 * math.pi * turn)
        for element, share, u, turn in (("Ca", 1, 0.01, 0.1 + 0.4 - 0.3), ("O", 0.5, 0.02, 0.6 + 0.3 - 0.8))
    )
    found = phase.structure_factors(torch.tensor([[1, 2, -1]]))
    assert complex(found[0]) == pytest.approx(expected, rel=1e-9)


def test_b_factors_and_missing_displacements(tmp_path: Path) -> None:
    as_b = TRICLINIC.replace("U_iso_or_equiv", "B_iso_or_equiv")
    assert Phase.from_cif_text(as_b).u_iso.tolist() == pytest.approx(
        [0.01 / (8 * math.pi**2)] * 2 + [0.02 / 8 / math.pi**2] * 2
    )
    without = TRICLINIC.replace("_atom_site_U_iso_or_equiv\n", "").replace(" 0.01\n", "\n").replace(" 0.02\n", "\n")
    assert Phase.from_cif_text(without).u_iso.tolist() == [DEFAULT_U_ISO] * 4


def test_silicon_keeps_the_origin_of_its_own_operations(shared_data: Path) -> None:
    phase = Phase.from_cif(shared_data / "cif" / "Si-Silicon.cif")
    found = {tuple(hkl) for hkl in phase.reflections(1.2).hkl.tolist()}
    assert (1, 1, 1) in found
    assert (2, 2, 0) in found
    assert not found & {(2, 0, 0), (2, 2, 2), (1, 0, 0), (1, 1, 0)}  # the diamond glide and its special position


def test_phases_pickle_compare_and_hash() -> None:
    phase = linio2()
    again = pickle.loads(pickle.dumps(phase))
    assert again == phase
    assert hash(again) == hash(phase)
    assert Phase.from_cif_text(phase.cif) == phase
    assert Phase.from_cif_text(TRICLINIC) != phase


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("this is not a CIF", "does not parse as a CIF|has no atoms"),
        ("data_x\nloop_\n_cell_length_a\n", "does not parse as a CIF|has no atoms"),
        ("", "does not parse as a CIF|has no atoms"),
        ("\x00\x01\x89HDF", "does not parse as a CIF|has no atoms"),
        (TRICLINIC[: TRICLINIC.index("loop_\n_atom")], "has no atoms"),
        (TRICLINIC.replace("_cell_length_a 4.1\n", ""), "has no unit cell"),
        (TRICLINIC.replace("_cell_angle_beta 99\n", ""), "does not parse as a CIF"),
        (TRICLINIC.replace("0.1 0.2 0.3", "? ? ?"), "atom without coordinates|does not parse"),
        (TRICLINIC.replace("Ca1 Ca2+", "Xx1 Xx"), "unknown element 'Xx'"),
        (TRICLINIC.replace("-x,-y,-z", "-x,-y,z"), "do not fit its cell"),
        (TRICLINIC.replace("-x,-y,-z", "banana"), "does not parse as a CIF"),
    ],
    ids=[
        "prose",
        "cut",
        "empty",
        "binary",
        "no atoms",
        "no cell",
        "no angle",
        "no xyz",
        "element",
        "misfit",
        "operator",
    ],
)
def test_unusable_cifs_are_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.cif"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        Phase.from_cif(path)
    assert "\n" not in str(caught.value)
    assert "bad.cif" in str(caught.value)


def test_missing_cif_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        phase_from(tmp_path / "none.cif")
    with pytest.raises(UserError, match="cannot read"):
        Phase.from_cif(tmp_path)
