"""Maps for DREAM.3D: a `.dream3d` file in the layout of version 6.5 (file version 7.0), which DREAM3D-NX imports too.

The layout is that of SIMPL's `DataContainer` files: `DataContainers/ImageDataContainer` with the geometry in
`_SIMPL_GEOMETRY`, the pixels in `CellData` (z = 1, y, x, components) and the phases in `CellEnsembleData`, where row 0
is for what is not indexed; each array carries `ObjectType`, `DataArrayVersion`, `TupleDimensions`,
`ComponentDimensions` and `Tuple Axis Dimensions` as attributes, texts of fixed length. DAMASK writes and reads the
same. Codes of crystal structures are those of EbsdLib (`CrystalStructure`: 0 for 6/mmm, 1 for m-3m and so on).

- `EulerAngles` in radians (Bunge), `Quats` as x, y, z, w (the same rotation, sample to crystal, vector part first),
  both float32, in our crystal axes (X || a, DREAM.3D's choice too), not Oxford's. The vector part has the sign that
  our quaternions have: both programs follow Rowenhorst et al. with P = +1.
- DREAM.3D's sample frame has x right, y up, z out, and its first row at the bottom. So rows are written from the last
  to the first, and the coordinates and the angles refer to one frame.
- Spacing is in µm; 1 where the step is not known.
- Not indexed: phase 0, `Mask` 0, angles 0.
"""

from __future__ import annotations

import os
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch

from stemtune.crystal.point_groups import LAUE_CLASSES
from stemtune.crystal.rotations import to_euler_deg
from stemtune.crystal_map.orientation_map import OrientationMap

CRYSTAL_STRUCTURES = dict(zip(LAUE_CLASSES, (4, 5, 6, 7, 8, 9, 10, 2, 0, 3, 1), strict=True))
"""EbsdLib's number of each Laue class."""

_UNKNOWN, _PRIMARY = 999, 0
_CELL, _CELL_ENSEMBLE = 3, 11  # types of attribute matrices
_TYPES = {
    "float32": "DataArray<float>",
    "int32": "DataArray<int32_t>",
    "uint32": "DataArray<uint32_t>",
    "bool": "DataArray<bool>",
}


def write_dream3d(orientation_map: OrientationMap, path: str | os.PathLike[str]) -> None:
    """Write the best orientation of every pixel, its phase and scores as `.dream3d`."""
    rows, columns = orientation_map.shape
    dy, dx = (value / 1000 for value in orientation_map.step_nm) if orientation_map.step_nm else (1.0, 1.0)
    with h5py.File(path, "w") as file:
        _attribute(file, "FileVersion", "7.0")
        file.create_group("DataContainerBundles")
        file.create_group("Pipeline")
        container = file.create_group("DataContainers/ImageDataContainer")
        _geometry(container.create_group("_SIMPL_GEOMETRY"), (columns, rows, 1), (dx, dy, 1.0))
        _cells(container.create_group("CellData"), orientation_map)
        _ensemble(container.create_group("CellEnsembleData"), orientation_map)


def _geometry(group: h5py.Group, dimensions: tuple[int, int, int], spacing: tuple[float, float, float]) -> None:
    group["DIMENSIONS"] = np.array(dimensions, np.int64)
    group["ORIGIN"] = np.zeros(3, np.float32)
    group["SPACING"] = np.array(spacing, np.float32)
    _attribute(group, "GeometryName", "ImageGeometry")
    _attribute(group, "GeometryTypeName", "ImageGeometry")
    for name, value in (("GeometryType", 0), ("SpatialDimensionality", 3), ("UnitDimensionality", 3)):
        group.attrs[name] = np.array([value], np.uint32)


