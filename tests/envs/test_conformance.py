"""One suite for every environment, ours and wrapped; and environments that are wrong in one way each, which it must catch."""

from dataclasses import replace
from typing import Any

import gymnasium
import pytest
import torch
from torch import Tensor

from rlflow.envs.conformance import CHECKS, Subject, check
from rlflow.envs.frozen import BasePolicy, Frozen, Residual, StartNoise
from rlflow.envs.prompt import PromptEnv
from rlflow.envs.prompts import Prompts
from rlflow.envs.sim import SimEnv
from rlflow.envs.simulators import drive, mujoco, tabletop, toy
from rlflow.envs.simulators import gym as gymnasium_envs
from rlflow.envs.simulators import gym_vector as gymnasium_vectors
from rlflow.envs.targets import Targeted
from rlflow.envs.wrappers import FrameStack, RewardScaling, RewardWrapper
from rlflow.flow.kernels import Ancestral
from rlflow.flow.policy import FlowPolicy
from rlflow.models.mlp import MLPField
from rlflow.rewards.base import Reward, RewardSet
from rlflow.types import Step, Tree


def locomotion(task: mujoco.Task, chunk: int = 2, num_steps: int = 12, limit: int = 10) -> Subject:
    """Episodes of `limit` primitive steps, unless the robot falls before."""

    def make(limit: int, size: int) -> Any:
        return lambda num_envs: SimEnv(mujoco.MujocoSim(task, num_envs, 1, limit), size, 0.9)

    return Subject(make(limit, chunk), make(24, chunk), make(limit, 1), num_envs=3, num_steps=num_steps, gamma=0.9)


def pendulum(chunk: int = 2) -> Subject:
    def make(limit: int, size: int) -> Any:
        return lambda num_envs: gymnasium_envs.gym(num_envs, "Pendulum-v1", size, 0.9, max_steps=limit)

    return Subject(make(7, chunk), None, make(7, 1), gamma=0.9)  # a chunk that the time limit cuts


def vector(mode: str, limit: int = 4) -> Subject:
    def make(limit: int) -> Any:
        def made(num_envs: int) -> SimEnv:
            makers = [lambda: gymnasium.make("Pendulum-v1", max_episode_steps=limit)] * num_envs
            env = gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=gymnasium.vector.AutoresetMode(mode))
            return gymnasium_vectors.vector_env(env, max_steps=limit)

        return made

    return Subject(make(limit), make(20), masked_reset=mode == "Disabled")


def squared(action: Tensor) -> Tensor:
    return -action.square().sum((1, 2))


def near(next_obs: dict[str, Tensor], reward: Tensor) -> list[float | None]:
    """No score in every third row."""
    gap = (next_obs["state"] - next_obs["goal"]).norm(dim=-1) - reward
    return [None if i % 3 == 2 else float(g) for i, g in enumerate(gap)]


def prompts(num_envs: int) -> PromptEnv:
    words = Prompts(tuple({"prompt": f"word {i}"} for i in range(64)))
    rewards = RewardSet([Reward("mean", lambda images: images.mean((1, 2, 3)))])
    return PromptEnv(
        words, rewards, num_envs, (3, 4, 4), lambda t: torch.tensor([[float(c.split()[1])] for c in t]), lambda x: x
    )


def reach(horizon: int = 4) -> Any:
    return lambda num_envs: toy.ToyReach(num_envs, horizon)


def wrapped(wrapper: Any, *args: Any) -> Subject:
    return Subject(lambda n: wrapper(reach()(n), *args), lambda n: wrapper(reach(20)(n), *args))


def frozen() -> BasePolicy:
    """An untrained flow for ToyReach."""
    torch.manual_seed(0)
    return BasePolicy(FlowPolicy(MLPField(4, (2, 2), 16), Ancestral(), num_steps=2))


