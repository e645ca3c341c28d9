"""A simulator that shows nan now and then: every learner goes on, learns from the other rows and says what it left out."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlflow.envs.simulators.toy import ToyReach
from rlflow.train.trainer import Trainer
from rlflow.types import Step, Tree, tree_leaves, tree_map

HERE = "tests.train.test_broken_rows:Glitch"


class Glitch(ToyReach):
    """Row 1 shows nan after its first step, row 2 in its first observation, row 3 what overflowed."""

    def __init__(self, num_envs: int, gamma: float = 0.99):
        super().__init__(num_envs, horizon=4, gamma=gamma)
        self.age = 0

    def spoil(self, obs: Tree, **rows: float) -> Tree:
        def spoilt(value: Tensor) -> Tensor:
            value = value.clone()
            for row, number in rows.items():
                if int(row[1:]) < len(value):
                    value[int(row[1:]), 0] = number
            return value

        return tree_map(spoilt, obs)

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tree:
        self.age = 0
        return self.spoil(super().reset(seeds, mask), r2=torch.nan)

    def recv(self) -> Step:
        step, self.age = super().recv(), self.age + 1
        if self.age != 1:
            return step
        return replace(step, obs=self.spoil(step.obs, r1=torch.nan, r3=torch.inf), final_obs=None)


SAC = ["algorithm.start=16", "algorithm.batch_size=16", "algorithm.updates_per_step=0.5"]
LEARNERS = {
    "critic, episodes": ("robot_reach_reinflow", ["env.mode=episodes", "algorithm.num_minibatches=1"]),
    "critic, steps": ("robot_reach_reinflow", ["env.mode=steps", "env.horizon=3", "algorithm.num_minibatches=1"]),
    "groups": ("robot_grpo", ["env.num_groups=4", "env.group_size=2"]),
    "replay": ("robot_reach_sac", SAC),
}


def trained(learner: str, tmp_path: Any) -> tuple[Trainer, list[dict[str, float]]]:
    recipe, overrides = LEARNERS[learner]
    seen: list[dict[str, float]] = []
    field = {"name": "gated" if learner == "replay" else "mlp", "width": 8, "running": True}
    values = [f"policy.field={field}", f"env.name={HERE}", "env.settings={}", "env.num_groups=8", *overrides]
    values += ["train.iterations=3", "eval.num=4", "eval.every=0", "train.tensorboard=false", "train.report=false"]
    trainer = Trainer(
        recipe,
        tmp_path / "run",
        overrides=values,
        trust_code=True,
        quiet=True,
        callbacks=[lambda trainer, i, metrics: seen.append(metrics)],
    )
    with pytest.warns(UserWarning, match=f"env {HERE}: .* steps met an observation or an action that is not finite"):
        trainer.fit()
    return trainer, seen


@pytest.mark.parametrize("learner", LEARNERS)
def test_the_others_are_learnt_from(learner, tmp_path):
    trainer, seen = trained(learner, tmp_path)
    assert seen[0]["env/bad_rows"] == 5, "rows 1 and 3 reach it and act on it, row 2 acts on it"
    assert all(row["optim/skipped_steps"] == 0 for row in seen)
    assert max(row["optim/steps"] for row in seen) > 0
    assert all(bool(p.isfinite().all()) for p in trainer.policy.parameters())
    normalisers = [v for n, v in trainer.policy.named_buffers() if n.endswith("moments")]
    assert normalisers
    assert all(bool(v.isfinite().all()) for v in normalisers)
    assert all(torch.tensor(v).isfinite() for n, v in trainer.last_eval.items()), trainer.last_eval
    if learner == "replay":
        data = trainer.algorithm.replay.data
        assert all(bool(v.isfinite().all()) for v in tree_leaves([data["obs"], data["next_obs"], data["action"]]))
        assert int((data["weight"][:4] == 0).sum()) == 5
