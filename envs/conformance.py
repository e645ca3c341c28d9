"""What any environment must do, as checks to run on one: `check(Subject(lambda num_envs: MyEnv(num_envs)))`.

A check plays random actions and raises AssertionError with what is wrong. In pytest, parametrise over CHECKS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rlflow.envs.base import VecEnv
from rlflow.types import Step, Tree, tree_leaves, tree_map, tree_where

Make = Callable[[int], VecEnv]


@dataclass(frozen=True)
class Subject:
    """An environment on trial: how to make it with B rows, and what it does not claim to do.

    `longer` makes it with a later time limit, `single` with one primitive action per step: with them the checks
    see what was truly reached at a time limit (one that whole chunks fill) and inside a chunk.
    """

    make: Make
    longer: Make | None = None
    single: Make | None = None
    num_envs: int = 5
    num_steps: int = 25
    gamma: float = 1.0  # discount inside a chunk
    bounded: bool = True  # actions beyond [-1, 1] act like those at the bound
    varied: bool = True  # episodes of different seeds differ
    masked_reset: bool = True  # some rows can be reset without the others

    @property
    def seeds(self) -> Tensor:
        """(B,) different seeds."""
        return torch.arange(self.num_envs) * 7 + 3

    def actions(self, env: VecEnv) -> Tensor:
        """(T, B, *D) random actions."""
        shape = (self.num_steps, self.num_envs, *env.action_shape)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(env.device)

    def play(self, env: VecEnv, actions: Tensor, seeds: Tensor | None = None) -> list[tuple[Tree, Step]]:
        """(first observation, step) of every step."""
        obs = env.reset(self.seeds if seeds is None else seeds)
        return go_on(env, obs, actions)


def go_on(env: VecEnv, obs: Tree, actions: Tensor) -> list[tuple[Tree, Step]]:
    """(observation before, step) of every action."""
    found = []
    for action in actions:
        step = env.step(action)
        found.append((obs, step))
        obs = step.obs
    return found


def parts(step: Step) -> dict[str, Any]:
    """What of a step must agree between two runs."""
    named = {"obs": step.obs, "reward": step.reward, "terminated": step.terminated, "truncated": step.truncated}
    named |= {"valid": step.valid, "reached": step.reached} | {f"info[{k}]": v for k, v in step.info.items()}
    return named if step.num_steps is None else named | {"num_steps": step.num_steps}


def same(a: Tree, b: Tree) -> bool:
    """Two trees equal to the bit, nan equal to nan."""
    return all(torch.equal(x.nan_to_num(7e7), y.nan_to_num(7e7)) for x, y in zip(leaves(a), leaves(b), strict=True))


def leaves(tree: Tree) -> list[Tensor]:
    """Tensors of a tree, on the CPU."""
    return [v.cpu() for v in tree_leaves(tree)]


def take(tree: Tree, rows: Any) -> Tree:
    """The rows of every tensor."""
    return tree_map(lambda v: v[rows], tree)


def must(holds: bool | Tensor, message: str) -> None:
    """AssertionError unless it holds."""
    if not bool(holds):
        raise AssertionError(message)


def must_agree(a: Step, b: Step, why: str, rows_a: Any = ..., rows_b: Any = ...) -> None:
    """Every part of the steps equal in the rows given."""
    one, two = parts(a), parts(b)
    must(one.keys() == two.keys(), f"{why}: a step has {sorted(one)}, another {sorted(two)}")
    for name in one:
        must(same(take(one[name], rows_a), take(two[name], rows_b)), f"{why}: {name} differs")


# -- the checks -----------------------------------------------------------------------------------


def shapes(subject: Subject) -> None:
    """Rows, dtypes and device of everything, and nothing handed out changes later."""
    env = subject.make(subject.num_envs)
    rows, first = env.num_envs, env.reset(subject.seeds)
    must(rows == subject.num_envs, f"asked for {subject.num_envs} rows, got {rows}")
    must(all(v.dtype in (torch.float32, torch.uint8, torch.long) for v in leaves(first)), "obs: float32 or uint8")
    kept = tree_map(torch.clone, first)
    for _, step in go_on(env, first, subject.actions(env)[:4]):
        for name in ("terminated", "truncated", "valid"):
            flag = getattr(step, name)
            must(flag.shape == (rows,) and flag.dtype == torch.bool, f"{name} must be (B,) bool")
        must(step.reward.shape == (rows,) and step.reward.is_floating_point(), "reward must be (B,) float")
        must(all(v.shape == (rows,) for v in step.info.values()), "info must hold (B,) tensors")
        for name, obs in {"obs": step.obs, "final_obs": step.final_obs}.items():
            if obs is not None:
                one, two = ([(v.shape, v.dtype) for v in tree_leaves(o)] for o in (first, obs))
                must(one == two, f"{name} differs in shape or dtype from the first observation")
        devices = {v.device.type for v in tree_leaves([step.obs, step.reward, step.terminated, step.truncated])}
        must(devices == {env.device.type}, f"tensors on {devices}, env.device is {env.device}")
    must(same(kept, first), "an observation handed out has changed later")
    if env.obs_spec is not None:
        told = [(tuple(v.shape), v.dtype) for v in tree_leaves(env.obs_spec)]
        must(told == [(tuple(v.shape[1:]), v.dtype) for v in tree_leaves(first)], "obs_spec is not what is observed")


def seeding(subject: Subject) -> None:
    """A trajectory is a function of seed and actions, whatever the row; other seeds, other trajectories."""
    env, again = subject.make(subject.num_envs), subject.make(subject.num_envs)
    actions, order = subject.actions(env), torch.arange(subject.num_envs).flip(0)
    moved = subject.play(again, actions[:, order], subject.seeds[order])
    for (o1, s1), (o2, s2) in zip(subject.play(env, actions), moved, strict=True):
        must(same(o1, take(o2, order)), "the same seed in another row: another observation")
        must_agree(s1, s2, "the same seed in another row", rows_b=order)
    played = subject.play(env, actions[:, :1].expand_as(actions))
    differ = any(not same(v, v[:1].expand_as(v)) for o, s in played for v in leaves([o, s.reward]))
    must(differ or not subject.varied, "all seeds give the same trajectory")


def independence(subject: Subject) -> None:
    """A row does not depend on how many others there are, nor on what they do; automatic resets included."""
    many = subject.make(subject.num_envs)
    actions = subject.actions(many)
    together = subject.play(many, actions)
    row = subject.num_envs - 2
    alone = subject.play(subject.make(1), actions[:, row : row + 1], subject.seeds[row : row + 1])
    for (_, a), (_, b) in zip(together, alone, strict=True):
        must_agree(a, b, "alone and among others", slice(row, row + 1))


def pieces(subject: Subject) -> None:
    """Rows sent in pieces, in any order, are the whole."""
    env, again = subject.make(subject.num_envs), subject.make(subject.num_envs)
    action = subject.actions(env)[0]
    env.reset(subject.seeds), again.reset(subject.seeds)
    again.send(action[2:], slice(2, subject.num_envs))
    again.send(action[:2], slice(0, 2))
    must_agree(env.step(action), again.recv(), "sent in pieces")


def ends(subject: Subject) -> None:
    """No row is terminated and truncated at once or outlives the horizon; a new episode begins where one ended."""
    env = subject.make(subject.num_envs)
    age = torch.zeros(subject.num_envs, dtype=torch.long, device=env.device)
    rested = torch.zeros_like(age, dtype=torch.bool)
    for _, step in subject.play(env, subject.actions(env)):
        rests = torch.zeros_like(rested) if step.num_steps is None else step.num_steps == 0
        must(not (rests & rested).any(), "a row stands still for two steps: at most one is lost to a reset")
        rested = rests
        must(
            not (step.terminated & step.truncated).any(),
            "a row is both terminated and truncated: a time limit is not an end",
        )
        age = age + step.valid
        must((age <= env.horizon).all(), f"an episode is longer than the horizon of {env.horizon} steps")
        must(step.ended[age == env.horizon].all(), f"an episode goes on after its {env.horizon} steps")
        must(step.final_obs is not None or not step.truncated.any(), "a row was cut off without final_obs")
        age = torch.where(step.ended, 0, age)


def final_observation(subject: Subject) -> None:
    """`final_obs` is not the next episode's first observation, and where nothing ended it is what `obs` says."""
    env = subject.make(subject.num_envs)
    if env.horizon == 1:
        return
    steps = [step for _, step in subject.play(env, subject.actions(env))]
    differ = seen = False
    for step, after in pairwise(steps):
        if step.final_obs is None:
            continue
        on = ~step.ended
        must(same(take(step.final_obs, on), take(step.obs, on)), "obs and final_obs differ where nothing ended")
        anew = step.ended & after.valid  # shows its next episode; else the next step is lost to the reset
        seen |= bool(anew.any())
        differ |= not same(take(step.final_obs, anew), take(step.obs, anew))
    must(differ or not seen, "final_obs is the first observation after the reset, not the last before it")


