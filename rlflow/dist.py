"""torch.distributed in the few verbs this package needs; all are the identity in one process."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def start() -> None:
    """Join the process group when launched by torchrun (nccl where there is a GPU per process, else gloo)."""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1 or dist.is_initialized():
        return
    use_cuda = torch.cuda.is_available()
    if use_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if use_cuda else "gloo")


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 writes the run folder."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait for every process."""
    if dist.is_initialized():
        dist.barrier()


def all_sum(value: Tensor) -> Tensor:
    """Sum over processes, returned everywhere (in place on a copy)."""
    if world() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value


def all_max(value: Tensor) -> Tensor:
    """Maximum over processes."""
    if world() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def all_gather_rows(value: Tensor) -> Tensor:
    """Concatenate equally shaped tensors of all ranks along the leading axis."""
    if world() == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(world())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts)


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """One flat all-reduce (sum) of all gradients; absent ones count as zero, so no rank can hang."""
    if world() == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for p, summed in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = summed.view_as(p).clone()
