"""`stemtune label --from MAP`: a map made elsewhere becomes the labels of a store."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stemtune.crystal_map.frames import AUTO
from stemtune.crystal_map.io import read_map
from stemtune.crystal_map.phase_matching import with_crystals
from stemtune.dataset.labels import label_target, labels_from_map, write_labels
from stemtune.dataset.store import Store
from stemtune.indexing.template_matching import chosen_phases


def label_from_map(
    store: str | os.PathLike[str],
    source: str | os.PathLike[str],
    cifs: Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
    *,
    frame: str = AUTO,
) -> dict[str, Any]:
    """Label the patterns of a store with the orientations of a map; what the map leaves open goes to stderr.

    The labelled store `out` by default takes the place of the store, a scan. The map `source` is one that
    `crystal_map.io.read_map` reads, in a `frame` of `crystal_map.frames.FRAMES` or "auto". Each phase that it uses has
    to be one of the `cifs`, as `crystal.phase.phase_from` takes them; without any, of the store's.

    The result holds `store`, `patterns`, `indexed`, `frame`, `program`.

    Raises a `UserError` for unusable input, a map of another shape for instance, before anything is written.
    """
    read = read_map(source, frame)
    name, notes = Path(source).name, read.attrs.get("notes", [])
    for note in notes:
        print(f"note: {name}: {note}", file=sys.stderr)
    target = label_target(store, out)
    with Store.open(store) as opened:
        orientation_map = with_crystals(read, chosen_phases(opened, cifs), f"'{source}'")
        facts = {
            "method": "map",
            "store": Path(store).name,
            "map": name,
            "map_sha256": _sha256(source),
            "program": read.attrs.get("program", "stemtune"),
            "frame": read.attrs.get("frame", "orix"),
            "cif": [Path(cif).name for cif in cifs],
            "notes": notes,
        }
        labels = labels_from_map(opened, orientation_map, facts)
    write_labels(store, labels, target)
    return {
        "store": str(target),
        "patterns": len(labels.phase),
        "indexed": int((labels.phase >= 0).sum()),
        "frame": read.attrs.get("frame", "orix"),
        "program": read.attrs.get("program", "stemtune"),
    }


def _sha256(path: str | os.PathLike[str]) -> str:
    found = Path(path).expanduser()
    with (found / "map.h5" if found.is_dir() else found).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