def time_limit(subject: Subject) -> None:
    """At the limit all is as if the episode went on: what is reached, what is paid, and no termination."""
    if subject.longer is None:
        return
    env, longer = subject.make(subject.num_envs), subject.longer(subject.num_envs)
    actions = subject.actions(env)
    alive = torch.ones(subject.num_envs, dtype=torch.bool, device=env.device)
    cut = False
    for (_, a), (_, b) in zip(subject.play(env, actions), subject.play(longer, actions), strict=True):
        must(same(a.reward[alive], b.reward[alive]), "the reward at the time limit is not that of going on")
        must(
            same(take(a.reached, alive), take(b.reached, alive)), "final_obs at the time limit is not what was reached"
        )
        must(torch.equal(a.terminated[alive], b.terminated[alive]), "a time limit is reported as a termination")
        cut |= bool((a.truncated & alive).any())
        alive = alive & ~a.ended & ~b.ended
    must(cut, "no episode met the time limit: give the subject more steps")


def masked_reset(subject: Subject) -> None:
    """Rows of the mask begin anew from their seeds; the others do not notice."""
    if not subject.masked_reset:
        return
    env, other = subject.make(subject.num_envs), subject.make(subject.num_envs)
    actions = subject.actions(env)
    before = subject.play(env, actions[:2])[-1][1].obs
    subject.play(other, actions[:2])
    mask = torch.arange(subject.num_envs) < 2
    obs = env.reset(subject.seeds + 100, mask)
    fresh = subject.make(subject.num_envs)
    start = fresh.reset(subject.seeds + 100)
    must(same(take(obs, mask), take(start, mask)), "a masked reset is not the start of an episode with that seed")
    must(same(take(obs, ~mask), take(before, ~mask)), "a masked reset changed the observation of another row")
    for action in actions[2:]:
        a, b, c = env.step(action), other.step(action), fresh.step(action)
        must_agree(a, b, "rows outside the mask", ~mask, ~mask)
        must_agree(a, c, "rows of the mask", mask, mask)


