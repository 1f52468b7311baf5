"""Work spread over the nodes of a Ray cluster: simulated blocks, patterns to be read."""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any

import ray
from ray.exceptions import RayTaskError, WorkerCrashedError

from stemtune._parallel import Spread
from stemtune.errors import UserError
from stemtune.tune.cluster.connect import connect

UNDER_WAY = 2  # blocks per CPU (or GPU) of the cluster that are being worked on or wait for the one who reads them
RETRIES = 8  # how often a block is repeated whose worker or node died; nothing else is repeated


def over_ray(address: str | None = None, device: str = "cpu") -> Spread:
    """Join the Ray at `address`, or that of `connect`, and return what spreads work over its nodes.

    A block takes one CPU (`device` "cpu") or one GPU ("cuda"); "auto" is a GPU if the cluster has any. A `UserError`
    says that Ray does not answer, or has none of what a block takes.
    """
    resources = connect(address=address)
    if device == "auto":
        device = "cuda" if resources.get("GPU", 0) >= 1 else "cpu"
    kind = "GPU" if device == "cuda" else "CPU"
    slots = int(resources.get(kind, 0))
    if slots < 1:
        raise UserError(f"the Ray that was joined has no {kind}, but each block takes one; add a node to it")
    block = ray.remote(num_cpus=int(kind == "CPU"), num_gpus=int(kind == "GPU"), max_retries=RETRIES)(_block)

    def spread(
        prepare: Callable[[Any], Any], given: Any, work: Callable[[Any, Any], Any], items: Sequence[Any]
    ) -> Generator[Any]:
        prepared, key = ray.put((prepare, given)), uuid.uuid4().hex
        waiting: deque[Any] = deque()
        try:
            for item in items:
                waiting.append(block.remote(key, prepared, work, item))
                if len(waiting) > UNDER_WAY * slots:
                    yield _result(waiting[0])
                    waiting.popleft()
            while waiting:
                yield _result(waiting[0])
                waiting.popleft()
        finally:
            for task in waiting:
                ray.cancel(task, force=True)

    return spread


def _result(task: Any) -> Any:
    try:
        return ray.get(task)
    except RayTaskError as problem:
        cause = problem.cause
        if isinstance(cause, UserError):
            raise UserError(str(cause)) from None
        raise
    except WorkerCrashedError:
        raise UserError(
            f"workers died {RETRIES + 1} times over one block, perhaps for lack of memory; give the nodes more"
        ) from None


_prepared: dict[str, Any] = {}  # what this worker process prepared last, under the key of the job that it is for


def _block(key: str, prepared: tuple[Callable[[Any], Any], Any], work: Callable[[Any, Any], Any], item: Any) -> Any:
    if key not in _prepared:
        prepare, given = prepared
        _prepared.clear()
        _prepared[key] = prepare(given)
    return work(_prepared[key], item)
