"""How the workers of a trial meet, and how their reports reach Tune.

They meet at the address of a node that Ray itself uses, and nowhere else: torch opens a port of rank 0 for it on every
address of its machine, without a token. Here it is opened on the node's own address alone, which is 127.0.0.1 for a Ray
of our own, and not at all for one worker.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray import tune
from ray.train import UserCallback
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

from stemtune.tune.run.trial_state import packed


class ToTune(UserCallback):  # type: ignore[misc]
    """Passes every report of a run to Tune, from the process in which both live; `metrics` are what Tune goes by."""

    def __init__(self, metrics: Sequence[str]) -> None:
        self._metrics = metrics

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Report what rank 0 reported; return when Tune has taken it, or end the thread if Tune stops the trial."""
        tune.report(packed(metrics[0], self._metrics))


class RendezvousConfig(TorchConfig):  # type: ignore[misc]
    """How workers find each other: at an address of rank 0's node that Ray itself uses."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _RendezvousBackend


class _RendezvousBackend(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True  # as NCCL wants it between GPUs of one node

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        world = len(worker_group)
        if world == 1:
            return
        address, port = worker_group.execute_single(0, _listen)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _join, address, port, rank, world, backend_config.backend, backend_config.timeout_s
                )
                for rank in range(world)
            ]
        )


_listening: dict[str, socket.socket] = {}  # the socket that this process, rank 0, listens on


def _listen() -> tuple[str, int]:
    """Listen on this node's address and return it with the port."""
    address = ray.util.get_node_ip_address()
    _listening["socket"] = made = socket.create_server(
        (address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET
    )
    return address, int(made.getsockname()[1])


def _join(address: str, port: int, rank: int, world: int, backend: str, seconds: int) -> None:
    """Join the process group of `world` workers that meet where rank 0 listens."""
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    wait = timedelta(seconds=seconds)
    listening = _listening.pop("socket").detach() if rank == 0 else None
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address, port, world, rank == 0, timeout=wait, multi_tenant=True, master_listen_fd=listening, use_libuv=True
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
