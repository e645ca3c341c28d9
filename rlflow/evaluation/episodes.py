"""Evaluation in a simulator: exactly `num` seeded episodes, each a row of its own, with the deployment sampler.

The seeds are no training seeds. Every row plays its first episode to the end, so long episodes are not left out
and short ones do not count twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlflow.envs.base import VecEnv, told_scores
from rlflow.envs.seeds import evaluation_seeds
from rlflow.envs.targets import rank_correlation
from rlflow.evaluation.film import Film
from rlflow.evaluation.images import Calls, deployed
from rlflow.files import save_tensors
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.select import Select
from rlflow.flow.solvers import Adaptive, Solver
from rlflow.flow.steps import Steps
from rlflow.parallel import dist
from rlflow.registry import located
from rlflow.report.pairing import kept, sample_keys
from rlflow.types import Step, Tree, tree_map

Act = Callable[[Tree, Tensor, int], Tensor]
"""(observations of M episodes, their numbers (M,), step) -> actions."""


@dataclass(frozen=True)
class Episodes:
    """Of N episodes by name (N,): success where the simulator knows it, return (undiscounted), length (steps).

    Those of the same starts played with the noise of training, where they were asked for, are named train_success, ...
    """

    scores: dict[str, Tensor]
    film: Film = field(default_factory=Film)
    task: Tensor | None = None  # (N,) of `tasks`
    tasks: Sequence[str] = ()
    key: Tensor | None = None  # (N,) of what was asked in each
    targets: Sequence[float] = ()  # of the tasks, where they are returns to be reached
    calls: float | None = None  # network rows of an action, where it was deployed

    def __len__(self) -> int:
        return len(self.scores["return"])

    @property
    def about(self) -> str:
        """What was evaluated, in words."""
        return f"{len(self)} seeded episodes"

    def means(self) -> dict[str, float]:
        """Mean over the episodes; "calls" over their actions, and how the returns follow the targets."""
        told = {} if self.calls is None else {"calls": self.calls}
        if len(self.targets) > 2:
            told["rank_correlation"] = rank_correlation(torch.tensor(self.targets), torch.stack(self._achieved()))
        return {name: float(score.nanmean()) for name, score in self.scores.items()} | told

    def _achieved(self) -> list[Tensor]:
        """Mean return of each task's episodes."""
        return [self.scores["return"][self.task == i].nanmean() for i in range(len(self.tasks))]

    def by_task(self) -> dict[str, float]:
        """Share of each task's episodes that reached their goal, or their mean return; {} where all are asked alike."""
        if self.targets and self.tasks:
            return {name: float(value) for name, value in zip(self.tasks, self._achieved(), strict=True)}
        if self.task is None or "success" not in self.scores:
            return {}
        shares = {name: self.scores["success"][self.task == i].nanmean() for i, name in enumerate(self.tasks)}
        return {name: float(share) for name, share in shares.items() if not bool(share.isnan())}

    def save(self, path: Path) -> None:
        """Per-episode scores, for paired comparisons later: row i is the same seed in every evaluation."""
        save_tensors(kept(self.scores, torch.arange(len(self)), self.key), path)

    def show(self, folder: Path, iteration: int, num: int) -> dict[str, Path]:
        """Write the films of the first episodes; returns them by name."""
        return {f"eval/film_{i}": path for i, path in enumerate(self.film.save(folder, iteration))}


