"""The notebooks run from end to end in the real machinery, hold no outputs, and use public functions only."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import pytest

import stemtune

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ALLOWED = {"stemtune", "numpy", "matplotlib", "pathlib", "os", "IPython", "orix"}
QUICK = {"05"}
"""Those that the default tests run; `pytest -m slow` runs the others."""


def cells(path: Path, kind: str) -> list[Any]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def outside(code: str) -> list[str]:
    """Return what `code` takes from modules that a notebook must not use, or from behind stemtune's public names."""
    found = []
    for node in ast.walk(ast.parse(code)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "stemtune":
            found += [f"stemtune.{node.attr}"] if node.attr not in stemtune.__all__ else []
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            found.append(node.attr)
        for name in names:
            room = name.split(".")[0]
            if room not in ALLOWED or (room == "stemtune" and name != "stemtune"):
                found.append(name)
    return found


def test_there_are_five() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_public_names_only(path: Path) -> None:
    code = "\n".join(cell.source for cell in cells(path, "code"))
    assert outside(code) == []
    functions = [node.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert functions == [], "a notebook holds no logic of its own"


def test_what_is_not_public_is_seen() -> None:
    assert outside("from stemtune.plot.ipf import ipf_colours") == ["stemtune.plot.ipf"]
    assert outside("import stemtune.dataset.store") == ["stemtune.dataset.store"]
    assert outside("import torch\nstemtune.api.train()") == ["torch", "stemtune.api"]
    assert outside("stemtune.train('a', 'b')") == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_without_outputs(path: Path) -> None:
    nbformat.validate(nbformat.read(path, as_version=4))
    for cell in cells(path, "code"):
        assert cell.outputs == []
        assert cell.execution_count is None


def pictures(notebook: Any) -> int:
    found = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in found)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=() if path.name[:2] in QUICK else pytest.mark.slow) for path in NOTEBOOKS],
)
@pytest.mark.timeout(1800)
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    if path.name.startswith("04"):
        monkeypatch.setenv("STEMTUNE_DATA", str(request.getfixturevalue("shared_data")))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / ".ipython"))
    work = tmp_path / "work"
    work.mkdir()
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=1500,
        kernel_name="python3",
        resources={"metadata": {"path": str(work)}},
    )
    client.execute()
    assert pictures(notebook) >= 2
