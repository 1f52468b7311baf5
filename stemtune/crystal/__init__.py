"""What an orientation is: rotations, symmetry, sampling of orientations, and the phase that is oriented.

An orientation is the rotation `g` that takes laboratory components to crystal components, `v_crystal = g * v_lab`
(the convention of orix): a unit quaternion, scalar first. In the crystal frame e1 points along a and e3 along c*.
In the laboratory x points right on the detector, y up, and the beam travels along -z, so that `g * z` is the
crystal direction that the pattern looks along. Symmetry acts from the left: `g` and `s * g` cannot be told apart.

Modules: `rotations` (batched, differentiable quaternion arithmetic), `symmetry` (the eleven Laue classes and
disorientation), `sampling` (random and gridded orientations), `scattering` (atomic scattering factors),
`phase` (a crystal from its CIF: atoms, reflections, structure factors).
"""
