"""Plans of states: normalised as they are read, followed by the actions that lead through them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlflow.envs.demos.dataset import Demos, Episode, write_demos
from rlflow.envs.simulators.toy import ToyReach
from rlflow.envs.targets import Targeted
from rlflow.flow.guidance import CFG
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.models.goals.plans import PlanField
from rlflow.pretrain.plans import PLANS, PlanCloning, fit_inverse

CLONING = replace(PLANS["robot_plan_hopper"], env="toy_reach", chunk=2, horizon=3)


def walks(folder: Path) -> Demos:
    """Points that move by a quarter of the action, seen as toy_reach shows them."""
    rng, episodes = torch.Generator().manual_seed(0), []
    for goal in torch.randn(20, 2, generator=rng):
        action = torch.rand(12, 2, generator=rng) * 2 - 1
        state = torch.cat([torch.zeros(1, 2), 0.25 * action.cumsum(0)[:-1]])
        obs = {"state": state, "goal": goal.expand(12, 2).contiguous()}
        episodes.append(Episode(obs, action, torch.ones(12), False, True))
    return write_demos(folder / "demos", episodes, {"name": "toy_reach"}, {})


def test_a_plan_is_the_way_through_the_states_that_followed(tmp_path: Path) -> None:
    demos = walks(tmp_path)
    plans = CLONING.chunks(demos)
    index = torch.tensor([0, 5, len(plans) - 1])
    obs, x = plans[index]
    assert x.shape == (3, 3, 4)
    now, later = (demos.observations(plans.starts[index] + i)["state"] for i in (1, 2))
    expected = (later - now) / (demos.moments[2] / demos.moments[0]).sqrt()[2:].float() / plans.field.spread[2:]
    torch.testing.assert_close(x[:, 1, 2:], expected, atol=1e-4, rtol=1e-4)
    assert not x[:, :, :2].any()  # goals stay
    assert 0.8 < float(plans[torch.arange(len(plans))][1][..., 2:].std()) < 1.2
    assert obs["target"][:, 0].tolist() == [12, 7, 4]  # the last window of an episode of 12 begins four before its end


def test_the_actions_of_true_states_are_those_that_led_there(tmp_path: Path) -> None:
    """s' = s + a / 4 can be inverted: from states alone, what was done."""
    torch.manual_seed(0)
    demos = walks(tmp_path)
    field = CLONING.network(demos)[0]
    assert isinstance(field, PlanField)
    assert fit_inverse(field, *demos.split(), steps=300, rows=128) < 0.12
    plans = CLONING.chunks(demos)
    index = torch.arange(0, len(plans), 7)
    obs, x = plans[index]
    with torch.no_grad():
        done = field.act(x, field.encode(obs))
    truth = demos.actions((plans.starts[index].unsqueeze(1) + torch.arange(2)).flatten()).view(-1, 2, 2)
    assert done.shape == truth.shape
    assert float((done - truth).square().mean().sqrt()) < 0.12
    assert float(truth.square().mean().sqrt()) > 0.5


def test_a_policy_of_plans_acts_under_guidance_and_makes_a_new_one_each_time() -> None:
    """What is carried out has the shape of a chunk and depends on the sample and on where it begins."""
    torch.manual_seed(0)
    field = PlanField(5, (2,), horizon=3, executed=2, width=16, depth=1)
    env = Targeted(ToyReach(4), [1.0])
    obs = env.reset(torch.arange(4))
    for guided in (field, CFG(field, 2.0)):
        policy = FlowPolicy(guided, FlowSDE(), num_steps=2)
        with torch.no_grad():
            done = policy.select(policy, policy.encode(obs), obs, policy.plan(), Key(0, "a"), torch.arange(4))
            again = policy.select(policy, policy.encode(obs), obs, policy.plan(), Key(0, "b"), torch.arange(4))
        assert done.shape == (4, *env.action_shape)
        assert not torch.equal(done, again)
        env.step(done)
    x, cond = torch.randn(4, 3, 4), field.encode(obs)
    elsewhere = field.encode({**obs, "state": obs["state"] + 1})
    with torch.no_grad():
        assert not torch.equal(field.act(x, cond)[:, 0], field.act(x, elsewhere)[:, 0])
        long = torch.cat([x[:, :2], 5 + x[:, 2:]], 1)
        assert torch.equal(field.act(x, cond), field.act(long, cond))  # what comes later is not carried out


def test_more_actions_than_states_are_refused() -> None:
    with pytest.raises(ValueError, match="a plan of 3 states has no more actions"):
        PlanField(5, (2,), horizon=3, executed=4)
    assert all(isinstance(c, PlanCloning) and c.chunk <= c.horizon for c in PLANS.values())
