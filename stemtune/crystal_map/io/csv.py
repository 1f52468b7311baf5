"""A map as a table in CSV: a row per pixel, for spreadsheets and scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from stemtune.crystal.rotations import to_euler_deg
from stemtune.crystal_map.orientation_map import OrientationMap


def write_csv(orientation_map: OrientationMap, path: Path) -> None:
    """Write a table of the best answers: a row per pixel, empty fields where not indexed.

    Columns: row, column, y_nm and x_nm (left out where the step is not known), phase (name), space_group, phi1_deg,
    Phi_deg, phi2_deg, q0 to q3 (scalar first, lab to crystal), confidence, spot_z_score, explained_intensity, and of a
    refined map ncc.
    """
    rows, columns = orientation_map.shape
    row, column = np.divmod(np.arange(rows * columns), columns)
    indexed = orientation_map.indexed
    euler = to_euler_deg(torch.from_numpy(orientation_map.orientation)).numpy()
    table: dict[str, Any] = {"row": row, "column": column}
    if orientation_map.step_nm is not None:
        dy, dx = orientation_map.step_nm
        table |= {"y_nm": [f"{value:.9g}" for value in row * dy], "x_nm": [f"{value:.9g}" for value in column * dx]}
    names = ['"' + name.replace('"', '""') + '"' for name in orientation_map.phase_names]
    groups = [str(phase.space_group) for phase in orientation_map.phases]
    table["phase"] = [names[index] if index >= 0 else "" for index in orientation_map.phase]
    table["space_group"] = [groups[index] if index >= 0 else "" for index in orientation_map.phase]
    measures = {
        **{name: euler[:, place] for place, name in enumerate(("phi1_deg", "Phi_deg", "phi2_deg"))},
        **{f"q{place}": orientation_map.orientation[:, place] for place in range(4)},
        "confidence": orientation_map.confidence,
    }
    for name in ("spot_z_score", "explained_intensity", "ncc"):
        if getattr(orientation_map, name) is not None:
            measures[name] = orientation_map.score(name)
    for name, values in measures.items():
        shown = indexed & np.isfinite(values)
        table[name] = [f"{value:.7g}" if show else "" for value, show in zip(values, shown, strict=True)]
    lines = [",".join(table), *(",".join(map(str, cells)) for cells in zip(*table.values(), strict=True))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
