"""The documentation is tested: its commands parse, its files exist, its links lead somewhere, its messages are real."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from stemtune.cli import _parser, main
from stemtune.errors import UserError

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CHANGELOG = ROOT / "CHANGELOG.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", CHANGELOG, *sorted((ROOT / "docs").rglob("*.md"))]
GUIDES = sorted((ROOT / "docs" / "guide").glob("*.md"))

RUN_NOT = re.compile(r"<!-- not run: (.+?) -->\s*\Z", re.S)
FENCE = re.compile(r"^```([a-z]*)\n(.*?)^```$", re.M | re.S)
VARIABLE = re.compile(r'^([A-Z]+)="?(.*?)"?$')
FILES = re.compile(r"\b((?:search_spaces|cluster|tests|docs|notebooks|benchmarks|stemtune)/[\w./-]*\w)")
README_LINES = 150

TINY = {"--patterns": "260", "--size": "64", "--scale": "0.05", "--grains": "6", "--workers": "1"}
"""What makes a guide's command small; a matched bank of 64 px is quick and still indexes."""


class Block(NamedTuple):
    """A code fence of a page: its language, its text, and why it is not run."""

    page: Path
    language: str
    text: str
    reason: str


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for fence in FENCE.finditer(text):
        why = RUN_NOT.search(text[: fence.start()])
        found.append(Block(page, fence[1], fence[2], why[1] if why else ""))
    return found


def commands(block: Block) -> list[list[str]]:
    """Return the block's lines as words: continued lines joined, comments dropped, variables filled in."""
    known: dict[str, str] = {}
    lines = []
    for raw in re.sub(r"\\\n\s*", " ", re.sub(r'"\n', '"\n', block.text)).splitlines():
        line = re.sub(r"\s#.*$", "", raw).strip()
        if given := VARIABLE.match(line):
            known[given[1]] = given[2]
            continue
        for key, value in known.items():
            line = re.sub(rf"\${key}\b", value, line)
        if line and not line.startswith("#"):
            lines.append(shlex.split(line))
    return lines


def stemtune_lines(page: Path) -> list[list[str]]:
    found = [words for block in blocks(page) if not block.language for words in commands(block)]
    return [words[1:] for words in found if words[0] == "stemtune"]


def benchmark_lines(page: Path) -> list[list[str]]:
    """Return what follows `python -m benchmarks` in a page, and what `make bench` makes of NAME and ARGS."""
    text = page.read_text()
    written = re.findall(r"python -m benchmarks +([^`\n#]+)", text)
    for name_given, more in re.findall(r"make bench NAME=(\w+)(?: ARGS=\"([^\"]*)\")?", text):
        written.append(f"{name_given} {more}")
    return [shlex.split(line) for line in written]


def parse_benchmark(words: Sequence[str]) -> None:
    """Have the benchmarks' own parser read a command line; it refuses what is no benchmark."""
    from benchmarks.__main__ import _parser as benchmark_parser

    try:
        benchmark_parser().parse_args(list(words))
    except SystemExit as end:
        if end.code:
            raise UserError(f"`python -m benchmarks {shlex.join(words)}` does not parse") from None


def parse(words: Sequence[str]) -> None:
    """Have the real parser read a command line."""
    _parser().parse_args(list(words))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_parse(page: Path) -> None:
    for words in stemtune_lines(page):
        if words == ["COMMAND", "--help"]:
            continue
        try:
            parse(words)
        except UserError as mistake:
            raise AssertionError(f"{name(page)}: `stemtune {shlex.join(words)}`: {mistake}") from None


def test_a_wrong_command_is_found() -> None:
    with pytest.raises(UserError, match="unrecognized"):
        parse(["predict", "scan.h5", "--model", "m", "--out", "map", "--nonsense"])
    with pytest.raises(UserError, match="required"):
        parse(["predict", "scan.h5", "--model", "m"])
    with pytest.raises(UserError, match="unrecognized"):
        parse(["sweep", "space.yaml", "--nonsense"])


@pytest.mark.parametrize("page", [page for page in PAGES if benchmark_lines(page)], ids=name)
def test_benchmarks_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    for words in benchmark_lines(page):
        parse_benchmark(words)


def test_a_wrong_benchmark_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(UserError):
        parse_benchmark(["nonsense"])
    with pytest.raises(UserError):
        parse_benchmark(["accuracy", "--nonsense"])


@pytest.mark.parametrize("page", [page for page in PAGES if page != CHANGELOG], ids=name)
def test_commands_within_a_sentence_exist(page: Path) -> None:
    """`stemtune WORD` in running text names a command; the changelog may name one that is gone."""
    known = set(re.findall(r"^    (\w+)(?: |$)", _parser().format_help(), flags=re.M)) | {"COMMAND"}
    assert {"predict", "sweep"} <= known
    for word in re.findall(r"`stemtune ([a-z]\w*)", re.sub(FENCE, "", page.read_text())):
        assert word in known, f"{name(page)} names the command `stemtune {word}`"


