"""Parameters that several processes hold in parts (torch's FSDP2): what differs from parameters held whole.

A sharded parameter is a DTensor. FSDP gathers it from its local part when a block runs, so whoever changes weights
writes into that part; optimiser, averages and references work on parts alone, being elementwise. Files hold whole
tensors, so a run goes on with any number of processes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from rlflow.parallel import dist

METHODS = ("encode", "decode")
"""Of a network, that read weights outside `forward`."""


def is_sharded(tensor: Tensor) -> bool:
    """True for a DTensor; the module that has them is slow to import, and loaded where there is one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its storage; any other tensor as it is."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def part(parameter: Tensor, whole: Tensor) -> Tensor:
    """This process's part of a whole tensor that is shaped like `parameter`."""
    if not is_sharded(parameter):
        return whole
    from torch.distributed.tensor import distribute_tensor

    p: Any = parameter
    return distribute_tensor(whole.to(p.device), p.device_mesh, p.placements, src_data_rank=None).to_local()


def whole(parameter: Tensor, mine: Tensor | None = None) -> Tensor:
    """The tensor of which `mine` (default: the parameter itself) is this process's part; every process has to ask.

    Of a sharded one only rank 0 gets it, on the CPU; the others an empty tensor.
    """
    if not is_sharded(parameter):
        return parameter if mine is None else mine
    from torch.distributed.tensor import DTensor

    p: Any = parameter.detach()
    value = local(p) if mine is None else mine
    shape = {"shape": p.shape, "stride": p.stride()}
    full = DTensor.from_local(value, p.device_mesh, p.placements, run_check=False, **shape).full_tensor()
    return full.cpu() if dist.rank() == 0 else full.new_empty(0)


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """`state_dict` of whole tensors; see `whole`."""
    return {name: whole(value) for name, value in module.state_dict().items()}


def load_whole_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Inverse of `whole_state`; ValueError for other names or shapes."""
    if not any(is_sharded(p) for p in module.parameters()):
        module.load_state_dict(state)
        return
    mine = module.state_dict()
    wrong = sorted(n for n in mine.keys() | state.keys() if n not in mine or n not in state)
    wrong += sorted(n for n in mine.keys() & state.keys() if mine[n].shape != state[n].shape)
    if wrong:
        raise ValueError(f"the stored weights are not those of this network: {wrong[:4]} differ")
    with torch.no_grad():
        for name, value in mine.items():
            local(value).copy_(part(value, state[name]))


def put(parameter: Tensor, value: Tensor) -> Tensor:
    """Put `value`, this process's part, in place of a parameter's; gives what was there.

    Storage is exchanged where the parameter is whole, and written to where FSDP gathers from it.
    """
    if not is_sharded(parameter):
        before = parameter.data
        parameter.data = value.to(before)
        return before
    mine = local(parameter)
    before = mine.clone()
    mine.copy_(value)
    return before


def finite(parameters: Iterable[Tensor]) -> bool:
    """True on every process where all weights of all processes are finite; they may lie on several devices."""
    bad = [(~local(p.detach()).isfinite()).any() for p in parameters]
    return not bool(dist.all_max(torch.stack([b.to(bad[0].device) for b in bad]).any().float()))


def shard(network: nn.Module, device: torch.device) -> None:
    """Share a network among all processes: each block on its own, then the rest; gradients are summed, not averaged.

    Weights are gathered before a block runs and dropped after it, in the backward pass too.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (dist.world(),))
    for module in (*blocks(network), network):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # else float32 needs a reduction that only NCCL knows
    for name in METHODS:
        register_fsdp_forward_method(network, name)


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The entries of the outermost module lists: the layers of a transformer."""
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from blocks(child)