SUBJECTS = {
    "toy_image": Subject(toy.ToyImage, bounded=False),
    "toy_bandit": Subject(toy.ToyBandit, varied=False),
    "toy_mdp": Subject(toy.ToyMDP, lambda n: toy.ToyMDP(n, horizon=20), num_envs=8, varied=False),
    "toy_routes": Subject(
        toy.ToyRoutes,
        lambda n: toy.ToyRoutes(n, horizon=40),
        lambda n: SimEnv(toy.RoutesSim(n, 2, 24)),
        num_envs=9,
        num_steps=40,
        gamma=0.99,
    ),
    "toy_reach": Subject(reach(), reach(20), lambda n: SimEnv(toy.ReachSim(n, 2, 8))),
    "toy_drive": Subject(drive.ToyDrive, num_envs=6),
    "targets": wrapped(Targeted, [1.0, 2.0]),
    "tabletop": Subject(
        lambda n: tabletop.Tabletop(n, chunk=3, horizon=9),
        lambda n: tabletop.Tabletop(n, chunk=3, horizon=40),
        lambda n: SimEnv(tabletop.TabletopSim(n, 9)),
        num_envs=6,
        num_steps=14,
        gamma=0.99,
    ),
    "prompt": Subject(prompts, masked_reset=False, bounded=False),
    "hopper": locomotion(mujoco.HOPPER),
    "walker2d": locomotion(mujoco.WALKER2D),
    "halfcheetah": locomotion(mujoco.HALFCHEETAH),
    "inverted_pendulum": locomotion(mujoco.INVERTED_PENDULUM, limit=4),
    "ant": locomotion(mujoco.ANT),
    "humanoid": locomotion(mujoco.HUMANOID),
    "gym": pendulum(),
    "vector_next_step": vector("NextStep"),
    "vector_same_step": vector("SameStep"),
    "vector_disabled": vector("Disabled"),
    "reward_scaling": replace(wrapped(RewardScaling), make=lambda n: RewardScaling(toy.ToyReach(n), clip=1e9)),
    "frame_stack": wrapped(FrameStack, 3),
    "start_noise": wrapped(Frozen, StartNoise(frozen())),
    "residual": wrapped(Frozen, Residual(frozen(), 0.5)),
    "reward_wrapper": Subject(
        lambda n: RewardWrapper(toy.ToyRoutes(n), RewardSet([Reward("squared", squared)])), bounded=False
    ),
    "reward_wrapper_masking": wrapped(RewardWrapper, RewardSet([Reward("near", near)])),
}
ACROSS_ROWS = {  # what these do to a row depends, by design, on the others
    "reward_scaling": {"seeding", "independence", "masked_reset", "time_limit"},
    "reward_wrapper_masking": {"seeding", "independence"},
}


@pytest.mark.parametrize("one", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", SUBJECTS)
def test_environment_conforms(name, one):
    if one.__name__ in ACROSS_ROWS.get(name, ()):
        pytest.skip("rows of this one share something")
    one(SUBJECTS[name])


# -- environments that are wrong ------------------------------------------------------------------


class Changed(toy.ToyReach):
    """ToyReach whose steps go through `change`."""

    def recv(self) -> Step:
        return self.change(super().recv())

    def change(self, step: Step) -> Step:
        return step


class ForgetsFinal(Changed):
    def change(self, step: Step) -> Step:
        return replace(step, final_obs=step.obs)


class NoFinal(Changed):
    def change(self, step: Step) -> Step:
        return replace(step, final_obs=None)


class LimitIsEnd(Changed):
    def change(self, step: Step) -> Step:
        return replace(step, terminated=step.ended, truncated=torch.zeros_like(step.ended))


class LimitIsBoth(Changed):
    def change(self, step: Step) -> Step:
        return replace(step, terminated=step.ended)


class LostAction(Changed):
    def change(self, step: Step) -> Step:
        return replace(step, num_steps=step.num_steps - 1)


class StaleFinal(Changed):
    """Where a row ended, what it saw one step before."""

    kept: Any = None

    def change(self, step: Step) -> Step:
        before, self.kept = self.kept, step.obs
        return step if before is None else replace(step, final_obs=before)


class Float64(Changed):
    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tree:
        return {k: v.double() for k, v in super().reset(seeds, mask).items()}


class WrongShape(Changed):
    def change(self, step: Step) -> Step:
        return replace(step, reward=step.reward[:, None])


class IntegerFlags(Changed):
    def change(self, step: Step) -> Step:
        return replace(step, truncated=step.truncated.long())


class SharedBuffer(Changed):
    """Hands out one buffer again and again."""

    buffer: Any = None

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tree:
        self.buffer = super().reset(seeds, mask)
        return self.buffer

    def change(self, step: Step) -> Step:
        for name, value in self.buffer.items():
            value.copy_(step.obs[name])
        return replace(step, obs=self.buffer)


class GlobalNoise(Changed):
    """Start states from a generator that rows share."""

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tree:
        return super().reset(torch.randint(2**31, seeds.shape), mask)


class RowNumberSeeds(Changed):
    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tree:
        return super().reset(seeds + torch.arange(len(seeds)), mask)


class OneSeed(Changed):
    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tree:
        return super().reset(torch.zeros_like(seeds), mask)


class Contagious(Changed):
    """Rewards less their mean over the rows."""

    def change(self, step: Step) -> Step:
        return replace(step, reward=step.reward - step.reward.mean())


class ResetsAll(Changed):
    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tree:
        return super().reset(seeds)


class ResetsNone(Changed):
    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tree:
        return super().reset(seeds, None if mask is None else mask & False)


class LeakyReset(Changed):
    """A masked reset that sets back everyone's clock."""

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tree:
        obs = super().reset(seeds, mask)
        self.elapsed = 0 * self.elapsed
        return obs


class ForgetsClock(Changed):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state | {"elapsed": torch.zeros(self.num_envs, dtype=torch.long)})


