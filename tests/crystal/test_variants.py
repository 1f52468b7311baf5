"""Pseudo-cubic variants and the beam-180 twin, judged by the reflections that they share with the crystal."""

import math
from pathlib import Path

import pytest
import torch

from stemtune.crystal import rotations
from stemtune.crystal.phase import Phase, Reflections, linio2
from stemtune.crystal.pseudo_symmetry import pseudo_variants
from stemtune.crystal.sampling import random_orientations
from stemtune.crystal.symmetry import beam180, disorientation_deg, reduce_to_fundamental_zone

C_AXIS = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)


def shared_intensity(variant: torch.Tensor, reflections: Reflections) -> float:
    """The part of the intensity whose spots fall within 0.02 1/Å of spots of the variant, wherever the beam comes from.

    A spot of `variant * g` stands at inverse(g) * inverse(variant) * h: apart from the lab frame, at the latter.
    """
    moved = rotations.rotate(rotations.inverse(variant), reflections.g)
    distance, partner = torch.cdist(moved, reflections.g).min(1)
    strength = reflections.structure_factor.abs().square()
    return float(((distance < 0.02) * (strength * strength[partner]).sqrt()).sum() / strength.sum())


def test_there_are_three_kinds_of_seven_variants() -> None:
    phase = linio2()
    variants = pseudo_variants(phase)
    assert [name for name, _ in variants] == [
        "60 about c",
        *(f"{kind} #{i}" for kind in ("70.5", "90") for i in (1, 2, 3)),
    ]
    nothing = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    for name, v in variants:
        expected = {"60 about c": 60.0, "70.5": math.degrees(math.acos(1 / 3)), "90": 90.0}[name.split(" #")[0]]
        assert float(disorientation_deg(v, nothing, phase.symmetry)) == pytest.approx(expected, abs=1e-6)
        tilt = math.degrees(math.acos(min(1.0, abs(float(rotations.rotate(v, C_AXIS)[2])))))
        assert tilt == pytest.approx(0 if "c" in name else 70.5288, abs=1e-4)
    stack = torch.stack([v for _, v in variants])
    between = disorientation_deg(stack[:, None], stack[None], phase.symmetry) + 180 * torch.eye(7, dtype=torch.float64)
    assert float(between.min()) > 30


def test_the_ninety_degree_variants_superimpose_the_cubic_sublattice() -> None:
    phase = linio2()
    reflections = phase.reflections(1.0)
    shared = {name: shared_intensity(v, reflections) for name, v in pseudo_variants(phase)}
    by_chance = sorted(shared_intensity(q, reflections) for q in random_orientations(100, 1))
    assert all(shared[f"90 #{i}"] > 0.6 for i in (1, 2, 3))
    assert shared["60 about c"] > 0.2
    assert all(shared[f"70.5 #{i}"] > 0.12 for i in (1, 2, 3))
    assert by_chance[90] < 0.05
    # The other choice of the cubic frame, turned by 60 degrees about c, is not a sublattice of this crystal.
    twin = rotations.from_axis_angle_deg(C_AXIS, 60.0)
    for name, v in pseudo_variants(phase):
        if name.startswith("90"):
            wrong = rotations.multiply(rotations.multiply(twin, v), rotations.inverse(twin))
            assert shared_intensity(wrong, reflections) < 0.2


def test_cubic_reflections_fall_on_each_other() -> None:
    # 006 and 012 are {111} of the cubic cell, 104 is {200}; the layers' own 003 and 101 have no partner.
    phase = linio2()
    h = (
        torch.tensor([[0, 0, 6], [0, 1, 2], [1, 0, 4], [1, 1, 0], [0, 0, 3], [1, 0, 1]]).double()
        @ phase.reciprocal_matrix
    )
    every = phase.reflections(1.0).g
    for name, v in pseudo_variants(phase):
        if name.startswith("90"):
            distance = torch.cdist(rotations.rotate(rotations.inverse(v), h), every).amin(1)
            assert float(distance[:4].max()) < 0.012
            assert float(distance[4:].min()) > 0.05


def test_the_set_of_variants_does_not_depend_on_the_representative() -> None:
    phase = linio2()
    stack = torch.stack([v for _, v in pseudo_variants(phase)])
    kinds = [name.split(" #")[0] for name, _ in pseudo_variants(phase)]
    g = random_orientations(1, 2)
    reference = rotations.multiply(stack, g)
    for operation in phase.symmetry.operations:
        other = rotations.multiply(stack, rotations.multiply(operation, g))
        apart = disorientation_deg(other[:, None], reference[None], phase.symmetry)
        assert float(apart.amin(1).max()) < 1e-6
        assert [kinds[i] for i in apart.argmin(1).tolist()] == kinds
    for v in stack:
        assert torch.allclose(reduce_to_fundamental_zone(v, phase.symmetry), v, atol=1e-12)


def test_only_layered_oxides_have_variants(shared_data: Path) -> None:
    assert len(pseudo_variants(Phase.from_cif(shared_data / "cathode" / "LCO.cif"))) == 7
    for other in ("cif/Ni.cif", "cathode/Li2MnO3.cif"):
        assert pseudo_variants(Phase.from_cif(shared_data / other)) == []
    stretched = Phase.from_cif_text(linio2().cif.replace("14.19", "15.19"))
    assert stretched.lattice.c == 15.19
    assert pseudo_variants(stretched) == []


@pytest.mark.parametrize("direction", [[1.0, 0, 0], [2, 1, 0], [0, 0, 1], [1, -1, 1]])
def test_the_beam180_twin_has_the_same_zero_layer_pattern(direction: list[float]) -> None:
    phase = linio2()
    reflections = phase.reflections(1.2)
    along = torch.tensor(direction).double() @ phase.lattice.matrix()
    axis = along / along.norm()
    tilt = torch.linalg.cross(axis, C_AXIS)  # turn the zone axis of the crystal onto the lab's z
    angle = math.degrees(math.acos(float(axis[2])))
    g = (
        rotations.inverse(rotations.from_axis_angle_deg(tilt, angle))
        if tilt.norm() > 1e-6
        else phase.symmetry.operations[0]
    )
    assert torch.allclose(rotations.rotate(g, C_AXIS), axis, atol=1e-9)
    zone = reflections.hkl.double() @ torch.tensor(direction).double() == 0
    assert int(zone.sum()) >= 6
    strength = reflections.structure_factor.abs()[zone]

    def pattern(orientation: torch.Tensor) -> torch.Tensor:
        return rotations.rotate(rotations.inverse(orientation), reflections.g[zone])

    distance, partner = torch.cdist(pattern(beam180(g)), pattern(g)).min(1)
    assert float(distance.max()) < 1e-6
    assert torch.allclose(strength[partner], strength, rtol=1e-9)
    turned = rotations.multiply(g, rotations.from_axis_angle_deg(C_AXIS, 37.0))
    assert float(torch.cdist(pattern(turned), pattern(g)).amin(1).max()) > 0.05
