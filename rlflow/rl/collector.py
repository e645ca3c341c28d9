"""Collector: walks an environment with the policy and hands back one Rollout; nothing of it survives a call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import Plan, Steps
from rlflow.rl.groups import Groups
from rlflow.rl.likelihoods.base import Likelihood
from rlflow.rl.sampler import Sampler
from rlflow.types import Chain, Cond, Evidence, Rollout, Step, Tree, tree_map, tree_stack


class Collector:
    """Samples `horizon` outer steps of B rows in micro-batches, so images are scored while the next are sampled.

    mode 'episodes': every iteration starts anew from the groups' seeds, and a row is masked after its
    first end. mode 'steps': episodes run on across iterations.
    """

    def __init__(
        self,
        env: Any,
        policy: FlowPolicy,
        likelihood: Likelihood | None,
        steps: Steps,
        groups: Groups,
        *,
        seed: int = 0,
        horizon: int = 1,
        mode: Literal["episodes", "steps"] = "episodes",
        rows_per_call: int = 64,
        sample_with: str = "live",
        shared_noise: bool = False,
        keep_path: int = 0,
    ):
        if env.num_envs != groups.num_rows:
            raise ValueError(f"the environment has {env.num_envs} rows, the groups of this process {groups.num_rows}")
        if tuple(env.action_shape) != tuple(policy.event_shape):
            raise ValueError(f"the policy makes {policy.event_shape}, the environment takes {env.action_shape}")
        if policy.select.num > 1:
            raise ValueError(
                f"no density describes a sample that is the {policy.select.about}, so rollouts are of single samples: "
                "a recipe's policy.select is of evaluation alone; load a policy to train without select"
            )
        if likelihood is not None:
            likelihood.check(policy, steps)
        if mode == "steps" and env.horizon == 1:
            raise ValueError("episodes of one step have nothing to carry over between iterations: use mode=episodes")
        if shared_noise and (horizon > 1 or mode == "steps"):
            raise ValueError(
                "only rows of one observation can share their noise: use shared_noise=false beyond one step"
            )
        if shared_noise and not steps.possible(policy.num_steps):
            raise ValueError(
                f"rows that share their start differ in nothing where {type(steps).__name__} adds no noise: "
                "use shared_noise=false"
            )
        self.env, self.policy, self.likelihood, self.steps, self.groups = (
            env,
            policy,
            likelihood,
            steps,
            groups,
        )
        self.seed, self.horizon, self.mode, self.sample_with = seed, horizon, mode, sample_with
        self.shared_noise, self.keep_path = shared_noise, keep_path
        # only rows of one group share an observation, and only while an episode has just begun
        self.copies = groups.group_size if horizon == 1 and mode == "episodes" else 1
        self.rows_per_call = max(self.copies, rows_per_call // self.copies * self.copies)
        self._sampler = Sampler(policy)
        self.obs: Tree | None = None

    @torch.no_grad()
    def collect(self, iteration: int) -> Rollout:
        """One iteration of experience under the weights `sample_with`."""
        rows_before = self.policy.network_rows
        obs = self._start(iteration)
        alive = torch.ones(self.groups.num_rows, device=self.env.device)
        outs: list[dict[str, Any]] = []
        with self.policy.using(self.sample_with):
            self._sampler.renew()
            for outer in range(self.horizon):
                chains, evidence, conds = self._act(obs, iteration, outer)
                step: Step = self.env.recv()
                outs.append(self._entry(obs, chains, step, alive, outer) | {"evidence": evidence, "cond": conds})
                if self.mode == "episodes":
                    alive = alive * ~(step.terminated | step.truncated)
                obs = step.obs
        self.obs = obs
        return self._rollout(outs, obs, self.policy.network_rows - rows_before)

    def _start(self, iteration: int) -> Tree:
        if self.obs is not None and self.mode == "steps":
            return self.obs
        obs = self.env.reset(self.groups.seeds(iteration))
        if iteration == 0:  # a running normaliser knows the scale before the first action is taken
            self.policy.field.unguided.observe(obs)
        return obs

    def _act(self, obs: Tree, iteration: int, outer: int) -> tuple[list[Chain], list[Evidence], list[Cond]]:
        """Sample every micro-batch of one outer step and send its actions."""
        chains, evidence, conds = [], [], []
        grid = self.policy.grid(self.policy.num_steps)
        key = Key(self.seed, "rollout", iteration, outer)
        for start in range(0, self.groups.num_rows, self.rows_per_call):
            rows = slice(start, min(start + self.rows_per_call, self.groups.num_rows))
            ids = self.groups.row_ids()[rows]
            plan: Plan = self.steps(iteration, grid, ids + outer * self.groups.total_rows)
            mine = tree_map(lambda v: v[rows][:: self.copies], obs)  # noqa: B023 - used at once
            cond = self.policy.encode(mine)
            chain = self._sample(cond, plan, key, ids)
            self.env.send(self.policy.squash(chain.final), rows)
            if chain.path is not None:  # a copy: the states of earlier steps are let go
                chain = replace(chain, path=chain.path[:, -self.keep_path - 1 :].clone())
            chains.append(chain)
            cond = cond.repeat(self.copies)
            if self.likelihood is not None:
                draws = self.groups.group_ids()[rows] if self.likelihood.shared_draws else ids
                evidence.append(self.likelihood.record(self.policy, cond, chain, key, draws))
            conds.append(cond)
        return chains, evidence, conds

    def _sample(self, cond: Cond, plan: Plan, key: Key, ids: Tensor) -> Chain:
        if self.copies == 1 and not self.keep_path:
            return self._sampler(cond, plan, key, ids)
        return self.policy.sample(
            cond,
            plan,
            key=key,
            row_ids=ids,
            copies=self.copies,
            shared_noise=self.shared_noise,
            keep_path=self.keep_path > 0,
        )

    def _entry(self, obs: Tree, chains: list[Chain], step: Step, alive: Tensor, outer: int) -> dict[str, Any]:
        weight = alive * step.valid * step.reward.isfinite()
        return {
            "obs": obs,
            "action": torch.cat([c.final for c in chains]),
            "path": [c.path for c in chains if c.path is not None],
            "constant": [c.constant for c in chains if c.constant is not None],
            "reward": step.reward,
            "terminated": step.terminated,
            "truncated": step.truncated,
            "weight": weight.to(self.policy.dtype),
            "final_obs": step.final_obs,
            "next_obs": step.obs,
            "info": step.info,
            "num_steps": step.num_steps,
            "parts": step.reward_parts,
            "row_ids": self.groups.row_ids() + outer * self.groups.total_rows,
        }

    def _rollout(self, outs: list[dict[str, Any]], last_obs: Tree, network_rows: int) -> Rollout:
        def stack(name: str) -> Any:
            return tree_map(lambda v: v.to(self.policy.device), tree_stack([o[name] for o in outs]))

        evidence = [e for o in outs for e in o["evidence"]]
        keep = not self.policy.encoder_trains
        rollout = Rollout(
            obs=stack("obs"),
            action=stack("action"),
            reward=stack("reward").to(self.policy.dtype),
            terminated=stack("terminated"),
            truncated=stack("truncated"),
            weight=stack("weight"),
            last_obs=last_obs,
            final_obs=stack("final_obs") if fill_final_obs(outs) else None,
            group=self.groups.group_ids().to(self.policy.device, non_blocking=True),
            row_ids=tree_stack([o["row_ids"] for o in outs]),
            info=stack("info"),
            reward_parts=stack("parts"),
            reward_weights=self.env.reward_weights,
            evidence=Evidence.cat(evidence) if evidence else None,
            constant=torch.cat(constant) if (constant := [c for o in outs for c in o["constant"]]) else None,
            path=torch.cat([p for o in outs for p in o["path"]]) if self.keep_path else None,
            cond=Cond.cat([c for o in outs for c in o["cond"]]) if keep else None,
            num_steps=None if outs[0]["num_steps"] is None else stack("num_steps"),
            network_calls=network_rows,
        )
        mask_broken_samples(rollout)
        return rollout

    def state_dict(self) -> dict[str, Any]:
        """The environment's state, that of its wrappers in any case, and the observation in hand.

        Without the latter the next iteration starts new episodes: in mode 'episodes', and after a resume with a
        simulator that cannot be saved.
        """
        goes_on = self.mode == "steps" and self.env.exact_resume
        return {"env": self.env.state_dict()} | ({"obs": self.obs} if goes_on else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        obs = state.get("obs")
        self.obs = None if obs is None else tree_map(lambda v: v.to(self.env.device), obs)
        self.env.load_state_dict(state["env"])


def fill_final_obs(outs: list[dict[str, Any]]) -> bool:
    """Where nothing ended an env may give no final_obs: put the next observation there; False if none gave any."""
    if all(o["final_obs"] is None for o in outs):
        if any(bool(o["truncated"].any()) for o in outs):
            raise ValueError(
                "the environment cut an episode off without final_obs: its Step must hold what was reached"
            )
        return False
    for o in outs:
        if o["final_obs"] is None:
            o["final_obs"] = o["next_obs"]
    return True


def mask_broken_samples(rollout: Rollout) -> None:
    """Give samples that are not finite weight 0 and the evidence of a sound one: 0 * nan is nan in the gradient.

    Where none is sound their evidence stays, and the learner's own check of its gradient ends the run.
    """
    sound = rollout.action.isfinite().flatten(2).all(2)
    if bool(sound.all()):
        return
    rollout.weight = rollout.weight * sound
    rollout.action = torch.where(sound.view(*sound.shape, *[1] * (rollout.action.ndim - 2)), rollout.action, 0.0)
    if rollout.evidence is not None and bool(sound.any()):
        flat = sound.flatten()
        own = torch.arange(len(flat), device=flat.device)
        own = torch.where(flat, own, flat.long().argmax())
        rollout.evidence = rollout.evidence.index(own)
        rollout.constant = None if rollout.constant is None else rollout.constant[own]


def permute_rewards(rollout: Rollout, generator: torch.Generator) -> None:
    """The control: rewards shuffled across the batch before anything else, so they carry no information.

    The whole outcome of a row goes to another one, its episode ends with it: where every step is paid, to end
    late is a reward too.
    """
    order = torch.randperm(rollout.reward.shape[1], generator=generator)
    for name in ("reward", "weight", "terminated", "truncated", "num_steps", "reward_parts"):
        setattr(rollout, name, tree_map(lambda v: v[:, order], getattr(rollout, name)))