class LivingState(Changed):
    """A saved state that moves on with the environment."""

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"sim": self.sim.state}


class NoState(Changed):
    def state_dict(self) -> dict[str, Any]:
        return {}


class Unclipped(Changed):
    def __init__(self, num_envs: int, horizon: int = 4):
        super().__init__(num_envs, horizon)
        self.bounds = lambda action: action.copy()


class Swapped(Changed):
    """Rows sent in pieces land in the wrong place."""

    def send(self, action: Tensor, rows: slice) -> None:
        super().send(action, slice(0, len(action)))


class ReturnsEverywhere(Changed):
    def change(self, step: Step) -> Step:
        return replace(step, info=step.info | {"episode_return": torch.from_numpy(self.returns)})


class WrongLength(Changed):
    def change(self, step: Step) -> Step:
        return replace(step, info=step.info | {"episode_length": step.info["episode_length"] + 1})


class WrongDiscount(Changed):
    def __init__(self, num_envs: int, horizon: int = 4):
        super().__init__(num_envs, horizon)
        self.gamma = 0.5


class StandsStill(Changed):
    """A row that has ended carries out nothing for ever."""

    over: Any = False

    def change(self, step: Step) -> Step:
        self.over = step.ended | self.over
        return replace(step, num_steps=torch.where(self.over, 0, step.num_steps), valid=~self.over)


class TooLong(Changed):
    """Promises a shorter episode than it plays."""

    def __init__(self, num_envs: int, horizon: int = 4):
        super().__init__(num_envs, horizon)
        self.horizon = horizon - 1


BROKEN = {
    ForgetsFinal: "final_observation: final_obs is the first observation after the reset",
    NoFinal: "ends: a row was cut off without final_obs",
    LimitIsEnd: "time_limit: a time limit is reported as a termination",
    LimitIsBoth: "ends: a row is both terminated and truncated",
    LostAction: "statistics: episode_length is not what was played",
    StaleFinal: "final_observation: obs and final_obs differ where nothing ended",
    Float64: "shapes: obs: float32 or uint8",
    WrongShape: r"shapes: reward must be \(B,\) float",
    IntegerFlags: r"shapes: truncated must be \(B,\) bool",
    SharedBuffer: "shapes: an observation handed out has changed later",
    GlobalNoise: "seeding: the same seed in another row: another observation",
    RowNumberSeeds: "seeding: the same seed in another row: another observation",
    OneSeed: "seeding: all seeds give the same trajectory",
    Contagious: "seeding: the same seed in another row: reward differs|independence: .*reward differs",
    ResetsAll: "masked_reset: a masked reset changed the observation of another row",
    ResetsNone: "masked_reset: a masked reset is not the start",
    LeakyReset: "masked_reset: rows outside the mask",
    ForgetsClock: "resume: after a resume",
    LivingState: "resume: after a resume",
    NoState: "resume: exact_resume is True but there is no state: set it",
    Unclipped: "bounds: an action beyond the bounds",
    Swapped: "pieces: sent in pieces",
    ReturnsEverywhere: r"statistics: info\[episode_return\]",
    WrongLength: "statistics: episode_length is not what was played",
    WrongDiscount: "chunks: a chunk's reward is not",
    StandsStill: "ends: a row stands still",
    TooLong: "ends: an episode (is longer than|goes on after)",
}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_environment_is_caught(kind):
    single = lambda n: SimEnv(toy.ReachSim(n, 2, 8))  # noqa: E731
    subject = Subject(kind, lambda n: kind(n, 20), single, num_steps=17)
    with pytest.raises(AssertionError, match=BROKEN[kind]):
        check(subject)


class RunsOn(toy.ToyRoutes):
    """A row that ends in mid-chunk is paid for the rest of its chunk, as if it had gone on."""

    def recv(self) -> Step:
        step = super().recv()
        cut = step.ended & (step.num_steps == 1)
        return replace(step, reward=torch.where(cut, step.reward + 0.5, step.reward))


class CountsAll(toy.ToyRoutes):
    def recv(self) -> Step:
        step = super().recv()
        return replace(step, num_steps=torch.full_like(step.num_steps, 2))


@pytest.mark.parametrize(("kind", "message"), [(RunsOn, "chunk's reward"), (CountsAll, "num_steps|episode_length")])
def test_a_chunk_that_does_not_stop_is_caught(kind, message):
    with pytest.raises(AssertionError, match=message):
        check(replace(SUBJECTS["toy_routes"], make=kind, longer=None))
