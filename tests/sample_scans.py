"""Small scan files and simulated scans that several tests use."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rsciio import hspy, zspy

from stemtune.config import Config
from stemtune.crystal.phase import linio2
from stemtune.crystal.sampling import random_orientations
from stemtune.dataset.ingest import ingest
from stemtune.diffraction.conditions import draw_conditions
from stemtune.diffraction.geometry import Geometry
from stemtune.diffraction.kinematic import KinematicSimulator
from stemtune.errors import UserError
from stemtune.scan.ellipse import Ellipse


def write_scan(
    path: Path, data: Any, units: str = "1/Å", kv: float | None = 200.0, scan_units: str = "nm", scale: float = 0.05
) -> Path:
    """Write a hyperspy file as hyperspy does, with rosettasciio."""
    axes = []
    for number, length in enumerate(data.shape):
        signal = number >= data.ndim - 2
        axes.append({
            "_type": "UniformDataAxis", "name": "yxvu"[number - data.ndim], "units": units if signal else scan_units,
            "navigate": not signal, "size": length, "is_binned": False, "scale": scale if signal else 4.0,
            "offset": -scale * (length - 1) / 2 if signal else 0.0,
        })  # fmt: skip
    metadata = {"General": {"title": "scan"}, "Signal": {"signal_type": ""}}
    if kv:
        metadata["Acquisition_instrument"] = {"TEM": {"beam_energy": kv}}
    signal = {
        "data": data, "axes": axes, "metadata": metadata, "original_metadata": {}, "learning_results": {}, "models": {},
        "package_info": {"package": "hyperspy", "package_version": "2.0"},
        "attributes": {"_lazy": False, "ragged": False}, "tmp_parameters": {},
    }  # fmt: skip
    (zspy if path.suffix == ".zspy" else hspy).file_writer(str(path), signal)
    return path


def refused(scan: Path, tmp_path: Path, **options: Any) -> str:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as caught:
        ingest(scan, tmp_path / "out.h5", **options)
    assert sorted(tmp_path.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


SHAPE, SIZE = (12, 10), 64
PLANE = np.array([[30.2, 33.1], [3.0, -1.0], [1.5, 2.5]])  # centre, along rows, along columns


def scan_of(
    shape: tuple[int, int] = SHAPE,
    plane: Any = PLANE,
    ellipse: Ellipse | None = None,
    stretch: float = 1.0,
    **flat: Any,
) -> np.ndarray:
    """Return simulated counts (rows, columns, S, S) whose direct beam lies on a plane over the scan."""
    settings = {"size": SIZE, "scale": 0.05, "centre_error": 0, "dose": "3000:20000", "background": "0.1:0.3", **flat}
    simulate = Config.from_flat({f"simulate.{key}": value for key, value in settings.items()}).simulate
    size = simulate.size
    simulator = KinematicSimulator(linio2(), Geometry(size, simulate.scale, 200.0), simulate)
    count, generator = shape[0] * shape[1], torch.Generator().manual_seed(3)
    conditions = draw_conditions(simulate, simulator.geometry, count, generator, torch.device("cpu"))
    r, c = (axis.ravel() for axis in np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    centre = np.stack((np.ones(count), r, c), axis=1) @ plane
    distortion = stretch * (ellipse or Ellipse(0, 0)).matrix()
    conditions = dataclasses.replace(
        conditions,
        centre_px=torch.as_tensor(centre, dtype=torch.float32),
        distortion=torch.as_tensor(distortion, dtype=torch.float32).expand(count, 2, 2),
    )
    counts = simulator.expose(random_orientations(count, 4).float(), conditions, generator)
    return counts.numpy().astype(np.uint16).reshape(*shape, size, size)
