"""OGPO: with the true reward for a critic it is GRPO to the bit; its targets are the value of the policy of today."""

import copy
from dataclasses import replace

import pytest
import torch

from rlflow.config import recipes
from rlflow.envs.simulators.toy import ToyBandit, ToyImage
from rlflow.envs.wrappers import Processed
from rlflow.flow.kernels import LearnedNoise
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import All
from rlflow.models.mlp import MLPField
from rlflow.rl.advantages import GroupAdvantage
from rlflow.rl.collector import Collector
from rlflow.rl.groups import Groups
from rlflow.rl.learners.policy_gradient import PolicyGradient
from rlflow.rl.likelihoods.chain import ChainLikelihood
from rlflow.rl.off_policy.learner import OffPolicySettings
from rlflow.rl.off_policy.offline import Offline
from rlflow.rl.off_policy.ogpo import OGPO, Imagined, agreed
from rlflow.rl.off_policy.replay import Replay, Transitions
from rlflow.rl.off_policy.twin import TwinSettings
from rlflow.rl.optim import AdamW
from rlflow.types import Cond
from tests.rl.off_policy.test_sac import transitions

STATES, COPIES = 4, 6


def make_chain(seed: int = 5, lr: float = 1e-3, states: int = STATES, dims: int = 1, **settings) -> PolicyGradient:
    torch.manual_seed(0)
    policy = FlowPolicy(MLPField(dims, (1, 2), 16), LearnedNoise(dims, (1, 2), 0.1, 0.3, width=8), num_steps=3)
    groups, likelihood = Groups(states, COPIES), ChainLikelihood(reduce="sum", joint=True)
    return PolicyGradient(
        policy, likelihood, GroupAdvantage(), groups, optimizer=AdamW(lr=lr), seed=seed, num_minibatches=2, **settings
    )


def make(chain: PolicyGradient | None = None, imagined: Imagined | None = None, **settings) -> OGPO:
    chain = chain or make_chain()
    small = {"twin": TwinSettings(width=16, lr=3e-3), "batch_size": 32, "start": 0}
    imagined = imagined or Imagined(chain.groups.num_groups, COPIES)
    return OGPO(chain, All(), Replay(4096, 1.0), OffPolicySettings(**(small | settings)), imagined)


def test_paid_by_the_true_reward_it_is_grpo_to_the_bit() -> None:
    """The same states and noise once through the environment, once through a critic that knows its reward."""
    env, judge = ToyBandit(STATES * COPIES), ToyBandit(STATES * COPIES)
    plain, ogpo = make_chain(), make()
    collector = Collector(env, plain.policy, plain.likelihood, All(), plain.groups, seed=5, horizon=1)
    rollout = collector.collect(0)
    judge.reset(torch.arange(judge.num_envs))
    ogpo.twin.value = lambda cond, action: judge.step(action).reward  # type: ignore[method-assign]
    imagined = ogpo.imagine(torch.ones(STATES, 1), torch.ones(STATES), Key(5, "rollout", 0, 0))
    for name in ("obs", "action", "reward", "terminated", "weight", "group", "row_ids"):
        assert torch.equal(getattr(rollout, name), getattr(imagined, name)), name
    assert plain.update(rollout)["policy/first_log_ratio_max"] == 0
    assert ogpo.chain.update(imagined)["policy/first_log_ratio_max"] == 0
    mine, theirs = ogpo.policy.state_dict(), plain.policy.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    start = make_chain().policy.state_dict()
    assert any(not torch.equal(mine[name], start[name]) for name in start)


