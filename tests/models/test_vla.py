"""VLA: everything observed matters, rows are apart, and a frozen prefix runs once for every decision."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlflow.envs.simulators.tabletop import LENGTH, PIXELS, WORDS, Tabletop
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import OneRandom
from rlflow.models.io import load_field, save_field
from rlflow.models.vla import VLA
from rlflow.rl.advantages import GAE, GroupAdvantage
from rlflow.rl.collector import Collector
from rlflow.rl.groups import Groups
from rlflow.rl.learners.policy_gradient import PolicyGradient
from rlflow.rl.likelihoods.chain import ChainLikelihood
from rlflow.types import Tree

ROWS = 8


def field(seed: int = 0) -> VLA:
    torch.manual_seed(seed)
    made = VLA((4, 2), vocab=len(WORDS), context=LENGTH, pixels=PIXELS, width=16)
    torch.nn.init.normal_(made.leave[1].weight)  # as after training
    return made


def observed() -> Tree:
    return Tabletop(ROWS).reset(torch.arange(ROWS))


def velocity(field: VLA, obs: Tree, t: float = 0.3) -> Tensor:
    x = torch.randn(1, 4, 2, generator=torch.Generator().manual_seed(1)).expand(ROWS, 4, 2)
    with torch.no_grad():
        return field(x, torch.full((ROWS,), t), torch.zeros(ROWS), field.encode(obs))


CHANGES: dict[str, Callable[[Tree], Tree]] = {
    "pixels": lambda v: v.flip(2),
    "text": lambda v: torch.where(v == WORDS.index("red"), WORDS.index("blue"), v.roll(1, 0)),
    "state": lambda v: v + 0.1,
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_observation_matters(name):
    obs = observed()
    before, after = velocity(field(), obs), velocity(field(), {**obs, name: CHANGES[name](obs[name])})
    assert float((after - before).abs().amax((1, 2)).min()) > 1e-4


@pytest.mark.parametrize("name", ["keys", "values", "pooled"])
def test_the_expert_reads_the_cache_of_every_layer_and_the_readout(name):
    made = field()
    cond = made.encode(observed()).map(torch.detach)
    part = cond.data[name].requires_grad_()
    v = made(torch.randn(ROWS, 4, 2), torch.full((ROWS,), 0.3), torch.zeros(ROWS), cond)
    (grad,) = torch.autograd.grad(v.square().sum(), part)
    by_layer = grad.abs().flatten(2).amax(-1) if name != "pooled" else grad.abs().amax(-1)
    assert float(by_layer.min()) > 0


def test_time_and_every_noisy_action_matter_for_every_action():
    made, obs = field(), observed()
    assert not torch.equal(velocity(made, obs, 0.3), velocity(made, obs, 0.6))
    x = torch.zeros(ROWS, 4, 2, requires_grad=True)
    v = made(x, torch.full((ROWS,), 0.3), torch.zeros(ROWS), made.encode(obs))
    for i in range(4):
        (grad,) = torch.autograd.grad(v[:, i].square().sum(), x, retain_graph=True)
        assert float(grad.abs().amax((0, 2)).min()) > 0


def test_the_order_of_words_and_pixels_is_seen():
    """Without positions a bag of tokens would remain."""
    obs = observed()
    swapped = {**obs, "text": obs["text"].flip(1), "pixels": obs["pixels"].transpose(1, 2)}
    for name in ("text", "pixels"):
        assert not torch.allclose(velocity(field(), obs), velocity(field(), {**obs, name: swapped[name]}), atol=1e-5)


def test_without_a_picture_words_and_a_normalised_state_remain():
    """The state counts in units of the demonstrations: what lies three times as wide apart under a std of 3 is the same."""
    obs = {name: observed()[name] for name in ("text", "state")}

    def made(std: float) -> VLA:
        torch.manual_seed(0)
        field = VLA((4, 2), vocab=len(WORDS), context=LENGTH, pixels=0, width=16)
        torch.nn.init.normal_(field.leave[1].weight)
        field.normalizer.moments.copy_(torch.tensor([[1.0], [0.5], [std**2]]).expand(3, 2))
        return field

    wide = {**obs, "state": 0.5 + 3 * (obs["state"] - 0.5)}
    torch.testing.assert_close(velocity(made(3.0), wide), velocity(made(1.0), obs))
    for name in obs:
        changed = {**obs, name: CHANGES[name](obs[name])}
        assert not torch.allclose(velocity(made(1.0), changed), velocity(made(1.0), obs), atol=1e-4)
    with pytest.raises(ValueError, match="the model reads"):
        made(1.0).encode(observed())


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(ValueError, match="pixels 20 must be a multiple of 8"):
        VLA((4, 2), vocab=3, pixels=20)


def test_a_row_does_not_depend_on_the_others():
    obs = observed()
    alone = {name: v[2:3].expand_as(v) for name, v in obs.items()}
    torch.testing.assert_close(velocity(field(), alone)[2], velocity(field(), obs)[2])


def test_another_observation_is_refused():
    obs = observed()
    with pytest.raises(ValueError, match="the model reads"):
        field().encode({"pixels": obs["pixels"], "state": obs["state"]})
    with pytest.raises(ValueError, match="the model reads"):
        field().encode(obs["state"])


def test_it_comes_back_from_disk(tmp_path):
    made = field()
    save_field(made, tmp_path)
    assert torch.equal(velocity(load_field(str(tmp_path)), observed()), velocity(made, observed()))


class Counter:
    """Rows that went through the prefix."""

    def __init__(self, field: VLA):
        self.rows: list[int] = []
        field.prefix.register_forward_hook(lambda module, args, out: self.rows.append(len(args[0])))


@pytest.mark.parametrize("advantage", [GroupAdvantage(), GAE()], ids=["group", "gae"])
def test_a_frozen_prefix_runs_once_per_decision_and_an_update_only_asks_for_states_never_decided_in(advantage):
    """Rollout: T x B rows. Update: none with groups; a critic values the states after the last decision of each row."""
    made, horizon = field(), 3
    made.prefix.requires_grad_(False)
    policy = FlowPolicy(made, FlowSDE(0.5), num_steps=4)
    policy.multiple = 4  # rows that passes are filled up to: all of these are such
    likelihood, groups = ChainLikelihood("sum"), Groups(ROWS // 4, 4)
    env = Tabletop(ROWS, chunk=4, horizon=8)  # an episode ends inside
    count = Counter(made)
    walker = Collector(
        env, policy, likelihood, OneRandom(skip_last=0), groups, horizon=horizon, mode="steps", rows_per_call=4
    )
    rollout = walker.collect(0)
    rollout.reward += torch.randn(rollout.reward.shape, generator=torch.Generator().manual_seed(0))
    assert count.rows == [4] * (horizon * ROWS // 4)
    count.rows.clear()
    learner = PolicyGradient(policy, likelihood, advantage, groups, epochs=3, num_minibatches=2, micro_batch=8)
    before = made.leave[1].weight.clone()
    metrics = learner.update(rollout)
    ended = int((rollout.terminated | rollout.truncated).sum())
    assert ended > 0
    assert sum(count.rows) == (ROWS + ended if learner.critic is not None else 0)
    assert metrics["policy/first_log_ratio_max"] == 0
    assert not torch.equal(made.leave[1].weight, before)


def test_a_prefix_that_trains_is_run_again():
    """Its encodings would be stale, and without a graph."""
    made = field()
    policy = FlowPolicy(made, FlowSDE(0.5), num_steps=4)
    policy.multiple = 4  # rows that passes are filled up to: all of these are such
    groups, likelihood = Groups(2, 4), ChainLikelihood("sum")
    walker = Collector(Tabletop(8), policy, likelihood, OneRandom(skip_last=0), groups, horizon=2, mode="steps")
    rollout = walker.collect(0)
    rollout.reward += torch.randn(rollout.reward.shape, generator=torch.Generator().manual_seed(0))
    count = Counter(made)
    before = made.prefix.word.weight.clone()
    PolicyGradient(policy, likelihood, GroupAdvantage(), groups, micro_batch=8).update(rollout)
    assert sum(count.rows) == rollout.num_rows
    assert not torch.equal(made.prefix.word.weight, before)
