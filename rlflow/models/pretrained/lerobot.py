"""LeRobot's pi0 and SmolVLA as velocity fields: rlflow replaces their Euler loop and nothing else.

Both policies end in one loop, x <- x - denoise_step(..., x_t=x, timestep=s) / K from s = 1 (noise) to 0 (actions), over
what their `sample_actions` made of the observation: a cache of keys and values, masks, for pi0 also the state. That is
their condition: `encode` lets the policy prepare everything itself and stops it at the first denoising step, and

    v(x, t) = -denoise_step(**condition, x_t=x, timestep=1 - t).

LeRobot is not imported: any policy with `config.chunk_size`, `config.max_action_dim`, `predict_action_chunk` and
`model.denoise_step` will do (LeRobot 0.6; Black et al. 2024, Shukor et al. 2025).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from rlflow.files import as_readable
from rlflow.flow.field import VelocityField
from rlflow.types import Cond, Tree

NEEDED = ("chunk_size", "max_action_dim")
Rebuild = Callable[[Cond], Any]


class _Prepared(Exception):
    """Carries what the policy would have denoised with."""

    def __init__(self, condition: dict[str, Any]):
        self.condition = condition


@contextmanager
def _stopped(model: nn.Module) -> Iterator[None]:
    """Inside, `model.denoise_step` raises _Prepared instead of running."""

    def stop(*, x_t: Tensor, timestep: Tensor, **condition: Any) -> Tensor:
        raise _Prepared(condition)

    model.denoise_step = stop  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.denoise_step  # the class's own shows again


class LeRobotField(VelocityField):
    """A LeRobot flow policy; an observation is the batch that its own preprocessor makes, as a dict of tensors.

    `example` is such a batch. Parameters that no gradient of the velocity reaches (the vision-language model) are
    frozen: the prefix runs once per decision. "pooled" is the mean of the last cached values over the prefix.
    A sample is a whole padded chunk (chunk_size, max_action_dim), for at earlier steps the padding moves the rest.
    """

    own_format = True

    def __init__(self, policy: nn.Module, example: Tree):
        super().__init__()
        config: Any = getattr(policy, "config", None)
        missing = [name for name in NEEDED if getattr(config, name, None) is None]
        if missing or getattr(getattr(policy, "model", None), "denoise_step", None) is None:
            raise ValueError(f"{type(policy).__name__} has no Euler loop that is known: config lacks {missing}")
        if getattr(config, "compile_model", False):
            raise ValueError("a compiled loop cannot be replaced: load the policy with compile_model=False")
        self.policy, self.args = policy, {}
        self.event_shape = (int(config.chunk_size), int(config.max_action_dim))
        self._rebuild: dict[str, Rebuild] = {}
        cond = self.encode(example)
        self.num_features = cond["pooled"].shape[1]
        self._frozen = self._freeze(cond)

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
        """What is frozen: encodings are kept."""
        return self._frozen

    def save_weights(self, folder: Path) -> None:
        """Refused: this format could not be read again."""
        raise ValueError(
            "a LeRobot policy is saved in LeRobot's own format: "
            "rlflow.models.pretrained.lerobot.save_policy(field, DIR)"
        )

    @torch.no_grad()
    def encode(self, obs: Tree) -> Cond:
        """What the policy prepares for a batch, as tensors that lead with N; its prefix runs once."""
        policy: Any = self.policy
        policy.reset()
        try:
            with _stopped(policy.model):
                policy.predict_action_chunk(dict(obs))
        except _Prepared as prepared:
            parts: dict[str, Tensor] = {}
            self._rebuild = {n: _take_apart(v, n, parts) for n, v in prepared.condition.items()}
            return Cond(parts | {"pooled": _pooled(parts)})
        raise ValueError(f"{type(policy).__name__}.predict_action_chunk ended without a denoising step")

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        """Velocity (N, chunk_size, max_action_dim) at x and t (N,); dt is ignored."""
        condition = {name: rebuild(cond) for name, rebuild in self._rebuild.items()}
        model: Any = self.policy.model
        return -model.denoise_step(**condition, x_t=x, timestep=(1 - t).to(x.dtype))


def _take_apart(value: Any, name: str, parts: dict[str, Tensor]) -> Rebuild:
    """Put the tensors of a condition into `parts` by name; returns what makes the like of it from a Cond's rows.

    Tensors, dicts of them, caches with `layers` of keys and values, and constants. A cache is made anew at every
    call, for a step of the policy may append to it.
    """
    if isinstance(value, Tensor):
        parts[name] = value.contiguous()  # as rows taken from it are, or matrix products would round otherwise
        return lambda cond: cond[name]
    if isinstance(value, dict):
        inner = {k: _take_apart(v, f"{name}.{k}", parts) for k, v in value.items()}
        return lambda cond: {k: rebuild(cond) for k, rebuild in inner.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return lambda cond: value
    layers = [
        _take_apart({"keys": v.keys, "values": v.values}, f"{name}.{i}", parts) for i, v in enumerate(value.layers)
    ]
    return lambda cond: _cache(value, [rebuild(cond) for rebuild in layers])


def _cache(like: Any, layers: list[dict[str, Tensor]]) -> Any:
    """A cache like another one, with its own keys and values."""
    made = copy.copy(like)
    made.layers = [copy.copy(layer) for layer in like.layers]
    for layer, kept in zip(made.layers, layers, strict=True):
        layer.keys, layer.values = kept["keys"], kept["values"]
    return made


def _pooled(parts: dict[str, Tensor]) -> Tensor:
    """(N, F) mean of the last values, (N, L, heads, d) or (N, heads, L, d), over valid tokens, and the state."""
    mask = parts["prefix_pad_masks"]
    last = [v for name, v in parts.items() if "value" in name.rpartition(".")[2]][-1]
    tokens = (last if last.shape[1] == mask.shape[1] else last.transpose(1, 2)).flatten(2).float()
    mean = (tokens * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    return torch.cat([mean, *(parts[n].flatten(1).float() for n in ("state",) if n in parts)], 1)


def save_policy(field: VelocityField, folder: str) -> None:
    """Write the weights in place as LeRobot does; plain LeRobot loads and runs them, with the processors beside it."""
    assert isinstance(field, LeRobotField)
    policy: Any = field.policy
    policy.save_pretrained(folder)
    as_readable(Path(folder))
