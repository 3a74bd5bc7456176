"""The ranks of a learner: one process each, joined by torch.distributed (gloo on CPU, nccl on GPU).

Every rank holds the whole batch and a shard of every tensor (FSDP2). A call here is a collective: it returns once
every rank has made it, and raises after `timeout_s` where one does not.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from learner.actor_critic import ActorCritic

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Ranks:
    """This process's place in the group."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place, the same bits on each."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor


def join(rank: int, size: int, *, address: str, port: int, device: torch.device, timeout_s: float) -> Ranks:
    """Form the group; rank 0 listens at `address`, and nowhere else.

    Raises:
        RuntimeError: not every rank came within `timeout_s`.
    """
    if address == LOOPBACK:  # gloo would bind to whatever the host's name resolves to
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_s)
    store = meeting_place(rank, size, address=address, port=port, timeout=timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return Ranks(rank, size, device, init_device_mesh(device.type, (size,)))


def meeting_place(rank: int, size: int, *, address: str, port: int, timeout: timedelta) -> dist.Store:
    """Where the ranks find each other. Left to itself, rank 0 would take anybody's words, at every address it has.

    Raises:
        RuntimeError: not every rank came within `timeout`.
    """
    if rank > 0:
        return dist.TCPStore(address, port, size, is_master=False, timeout=timeout)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listening = socket.create_server((address, port), family=family, backlog=2048)
    return dist.TCPStore(
        address, port, size, is_master=True, timeout=timeout, multi_tenant=True, master_listen_fd=listening.detach()
    )


def alone(device: torch.device) -> Ranks:
    """A group of one in this process, without a socket."""
    if not dist.is_initialized():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return Ranks(0, 1, device, init_device_mesh(device.type, (1,)))


def shard(module: ActorCritic, ranks: Ranks, *, dtype: str, activation_checkpointing: bool) -> None:
    """Distribute parameters over the ranks: fp32 masters, compute in `dtype`, gradients summed in fp32.

    Layers are gathered one at a time; what is outside of them (embeddings, norms) stays gathered from the forward to
    the backward pass.
    """
    compute = MixedPrecisionPolicy(
        param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    again = ranks.size > 1  # gathering twice is the price of memory, and a rank alone has nothing to free
    for name, layer in list(module.layers()):
        if activation_checkpointing:
            layer = checkpoint_wrapper(layer)
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, layer)
        fully_shard(layer, mesh=ranks.mesh, mp_policy=compute, reshard_after_forward=again)
    if module.value_head is not None:
        fully_shard(module.value_head, mesh=ranks.mesh)  # small, and its targets are far from 1: fp32
    fully_shard(module, mesh=ranks.mesh, mp_policy=compute, reshard_after_forward=False)
    for part in module.modules():
        if isinstance(part, FSDPModule) and ranks.size > 1:
            # Losses are divided by the global token count already: gradients are summed, not averaged.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one; a collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
