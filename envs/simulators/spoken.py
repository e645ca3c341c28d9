"""What a robot is asked to do, as a part of what it observes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlflow.envs.sim import Outcome, Sim
from rlflow.types import Tree, as_bytes

LENGTH = 256
"""Bytes of a sentence."""


class Spoken(Sim):
    """A simulation whose rows are told what to do by a sentence: "task", (LENGTH,) uint8 of its UTF-8.

    `ask()` gives the sentences of all rows, after every reset. What is observed besides stays; where it was no dict it
    is "state".
    """

    def __init__(self, sim: Sim, ask: Callable[[], Sequence[str]]):
        self.sim, self.ask = sim, ask
        self.num_envs, self.low, self.high, self.horizon = sim.num_envs, sim.low, sim.high, sim.horizon
        self.max_chunk, self.device, self.step_seconds = sim.max_chunk, sim.device, sim.step_seconds
        self.tasks, self.exact_resume = sim.tasks, sim.exact_resume
        self._words = as_bytes([""] * sim.num_envs, LENGTH)
        self.obs_spec = self._with(sim.obs_spec, torch.empty(LENGTH, dtype=torch.uint8, device="meta"))

    def _with(self, obs: Tree, words: Tensor) -> Tree:
        return {**(obs if isinstance(obs, dict) else {"state": obs}), "task": words}

    @property
    def asked(self) -> Tensor:  # type: ignore[override]
        """As the simulation's."""
        return self.sim.asked

    def reset(self, seeds: Tensor, mask: Tensor) -> Tree:
        """The simulation's, and what is asked from now on."""
        obs = self.sim.reset(seeds, mask)
        self._words = as_bytes(self.ask(), LENGTH)
        return self._with(obs, self._words)

    def advance(self, action: Tensor) -> Outcome:
        """The simulation's."""
        out = self.sim.advance(action)
        return replace(out, obs=self._with(out.obs, self._words))

    def render(self, row: int, size: tuple[int, int]) -> Tensor:
        """The simulation's."""
        return self.sim.render(row, size)

    def state_dict(self) -> dict[str, Any]:
        """The simulation's."""
        return self.sim.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.sim.load_state_dict(state)
