"""FQL and QAM where the optimum can be written down: a linear Q beside a cloned flow that is exactly a Gaussian."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rlflow.envs.simulators.toy import ToyReach
from rlflow.flow.field import VelocityField
from rlflow.flow.kernels import Ancestral, FlowSDE, LearnedNoise
from rlflow.flow.marginal import end_weights
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.squash import Tanh
from rlflow.flow.steps import AllButLast, NoSteps
from rlflow.models.mlp import MLPField
from rlflow.rl.collector import Collector
from rlflow.rl.groups import Groups
from rlflow.rl.off_policy.actor import ActorSettings
from rlflow.rl.off_policy.extraction import FQL, QAM, Extraction
from rlflow.rl.off_policy.flow_q import FlowQ
from rlflow.rl.off_policy.learner import OffPolicySettings
from rlflow.rl.off_policy.offline import Offline
from rlflow.rl.off_policy.replay import Replay, Transitions
from rlflow.rl.off_policy.twin import TwinSettings
from rlflow.rl.optim import AdamW
from rlflow.types import Cond
from tests.rl.learners.test_adjoint import Shifted, end_mean
from tests.rl.off_policy.test_sac import transitions

STEPS, SLOPE = 5, 0.8
ROWS = Cond({"pooled": torch.zeros(64, 3, dtype=torch.float64)})


def losses(extraction: Extraction, policy: FlowPolicy, behaviour: FlowPolicy, slope: float = SLOPE) -> Tensor:
    """(N,) for Q = slope times the sum of the action's numbers."""
    steps = AllButLast() if isinstance(extraction, QAM) else NoSteps()
    plan = steps(0, policy.grid(policy.num_steps), torch.zeros(1, dtype=torch.long))
    torch.manual_seed(3)
    noise = torch.randn(plan.num_steps + 1, 64, *policy.event_shape, dtype=torch.float64)
    return extraction.loss(
        policy, behaviour, (plan, behaviour.plan()), ROWS, lambda a: slope * a.flatten(1).sum(1), noise
    )[0]


def grad(loss: Tensor, policy: FlowPolicy) -> Tensor:
    return torch.autograd.grad(loss.mean(), policy.field.shift)[0]


class OneStep(VelocityField):
    """x_0 to its shift + .5 x_0, two numbers: where any number of Euler steps of that velocity leads, or one."""

    event_shape, num_features = (1, 2), 3

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def encode(self, obs: Tensor) -> Cond:
        return Cond({"pooled": obs})

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        start = (x - t[:, None, None] * self.shift) / (1 - 0.5 * t[:, None, None])
        return self.shift - 0.5 * start


@pytest.mark.parametrize("weight", [0.7, 10.0, 1e6])
def test_fql_ends_where_the_slope_balances_the_distance(weight: float) -> None:
    """mu = flow_b + D slope / (2 weight), from every x_0; for a weight without bound it is the clone itself."""
    policy = FlowPolicy(OneStep(), FlowSDE(0.5), num_steps=1)
    extraction = FQL(weight, num_steps=7)
    behaviour = extraction.behaviour(policy)
    assert behaviour.num_steps == 7
    wanted = 2 * SLOPE / (2 * weight)
    assert float(grad(losses(extraction, policy, behaviour), policy).abs().min()) > 0
    policy.field.shift.data.fill_(wanted)
    torch.testing.assert_close(grad(losses(extraction, policy, behaviour), policy), torch.zeros(2).double())
    with torch.no_grad():
        mine = policy.sample(ROWS, x_0=torch.ones(64, 1, 2).double()).final
        theirs = behaviour.sample(ROWS, x_0=torch.ones(64, 1, 2).double()).final
    torch.testing.assert_close(mine - theirs, torch.full_like(mine, wanted))


