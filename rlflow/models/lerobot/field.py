"""LeRobot's flow policies as velocity fields: rlflow replaces their Euler loop and nothing else.

They end in one function, `euler_integrate(denoise_fn, noise, num_steps)`: x <- x - denoise_fn(x, s) / K from s = 1
(noise) to 0 (actions). `encode` lets the policy prepare everything itself, its prefix once, and stops it at that call;
what `denoise_fn` holds is the condition, and

    v(x, t) = -denoise_fn(x, 1 - t).

LeRobot is not imported: any policy with `predict_action_chunk` whose module calls `euler_integrate`, on batches that
lead with rows, will do (LeRobot 0.6: pi0, Black et al. 2024; pi0.5, 2025; SmolVLA, Shukor et al. 2025; EO-1, 2025).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any, Protocol

import torch
import torch.nn as nn
from torch import Tensor

from rlflow.files import read_tensors, save_tensors
from rlflow.flow.field import VelocityField
from rlflow.models.io import check_finite
from rlflow.models.lerobot.condition import Rebuild, again, axes_of, cells, pooled, take_apart, tensors
from rlflow.models.lerobot.eo1 import as_list
from rlflow.types import Cond, Tree, tree_map

SEAM = "euler_integrate"
TRAINED = "trained.safetensors"


class Processors(Protocol):
    """What stands between an environment and a policy: names, normalisation, tokens."""

    num_actions: int

    def before(self, obs: Tree) -> Tree:
        """An environment's observations (N, ...) to the policy's batch."""

    def after(self, x: Tensor) -> Tensor:
        """Samples (N, H, D) to actions (N, H, A) in the environment's own units."""


class _Prepared(Exception):
    """Carries what the policy would have denoised with, and from."""

    def __init__(self, denoise: FunctionType, noise: Tensor):
        self.denoise, self.noise = denoise, noise


def seam_of(policy: nn.Module) -> Any:
    """The module whose `euler_integrate` a policy calls; ValueError where there is none."""
    kinds = [kind for part in (policy, getattr(policy, "model", None)) for kind in type(part).__mro__]
    found = [sys.modules[kind.__module__] for kind in kinds if SEAM in vars(sys.modules[kind.__module__])]
    if not found:
        raise ValueError(
            f"{type(policy).__name__} has no Euler loop that is known: its module does not call {SEAM}, as those of "
            "pi0, pi0.5, SmolVLA and EO-1 do"
        )
    return found[0]


@contextmanager
def _stopped(module: Any) -> Iterator[None]:
    """Inside, the loop raises _Prepared instead of running."""

    def stop(denoise: FunctionType, noise: Tensor, num_steps: int, *, rtc_enabled: bool = False, **rest: Any) -> Tensor:
        if rtc_enabled:
            raise ValueError("real-time chunking changes the velocity by the chunk before: load with rtc_config off")
        raise _Prepared(denoise, noise)

    loop = vars(module)[SEAM]
    setattr(module, SEAM, stop)
    try:
        yield
    finally:
        setattr(module, SEAM, loop)


