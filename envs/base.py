"""VecEnv: the one environment contract, image or robot. Batched tensors on one device; B rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlflow.parallel import dist
from rlflow.rewards.base import RewardSet
from rlflow.types import Step, Tree, tree_leaves


class VecEnv:
    """`recv(send(action))` advances every row once; an image environment ends every episode at once (T = 1)."""

    num_envs: int
    """B, rows of this process."""
    action_shape: tuple[int, ...]
    """*D of one action."""
    horizon: int
    """Longest episode in steps."""
    device: torch.device = torch.device("cpu")
    obs_spec: Tree = None
    """One row's observation as meta tensors (shape and dtype); None where it is not told."""
    exact_resume: bool = True
    """False when the simulator cannot be saved; a resumed run is then equal in law only."""

    tasks: Sequence[str] = ()
    """Names of what rows are asked to do, where that differs."""
    targets: Sequence[float] = ()
    """Returns that rows are asked for in turn, where they are (`Targeted`)."""
    watch: Callable[[], None] | None = None
    """Called after every primitive step, in mid-chunk too; of a chunk's calls a row's first `num_steps` are its."""
    step_seconds: float = 0.04
    """Of a primitive step, by which films are timed."""
    once: bool = False
    """True where nobody looks at a row after its end until the next reset: it may rest then, not valid, as it ended."""

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tree:
        """Start an episode per row from its seed (B,) (rows with mask False keep theirs); observations (B, ...)."""
        raise NotImplementedError

    def send(self, action: Tensor, rows: slice) -> None:
        """Hand over the actions of `rows`; may return before they are carried out."""
        raise NotImplementedError

    def recv(self) -> Step:
        """Wait for every row sent; observations are those after an automatic reset of ended rows."""
        raise NotImplementedError

    def step(self, action: Tensor) -> Step:
        """recv(send(action))."""
        self.send(action, slice(0, self.num_envs))
        return self.recv()

    @property
    def asked(self) -> Tensor:
        """(B,) number of each row's task among `tasks`."""
        return torch.zeros(self.num_envs, dtype=torch.long, device=self.device)

    @property
    def earned(self) -> Tensor:
        """(B,) undiscounted return of each row's running episode so far; NotImplementedError where nobody counts."""
        raise NotImplementedError(
            f"{type(self).__name__} does not say what episodes have earned: give it `earned` (B,)"
        )

    @property
    def obs_dim(self) -> int:
        """Numbers in one row's observation."""
        return sum(leaf.numel() for leaf in tree_leaves(self.obs_spec))

    @property
    def reward_weights(self) -> dict[str, float]:
        """Weights when several rewards are to be combined as advantages; otherwise empty."""
        return {}

    @property
    def unwrapped(self) -> VecEnv:
        """The environment inside all wrappers."""
        return self

    def render(self, row: int, size: tuple[int, int] = (192, 192)) -> Tensor:
        """(H, W, 3) uint8 picture of one row as it stands; NotImplementedError where there is none."""
        raise NotImplementedError(f"{type(self).__name__} draws no pictures")

    def metrics(self) -> dict[str, float]:
        """Counters since the last call (masked rewards, seconds); all ranks have to ask at once."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """JSON-able and tensor state: simulator, RNG, elapsed steps.

        Tensors that lead with B, and 0-d ones for what all rows share, can be dealt to another number of processes.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""


def reward_metrics(rewards: RewardSet) -> dict[str, float]:
    """Means, masked shares and seconds of rewards since the last call; failed calls summed over all ranks."""
    out = rewards.metrics()
    names = [f"reward/{name}/errors" for name in rewards.weights]
    failed = dist.all_sum(torch.tensor([out.pop(name, 0.0) for name in names], dtype=torch.float64))
    return out | {name: number for name, number in zip(names, failed.tolist(), strict=True) if number}


def told_scores(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scores of N episodes (N,) without a success that nobody tells; where one tells, the silent ones have failed."""
    silent = {name for name, value in scores.items() if name.endswith("success") and bool(value.isnan().all())}
    told = {name: value for name, value in scores.items() if name not in silent}
    return {name: value.nan_to_num() if name.endswith("success") else value for name, value in told.items()}
