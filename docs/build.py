"""Build the documentation into a folder: every page as HTML, and a reference from the docstrings (`make docs`)."""

from __future__ import annotations

import os
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path

import markdown2
import pdoc

import stemtune
from stemtune import api

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAGES = (*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(HERE.rglob("*.md")))
REFERENCE = (
    "stemtune",
    "stemtune.crystal.phase",
    "stemtune.crystal.rotations",
    "stemtune.crystal.symmetry",
    "stemtune.crystal_map.orientation_map",
    "stemtune.dataset.store",
    "stemtune.learning.model",
    "stemtune.learning.models",
    "stemtune.config",
    "stemtune.config.sections",
    "stemtune.errors",
    "!stemtune.learning.models.",
)
"""What is referred to: the public functions, what they return, and what a new backbone needs."""

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2rem } a { color: #0060a0 } nav { font-size: 0.9rem; margin-bottom: 2rem }
pre { background: #f4f5f6; padding: 0.8rem 1rem; overflow-x: auto; border-radius: 4px; font-size: 0.85rem }
code { font-family: ui-monospace, monospace; font-size: 0.9em }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem } img { max-width: 100% }
th, td { border-bottom: 1px solid #ddd; padding: 0.4rem 0.8rem 0.4rem 0; text-align: left; vertical-align: top }
"""
EXTRAS = ["tables", "fenced-code-blocks", "header-ids", "cuddled-lists"]


def place(source: Path) -> Path:
    """Return where a page or picture goes, from the folder of the built pages on."""
    if source.is_relative_to(HERE):
        inside = source.relative_to(HERE)
        return inside.with_suffix(".html") if inside.suffix == ".md" else inside
    return Path(source.name.lower()).with_suffix(".html")


def link(source: Path, target: str) -> str:
    """Return the address in the built page of `source` of what its link `target` leads to."""
    path, mark, anchor = target.partition("#")
    there = (source.parent / path).resolve()
    if not path or "://" in target or (there not in PAGES and there.suffix != ".png"):
        return target
    return os.path.relpath(place(there), place(source).parent) + mark + anchor


def page(source: Path, out: Path) -> None:
    """Write a Markdown page as HTML, its links led to the built pages."""
    text = source.read_text(encoding="utf-8")
    body = str(markdown2.markdown(text, extras=EXTRAS))
    body = re.sub(r'(href|src)="([^"]+)"', lambda found: f'{found[1]}="{link(source, found[2])}"', body)
    title = re.search(r"^# (.+)$", text, flags=re.M)
    up = os.path.relpath(".", place(source).parent)
    head = f"<meta charset='utf-8'><title>{title[1] if title else source.stem}</title><style>{STYLE}</style>"
    nav = f"<nav><a href='{up}/index.html'>stemtune</a> · <a href='{up}/api/stemtune.html'>Python reference</a></nav>"
    written = out / place(source)
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(f"<!doctype html><html lang='en'><head>{head}</head><body>{nav}{body}</body></html>", "utf-8")


def main(out: Path) -> None:
    """Write every page into `out`, in place of what was there."""
    shutil.rmtree(out, ignore_errors=True)
    for source in PAGES:
        page(source, out)
    for picture in HERE.glob("*.png"):
        shutil.copy(picture, out)
    import_module("stemtune.sweep")  # the module of that name; the function is what is public
    for name in stemtune.__all__:  # the package fetches them when they are first used; pdoc reads what is there
        setattr(stemtune, name, getattr(api, name, None) or getattr(stemtune, name))
    pdoc.render.configure(docformat="numpy", show_source=False, search=True)
    pdoc.pdoc(*REFERENCE, output_directory=out / "api")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs"))