def test_a_normalised_q_is_blind_to_the_rewards_scale() -> None:
    policy = FlowPolicy(OneStep(), FlowSDE(0.5), num_steps=1)
    extraction = FQL(2.0, normalize=True)
    behaviour = extraction.behaviour(policy)
    one, other = (grad(losses(extraction, policy, behaviour, slope), policy) for slope in (0.1, 50.0))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_qam_ends_at_the_cloned_law_tilted_by_q(scale: float) -> None:
    """A Gaussian tilted by exp(scale slope a) moves by its variance times scale slope; at scale 0 it is the clone."""
    policy = FlowPolicy(Shifted(STEPS), Ancestral(1.0), num_steps=STEPS)
    extraction, steps = QAM(scale), AllButLast()
    behaviour = extraction.behaviour(policy)
    plan = steps(0, policy.grid(STEPS), torch.zeros(1, dtype=torch.long))
    start, weights = end_weights(policy.kernel, policy.solver, plan, (1,), 3)
    policy.field.shift.data.normal_()
    for _ in range(2):  # Newton's steps, of a square
        gradient = grad(losses(extraction, policy, behaviour), policy)
        curvature = (policy.kernel.gain(plan.t[:-1], plan.t[1:]) / policy.kernel.min_std(plan.t[:-1], plan.t[1:])) ** 2
        policy.field.shift.data -= gradient / torch.where(plan.noisy, curvature, 2.0)
    assert float(losses(extraction, policy, behaviour).detach().max()) < 1e-20, "the optimum, whatever the samples"
    tilted = float(start + weights[1:].square().sum() * SLOPE * scale)
    assert end_mean(policy, steps) == pytest.approx(tilted, abs=1e-9)
    assert float(policy.field.shift.detach()[-1]) == pytest.approx(0, abs=1e-12), "the last step is the clone's"


def test_qams_gradient_does_not_pass_through_q_or_the_chain() -> None:
    """The policy's own derivative stays out: what is matched is held."""
    policy = FlowPolicy(Shifted(STEPS), Ancestral(1.0), num_steps=STEPS)
    behaviour = QAM(1.0).behaviour(policy)
    found = losses(QAM(1.0), policy, behaviour)
    assert all(p.grad is None for p in behaviour.parameters())
    (one,) = torch.autograd.grad(found.sum(), policy.field.shift)
    assert float(one[:-1].abs().min()) > 0


def make(extraction: Extraction) -> FlowQ:
    torch.manual_seed(0)
    one = isinstance(extraction, FQL)
    policy = FlowPolicy(
        MLPField(4, (2, 2), 12, running=True), FlowSDE(0.5) if one else Ancestral(1.0), num_steps=1 if one else 4,
        squash=Tanh(),
    ).double()  # fmt: skip
    shared = OffPolicySettings(batch_size=16, start=0, twin=TwinSettings(width=8))
    return FlowQ(policy, NoSteps() if one else AllButLast(), Replay(1000, 0.9), extraction, shared)


@pytest.mark.parametrize("extraction", [FQL(3.0, num_steps=4), QAM(0.5)], ids=["fql", "qam"])
def test_the_behaviour_learns_the_data_and_not_q(extraction: Extraction) -> None:
    """Its gradient is flow matching's: the same for any Q, none from decisions that were not carried out whole."""
    learner, batch = make(extraction), transitions(16, (2, 2))
    noise = learner.noise(16)[1]

    def gradients(b) -> list[Tensor]:
        return learner.actor_gradients(vars(b), learner.policy.encode(b.obs).data, noise)[1]

    before = gradients(batch)
    learner.twin.net.weights[0].data.normal_()
    for a, b in zip(before, gradients(batch), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    part = copy.copy(batch)
    part = replace(part, counts=torch.zeros_like(part.counts))
    assert all(float(g.abs().max()) == 0 for g in gradients(part))
    reference = copy.deepcopy(learner.behaviour)
    wanted = torch.autograd.grad(learner.matched(batch, learner.policy.encode(batch.obs), noise), learner.cloning.parameters)  # fmt: skip
    torch.testing.assert_close(before, wanted)
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), learner.behaviour.parameters(), strict=True))


def test_targets_are_those_of_the_deployed_policy() -> None:
    """R + discount Q'(s', a') at the sampler without noise."""
    learner, batch = make(QAM(0.5)), transitions(8, (2, 2))
    noise = learner.noise(8)[0]
    with torch.no_grad():
        cond = learner.policy.encode(batch.next_obs)
        action = torch.tanh(learner.policy.sample(cond, learner.policy.plan(), x_0=noise).final)
        wanted = batch.reward + 0.9 * learner.twin.target_value(cond, action)
    torch.testing.assert_close(learner.target(batch, noise), wanted)


