"""Whether every node of the cluster can run a trial: asked of each of them, before any trial begins.

A sweep on a cluster whose nodes see different folders or run different code fails hours later, or trains on the wrong
patterns. So one task per node looks for the sweep's folder and files and says which versions it runs.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from stemtune._version import __version__
from stemtune.errors import UserError

ANSWER_S = 180.0  # how long a node may take to answer: it starts a process and imports Ray for it
JOIN_S = 600.0  # how long nodes may take to join; `STEMTUNE_NODES_WAIT_S` sets another time


@dataclass(frozen=True)
class NodeReport:
    """What a node says of itself: versions, the marker it read in the sweep's folder, and the sizes of files."""

    ray: str
    python: str
    stemtune: str
    marker: str
    writable: str
    sizes: dict[str, int | None]


def alive() -> list[dict[str, Any]]:
    """Return Ray's description of every node that takes part."""
    return [node for node in ray.nodes() if node["Alive"]]


def node_label(node: Mapping[str, Any]) -> str:
    """Return a node's name and address as a person knows them."""
    name, address = str(node.get("NodeManagerHostname", "")), str(node["NodeManagerAddress"])
    return f"{name} ({address})" if name and name != address else address


def wait_for(count: int) -> None:
    """Wait until `count` nodes take part; after `JOIN_S` say which came."""
    seconds = float(os.environ.get("STEMTUNE_NODES_WAIT_S") or JOIN_S)
    deadline = time.monotonic() + seconds
    while len(alive()) < count:
        if time.monotonic() > deadline:
            raise UserError(
                f"only {len(alive())} of {count} nodes joined within {seconds:g} s:"
                f" {', '.join(node_label(node) for node in alive())}; the log of `ray start` on the others says why"
                " (another Ray or Python version, a wrong token, a closed port), or lower --nodes"
            )
        time.sleep(1.0)


def workers_that_fit(resources: Mapping[str, float], each: Mapping[str, float]) -> int:
    """Return how many workers that need `each` fit into a node's `resources`."""
    fits = [(resources.get(kind, 0.0) + 1e-9) / need for kind, need in each.items() if need]
    return math.floor(min(fits)) if fits else 0


def inspect_node(folder: str, marker: str, paths: Sequence[str]) -> NodeReport:
    """Report what the node sees on which this runs (the task of each node)."""
    writable = ""
    try:
        read = (Path(folder) / marker).read_text()
    except OSError:
        read = ""
    probe = Path(folder) / f"{marker}.{uuid.uuid4().hex}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as problem:
        writable = problem.strerror or str(problem)
    sizes = {path: Path(path).stat().st_size if Path(path).is_file() else None for path in paths}
    return NodeReport(ray.__version__, platform.python_version(), __version__, read, writable, sizes)


def check(folder: Path, paths: Sequence[str] = ()) -> None:
    """See that every node reads and writes the sweep's `folder`, sees the files `paths`, and runs the same versions.

    The first node that differs is named, with the remedy. On one node, the driver's own, there is nothing to ask.
    """
    nodes = alive()
    here = ray.get_runtime_context().get_node_id()
    if [node["NodeID"] for node in nodes] == [here]:
        return
    marker = f".seen-by-all.{os.getpid()}"
    word = uuid.uuid4().hex
    (folder / marker).write_text(word)
    try:
        answers = _ask(nodes, str(folder), marker, paths)
    finally:
        (folder / marker).unlink(missing_ok=True)
    wanted = inspect_node(str(folder), marker, paths)
    for node, answer in zip(nodes, answers, strict=True):
        compare_reports(node_label(node), answer, wanted, word, folder)


def _ask(nodes: Sequence[Mapping[str, Any]], folder: str, marker: str, paths: Sequence[str]) -> list[NodeReport]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(inspect_node)
    calls = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            folder, marker, list(paths)
        )
        for node in nodes
    ]
    deadline = time.monotonic() + ANSWER_S
    answers = []
    for node, call in zip(nodes, calls, strict=True):
        try:
            answers.append(ray.get(call, timeout=max(1.0, deadline - time.monotonic())))
        except Exception as problem:
            raise UserError(f"node {node_label(node)} cannot run trials: {_reason(problem)}") from None
    return answers


def _reason(problem: Exception) -> str:
    if isinstance(problem, ray.exceptions.GetTimeoutError):
        return f"no answer within {ANSWER_S:g} s"
    text = str(problem)
    if "No module named" in text:
        module = text.split("No module named", 1)[1].split("\n")[0].strip(" '\"")
        return f"it has no module {module}; set its environment up as the others' (cluster/setup.sh)"
    lines = text.strip().splitlines()
    return lines[-1][:200] if lines else type(problem).__name__


def compare_reports(name: str, answer: NodeReport, wanted: NodeReport, word: str, folder: Path) -> None:
    """Raise a `UserError` that names the node `name` when its `answer` is not the `wanted` one."""
    for kind in ("stemtune", "ray", "python"):
        here, there = getattr(wanted, kind), getattr(answer, kind)
        if here != there:
            raise UserError(
                f"node {name} runs {kind} {there}, but the sweep's own node {here}; set both up with the same"
                " environment (cluster/setup.sh) and start Ray there again"
            )
    if answer.marker != word:
        raise UserError(
            f"node {name} does not see the sweep's folder {folder} as this node does; put sweeps on storage that all"
            " nodes share (STEMTUNE_SWEEPS) or mount it there"
        )
    if answer.writable:
        raise UserError(f"node {name} cannot write to the sweep's folder {folder}: {answer.writable}")
    for path, size in answer.sizes.items():
        if size != wanted.sizes[path]:
            what = "does not see" if size is None else f"has another file ({size:,} bytes) as"
            raise UserError(f"node {name} {what} '{path}'; copy it to storage that all nodes share and name that")


def nodes_of(group: str) -> tuple[str, ...]:
    """Return the names of the nodes on which a trial's workers run, from the id of their placement group."""
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, placement_group_table

    with contextlib.suppress(Exception):
        table = placement_group_table(PlacementGroup(PlacementGroupID.from_hex(group)))
        names = {node["NodeID"]: str(node["NodeManagerHostname"]) for node in ray.nodes()}
        return tuple(sorted({names.get(node, node) for node in table["bundles_to_node_id"].values()}))
    return ()