class EpisodeEvaluator:
    """Plays the same `num` episodes each time it is called; the ranks share them.

    `noise` is the start of every denoising chain: 'random' as in training; 'fixed', one draw per episode for all of
    its steps; 'zero'. `make(num_envs)` gives an environment without reward wrappers. With `noisy`, the plan of
    training, all episodes are played a second time as training samples them: the gap between the two is told. `world`,
    JSON-able, is what tells this environment from others.
    """

    _task: Tensor  # of this rank's episodes

    def __init__(
        self,
        policy: FlowPolicy,
        make: Callable[[int], VecEnv],
        *,
        num: int = 40,
        num_steps: int | None = None,
        solver: Solver | None = None,
        seed: int = 0,
        rows_per_call: int = 100,
        noise: Literal["random", "fixed", "zero"] = "random",
        video: int | None = 0,
        noisy: Steps | None = None,
        world: Any = None,
        select: Select | None = None,
    ):
        with located("eval.num_steps"):
            policy.plan(num_steps)
        with located("eval.solver"):
            policy.check_solver(solver or policy.solver)
        self.policy, self.num, self.num_steps, self.solver, self.seed = policy, num, num_steps, solver, seed
        self.select = select or Select()
        self.rows_per_call = max(1, rows_per_call // self.select.num)
        self.noise, self.video, self.noisy = noise, video, noisy
        self.key = torch.from_numpy(sample_keys([world, seed, i] for i in range(num)))
        self.rows = torch.arange(num).tensor_split(dist.world())[dist.rank()]
        self.env = make(len(self.rows))
        # where rows differ in calls their mean is over all of them, those whose episode has ended too
        self.env.unwrapped.once = not isinstance(solver or policy.solver, Adaptive)
        self._calls = Calls(policy)

    @torch.no_grad()
    def __call__(self, weights: str = "live") -> Episodes:
        """Evaluate one weight set."""
        film = Film(self.env, self.video if dist.rank() == 0 else 0)
        self._calls.begin()
        with self.policy.using(weights):
            with film:
                mine = self._play(self._deployed, film)
            if self.noisy is not None:
                train = self._play(partial(self._trained, self.noisy), Film())
                mine |= {f"train_{name}": value for name, value in train.items()}
        self.env.metrics()  # says what was not finite
        scores = told_scores({name: dist.gather_shares(value, self.num) for name, value in mine.items()})
        calls = self._calls.mean()
        if not self.env.tasks:
            return Episodes(scores, film, key=self.key, calls=calls)
        task = dist.gather_shares(self._task, self.num).long()
        return Episodes(scores, film, task, self.env.tasks, self.key, self.env.targets, calls)

    def _play(self, act: Act, film: Film) -> dict[str, Tensor]:
        """Scores of this rank's episodes."""
        env = self.env
        obs = env.reset(evaluation_seeds(self.seed, self.num)[self.rows])
        self._task = self.env.asked.float().cpu().clone()
        alive = torch.ones(len(self.rows), dtype=torch.bool, device=env.device)
        total = torch.zeros(len(self.rows), device=env.device)
        told: dict[str, Tensor] = {}
        for step in range(env.horizon):
            for part in torch.arange(len(self.rows)).split(self.rows_per_call):
                rows = slice(int(part[0]), int(part[-1]) + 1)
                env.send(act(tree_map(lambda v: v[rows], obs), self.rows[rows], step), rows)  # noqa: B023
            out = env.recv()
            total = total + torch.where(alive, out.reward.nan_to_num(), 0.0)
            told = _tell(told, out, alive)
            film.cut(out.ended)
            alive = alive & ~out.ended
            obs = out.obs
            if not bool(alive.any()):
                break
        scores = {"success": told["success"]} if "success" in told else {}
        scores["return"] = told.get("episode_return", total)
        scores |= {"length": told["episode_length"]} if "episode_length" in told else {}
        return {name: value.float().cpu() for name, value in scores.items()}

    def _deployed(self, obs: Tree, ids: Tensor, step: int) -> Tensor:
        """Actions of the episodes `ids` (M,) at one step, without noise but that of the start."""
        policy = self.policy
        zero = torch.zeros(len(ids), *policy.event_shape, dtype=policy.dtype, device=policy.device)
        key = Key(self.seed, "evaluate", outer=0 if self.noise == "fixed" else step)
        with deployed(policy, self.solver), self._calls.count(len(ids)):
            x_0, plan = zero if self.noise == "zero" else None, policy.plan(self.num_steps)
            return self.select(policy, policy.encode(obs), obs, plan, key, ids, x_0)

    def _trained(self, steps: Steps, obs: Tree, ids: Tensor, step: int) -> Tensor:
        """The same with the noise and the number of steps of training."""
        policy, key = self.policy, Key(self.seed, "evaluate", outer=step)
        plan = steps(0, policy.grid(policy.num_steps), ids + step * self.num)
        return policy.squash(policy.sample(policy.encode(obs), plan, key=key, row_ids=ids).final)

    def compare_with(self, policy: FlowPolicy) -> None:
        """Episodes are judged alone."""

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing is carried from one evaluation to the next."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`."""


def _tell(told: dict[str, Tensor], out: Step, alive: Tensor) -> dict[str, Tensor]:
    """What the environment tells of an episode at its end, kept from a row's first end on."""
    ends = alive & out.ended
    known = [name for name in ("success", "episode_return", "episode_length") if name in out.info]
    blank = torch.full_like(out.reward, torch.nan)
    return {name: torch.where(ends, out.info[name].to(blank), told.get(name, blank)) for name in known}