def resume(subject: Subject) -> None:
    """A saved state goes on exactly, in the middle of episodes, and does not move with the environment."""
    env, other = subject.make(subject.num_envs), subject.make(subject.num_envs)
    if not env.exact_resume or env.horizon == 1:
        return
    actions = subject.actions(env)
    for half in (len(actions) // 2, len(actions) // 2 + 1):  # not both between two episodes
        subject.play(env, actions[:half])
        saved = env.state_dict()
        must(bool(saved), "exact_resume is True but there is no state: set it to False, or save the simulator")
        rest = [env.step(action) for action in actions[half:]]
        for _ in range(2):  # a state can be taken up twice
            other.load_state_dict(saved)
            for action, step in zip(actions[half:], rest, strict=True):
                must_agree(other.step(action), step, "after a resume")


def bounds(subject: Subject) -> None:
    """An action beyond [-1, 1] does what the one at the bound does."""
    if not subject.bounded:
        return
    env, other = subject.make(subject.num_envs), subject.make(subject.num_envs)
    actions = 3 * subject.actions(env)
    for (_, a), (_, b) in zip(subject.play(env, actions), subject.play(other, actions.clamp(-1, 1)), strict=True):
        must_agree(a, b, "an action beyond the bounds and its clipped self")


def statistics(subject: Subject) -> None:
    """Episode length and return are told at the end of an episode, nan elsewhere; lengths add up."""
    env = subject.make(subject.num_envs)
    age = torch.zeros(subject.num_envs, device=env.device)
    for _, step in subject.play(env, subject.actions(env)):
        if "episode_length" not in step.info:
            return
        age = age + (1 if step.num_steps is None else step.num_steps)
        for name in ("episode_return", "episode_length"):
            must(torch.equal(step.info[name].isfinite(), step.ended), f"info[{name}] where an episode ended, else nan")
        must(
            torch.equal(step.info["episode_length"][step.ended], age[step.ended]),
            "episode_length is not what was played",
        )
        age = torch.where(step.ended, 0.0, age)


def chunks(subject: Subject) -> None:
    """A chunk is its primitive actions one by one until the row ends, their rewards discounted inside."""
    if subject.single is None:
        return
    env, single = subject.make(subject.num_envs), subject.single(subject.num_envs)
    actions = subject.actions(env)
    played, alive = subject.play(env, actions), torch.ones(subject.num_envs, dtype=torch.bool, device=env.device)
    single.reset(subject.seeds)
    for action, (_, step) in zip(actions, played, strict=True):
        reward, count, reached, ended = one_by_one(single, action, subject.gamma)
        must(torch.equal(ended[alive], step.ended[alive]), "a chunk does not end where its primitive actions do")
        must(torch.allclose(reward[alive], step.reward[alive], atol=1e-5), "a chunk's reward is not sum gamma^i r_i")
        must(step.num_steps is not None, "a chunk must tell num_steps")
        must(same(count[alive], take(step.num_steps, alive)), "num_steps is not what was carried out")
        must(same(take(reached, alive), take(step.reached, alive)), "final_obs is not where the chunk ended")
        alive = alive & ~step.ended


def one_by_one(env: VecEnv, chunk: Tensor, gamma: float) -> tuple[Tensor, Tensor, Tree, Tensor]:
    """(reward, steps carried out, observation reached, ended) of the actions of a chunk up to each row's end."""
    ended = torch.zeros(env.num_envs, dtype=torch.bool, device=env.device)
    reward, count, reached = ended.float(), ended.long(), None
    for i in range(chunk.shape[1]):
        step = env.step(chunk[:, i : i + 1])
        reward = reward + torch.where(ended, 0.0, gamma**i * step.reward)
        count = count + ~ended
        reached = step.reached if reached is None else tree_where(ended, reached, step.reached)
        ended = ended | step.ended
    return reward, count, reached, ended


CHECKS = (
    shapes,
    seeding,
    independence,
    pieces,
    ends,
    final_observation,
    time_limit,
    masked_reset,
    resume,
    bounds,
    statistics,
    chunks,
)


def check(subject: Subject) -> None:
    """Run every check; AssertionError names the first that fails."""
    for one in CHECKS:
        try:
            one(subject)
        except AssertionError as error:
            raise AssertionError(f"{one.__name__}: {error}") from error