@pytest.mark.parametrize("extraction", [FQL(3.0, num_steps=4), QAM(0.5)], ids=["fql", "qam"])
def test_a_saved_learner_goes_on_as_if_it_had_not_stopped(extraction: Extraction) -> None:
    """And recorded or not, one step is another to the bit."""
    one, two = make(extraction), make(extraction)
    for recorded in (two._critic, two._actor):
        recorded.why_not = "plain"
    collector = Collector(ToyReach(8), one.policy, None, one_steps(extraction), Groups(8, 1), horizon=2)
    rollouts = [collector.collect(i) for i in range(3)]
    one.update(rollouts[0]), one.update(rollouts[1])
    assert one._actor.recordings or one._actor.why_not, "recorded"
    assert one._actor.why_not is None
    assert one._critic.why_not is None
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    two.policy.load_state_dict(one.policy.state_dict())
    two.policy.weights.load_state_dict(copy.deepcopy(one.policy.weights.state_dict()))
    assert one.update(rollouts[2]) == pytest.approx(two.update(rollouts[2]), rel=0, abs=0, nan_ok=True)
    for a, b in ((one.policy, two.policy), (one.behaviour, two.behaviour)):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert one.policy.counts[0] > 0


def one_steps(extraction: Extraction) -> NoSteps | AllButLast:
    return NoSteps() if isinstance(extraction, FQL) else AllButLast()


def test_what_neither_can_do_is_refused() -> None:
    policy = FlowPolicy(MLPField(4, (1, 2), 12), LearnedNoise(4, (1, 2), 0.1, 0.3, width=8), num_steps=4)
    with pytest.raises(ValueError, match=r"fql acts in one step without noise: use policy\.num_steps=1"):
        FQL().check(policy, NoSteps())
    with pytest.raises(ValueError, match="LearnedNoise on these steps is not memoryless"):
        QAM().check(policy, AllButLast())
    with pytest.raises(ValueError, match="adjoint needs the same noisy steps always"):
        QAM().check(FlowPolicy(MLPField(4, (1, 2), 12), Ancestral(1.0), num_steps=4), NoSteps())


def four_modes(num: int = 2000) -> Offline:
    """A bandit's decisions at (+-2, +-2), each mode as often, scattered by .2; paid 1, .8, .6 or .4 by the mode."""
    mode = torch.arange(num) % 4
    signs = torch.stack([1 - 2 * (mode % 2), 1 - 2 * (mode // 2)], -1).float()
    action = (2 * signs + 0.2 * torch.randn(num, 2, generator=torch.Generator().manual_seed(0))).unsqueeze(1)
    obs = torch.ones(num, 1)
    data = Transitions(obs, action, 1 - 0.2 * mode, torch.zeros(num), obs, torch.ones(num), torch.ones(num, 1))
    return Offline(data, torch.arange(num), clone=800, updates=600)


def played(policy: FlowPolicy) -> tuple[float, float]:
    """Mean reward of 2,000 actions, and the share of them that lie on a mode."""
    with torch.no_grad():
        done = policy.sample(policy.encode(torch.ones(2000, 1)), key=Key(0, "test")).final[:, 0]
    reward = 1 - 0.2 * ((done[:, 0] < 0).float() + 2 * (done[:, 1] < 0).float())
    return float(reward.mean()), float(((done.abs() - 2).abs().amax(1) < 0.8).float().mean())


@pytest.mark.slow
def test_qam_shifts_the_shares_of_modes_and_stays_where_the_data_are() -> None:
    """Mean reward .7 of the clone; of its law tilted by exp(8 r), of which the best mode has .80, it is .951."""
    torch.manual_seed(0)
    policy = FlowPolicy(MLPField(1, (1, 2), 64), Ancestral(1.0), num_steps=10)
    shared = OffPolicySettings(batch_size=128, twin=TwinSettings(width=64, lr=1e-3), offline=four_modes())
    actor = ActorSettings(AdamW(lr=1e-3, betas=(0.9, 0.999)))
    learner = FlowQ(policy, AllButLast(), Replay(64, 1.0), QAM(8.0), shared, actor)
    learner.begin()
    (reward, near), (cloned, as_near) = played(policy), played(learner.behaviour)
    assert cloned == pytest.approx(0.7, abs=0.03)
    assert 0.91 < reward < 0.97
    assert near > as_near - 0.1