def test_targets_are_the_value_of_todays_policy_without_entropy() -> None:
    """Paid r for ever, Q = r / (1 - gamma) is their fixed point; what a task ended is worth its reward."""
    ogpo, batch = make(make_chain(dims=4)), transitions(64)
    batch = replace(
        batch, reward=torch.full((64,), 0.3).double(), obs=batch.obs.float(), next_obs=batch.next_obs.float()
    )
    q, acted = torch.tensor(0.0), []

    def value(cond: object, action: torch.Tensor) -> torch.Tensor:
        acted.append(action)
        return q.expand(len(action))

    ogpo.twin.target_value = value  # type: ignore[method-assign, assignment]
    for ogpo.updates in range(150):
        q = ogpo.target(batch).mean()
    assert float(q) == pytest.approx(0.3 / (1 - 0.9), rel=1e-4)
    assert not torch.equal(acted[0], acted[1]), "each with noise of its own"
    assert torch.equal(ogpo.target(replace(batch, discount=0 * batch.discount)), batch.reward)


def test_critics_that_agree_pay_their_least_and_others_nothing() -> None:
    """Of one critic the advantage itself; odd in the advantages; never further from 0 than any critic's."""
    each = torch.randn(3, 400, generator=torch.Generator().manual_seed(0))
    found, alike = agreed(each), (each > 0).all(0) | (each < 0).all(0)
    assert torch.equal(agreed(each[:1]), each[0])
    assert torch.equal(agreed(-each), -found)
    assert torch.equal(found != 0, alike)
    assert torch.equal(found.abs()[alike], each.abs().amin(0)[alike])


def test_conservative_chains_are_paid_by_what_the_critics_agree_on() -> None:
    """Two critics that differ by the state alone agree on everything; two of opposite sign on nothing."""
    ogpo, states = make(imagined=Imagined(STATES, COPIES, conservative=True)), torch.ones(STATES, 1)

    def paid(*critics: torch.Tensor) -> torch.Tensor:
        ogpo.twin.each = lambda cond, action: torch.stack(critics)  # type: ignore[method-assign]
        return ogpo.imagine(states, torch.ones(STATES), Key(5, "rollout", 0, 0)).reward[0]

    q = torch.randn(STATES * COPIES, generator=torch.Generator().manual_seed(1))
    of_state = torch.arange(float(STATES)).repeat_interleave(COPIES)
    within = q.view(STATES, COPIES) - q.view(STATES, COPIES).mean(1, keepdim=True)
    torch.testing.assert_close(paid(q, q + of_state), within.flatten())
    assert not paid(q, -q).any()


def test_the_chain_waits_for_its_critics() -> None:
    """`warmup` steps of the critics leave the policy as it was, to the bit; the next update moves it."""
    chain = make_chain()
    ogpo = make(chain, imagined=Imagined(STATES, COPIES, warmup=40), batch_size=16)
    collector = Collector(ToyBandit(32), chain.policy, None, All(), Groups(32, 1), horizon=1)
    start = copy.deepcopy(chain.policy.state_dict())
    moved = []
    for iteration in range(2):  # 32 updates each
        ogpo.update(collector.collect(iteration))
        moved.append(any(not torch.equal(v, start[k]) for k, v in chain.policy.state_dict().items()))
    assert moved == [False, True]


def demonstrated() -> Transitions:
    """64 decisions that end and are paid .7."""
    data = transitions(64)
    data = replace(data, **{name: value.float() for name, value in vars(data).items()})
    return replace(data, reward=torch.full((64,), 0.7), discount=torch.zeros(64))


def test_demonstrations_teach_the_critics_before_the_first_rollout() -> None:
    """Decisions that end and are paid .7 are worth .7; the policy stays as it was, and the clone is its reference."""
    data = demonstrated()
    chain = make_chain(dims=4)
    before = copy.deepcopy(chain.policy.state_dict())
    ogpo = make(chain, offline=Offline(data, torch.arange(64), clone=0, updates=300))
    ogpo.begin()
    assert all(torch.equal(v, before[k]) for k, v in chain.policy.state_dict().items())
    torch.testing.assert_close(
        ogpo.twin.value(chain.policy.encode(data.obs), data.action), data.reward, atol=0.05, rtol=0
    )
    half = ogpo.draw(32, torch.Generator().manual_seed(0))
    assert len(half) == 32, "of the demonstrations alone, while nothing was seen"


