"""Record what pyxem 0.21 answers to 40 of the shipped patterns, so that its columns are read rightly without it.

pyxem and its friends live in an environment of their own:

    python3 -m venv /tmp/pyxem-venv
    /tmp/pyxem-venv/bin/pip install -c constraints.txt "pyxem==0.21.0"
    python tests/oracles/pyxem_columns.py /tmp/pyxem-venv/bin/python tests/oracles/pyxem_columns.npz

The patterns are py4DSTEM's Bloch waves with 0.5 degrees of precession, noise-free; they and the templates are raised to
0.25. `raw` (40, 4) holds pyxem's template, correlation, in-plane angle in degrees and mirror; `grid` the quaternions of
those templates, to which the first column points; `shipped` (40, 4) the quaternions that pyxem's own `to_rotation`
makes of `raw`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import peers, testset
from stemtune.crystal.phase import linio2


def main(python: str, out: str) -> None:
    """Have pyxem match the patterns and write its answer."""
    condition = testset.Condition(0.5, 0)
    patterns = testset.pictures(testset.py4dstem(condition.precession_deg).first(40), condition)
    with tempfile.TemporaryDirectory() as folder:
        job = {"cif": linio2().cif, "powers": np.array([[0.25, 0.25]]), "set0": patterns}
        result = peers._call(peers.PYXEM, python, Path(folder), job)
    raw = result["set0/0/raw"]
    used, raw[:, 0] = np.unique(raw[:, 0].astype(int), return_inverse=True)
    np.savez_compressed(out, raw=raw, grid=result["grid"][used], shipped=result["set0/0/shipped"])


if __name__ == "__main__":
    main(*sys.argv[1:])
