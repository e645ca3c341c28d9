"""torch.distributed in the few verbs this package needs; all are the identity in one process."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 5.0
"""Seconds that the others have to end in once one process has failed: they may wait for it in a collective."""


def num_cpus() -> int:
    """CPUs this process may run on: under taskset or in a container fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start() -> None:
    """Join the process group when launched by torchrun (nccl for tensors on a GPU, gloo for others)."""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1 or dist.is_initialized():
        return
    use_cuda = torch.cuda.is_available()
    if use_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo")  # simulators count on the CPU


def launch(processes: int, run: Callable[..., None], *args: Any) -> None:
    """run(*args) in `processes` processes of this machine, one group; a signal to this one is handed to each.

    Small networks gain on a CPU: a process with one thread wastes less than a second thread does. ValueError for more
    processes than GPUs; SystemExit with its code when one fails, after the others were ended.
    """
    from torch.multiprocessing.spawn import ProcessExitedException, start_processes

    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise ValueError(f"{processes} processes need a GPU each, this machine has {torch.cuda.device_count()}")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cpus() // processes)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    resource_tracker.ensure_running()  # the first process that it is started for would unblock signals
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the children begin so: until they are ready, one waits
    children = start_processes(_member, (processes, port, run, args), processes, join=False, start_method="spawn")
    assert children is not None

    def hand_on(number: int, frame: FrameType | None) -> None:
        for pid in children.pids():
            os.kill(pid, number)

    before = {n: signal.signal(n, hand_on) for n in SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        while not children.join(grace_period=GRACE):
            pass
    except ProcessExitedException as error:
        if error.signal_name is not None:
            print(f"rlflow: process {error.error_index} was ended by {error.signal_name}", file=sys.stderr)
        raise SystemExit(error.exit_code % 256) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _member(index: int, processes: int, port: int, run: Callable[..., None], args: Sequence[Any]) -> None:
    os.setsid()  # Ctrl-C reaches us through the launcher, once
    numbers = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": processes, "MASTER_PORT": port}
    os.environ.update({name: str(number) for name, number in numbers.items()}, MASTER_ADDR="127.0.0.1")
    with suppress(KeyboardInterrupt):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        run(*args)


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


def gather(value: Any) -> list[Any]:
    """`value` of every process, in their order, on rank 0; [] elsewhere. Tensors in it have to be on the CPU."""
    if world() == 1:
        return [value]
    found = [None] * world() if rank() == 0 else None
    dist.gather_object(value, found)
    return found or []


def gather_shares(mine: Tensor, total: int) -> Tensor:
    """Concatenate what each rank made of its share, `torch.arange(total).tensor_split(world)[rank]`."""
    if world() == 1:
        return mine
    most = -(-total // world())
    padded = torch.cat([mine, mine.new_zeros((most - len(mine), *mine.shape[1:]))])
    sizes = [len(part) for part in torch.arange(total).tensor_split(world())]
    everyone = all_gather_rows(padded).split(most)
    return torch.cat([part[:n] for part, n in zip(everyone, sizes, strict=True)])


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """One flat all-reduce (sum) of all gradients; absent ones become zero, in a single process too."""
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if world() == 1 or not parameters:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    dist.all_reduce(flat)
    for p, summed in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = summed.view_as(p).clone()


def device() -> torch.device:
    """The GPU of this process, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