def test_demonstrations_that_the_policy_does_not_read_are_refused_at_construction() -> None:
    with pytest.raises(ValueError, match=r"^offline.demos: the network of policy.field does not read what is seen"):
        make(make_chain(dims=1), offline=Offline(demonstrated(), torch.arange(64)))


def test_each_step_of_the_critics_has_a_subset_of_its_own() -> None:
    """Of four critics every pair is asked for targets in time, not always the first two."""
    ogpo = make(twin=TwinSettings(num=4, width=8, subset=2))
    ask, asked = ogpo.twin.target_value, []

    def target_value(cond: Cond, action: torch.Tensor) -> torch.Tensor:
        asked.append(tuple(sorted(ogpo.twin.chosen.tolist())))
        return ask(cond, action)

    ogpo.twin.target_value = target_value  # type: ignore[method-assign]
    ogpo.update(Collector(ToyBandit(64), ogpo.policy, None, All(), Groups(64, 1), horizon=1).collect(0))
    assert len(asked) == 64
    assert len(set(asked)) == 6


@pytest.mark.slow
def test_it_learns_from_its_replay() -> None:
    """Four prompts, a place for each: from 1.9 away to within 1.1 in 384 decisions, each of which counts many times."""
    torch.manual_seed(0)
    policy = FlowPolicy(MLPField(4, (1, 2), 32), LearnedNoise(4, (1, 2), 0.1, 0.3, width=8), num_steps=3)
    likelihood, groups = ChainLikelihood(reduce="sum", joint=True), Groups(16, COPIES)
    chain = PolicyGradient(policy, likelihood, GroupAdvantage(), groups, optimizer=AdamW(lr=5e-3), seed=5)
    ogpo = make(
        chain,
        imagined=Imagined(16, COPIES, rounds=4),
        twin=TwinSettings(width=32, lr=1e-2),
        batch_size=64,
        updates_per_step=2.0,
    )
    env = Processed(ToyImage(32), lambda obs: obs, lambda action: action[:, 0], (1, 2))
    collector = Collector(env, policy, None, All(), Groups(32, 1), horizon=1)
    rewards = []
    for iteration in range(13):
        rollout = collector.collect(iteration)
        rewards.append(float(rollout.reward.mean()))
        ogpo.update(rollout)
    assert sum(rewards[:2]) / 2 < -1.7
    assert sum(rewards[-3:]) / 3 > -1.1


def test_a_saved_learner_goes_on_as_if_it_had_not_stopped() -> None:
    """Replay, critics, chain and their optimisers, to the bit."""
    one, two = make(), make()
    collector = Collector(ToyBandit(32), one.policy, None, All(), Groups(32, 1), horizon=1)
    rollouts = [collector.collect(i) for i in range(3)]
    one.update(rollouts[0]), one.update(rollouts[1])
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    two.policy.load_state_dict(one.policy.state_dict())
    two.policy.weights.load_state_dict(copy.deepcopy(one.policy.weights.state_dict()))
    assert one.update(rollouts[2]) == pytest.approx(two.update(rollouts[2]), rel=0, abs=0, nan_ok=True)
    assert all(torch.equal(a, b) for a, b in zip(one.policy.parameters(), two.policy.parameters(), strict=True))


def test_groups_that_are_not_those_asked_for_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has groups of \(4, 6\)"):
        make(imagined=Imagined(8, 6))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("advantage=gae", "^advantage: algorithm=ogpo compares the chains of one state"),
        ("reward.scale=true", "^reward.scale: the replay of algorithm=ogpo would keep quotients"),
        (
            "algorithm.chain.num_minibatches=200",
            r"^algorithm\.chain\.num_minibatches: 200 is more than algorithm.states = 128",
        ),
        ("algorithm.copies=1", r"^algorithm\.copies: must be at least 2"),
        ("algorithm.chain.objective={name: clip, lo: 1}", r"^algorithm\.chain\.objective\.lo: .*did you mean 'low'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_their_path(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipes.load("robot_ogpo", [override])
