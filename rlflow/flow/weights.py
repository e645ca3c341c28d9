"""Named weight sets of the trainable parameters: 'live', 'ref', 'old', 'ema'; one mechanism for all.

A set holds copies of the trainable parameters only, so with LoRA the reference (adapters at their
start, where they add nothing) costs megabytes. Using a set points the parameters at its storage and
copies nothing (sharded ones are written over and back); a set never holds the live weights, so it may be
saved at any time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch import Tensor

from rlflow.flow.path import at_least_float
from rlflow.parallel import shards


class WeightSets:
    """Snapshots of a module's trainable parameters, by name."""

    def __init__(self, module: nn.Module):
        self._module = [module]  # in a list, so that nn.Module does not register a cycle
        self.sets: dict[str, dict[str, Tensor]] = {}
        self.active = "live"
        self.places: dict[str, torch.device] = {}
        """Where a set is stored, if not beside the parameters: a reference of the whole network on the host."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name."""
        return {n: p for n, p in self._module[0].named_parameters() if p.requires_grad}

    def snapshot(self, name: str) -> None:
        """Store the live weights under `name`."""
        self._only_live(name)
        found = {n: shards.local(p.detach()) for n, p in self.parameters().items()}
        self.sets[name] = {n: p.to(self.places.get(name, p.device), copy=True) for n, p in found.items()}

    @torch.no_grad()
    def blend(self, name: str, decay: float) -> None:
        """set <- decay set + (1 - decay) live; the set becomes at least float32, where small steps count."""
        self._only_live(name)
        stored, live = self.sets[name], self.parameters()
        stored.update({n: at_least_float(stored[n]) for n in live})
        new = [at_least_float(shards.local(p.detach())) for p in live.values()]
        torch._foreach_lerp_([stored[n] for n in live], new, 1 - decay)

    def _only_live(self, name: str) -> None:
        if name == "live" or self.active != "live":
            raise ValueError(f"cannot store the set {name!r} while {self.active!r} is in place")

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
        stored, named = self.sets[name], dict(self._module[0].named_parameters())
        self._check_complete(name, stored)
        # by stored name: freezing parameters inside changes nothing
        live = {n: shards.put(named[n], value) for n, value in stored.items()}
        self.active = name
        try:
            yield
        finally:
            self.active = "live"
            for n, value in live.items():
                shards.put(named[n], value)

    def _check_complete(self, name: str, stored: dict[str, Tensor]) -> None:
        missing = sorted(self.parameters().keys() - stored.keys())
        if missing:
            raise ValueError(
                f"the weight set {name!r} lacks {missing}: they became trainable after it was stored; store it again"
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Flat 'set/parameter' tensors; of a sharded network whole ones, for which every process has to ask."""
        named = dict(self._module[0].named_parameters())
        return {f"{s}/{n}": shards.whole(named[n], v) for s, values in self.sets.items() for n, v in values.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`; shapes and names must match the parameters."""
        named = dict(self._module[0].named_parameters())
        sets: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, parameter = key.partition("/")
            if parameter not in named or named[parameter].shape != value.shape:
                raise ValueError(f"stored weight {key!r} of shape {tuple(value.shape)} matches no parameter")
            place = self.places.get(name, named[parameter].device)
            mine = shards.part(named[parameter], value.detach())
            sets.setdefault(name, {})[parameter] = mine.to(place, copy=True)
        for name, stored in sets.items():
            self._check_complete(name, stored)
        self.sets = sets
