"""The rules of the house, kept by reading the code: the order of rooms, owners of libraries, sizes, names."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "stemtune"
MODULES = sorted(PACKAGE.rglob("*.py"))
CODE = sorted(path for folder in ("stemtune", "tests", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.py"))

ORDER = (
    *("errors", "_version", "_files", "_parallel", "_progress", "config", "crystal", "diffraction", "crystal_map"),
    *("scan", "dataset", "learning", "indexing", "analysis", "plot", "map_folder", "live"),
)
"""A room may import itself and those before it."""

BESIDE = {
    "tracking": {"errors", "_version", "_files", "config"},
    "tune": {*ORDER[: ORDER.index("learning") + 1], "tracking"},
    "live": {*ORDER[: ORDER.index("live")], "tune.cluster"},
}
"""Rooms with a rule of their own: what each may import."""

ON_TOP = ("api", "demo", "study", "cli", "sweep")
"""What may import every room; nothing else imports these, and of themselves each only those before it or itself."""

OWNERS = {
    "ray": {"tune", "live/server"},
    "optuna": {"tune"},
    "mlflow": {"tracking"},
    "timm": {"learning"},
    "safetensors": {"learning"},
    "h5py": {"scan", "dataset", "crystal_map", "indexing", "analysis", "live", "cli", "plot"},
    "rsciio": {"scan/readers"},
    "matplotlib": {"plot", "tune/report", "study", "live/session"},
    "jinja2": {"plot/report", "tune/report", "study", "live"},
    "orix": {"crystal", "crystal_map", "plot"},
    "diffsims": {"crystal"},
}
"""The rooms, folders or modules that may import each library."""

LONGEST_FILE, LONGEST_FUNCTION, MOST_FILES = 400, 60, 15
LARGEST_PACKAGE = {"lines": 32_000, "files": 190}


def place(path: Path) -> str:
    """Return the module's place inside the package, `tune/report` for stemtune/tune/report.py."""
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def imported(text: str) -> set[str]:
    """Return every module that the code imports: at the top, inside a function, or by name with `import_module`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only: run as a script, relative ones fail"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return names


def wrong_imports(here: str, text: str) -> list[str]:
    """Return what the module at `here` imports although it may not."""
    room, wrong = here.split("/")[0], []
    for name in sorted(imported(text)):
        parts = name.split(".")
        if parts[0] != "stemtune" or len(parts) == 1 or parts[1].startswith("__"):
            continue
        there = parts[1]
        if there == room or (here in ("__init__", "__main__")):
            continue
        if room in ON_TOP:
            allowed = there not in ON_TOP or ON_TOP.index(there) < ON_TOP.index(room)
        elif room in BESIDE:
            allowed = any(".".join(parts[1 : 1 + rule.count(".") + 1]) == rule for rule in BESIDE[room])
        else:
            assert room in ORDER, f"{here}: a new room needs its place in the order"
            allowed = there in ORDER[: ORDER.index(room)]
        if not allowed:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_no_import_points_upwards(path: Path) -> None:
    wrong = wrong_imports(place(path), path.read_text())
    assert not wrong, f"{place(path)} imports {', '.join(wrong)}, which is above it"


def private_of_ray(text: str) -> list[str]:
    """Return what the code imports of Ray that is private: a part of the name that begins with `_`."""
    return sorted(name for name in imported(text) if name.startswith("ray.") and "._" in name)


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_private_names_of_ray_are_in_one_file(path: Path) -> None:
    if place(path) != "tune/cluster/ray_internals":
        assert not private_of_ray(path.read_text())


def test_a_private_name_of_ray_is_found() -> None:
    assert private_of_ray("from ray._private import ray_constants") == ["ray._private.ray_constants"]
    assert private_of_ray("def f():\n    from ray.train.v2._internal.execution import controller")
    assert not private_of_ray("import ray\nfrom ray.train.torch import TorchTrainer")


@pytest.mark.parametrize(
    "line",
    [
        "from stemtune.plot.ipf import draw_ipf",
        "import stemtune.tune.run.sweep",
        "def f():\n    from stemtune import api",
        "from importlib import import_module\nimport_module('stemtune.live.server')",
        "import importlib\nimportlib.import_module('stemtune.tracking.query')",
    ],
)
def test_an_upward_import_is_found(line: str) -> None:
    assert wrong_imports("learning/fit", line)
    assert not wrong_imports("learning/fit", "from stemtune.dataset.store import Store\nimport torch")


def test_no_modules_import_each_other() -> None:
    """No circle of modules, imports inside functions and for types included."""
    known = {f"stemtune.{place(path).replace('/', '.')}".removesuffix(".__init__"): path for path in MODULES}
    arrows: dict[str, set[str]] = {}
    for name, path in known.items():
        found = {next((n for n in (to, to.rpartition(".")[0]) if n in known), "") for to in imported(path.read_text())}
        arrows[name] = found - {"", name}
    assert not list(circles(arrows)), "modules import each other: " + "; ".join(circles(arrows))


def circles(arrows: dict[str, set[str]]) -> Iterator[str]:
    """Yield every circle of the graph that a walk in depth runs into."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> Iterator[str]:
        if name in way:
            yield " -> ".join([*way[way.index(name) :], name])
            return
        if name in done:
            return
        for there in sorted(arrows.get(name, ())):
            yield from walk(there, [*way, name])
        done.add(name)

    for name in sorted(arrows):
        yield from walk(name, [])


def test_a_circle_is_found() -> None:
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}))
    assert not list(circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}))


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_each_library_has_an_owner(path: Path) -> None:
    for name in imported(path.read_text()):
        library = name.split(".")[0]
        if library in OWNERS:
            parts = place(path).split("/")
            here = {"/".join(parts[:n]) for n in range(1, len(parts) + 1)}
            assert here & OWNERS[library], f"{place(path)} imports {library}, owned by {OWNERS[library]}"


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= LONGEST_FILE, f"{path} is longer than {LONGEST_FILE} lines"
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{path} has no module docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node, clean=False) or ""
            length = (node.end_lineno or 0) - node.lineno + 1 - doc.count("\n")
            assert length <= LONGEST_FUNCTION, f"{path}:{node.lineno} {node.name} has {length} lines"


def test_rooms_and_package_stay_small() -> None:
    for folder in {path.parent for path in CODE}:
        count = len(list(folder.glob("*.py")))
        assert count <= MOST_FILES or folder == ROOT / "tests", f"{folder} has {count} files at one level"
    lines = sum(path.read_text().count("\n") for path in MODULES)
    assert lines <= LARGEST_PACKAGE["lines"] and len(MODULES) <= LARGEST_PACKAGE["files"], (
        f"the package has {lines} lines in {len(MODULES)} files"
    )


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


def test_tests_mirror_the_rooms() -> None:
    """A folder of tests is called like the room whose code it tests, or names what is tested across rooms."""
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()} | {"benchmarks"}
    across = {"cluster", "faults", "oracles", "data"}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= rooms | across, folders - rooms - across


def test_the_quick_tier_names_tests_that_exist() -> None:
    text = (ROOT / "tests" / "conftest.py").read_text()
    table = next(node for node in ast.parse(text).body if isinstance(node, ast.Assign))
    names = [leaf.value for leaf in ast.walk(table.value) if isinstance(leaf, ast.Constant)]
    assert len(names) > 20
    for name in names:
        assert (ROOT / "tests" / name).exists(), name
