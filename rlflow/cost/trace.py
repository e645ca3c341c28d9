"""What a network costs, found by running the recipe's own code on tensors without storage (torch's FakeTensorMode).

Nothing is loaded or computed: each operation only says which tensors it would make. Two figures come out of it: the
bytes alive at the worst moment, and the floating-point operations, of sampling and of a scored pair with its backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rlflow.flow.policy import FlowPolicy
from rlflow.models.pretrained.shapes_of import beside
from rlflow.rl.likelihoods.base import Likelihood
from rlflow.types import Cond, Evidence, Tree, tree_leaves, tree_map

FEW = 4
"""Rows of a trace that counts per row."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made while it is active: `now`, and the most there were, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            self.see(tensor)
        return out

    def see(self, tensor: Tensor) -> None:
        """Count a storage until it is freed; a view adds nothing."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def as_on_gpu() -> AbstractContextManager[Any]:
    """rms_norm is many operations on a CPU, and one on a GPU: that keeps for its backward what layer_norm keeps."""

    def one_kernel(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        return F.layer_norm(x, shape, weight, None, torch.finfo(x.dtype).eps if eps is None else eps)

    return mock.patch.object(F, "rms_norm", one_kernel)


def attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """2 matrix products of attention's forward; shapes (N, heads, L, d). torch counts it on GPUs only."""
    n, heads, length, d = query
    return int(2 * n * heads * length * key[-2] * (d + value[-1]))


def attention_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """5 matrix products of attention's backward, one of which recomputes the weights."""
    n, heads, length, d = query
    return int(2 * n * heads * length * key[-2] * (3 * d + 2 * value[-1]))


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def fake_mode() -> FakeTensorMode:
    """Inside it every new tensor has a shape and no storage."""
    return FakeTensorMode(allow_non_fake_inputs=True)


Pass = Callable[[int], Callable[[], Any]]
"""Rows to what is measured; its inputs are made before."""