class LeRobotField(VelocityField):
    """A LeRobot flow policy; an observation is what `processors` read, without them the batch of LeRobot's own.

    `example` is a batch, as a dict of tensors. Parameters that no gradient of the velocity reaches (the vision-language
    model of pi0, pi0.5 and SmolVLA, EO-1's eyes) are frozen: the prefix runs once per decision, without a graph.
    "pooled" is the mean of the last cached values over the prefix, normalised, beside the state as processed. A sample
    is a whole padded chunk (chunk_size, max_action_dim), for at earlier steps the padding moves the rest. Only what
    trains is part of `state_dict`.
    """

    own_format, builder = True, "rlflow.models.lerobot.opening:lerobot"

    def __init__(self, policy: nn.Module, example: Tree, processors: Processors | None = None):
        super().__init__()
        self._seam, config = seam_of(policy), getattr(policy, "config", None)
        if getattr(config, "compile_model", False):
            raise ValueError("a compiled loop cannot be replaced: load the policy with compile_model=False")
        self.policy, self.processors, self.args = policy, processors, {}
        self.decodes_actions = processors is not None
        self.num_actions = None if processors is None else processors.num_actions
        self._rebuild: dict[str, Rebuild] = {}
        few = self._looked(example, 2)
        self._read: set[nn.Parameter] = set()
        with self._watched():
            more = self._looked(example, 3)
        self._axes = axes_of(few, more)
        cond = self._encoded(_rows(example, 2))
        self.num_features = cond["pooled"].shape[1]
        self._frozen = self._freeze(cond)
        self._keep_only_trained()

    # -- the condition ------------------------------------------------------------------------------

    @torch.no_grad()
    def _prepare(self, batch: Tree) -> _Prepared:
        """Let the policy do all that comes before its loop."""
        policy: Any = self.policy
        policy.reset()
        try:
            with _stopped(self._seam):
                policy.predict_action_chunk(as_list(batch))
        except _Prepared as prepared:
            return prepared
        raise ValueError(f"{type(policy).__name__}.predict_action_chunk ended without a denoising step")

    def _looked(self, example: Tree, num: int) -> dict[str, Tensor]:
        """The tensors of the condition of `num` rows."""
        prepared = self._prepare(_rows(example, num))
        self.event_shape, self._dtype = tuple(prepared.noise.shape[1:]), prepared.noise.dtype
        return tensors(cells(prepared.denoise))

    def _encoded(self, batch: Tree) -> Cond:
        prepared, parts = self._prepare(batch), dict[str, Tensor]()
        held = cells(prepared.denoise)
        self._denoise = prepared.denoise
        self._rebuild = {n: take_apart(v, n, self._axes, parts) for n, v in held.items()}
        return Cond(parts | {"pooled": pooled(parts, batch.get("observation.state"))})

    def encode(self, obs: Tree) -> Cond:
        """What the policy prepares for observations, as tensors that lead with N; its prefix runs once."""
        return self._encoded(obs if self.processors is None else self.processors.before(obs))

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        """Velocity (N, chunk_size, max_action_dim) at x and t (N,); dt is ignored."""
        held = {name: rebuild(cond) for name, rebuild in self._rebuild.items()}
        return -again(self._denoise, held)(x.to(self._dtype), (1 - t).float())

    def decode(self, x: Tensor) -> Tensor:
        """Samples to actions (N, H, A) in the environment's own units."""
        return x if self.processors is None else self.processors.after(x)

    # -- what trains --------------------------------------------------------------------------------

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Note the parameters of the modules that run inside: those of the prefix."""

        def note(module: nn.Module, *_: Any) -> None:
            self._read |= set(module.parameters(recurse=False))

        hooks = [module.register_forward_pre_hook(note) for module in self.policy.modules()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _freeze(self, cond: Cond) -> list[nn.Parameter]:
        """Stop the training of what the velocity does not depend on; those parameters."""
        x = cond["pooled"].new_zeros(len(cond), *self.event_shape)
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        if not trained:
            raise ValueError("no parameter trains: unfreeze the action expert before wrapping the policy")
        with torch.enable_grad():
            v = self(x, x.new_full((len(x),), 0.5), x.new_zeros(len(x)), cond)
        grads = torch.autograd.grad(v.square().sum(), trained, allow_unused=True)
        frozen = [p for p, grad in zip(trained, grads, strict=True) if grad is None]
        for p in frozen:
            p.requires_grad_(False)
        return frozen

    def encoder_parameters(self) -> list[nn.Parameter]:
        """What the prefix reads: encodings are kept where none of it trains. No gradient goes into the prefix."""
        return [*self._frozen, *(p for p in self._read if p.requires_grad)]

    @property
    def grad_checkpointing(self) -> bool:
        """Not on offer."""
        return False

    @grad_checkpointing.setter
    def grad_checkpointing(self, on: bool) -> None:
        if on:
            raise ValueError(
                f"{type(self.policy).__name__} recomputes nothing in evaluation mode, in which it samples and is "
                "scored: set policy.grad_checkpointing=false and lower algorithm.micro_batch"
            )

    # -- files --------------------------------------------------------------------------------------

    def _keep_only_trained(self) -> None:
        """Leave what is frozen out of `state_dict`, and out of what loading one asks for."""
        kept = {f"policy.{name}" for name, p in self.policy.named_parameters() if p.requires_grad}

        def without_base(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
            for name in [n for n in state if n.startswith(prefix) and n.removeprefix(prefix) not in kept]:
                del state[name]

        def not_missing(module: nn.Module, keys: Any) -> None:
            keys.missing_keys[:] = [k for k in keys.missing_keys if any(k.endswith(name) for name in kept)]

        self.register_state_dict_post_hook(without_base)
        self.register_load_state_dict_post_hook(not_missing)

    def save_weights(self, folder: Path) -> None:
        """What trained, for `policy.field`; `save_policy` writes the policy for plain LeRobot."""
        if not self.args:
            raise ValueError(
                "a policy wrapped in Python does not say where it came from: save it in LeRobot's own format by "
                "rlflow.models.lerobot.export.save_policy(field, DIR), or open it by {name: lerobot, checkpoint: ...}"
            )
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        check_finite(state, f"{folder / TRAINED} was not written")
        save_tensors(state, folder / TRAINED)

    def load_weights(self, folder: Path) -> None:
        """Inverse of `save_weights`."""
        state = read_tensors(folder / TRAINED)
        check_finite(state, str(folder / TRAINED))
        self.load_state_dict(state)


def _rows(example: Tree, num: int) -> Tree:
    """The first row of a batch, `num` times."""
    return tree_map(lambda v: v[:1].repeat(num, *[1] * (v.ndim - 1)), example)