def _cells(group: h5py.Group, orientation_map: OrientationMap) -> None:
    rows, columns = orientation_map.shape
    indexed = orientation_map.indexed
    known = np.where(indexed[:, None], orientation_map.orientation, (1.0, 0.0, 0.0, 0.0))
    euler = np.deg2rad(to_euler_deg(torch.from_numpy(known)).numpy())
    arrays = {
        "EulerAngles": np.where(indexed[:, None], euler, 0).astype(np.float32),
        "Quats": np.roll(known, -1, axis=1).astype(np.float32),
        "Phases": (orientation_map.phase + 1).astype(np.int32),
        "Mask": indexed,
        "Confidence": np.nan_to_num(orientation_map.confidence),
    }
    scores = {"SpotZScore": orientation_map.spot_z_score, "ExplainedIntensity": orientation_map.explained_intensity}
    arrays |= {name: np.nan_to_num(values).astype(np.float32) for name, values in scores.items() if values is not None}
    for name, values in arrays.items():
        laid = values.reshape(rows, columns, -1)[::-1]
        _array(group, name, laid[None], (columns, rows, 1))
    _matrix(group, _CELL, (columns, rows, 1))


def _ensemble(group: h5py.Group, orientation_map: OrientationMap) -> None:
    phases = orientation_map.crystals
    count = (len(phases) + 1,)
    structures = [_UNKNOWN, *(CRYSTAL_STRUCTURES[phase.symmetry.laue] for phase in phases)]
    lattices = np.array([[0.0] * 6, *(phase.lattice for phase in phases)], np.float32)
    _array(group, "CrystalStructures", np.array(structures, np.uint32)[:, None], count)
    _array(group, "PhaseTypes", np.array([_UNKNOWN] + [_PRIMARY] * len(phases), np.uint32)[:, None], count)
    _array(group, "SpaceGroups", np.array([0, *(phase.space_group for phase in phases)], np.uint32)[:, None], count)
    _array(group, "LatticeConstants", lattices, count)
    for name in ("MaterialName", "PhaseName"):
        _texts(group, name, ["Invalid Phase", *orientation_map.phase_names])
    _matrix(group, _CELL_ENSEMBLE, count)


def _matrix(group: h5py.Group, kind: int, tuples: tuple[int, ...]) -> None:
    group.attrs["AttributeMatrixType"] = np.array([kind], np.uint32)
    group.attrs["TupleDimensions"] = np.array(tuples, np.uint64)


def _array(group: h5py.Group, name: str, values: npt.NDArray[Any], tuples: tuple[int, ...]) -> None:
    """Write `values`, last axis the components, whose `tuples` count x first."""
    stored = values.astype(np.uint8) if values.dtype == bool else values
    group[name] = np.ascontiguousarray(stored)
    _describe(group[name], _TYPES[values.dtype.name], values.shape[-1], tuples)


def _texts(group: h5py.Group, name: str, texts: list[str]) -> None:
    kind = h5py.h5t.C_S1.copy()
    kind.set_size(h5py.h5t.VARIABLE)
    group.create_dataset(name, data=[text.encode("ascii", "replace") for text in texts], dtype=h5py.Datatype(kind))
    _describe(group[name], "StringDataArray", 1, (len(texts),))


def _describe(data: h5py.Dataset, kind: str, components: int, tuples: tuple[int, ...]) -> None:
    _attribute(data, "ObjectType", kind)
    _attribute(data, "Tuple Axis Dimensions", ",".join(f"{a}={n}" for a, n in zip("xyz", tuples, strict=False)))
    data.attrs["DataArrayVersion"] = np.array([2], np.int32)
    data.attrs["ComponentDimensions"] = np.array([components], np.uint64)
    data.attrs["TupleDimensions"] = np.array(tuples, np.uint64)


def _attribute(entry: h5py.Group | h5py.Dataset | h5py.File, name: str, text: str) -> None:
    """Keep a text of fixed length that ends with a null: SIMPL reads no others."""
    kind = h5py.h5t.C_S1.copy()
    kind.set_size(len(text) + 1)
    entry.attrs.create(name, text, dtype=h5py.Datatype(kind))
