"""Named weight sets of the trainable parameters: 'live', 'ref', 'old', 'ema'; one mechanism for all.

A set holds copies of the trainable parameters only, so with LoRA the reference (adapters at their
start, where they add nothing) costs megabytes. Swapping exchanges storage and copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch import Tensor


class WeightSets:
    """Snapshots of a module's trainable parameters, by name."""

    def __init__(self, module: nn.Module):
        self._module = [module]  # in a list, so that nn.Module does not register a cycle
        self.sets: dict[str, dict[str, Tensor]] = {}
        self.active = "live"

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name."""
        return {n: p for n, p in self._module[0].named_parameters() if p.requires_grad}

    @torch.no_grad()
    def snapshot(self, name: str) -> None:
        """Store the live weights under `name`."""
        if name == "live" or self.active != "live":
            raise ValueError(f"cannot store the set {name!r} while {self.active!r} is in place")
        self.sets[name] = {n: p.detach().clone() for n, p in self.parameters().items()}

    @torch.no_grad()
    def blend(self, name: str, decay: float) -> None:
        """set <- decay set + (1 - decay) live, in at least float32."""
        live = self.parameters()
        torch._foreach_lerp_([self.sets[name][n] for n in live], [p.detach() for p in live.values()], 1 - decay)

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Put the set in place of the live weights; a missing set is an error, never silently live."""
        if name == self.active:
            yield
            return
        if name != "live" and name not in self.sets:
            raise KeyError(f"no weight set {name!r}; stored: {sorted(self.sets)}")
        if self.active != "live":
            raise ValueError(f"cannot use {name!r} while {self.active!r} is in place: weight sets do not nest")
        self._swap(name)
        self.active = name
        try:
            yield
        finally:
            self.active = "live"
            self._swap(name)

    def _swap(self, name: str) -> None:
        stored = self.sets[name]
        for n, p in self.parameters().items():
            p.data, stored[n] = stored[n], p.data

    def state_dict(self) -> dict[str, Tensor]:
        """Flat 'set/parameter' tensors."""
        return {f"{s}/{n}": v for s, values in self.sets.items() for n, v in values.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`; shapes and names must match the trainable parameters."""
        live = self.parameters()
        sets: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, parameter = key.partition("/")
            like = live[parameter]
            sets.setdefault(name, {})[parameter] = value.to(like.device, like.dtype).reshape(like.shape).clone()
        self.sets = sets
