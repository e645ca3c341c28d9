"""`rlflow bench off_policy` times steps that learn, and tells how they compare."""

import torch

from rlflow.bench.off_policy import ACTORS, bench_off_policy, learner
from rlflow.config import recipes


def test_contenders_take_turns_and_are_told_apart() -> None:
    turns: list[str] = []
    others = {"peer": lambda: turns.append("peer")}
    found = bench_off_policy(8, 8, repeats=2, num=3, actors=("gaussian",), others=others)
    assert len(turns) == 3 * 3  # the first turn warms up
    assert set(found["steps_per_cpu_second"]) == {"peer", "gaussian"}
    assert found["times_as_fast"]["peer"] == 1
    assert found["times_as_fast"]["gaussian"] < 1
    assert (found["batch_size"], found["width"]) == (8, 8)


def test_a_step_is_one_of_every_optimiser() -> None:
    step = learner("flow_g", 8, 8)
    sac = step.__self__  # type: ignore[attr-defined]
    before = [p.detach().clone() for p in (sac.optimizer.parameters[0], sac.twin.net.weights[0], sac.temperature.log)]
    step()
    after = sac.optimizer.parameters[0], sac.twin.net.weights[0], sac.temperature.log
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert sac.updates == 1


def test_every_actor_is_a_recipe() -> None:
    assert {f"robot_sac_{actor.removesuffix('_bfloat16')}" for actor in ACTORS} <= set(recipes.names())