def test_the_readme_is_one_page() -> None:
    assert len(README.read_text().splitlines()) <= README_LINES


def test_every_page_is_reached_from_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / path).resolve() for path in re.findall(r"\]\(([^)#\s]+)", index.read_text())}
    assert {name(page) for page in PAGES if page != index} <= {name(page) for page in linked if page.suffix == ".md"}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_named_files_exist(page: Path) -> None:
    text = page.read_text()
    for path in FILES.findall(text):
        if "*" not in path and "mine.py" not in path:
            assert (ROOT / path).exists(), f"{name(page)} names {path}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(FENCE, "", page.read_text())):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name(page)} links to {target}, which is not there"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", there.read_text(), flags=re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_named_spaces_pass_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    named = {path for page in PAGES for path in FILES.findall(page.read_text()) if path.startswith("search_spaces/")}
    spaces = sorted(str(ROOT / path) for path in named if path.endswith(".yaml"))
    assert len(spaces) > 3
    assert main(["check", *spaces]) == 0, capsys.readouterr().err


def test_spaces_in_the_guides_are_spaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = [block for page in PAGES for block in blocks(page) if block.language == "yaml"]
    assert written
    for number, block in enumerate(written):
        assert yaml.safe_load(block.text)
        (tmp_path / f"space{number}.yaml").write_text(block.text)
        assert main(["check", str(tmp_path / f"space{number}.yaml")]) == 0, capsys.readouterr().err


def messages() -> list[str]:
    """Return every text of the source, what is filled in replaced by a mark."""
    found = []
    for path in [*sorted((ROOT / "stemtune").rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def said(message: str, texts: Sequence[str]) -> bool:
    """Tell whether some text of the source holds the fixed parts of `message` in their order."""
    parts = [re.escape(part.strip(" '`.")) for part in message.replace("`", "").split("…") if part.strip(" '`.")]
    wanted = re.compile(".*?".join(parts), re.S)
    return any(wanted.search(text.replace("`", "")) for text in texts)


def test_messages_in_troubleshooting_are_the_programs_own() -> None:
    texts = messages()
    quoted = re.findall(r"\*\*`(.+?)`\*\*", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.S)
    assert len(quoted) > 20
    for message in quoted:
        assert said(message, texts), f"no error message reads: {message}"
    assert not said("… holds … frames and no scan shape; give --form ny,nx", texts)


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{cited["version"]}"' in project
    assert f'license = "{cited["license"]}"' in project
    assert {"cff-version", "message", "title", "authors"} <= set(cited)


def test_the_changelog_begins_with_this_version() -> None:
    newest = re.search(r"^## \[(.+?)\] - (\S+)$", CHANGELOG.read_text(), flags=re.M)
    assert newest
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (newest[1], newest[2]) == (cited["version"], cited["date-released"].isoformat())


def lint_commands() -> list[str]:
    """Return what `make lint` runs."""
    recipe = (ROOT / "Makefile").read_text().split("\nlint: install\n")[1].split("\n\n")[0]
    return [line.strip().removeprefix("$(BIN)/") for line in recipe.splitlines()]


def test_the_commit_hooks_are_the_linters_of_ci() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    assert [hook["entry"] for hook in hooks] == lint_commands()
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in hooks)


def test_public_ci_runs_what_the_checks_run() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["check"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    tried = job["strategy"]["matrix"]["python-version"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    told = [line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r"Python :: 3\.\d+$", line)]
    assert tried == told
    assert project["requires-python"] == f">={tried[0]}"


def tiny(words: Sequence[str]) -> list[str]:
    """Return a guide's command at a size that runs in seconds."""
    given = [word for word in words if word not in ("--dynamical",)]
    for option, value in TINY.items():
        if option in given:
            given[given.index(option) + 1] = value
    if given[0] == "simulate":
        given += [part for option in ("--size", "--scale") if option not in given for part in (option, TINY[option])]
    if "--scan" in given:
        given[given.index("--scan") + 1] = "18,24"
    if given[0] == "sweep":
        given += ["--trials", "1"]
    return given


RunLine = Callable[[list[str]], int]


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_guides_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what a guide says, in its order, in one folder; blocks that are not run say why in the page."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "search_spaces").symlink_to(ROOT / "search_spaces")
    ran = skipped = 0
    for block in blocks(page):
        if block.language or block.reason:
            skipped += 1
            continue
        for words in commands(block):
            ran += 1
            if words[0] == "stemtune":
                assert main(tiny(words[1:])) == 0, shlex.join(words)
            elif words[0] == "mkdir":
                Path(words[-1]).mkdir(exist_ok=True)
            elif words[0] == "mv":
                Path(words[1]).rename(Path(words[2]) / words[1])
            else:
                raise AssertionError(f"{name(page)}: this test does not know `{words[0]}`")
    assert ran or skipped
