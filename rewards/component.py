"""What a reward is before it runs: a function, or a class whose instances are called, with columns and settings.

    def sharpness(images, prompt, radius=2): ...        columns images, prompt; setting radius
    class Sharpness: __init__(self, model); __call__(self, images): ...    column images; setting model

Parameters without a default are columns, of a function or of `__call__`; settings are what a recipe says under
`reward.settings.NAME`. A class is made once, before the first iteration, so a missing model is said at the start.

    @differentiable
    def softness(images): ...        where `wants_graph(images)`, returns a tensor (N,) with a graph to them
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlflow import registry

C = TypeVar("C", bound=Callable[..., Any])

Settings = Mapping[str, Mapping[str, Any]]
"""Settings by reward name; the key `name` inside says which reward it is, where that is not the name itself."""


def column_names(fn: Callable[..., Any]) -> tuple[str, ...]:
    """The columns `fn` reads: its parameters without a default; those with one are options, never filled."""
    columns = []
    for name, p in inspect.signature(fn).parameters.items():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY):
            raise ValueError(f"reward function {fn!r}: parameter {p} names no column; write plain parameters")
        if p.default is p.empty:
            columns.append(name)
    return tuple(columns)


def reads(columns: Sequence[str]) -> inspect.Signature:
    """A signature of `columns`: as `self.__signature__` it says what an instance reads, where that is a setting."""
    return inspect.Signature([inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in columns])


def differentiable(reward: C) -> C:
    """Declare that a function, or a class's instances, return scores with a graph to images that have one.

    They are then on the images' device; nothing may be rounded or detached on the way to them.
    """
    reward.differentiable = True  # type: ignore[attr-defined]
    return reward


def is_differentiable(fn: Callable[..., Any]) -> bool:
    """Whether a reward, with its settings filled in or not, was declared so."""
    return bool(getattr(fn.func if isinstance(fn, partial) else fn, "differentiable", False))


def wants_graph(images: Tensor) -> bool:
    """Whether a gradient by these images is asked for: scores that are only logged may read 8-bit pictures."""
    return torch.is_grad_enabled() and images.requires_grad


def _spec(name: str, settings: Settings) -> dict[str, Any]:
    return {"name": name, **settings.get(name, {})}


def _supplied(spec: Any, trust_code: bool) -> tuple[str, ...]:
    """Parameters that a recipe may not set: the columns of a function."""
    found = registry.find("reward", spec["name"], trust_code)
    return () if inspect.isclass(found) else column_names(found)


def check_reward(section: str, name: str, settings: Settings, trust_code: bool = False) -> None:
    """ValueError where the reward `name`, asked for in `section`, does not exist or its settings are wrong."""
    spec = _spec(name, settings)
    registry.split_spec(f"reward.settings.{name}", spec)  # its name is one
    if registry.must_be_given(spec["name"]):
        return  # a run whose reward was a notebook's function still loads and samples; `make_reward` says so
    with registry.located(section if spec["name"] == name else f"reward.settings.{name}"):
        supplied = _supplied(spec, trust_code)
    registry.validate("reward", f"reward.settings.{name}", spec, supplied, trust_code)


def check_unused(settings: Settings, used: Sequence[str]) -> None:
    """ValueError for settings of a reward that nothing asks for."""
    for name in settings:
        if name not in used:
            raise ValueError(
                f"reward.settings.{name}: reward.weights and eval.metrics ask for no such reward"
                f"{registry.nearest(name, used)}"
            )


def make_reward(name: str, settings: Settings, trust_code: bool = False) -> Callable[..., Any]:
    """What a RewardSet calls: the function with its settings filled in, or an instance of the class."""
    path, spec = f"reward.settings.{name}", _spec(name, settings)
    found = registry.find("reward", spec["name"], trust_code)
    if inspect.isclass(found):
        return registry.build("reward", path, spec, trust_code=trust_code)
    chosen = registry.validate("reward", path, spec, column_names(found), trust_code)
    return partial(found, **chosen) if chosen else found
