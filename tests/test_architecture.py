"""The rules of the house, kept by reading the code: layers, owners of libraries, sizes, names."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "stemtune"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A room may import the rooms listed for it, and itself.
FLOOR = {"config", "errors", "files", "processes", "tracking", ""}
BELOW: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "processes": {"errors"},
    "config": {"errors"},
    "tracking": {"errors", "files", "config"},
    "crystal": FLOOR - {"tracking"},
    "diffraction": FLOOR - {"tracking"} | {"crystal"},
    "data": FLOOR - {"tracking"} | {"crystal", "diffraction"},
    "learning": FLOOR - {"tracking"} | {"crystal", "diffraction", "data"},
    "tune": FLOOR | {"crystal", "diffraction", "data", "learning"},
    "maps": FLOOR | {"crystal", "diffraction", "data", "learning"},
    "sweep": FLOOR | {"crystal", "diffraction", "data", "learning", "tune"},
}
ANYTHING = {"api", "cli", "demo", "bench", "study", "__main__", "__init__"}

OWNERS = {
    "ray": {"tune", "sweep"},
    "optuna": {"tune"},
    "mlflow": {"tracking"},
    "timm": {"learning"},
    "safetensors": {"learning"},
    "h5py": {"data", "maps"},
    "rsciio": {"data/readers/rosetta"},
    "matplotlib": {"maps", "tune/report", "study/report"},
    "orix": {"crystal", "data/labels", "maps", "bench"},
    "diffsims": {"crystal", "bench"},
}
# A peer is measured where the measurement stands, and a file is recognised where it is described.
EXCEPTIONS = {("diffsims", "data/rates"), ("diffsims", "diffraction/rates"), ("orix", "diffraction/rates")}


def place(path: Path) -> str:
    """Return the module's place inside the package, `tune/report` for stemtune/tune/report.py."""
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def room(path: Path) -> str:
    return place(path).split("/")[0]


def imported(path: Path) -> set[str]:
    """Return every module that the file imports, at the top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: absolute imports only (run as a script, relative ones fail)"
            names.add(node.module or "")
            if node.module == "stemtune":
                names |= {f"stemtune.{alias.name}" for alias in node.names if not alias.name.startswith("__")}
    return names


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_imports_point_left(path: Path) -> None:
    here = room(path)
    if here in ANYTHING:
        return
    assert here in BELOW, f"{place(path)}: a new room needs its place in the order of layers"
    for name in imported(path):
        if name.split(".")[0] != "stemtune" or name == "stemtune":
            continue
        there = name.split(".")[1]
        assert there == here or there in BELOW[here], f"{place(path)} imports {name}, which stands to its right"


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_each_library_has_an_owner(path: Path) -> None:
    for name in imported(path):
        library = name.split(".")[0]
        if library in OWNERS and (library, place(path)) not in EXCEPTIONS:
            allowed = OWNERS[library]
            # An owner is a room, a module or a folder of modules.
            here = {room(path), place(path), place(path.parent)}
            assert here & allowed, f"{place(path)} imports {library}, owned by {allowed}"


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400, f"{place(path)} is longer than 400 lines"
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{place(path)} has no module docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node, clean=False) or ""
            length = (node.end_lineno or 0) - node.lineno + 1 - doc.count("\n")
            assert length <= 60, f"{place(path)}:{node.lineno} {node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_no_module_hides_another(path: Path) -> None:
    """Run as a script, the package's own folder is on sys.path: a `logging.py` in it would break Ray."""
    name = path.stem
    assert name not in {"utils", "common", "helpers", "misc"}
    if path.parent == PACKAGE and name not in ("__init__", "__main__"):
        assert name not in sys.stdlib_module_names
        assert name not in {"ray", "torch", "timm", "optuna", "mlflow", "numpy", "h5py", "orix", "yaml", "tqdm"}


def test_every_folder_is_a_package() -> None:
    for path in MODULES:
        assert (path.parent / "__init__.py").exists(), f"{path.parent} has no __init__.py"