class Trace:
    """Of a policy (and its critic) whose parameters are without storage; traces of equal passes run once.

    `obs_spec` is one row's observation, without the row axis.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        likelihood: Likelihood | None,
        obs_spec: Tree,
        mode: AbstractContextManager[Any],
        critic: nn.Module | None = None,
    ):
        self.policy, self.likelihood, self.obs_spec = policy, likelihood, obs_spec
        policy.multiple = 1  # as on a GPU
        self.mode, self.critic = mode, critic
        self._known: dict[tuple[str, int], float] = {}

    def bytes(self, make: Pass, rows: int) -> float:
        """At the worst moment of a pass of `rows` rows, above what was there before."""
        return self._once(f"{make.__name__} bytes", rows, lambda: self._bytes(make, rows))

    def flops(self, make: Pass) -> float:
        """Of one row."""
        return self._once(f"{make.__name__} flops", FEW, lambda: self._flops(make)) / FEW

    def _once(self, name: str, rows: int, fn: Callable[[], float]) -> float:
        if (name, rows) not in self._known:
            with self.mode:
                self._known[name, rows] = fn()
        return self._known[name, rows]

    def _bytes(self, make: Pass, rows: int) -> float:
        fn = make(rows)
        with LiveBytes() as live, as_on_gpu():
            self._add_gradients()  # here, since tensors like these are replaced, not added to
            for module in self._modules():
                for tensor in (*module.parameters(), *module.buffers()):
                    live.see(tensor)  # a view of a weight, its transpose say, takes nothing
            before = live.now
            kept = fn()
        del kept
        return float(live.peak - before)

    def _modules(self) -> list[nn.Module]:
        found = [self.policy, self.critic, *beside(self.policy.field.unguided)]
        return [module for module in found if module is not None]

    def _add_gradients(self) -> None:
        for module in self._modules():
            for p in module.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None

    def _flops(self, make: Pass) -> float:
        """Not beside the bytes: the counter keeps tensors alive."""
        fn = make(FEW)
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as flops:
            fn()
        return float(flops.get_total_flops())

    # -- what an iteration asks of the network ----------------------------------------------------

    def observed(self, rows: int) -> Tree:
        """Observations of zeros."""
        return tree_map(lambda v: torch.zeros((rows, *v.shape), dtype=v.dtype), self.obs_spec)

    def state(self, rows: int) -> tuple[Tensor, Tensor]:
        """x (N, *D) and t (N,)."""
        x = torch.zeros(rows, *self.policy.event_shape, dtype=self.policy.dtype)
        return x, torch.full((rows,), 0.5, dtype=x.dtype)

    @torch.no_grad()
    def encode(self, rows: int) -> Cond:
        """Without graph."""
        return self.policy.encode(self.observed(rows))

    def sampling(self, rows: int) -> Callable[[], Any]:
        """One step without graph."""
        cond, (x, t) = self.encode(rows), self.state(rows)
        return torch.no_grad()(lambda: self.policy.transition(x, t, t + 0.1, cond))

    def scoring(self, rows: int) -> Callable[[], Any]:
        """A scored pair's forward and backward; gradients are there already."""
        likelihood, evidence, obs = self.likelihood, _evidence(*self.state(rows)), self.observed(rows)
        assert likelihood is not None
        frozen = None if self.policy.encoder_trains else self.encode(rows)

        def step() -> None:
            cond = self.policy.encode(obs) if frozen is None else frozen
            score = likelihood.score(self.policy, cond, evidence)
            likelihood.log_ratio(score.log_prob, evidence).exp().sum().backward()

        return step

    def stepping(self, rows: int) -> Callable[[], Any]:
        """A denoising step's forward and backward, down to the state it began with."""
        (x, t), cond = self.state(rows), self.encode(rows)

        def step() -> None:
            start = x.clone().requires_grad_()
            v = self.policy.velocity(start, t, torch.full_like(t, 0.1), cond)
            v.backward(torch.zeros_like(v))

        return step

    def grading(self, rows: int) -> Callable[[], Any]:
        """From samples to images and back, to the gradient of what judges them; not that judge itself."""
        x, _ = self.state(rows)

        def step() -> None:
            end = x.clone().requires_grad_()
            self.policy.field.unguided.decode(self.policy.squash(end)).float().sum().backward()

        return step

    def decoding(self, rows: int) -> Callable[[], Any]:
        """From samples to images or actions."""
        x, _ = self.state(rows)
        return torch.no_grad()(lambda: self.policy.field.unguided.decode(self.policy.squash(x)).float())

    def value(self, rows: int) -> Callable[[], Any]:
        """The critic's forward and backward; nothing without one."""
        cond, critic = self.encode(rows), self.critic
        return (lambda: None) if critic is None else (lambda: critic(cond).square().sum().backward())

    def cond_bytes(self) -> float:
        """Of one row's encoded condition."""
        return self._once("cond", FEW, lambda: _size(*self.encode(FEW).data.values())) / FEW

    def pair_bytes(self) -> float:
        """That are kept of a scored pair: x, x_next, mean, std and four numbers."""
        return self._once("pair", FEW, self._pair_bytes) / FEW

    @torch.no_grad()
    def _pair_bytes(self) -> float:
        x, t = self.state(FEW)
        found = self.policy.transition(x, t, t + 0.1, self.encode(FEW))
        return _size(x, x, found.mean, found.std, t, t, t, t)


def _size(*tensors: Tensor) -> float:
    return float(sum(v.numel() * v.element_size() for v in tensors))


def _evidence(x: Tensor, t: Tensor) -> Evidence:
    """One scored pair of each row."""
    x, t = x.unsqueeze(1), t.unsqueeze(1)
    return Evidence(x, x, t, t + 0.1, t, x, torch.ones_like(x[..., :1]), torch.ones_like(t, dtype=torch.bool))


def parameter_bytes(module: nn.Module, trained: bool) -> int:
    """Bytes of the parameters that train, or of those that do not and the buffers; shared ones once."""
    found = {id(p): p for p in module.parameters() if p.requires_grad == trained}
    buffers = [] if trained else list(module.buffers())
    return int(_size(*found.values(), *buffers))
