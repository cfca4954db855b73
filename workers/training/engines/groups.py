"""Process groups: how the ranks of one expert find each other, and the one sum that they take together.

Invariant: a group lives as long as its process, since DeepSpeed cannot join another one; no port is open to other machines than
those of the group, and a collective ends with an error when a peer is gone.
"""

import datetime
import os
import socket

import torch
from torch import distributed


def join_group(rank: int, world: int, host: str, port: int, device: str, timeout: float = 600.0) -> None:
    """Make this process rank `rank` of a group that lives as long as the process; joining the same group again is free.

    Sets the environment variables that torch and DeepSpeed read. `timeout` (seconds) bounds every later collective, so
    that a dead peer cannot hold the others for ever.
    """
    _join(rank, world, device, {"MASTER_ADDR": host, "MASTER_PORT": str(port)}, timeout)


def join_alone(device: str) -> None:
    """Make this process a group of one, without a port; DeepSpeed wants a group even then."""
    _join(0, 1, device, {}, 600.0)


def _join(rank: int, world: int, device: str, place: dict[str, str], timeout: float) -> None:
    if distributed.is_initialized():
        current = (distributed.get_rank(), distributed.get_world_size())
        assert current == (rank, world), f"this process is rank {current[0]} of {current[1]} already"
        return
    os.environ.update(place | {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"})
    limit = datetime.timedelta(seconds=timeout)
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=_meeting_point(place["MASTER_ADDR"], int(place["MASTER_PORT"]), rank, world, limit)
        if place
        else distributed.HashStore(),
        rank=rank,
        world_size=world,
        timeout=limit,
    )


def _meeting_point(
    host: str, port: int, rank: int, world: int, limit: datetime.timedelta
) -> distributed.Store:
    """The store where ranks find each other. torch's own would listen on every interface of rank 0's machine; this one listens
    on `host` only, and ranks of one machine talk over its loopback."""
    if host == "127.0.0.1":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if rank != 0:
        return distributed.TCPStore(host, port, world, timeout=limit)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=max(128, world))
    return distributed.TCPStore(
        host, port, world, is_master=True, timeout=limit, master_listen_fd=listening.detach()
    )


def leave_group() -> None:
    """End this process's membership, if any: the last thing a worker does, since DeepSpeed cannot join another group."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def average_over_ranks(tensors: list[torch.Tensor], world: int) -> None:
    """Replace every tensor by its mean over ranks, in one collective."""
    flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
    distributed.all_reduce(flat)
    flat /= world
    offset = 0
    for tensor in tensors:
        tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
        offset += tensor.numel()
