"""The rendezvous of a trial's workers: at the address of a node that Ray itself uses, and nowhere else.

Torch opens a port for it of rank 0 on every address of its machine, without a token. Here it is opened on
the node's own address alone, which is 127.0.0.1 for a Ray of our own, and not at all for one worker.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend


class RendezvousConfig(TorchConfig):  # type: ignore[misc]
    """How workers find each other: at an address of rank 0's node that Ray itself uses."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _RendezvousBackend


class _RendezvousBackend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_set_torch_distributed_env_vars)
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
