"""Toy environments with a known optimum, thousands of rows at once on any device: tests, docs, the matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlflow.envs.base import VecEnv
from rlflow.envs.demos.dataset import Episode
from rlflow.envs.seeds import uniform
from rlflow.envs.sim import Outcome, Sim, SimEnv
from rlflow.ranges import Count, Size
from rlflow.types import Step, Tree, tree_map, tree_where

CENTRES = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])


class ToyImage(VecEnv):
    """T = 1: the observation is one of four one-hot 'prompts', the action a point, reward -|action - centre|."""

    horizon, action_shape, obs_dim = 1, (2,), 4

    def __init__(self, num_envs: int = 64):
        self.num_envs = num_envs
        self.obs_spec = torch.empty(4, device="meta")
        self.obs = torch.zeros(num_envs, 4)
        self.action = torch.zeros(num_envs, 2)

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tree:
        obs = torch.nn.functional.one_hot(seeds % 4, 4).float()
        self.obs = obs if mask is None else tree_where(mask, obs, self.obs)
        return self.obs

    def send(self, action: Tensor, rows: slice) -> None:
        self.action[rows] = action.detach().float()

    def recv(self) -> Step:
        reward = -(self.action - self.obs @ CENTRES).norm(dim=-1)
        done = torch.ones(self.num_envs, dtype=torch.bool)
        return Step(self.obs, reward, done, ~done, None, done.clone(), {})


class ToySim(Sim):
    """A simulator whose whole state is a few tensors: `start(seeds)` makes them, `observe()` shows them."""

    exact_resume = True

    def __init__(self, num_envs: int, num_actions: int, horizon: int, device: str = "cpu"):
        self.num_envs, self.horizon, self.device = num_envs, horizon, torch.device(device)
        self.high = torch.ones(num_actions, device=device)
        self.low, self.centres = -self.high, CENTRES.to(device)
        self.state = self.start(torch.zeros(num_envs, dtype=torch.long, device=device))
        self.obs_spec = tree_map(lambda v: torch.empty(v.shape[1:], dtype=v.dtype, device="meta"), self.observe())

    def start(self, seeds: Tensor) -> dict[str, Tensor]:
        """First states (B, ...) of episodes with `seeds` (B,)."""
        raise NotImplementedError

    def observe(self) -> Tree:
        """Observations of the present states."""
        raise NotImplementedError

    def reset(self, seeds: Tensor, mask: Tensor) -> Tree:
        """First states in the rows of `mask`."""
        self.state = tree_where(mask, self.start(seeds), self.state)
        return self.observe()

    def state_dict(self) -> dict[str, Any]:
        """The state."""
        return tree_map(torch.clone, self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.state = {name: value.to(self.device, copy=True) for name, value in state.items()}


# -- reach ----------------------------------------------------------------------------------------


class ReachSim(ToySim):
    """A point mass moved by velocity commands to a goal in one of four corners."""

    def start(self, seeds: Tensor) -> dict[str, Tensor]:
        spread = (seeds.double() * 0.6180339887498949 + 0.7548776662466927).frac()  # even over neighbouring seeds
        goal = self.centres[seeds % 4] * (0.6 + 0.8 * spread.float().unsqueeze(1))
        return {"goal": goal, "state": torch.zeros_like(goal)}

    def observe(self) -> Tree:
        return dict(self.state)

    def advance(self, action: Tensor) -> Outcome:
        self.state["state"] = self.state["state"] + 0.25 * action
        distance = (self.state["state"] - self.state["goal"]).norm(dim=-1)
        return Outcome(self.observe(), -distance / 2, torch.zeros_like(distance, dtype=torch.bool))


class ToyReach(SimEnv):
    """A point mass that a chunk of two velocity commands moves to a goal; reward is minus the mean distance.

    `horizon` steps, then a truncation (time limit), with automatic reset to the row's next goal.
    Observation: {"state": position, "goal": goal}, a dict like a robot's. Best: full speed to the goal, then rest.
    """

    action_shape, obs_dim = (2, 2), 4

    def __init__(self, num_envs: int = 32, horizon: Count = 4, gamma: float = 1.0, device: str = "cpu"):
        super().__init__(ReachSim(num_envs, 2, 2 * horizon, device), chunk=2, gamma=gamma)


# -- bandit ---------------------------------------------------------------------------------------


class BanditSim(ToySim):
    """One pull: four peaks over the plane of actions, of heights 1, .8, .6 and .4."""

    def start(self, seeds: Tensor) -> dict[str, Tensor]:
        return {"obs": torch.ones(len(seeds), 1, device=seeds.device)}

    def observe(self) -> Tree:
        return self.state["obs"]

    def advance(self, action: Tensor) -> Outcome:
        distance = (action.unsqueeze(1) - 0.5 * self.centres).square().sum(-1)
        heights = torch.linspace(1.0, 0.4, 4, device=self.device)
        reward = (heights * torch.exp(-distance / (2 * 0.15**2))).amax(-1)
        return Outcome(self.observe(), reward, torch.ones_like(reward, dtype=torch.bool))


class ToyBandit(SimEnv):
    """A bandit with four modes at (+-.5, +-.5): reward max_k h_k exp(-|a - c_k|^2 / (2 .15^2)), h = 1, .8, .6, .4.

    Best: 1, at (.5, .5). A Gaussian policy that averages the modes plays (0, 0) and gets e^-11.
    """

    action_shape, obs_dim = (1, 2), 1

    def __init__(self, num_envs: int = 64, device: str = "cpu"):
        super().__init__(BanditSim(num_envs, 2, 1, device), chunk=1, gamma=1.0)


# -- a small MDP ----------------------------------------------------------------------------------


class MDPSim(ToySim):
    """Three states in a row: a > 0 goes right, any other action costs a little and goes back to the left end."""

    BACK = -0.05

    def start(self, seeds: Tensor) -> dict[str, Tensor]:
        return {"place": torch.zeros_like(seeds)}

    def observe(self) -> Tree:
        return torch.nn.functional.one_hot(self.state["place"].clamp(max=2), 3).float()

    def advance(self, action: Tensor) -> Outcome:
        right = action[:, 0] > 0
        place = torch.where(right, self.state["place"] + 1, 0)
        self.state["place"] = place
        done = place > 2
        return Outcome(self.observe(), torch.where(right, done.float(), self.BACK), done)


class ToyMDP(SimEnv):
    """Three states with known values. a > 0 moves right and pays 1 beyond the last, the end; else -.05 and back to 0.

    Under a policy that goes right with probability p (q = 1 - p), with S = 1 + p gamma + p^2 gamma^2,

        V_0 = (p^3 gamma^2 - .05 q S) / (1 - q gamma S),   W = gamma V_0 - .05,
        V_2 = p + q W,   V_1 = p gamma V_2 + q W;       best: p = 1, V_k = gamma^(2 - k).

    The time limit is no part of these: a critic finds them only if it bootstraps where an episode is cut off.
    """

    action_shape, obs_dim = (1, 1), 3

    def __init__(self, num_envs: int = 64, horizon: Count = 6, device: str = "cpu"):
        super().__init__(MDPSim(num_envs, 1, horizon, device), chunk=1)

    @staticmethod
    def values(p: float, gamma: float) -> list[float]:
        """[V_0, V_1, V_2], see above."""
        q, s = 1 - p, 1 + p * gamma + (p * gamma) ** 2
        first = (p**3 * gamma**2 + MDPSim.BACK * q * s) / (1 - q * gamma * s)
        back = MDPSim.BACK + gamma * first
        last = p + q * back
        return [first, p * gamma * last + q * back, last]


# -- two routes -----------------------------------------------------------------------------------


class RoutesSim(ToySim):
    """A point mass west of a round obstacle, the goal east of it."""

    SPEED, RADIUS, NEAR = 0.2, 0.5, 0.15

    def start(self, seeds: Tensor) -> dict[str, Tensor]:
        height = 0.1 * (2 * uniform(seeds, 1).float() - 1)
        return {"position": torch.cat([-torch.ones_like(height), height], 1)}

    def observe(self) -> Tree:
        return self.state["position"]

    def _distance(self) -> Tensor:
        x, y = self.state["position"].unbind(1)
        return torch.hypot(x - 1, y)

    def advance(self, action: Tensor) -> Outcome:
        before = self._distance()
        self.state["position"] = self.state["position"] + self.SPEED * action
        crashed = self.state["position"].norm(dim=-1) < self.RADIUS
        there = self._distance() < self.NEAR
        reward = before - self._distance() - crashed.float() + there.float()
        return Outcome(self.observe(), reward, crashed | there, info={"success": there.float()})


class ToyRoutes(SimEnv):
    """A point mass with two equally good routes round an obstacle, by velocity commands of at most .2 on each axis.

    Reward: the distance to the goal gained, 1 on arrival (success), -1 on hitting the disc; both end the episode.
    Best: above or below at full speed, 10 primitive steps, return > 1 + distance at the start - .15. The average
    of the two routes is the straight line, which crashes.
    """

    action_shape, obs_dim = (2, 2), 2

    def __init__(
        self, num_envs: int = 64, horizon: Count = 12, gamma: float = 0.99, device: str = "cpu", chunk: Size = 2
    ):
        super().__init__(RoutesSim(num_envs, 2, chunk * horizon, device), chunk=chunk, gamma=gamma)


def routes_command(
    position: Tensor, side: Tensor, noise: float = 0.15, height: float = 0.75, rng: torch.Generator | None = None
) -> Tensor:
    """Commands (N, 2) over (0, height * side) to the goal, with noise of that std on them; side (N,) is +-1."""
    over = torch.stack([torch.zeros_like(side), height * side], 1)
    target = torch.where(position[:, :1] < -0.05, over, torch.tensor([1.0, 0.0]))
    command = ((target - position) / RoutesSim.SPEED).clamp(-1, 1)
    return (command + noise * torch.randn(command.shape, generator=rng)).clamp(-1, 1)


def routes_episodes(num: int, seed: int, noise: float) -> Iterator[Episode]:
    """One whole episode from each of `num` seeds, one above the disc, the next below, wide of it."""
    rng = torch.Generator().manual_seed(seed)
    for i in range(num):
        sim = RoutesSim(1, 2, 24)
        seen: list[Tensor] = []
        done: list[Tensor] = []
        paid: list[Tensor] = []
        position = sim.reset(torch.tensor([seed + i]), torch.ones(1, dtype=torch.bool)).clone()
        side, over, won = torch.tensor([1.0 - 2 * (i % 2)]), False, False
        while len(seen) < sim.horizon and not over:
            seen.append(position[0])
            done.append(routes_command(position, side, noise, 1.0, rng)[0])
            out = sim.advance(done[-1][None])
            position = sim.observe().clone()
            paid.append(out.reward[0])
            over, won = bool(out.terminated[0]), bool(out.info["success"][0])
        yield Episode(torch.stack(seen), torch.stack(done), torch.stack(paid), over, not over, won)
