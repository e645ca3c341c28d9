"""Episodes with and without the noise of training: the same starts, the same weights, and the gap between the two."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from rlflow.envs.seeds import evaluation_seeds
from rlflow.envs.simulators.tabletop import TASKS, Tabletop
from rlflow.envs.simulators.toy import ToyBandit, ToyReach
from rlflow.evaluation.episodes import EpisodeEvaluator
from rlflow.flow.field import VelocityField
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import NoSteps, OneRandom
from rlflow.models.io import load_field
from rlflow.models.mlp import MLPField
from rlflow.report.glossary import HELDOUT, headline
from rlflow.types import Cond


class ToThePeak(VelocityField):
    """Its ODE ends in the best action from every start."""

    def __init__(self):
        super().__init__()
        self.event_shape, self.num_features = (1, 2), 1
        self.peak = torch.nn.Parameter(torch.tensor([0.5, 0.5]))

    def encode(self, obs):
        return Cond({"pooled": obs})

    def forward(self, x, t, dt, cond):
        return (self.peak - x) / (1 - t)[:, None, None]


def test_noise_costs_what_it_costs_and_leaves_the_other_score_alone():
    policy = FlowPolicy(ToThePeak(), FlowSDE(0.5), num_steps=4)
    both = EpisodeEvaluator(policy, ToyBandit, num=200, noisy=OneRandom(skip_last=0))().means()
    plain = EpisodeEvaluator(policy, ToyBandit, num=200)().means()
    assert plain["return"] > 0.9999
    assert {name: both[name] for name in plain} == plain
    # a quarter of the rows end with noise of std .144 on each axis: E[exp(-|e|^2 / (2 .15^2))] = 1 / (1 + (.144/.15)^2)
    assert abs(both["train_return"] - (0.75 + 0.25 / (1 + (0.144 / 0.15) ** 2))) < 0.06


def test_without_noisy_steps_the_two_are_the_same_episodes():
    torch.manual_seed(0)
    policy = FlowPolicy(MLPField(4, (2, 2), width=16), FlowSDE(0.5), num_steps=4)
    scores = EpisodeEvaluator(policy, ToyReach, num=6, noisy=NoSteps())().scores
    for name in ("return", "length"):
        assert torch.equal(scores[name], scores[f"train_{name}"])
    noisy = EpisodeEvaluator(policy, ToyReach, num=6, noisy=OneRandom())().scores
    assert not torch.equal(noisy["return"], noisy["train_return"])


class Telling(ToyBandit):
    """The rows of `told` say that they succeeded, the others nothing."""

    def __init__(self, num_envs, told):
        super().__init__(num_envs)
        self.told = told

    def recv(self):
        step, told = super().recv(), torch.full((self.num_envs,), torch.nan)
        told[self.told] = 1.0
        return replace(step, info=step.info | {"success": told})


@pytest.mark.parametrize(("told", "share"), [([], None), ([0, 2], 0.5), ([0, 1, 2, 3], 1.0)])
def test_who_is_silent_about_success_has_none_unless_nobody_speaks_of_it(told, share):
    policy = FlowPolicy(ToThePeak(), FlowSDE(0.5), num_steps=4)
    result = EpisodeEvaluator(policy, partial(Telling, told=told), num=4)()
    assert result.means().get("success") == share
    first = headline(HELDOUT + name for name in result.means())
    assert first == HELDOUT + ("return" if share is None else "success")


def test_the_headline_stays_the_deployed_score():
    policy = FlowPolicy(ToThePeak(), FlowSDE(0.5), num_steps=4)
    means = EpisodeEvaluator(policy, ToyBandit, num=4, noisy=OneRandom())().means()
    assert headline(HELDOUT + name for name in means) == HELDOUT + "return"


@torch.no_grad()
def test_the_chains_start_as_asked():
    """From zero; from one draw of the episode for all of its steps; or from another at every step."""
    torch.manual_seed(0)
    policy = FlowPolicy(MLPField(4, (2, 2), width=16), FlowSDE(0.5), num_steps=4)
    obs, rows = ToyReach(3).reset(torch.arange(3)), torch.arange(3)

    def actions(noise):
        evaluator = EpisodeEvaluator(policy, ToyReach, num=3, noise=noise)
        return [evaluator._deployed(obs, rows, step) for step in (0, 1)]

    from_zero = policy.sample(policy.encode(obs), x_0=torch.zeros(3, 2, 2)).final
    assert all(torch.equal(action, from_zero) for action in actions("zero"))
    fixed, random = actions("fixed"), actions("random")
    assert torch.equal(*fixed)
    assert torch.equal(fixed[0], random[0])
    assert not torch.equal(*random)


def test_success_is_told_by_task_of_the_seeds():
    """By hand from the per-episode scores and what each seed asks for; one thing to do is no list of tasks."""
    policy = FlowPolicy(load_field("tabletop"), FlowSDE(), num_steps=4)
    evaluator = EpisodeEvaluator(policy, partial(Tabletop, horizon=12), num=60)
    found = evaluator()
    env = Tabletop(60)
    env.reset(evaluation_seeds(0, 60))
    for i, name in enumerate(TASKS):
        rows = env.asked == i
        assert found.by_task().get(name, 0.0) == pytest.approx(float(found.scores["success"][rows].sum() / rows.sum()))
    assert found.by_task()["touch red"] > found.by_task()["push red to the left"] == 0
    bandit = FlowPolicy(ToThePeak(), FlowSDE(0.5), num_steps=4)
    assert EpisodeEvaluator(bandit, ToyBandit, num=4)().by_task() == {}
