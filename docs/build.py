"""Build the documentation into a folder: the guides as pages, the reference from the docstrings (`make docs`)."""

from __future__ import annotations

import re
import shutil
import sys
from importlib import import_module
from pathlib import Path

import markdown2
import pdoc

import stemtune
from stemtune import api

HERE = Path(__file__).parent
REFERENCE = (
    "stemtune",
    "stemtune.dataset.store",
    "stemtune.crystal_map.orientation_map",
    "stemtune.learning.model",
    "stemtune.learning.models",
    "stemtune.crystal.phase",
    "stemtune.crystal.rotations",
    "stemtune.crystal.symmetry",
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


def page(source: Path, out: Path) -> None:
    """Write a Markdown page as HTML, its links to other pages led to theirs."""
    depth = len(source.relative_to(HERE).parts) - 1
    up = "../" * depth
    body = str(markdown2.markdown(source.read_text(encoding="utf-8"), extras=EXTRAS))
    body = body.replace('href="../README.md"', f'href="{up}readme.html"')
    body = re.sub(r'href="(?!\w+:)([^"#]+)\.md([#"])', r'href="\1.html\2', body)
    title = re.search(r"^# (.+)$", source.read_text(encoding="utf-8"), flags=re.M)
    head = f"<meta charset='utf-8'><title>{title[1] if title else source.stem}</title><style>{STYLE}</style>"
    nav = f"<nav><a href='{up}index.html'>stemtune</a> · <a href='{up}reference/stemtune.html'>reference</a></nav>"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f"<!doctype html><html lang='en'><head>{head}</head><body>{nav}{body}</body></html>", "utf-8")


def main(out: Path) -> None:
    """Write every page into `out`, in place of what was there."""
    shutil.rmtree(out, ignore_errors=True)
    for source in sorted(HERE.rglob("*.md")):
        page(source, out / source.relative_to(HERE).with_suffix(".html"))
    for picture in HERE.glob("*.png"):
        shutil.copy(picture, out)
    readme = markdown2.markdown((HERE.parent / "README.md").read_text(encoding="utf-8"), extras=EXTRAS)
    readme = re.sub(r'(href|src)="docs/', r'\1="', str(readme)).replace('.md"', '.html"')
    nav = "<nav><a href='index.html'>stemtune</a></nav>"
    head = f"<meta charset='utf-8'><title>stemtune</title><style>{STYLE}</style>"
    text = f"<!doctype html><html lang='en'><head>{head}</head><body>{nav}{readme}</body></html>"
    (out / "readme.html").write_text(text, "utf-8")
    import_module("stemtune.sweep")  # the module of that name; the function is what is public
    for name in stemtune.__all__:  # the package fetches them when they are first used; pdoc reads what is there
        setattr(stemtune, name, getattr(api, name, None) or getattr(stemtune, name))
    pdoc.render.configure(docformat="numpy", show_source=False, search=True)
    pdoc.pdoc(*REFERENCE, output_directory=out / "reference")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs"))
