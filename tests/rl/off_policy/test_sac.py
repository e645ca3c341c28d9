"""SAC: gradients through the chain, densities, temperature, targets, and one update against stable-baselines3's."""

import math
from dataclasses import replace

import pytest
import torch

from rlflow.envs.simulators.toy import ToyReach
from rlflow.flow.kernels import FlowSDE, LearnedNoise
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.squash import Tanh
from rlflow.flow.steps import All, AllButLast
from rlflow.models.gated import GatedField
from rlflow.models.gaussian import GaussianField
from rlflow.models.mlp import MLPField
from rlflow.rl.collector import Collector, permute_rewards
from rlflow.rl.groups import Groups
from rlflow.rl.off_policy.actor import ActorSettings
from rlflow.rl.off_policy.learner import OffPolicySettings
from rlflow.rl.off_policy.path_entropy import entropy_target, highest_entropy, path_log_prob
from rlflow.rl.off_policy.replay import Replay, Transitions
from rlflow.rl.off_policy.sac import SAC
from rlflow.rl.off_policy.temperature import Temperature
from rlflow.rl.off_policy.twin import Ensemble, Twin, TwinSettings
from rlflow.rl.optim import AdamW, Deferred, NonFiniteError, Optimizer
from rlflow.types import Cond
from tests.rl.off_policy.test_replay import rollout

CPU = torch.device("cpu")


def make_policy(field=None, num_steps=3, std=(0.05, 0.4), shape=(1, 2), dtype=torch.float64):
    torch.manual_seed(0)
    field = field or GatedField(4, shape, width=12, gate_width=6)
    kernel = LearnedNoise(4, shape, *std, width=8)
    torch.nn.init.normal_(kernel.net[-1].weight, std=0.5)
    return FlowPolicy(field, kernel, num_steps=num_steps, squash=Tanh()).to(dtype)


def make_sac(policy=None, actor=None, batch_size=8, start=0, updates_per_step=1.0, permute=False, **own):
    shared = OffPolicySettings(batch_size, start, updates_per_step, TwinSettings(width=8), permute=permute)
    return SAC(policy or make_policy(), All(), Replay(1000, 0.9), shared, actor, **own)


def transitions(num=8, shape=(1, 2)):
    rows = {"obs": torch.randn(num, 4), "next_obs": torch.randn(num, 4), "action": torch.rand(num, *shape) * 2 - 1}
    rows |= {"reward": torch.randn(num), "discount": torch.full((num,), 0.9), "weight": torch.ones(num)}
    rows |= {"counts": torch.ones(num, shape[0])}
    return Transitions(**{k: v.double() for k, v in rows.items()})


def actor_step(sac, batch):
    return sac._actor_step(vars(batch), sac.policy.encode(batch.obs).data, sac.noise(len(batch))[1])


# -- the gradient ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [GatedField, MLPField])
def test_the_actors_gradient_goes_through_every_step(kind):
    """Against finite differences in directions of the weights, noise held: the chain, the density, Q and the squash."""
    sac = make_sac(make_policy(kind(4, (1, 2), 12)))
    batch = transitions()
    cond = sac.policy.encode(batch.obs)

    def loss():
        return sac.actor_loss(cond, batch, sac.noise(8)[1])[0]

    parameters = sac.optimizer.parameters
    gradients = torch.autograd.grad(loss(), parameters)
    for _ in range(3):
        direction = [torch.randn_like(p) for p in parameters]
        predicted = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
        values = []
        for h in (1e-5, -2e-5):
            with torch.no_grad():
                torch._foreach_add_(parameters, direction, alpha=h)
            values.append(loss().detach())
        with torch.no_grad():
            torch._foreach_add_(parameters, direction, alpha=1e-5)
        torch.testing.assert_close((values[0] - values[1]) / 2e-5, predicted, rtol=1e-4, atol=1e-7)


def test_the_first_step_of_the_chain_moves_the_action():
    """A gradient cut between the steps would leave only the last one's: here every time's share is there."""
    sac = make_sac(make_policy(num_steps=4))
    batch = transitions()
    seen = {}
    real = sac.policy.transition

    def watch(x, t, t_next, cond):
        if x.requires_grad:
            x.register_hook(lambda g: seen.__setitem__(round(float(t[0]), 2), g.abs().max().item()))
        return real(x, t, t_next, cond)

    sac.policy.transition = watch
    sac.actor_loss(sac.policy.encode(batch.obs), batch, sac.noise(8)[1])[0].backward()
    assert sorted(seen) == [0.25, 0.5, 0.75]
    assert all(size > 0 for size in seen.values())


def test_the_gaussian_terms_give_the_velocity_no_gradient_and_log_std_minus_one():
    """Reparameterised, log N(x'; mean, std) = -eps^2/2 - log std: only the squash's term moves the velocity."""
    policy = make_policy()
    policy.squash = type(policy.squash).__bases__[0]()  # the identity
    cond = policy.encode(torch.randn(6, 4).double())
    chain = policy.sample(cond, All()(0, policy.grid(3), torch.arange(6)), key=Key(0, "test"))
    log_std = chain.std.log()
    path_log_prob(policy, chain).sum().backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-12 for p in policy.field.parameters())
    assert policy.kernel.net[-1].bias.grad.abs().min() > 0
    with torch.enable_grad():
        again = policy.sample(cond, All()(0, policy.grid(3), torch.arange(6)), key=Key(0, "test"))
        (slope,) = torch.autograd.grad(path_log_prob(policy, again).sum(), again.std)
    # partial at fixed x_next is (z^2 - 1) / std; with x_next = mean + std eps the whole is -1 / std
    z = (again.x_next - again.mean) / again.std
    through_sample = -z * z / again.std
    torch.testing.assert_close((slope + through_sample) * log_std.exp(), -torch.ones_like(z), rtol=1e-6, atol=1e-6)


def test_the_critics_weights_get_no_gradient_from_the_actor():
    sac, batch = make_sac(), transitions()
    before = {k: v.clone() for k, v in sac.twin.net.state_dict().items()}
    actor_step(sac, batch)
    assert all(p.grad is None for p in sac.twin.net.parameters())
    assert all(torch.equal(v, sac.twin.net.state_dict()[k]) for k, v in before.items())


# -- densities and entropy ------------------------------------------------------------------------


def test_a_gaussian_actors_log_prob_is_torchs():
    policy = make_policy(GaussianField(4, (1, 2), width=12), num_steps=1)
    obs = torch.randn(7, 4).double()
    cond = policy.encode(obs)
    chain = policy.sample(cond, All()(0, policy.grid(1), torch.arange(7)), key=Key(3, "test"))
    std = policy.kernel(chain.x[:, 0], 0 * chain.x[:, 0], 0 * chain.t[:, 0], chain.t_next[:, 0], cond["pooled"]).std
    base = torch.distributions.Normal(policy.field.mean(obs).view(7, 1, 2), std)
    law = torch.distributions.TransformedDistribution(base, torch.distributions.TanhTransform(cache_size=1))
    law.transforms[0]._cached_x_y = (chain.final, chain.final.tanh())
    torch.testing.assert_close(path_log_prob(policy, chain), law.log_prob(chain.final.tanh()).flatten(1).sum(1))


def test_a_flows_log_prob_is_that_of_its_whole_path():
    """Built term by term from torch's Normal: the start, K steps, the squash."""
    policy = make_policy()
    cond = policy.encode(torch.randn(5, 4).double())
    chain = policy.sample(cond, All()(0, policy.grid(3), torch.arange(5)), key=Key(3, "test"))
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(chain.x[:, 0])
    for k in range(3):
        expected = expected + torch.distributions.Normal(chain.mean[:, k], chain.std[:, k]).log_prob(chain.x_next[:, k])
    expected = expected - torch.log(1 - chain.final.tanh().square())
    torch.testing.assert_close(path_log_prob(policy, chain), expected.flatten(1).sum(1))
    assert torch.equal(chain.x_next[:, 0], chain.x[:, 1])


def test_no_path_has_more_entropy_than_the_bound():
    """At the upper bound of the noise it is met but for the squash, which only lowers it."""
    policy = make_policy(std=(0.05, 0.4))
    torch.nn.init.zeros_(policy.kernel.net[-1].weight)
    torch.nn.init.constant_(policy.kernel.net[-1].bias, 50.0)
    cond = policy.encode(torch.randn(4000, 4).double())
    chain = policy.sample(cond, All()(0, policy.grid(3), torch.arange(4000)), key=Key(3, "test"))
    squashed = policy.squash.log_det(chain.final).mean()
    entropy = -path_log_prob(policy, chain).mean()
    assert squashed < 0
    assert (entropy - squashed).item() == pytest.approx(highest_entropy(policy), abs=0.1)


def test_an_unattainable_target_is_refused_and_the_default_is_not():
    """[.08, .16] at K = 4: at most -.24 nats per number, so the published target of 0 makes alpha diverge."""
    policy = make_policy(num_steps=4, std=(0.08, 0.16))
    assert highest_entropy(policy) / 2 == pytest.approx(-0.236, abs=1e-3)
    with pytest.raises(ValueError, match=r"0 nats per number cannot be reached.*less than -0\.236.*raise .*std_max"):
        make_sac(policy, target_entropy=0.0)
    middle = 0.5 * math.log(2 * math.pi * math.e)
    middle += 4 * (0.5 * math.log(2 * math.pi * math.e) + 0.5 * math.log(0.08 * 0.16))
    assert entropy_target(policy, None) / 2 == pytest.approx(middle - 0.5)
    assert entropy_target(policy, -1.0) == pytest.approx(-2.0)


def test_a_bound_that_falls_during_the_run_counts_as_it_will_be():
    policy = make_policy()
    high = highest_entropy(policy)
    policy.kernel.hold, policy.kernel.final = 0.3, 0.5
    assert highest_entropy(policy) < high
    policy.kernel.set_progress(1.0)
    assert math.exp(policy.kernel.hi) == pytest.approx(float(policy.kernel.max_std(torch.zeros(1), torch.ones(1))))


def test_fixed_noise_has_one_entropy_and_its_default_target_below():
    policy = FlowPolicy(MLPField(4, (1, 2), 8), FlowSDE(), num_steps=3, squash=Tanh())
    assert entropy_target(policy, None) == pytest.approx(highest_entropy(policy) - 0.5 * 2, abs=1e-5)


# -- temperature ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("entropy", "rises"), [(-5.0, True), (5.0, False)])
def test_the_temperature_rises_where_entropy_is_missing_and_falls_where_there_is_too_much(entropy, rises):
    temperature = Temperature(target=0.0, initial=0.2, lr=1e-2, device=CPU)
    for _ in range(20):
        temperature.fit(torch.tensor(-entropy))
    assert bool(temperature.value > 0.2) is rises
    still = Temperature(target=0.0, initial=0.2, lr=0.0, device=CPU)
    still.fit(torch.tensor(-entropy))
    assert float(still.value) == pytest.approx(0.2)


def test_the_whole_loop_brings_the_entropy_to_its_target():
    """With rewards that say nothing: the sign of alpha's loss and that of the actor's fit together."""
    sac = make_sac(
        alpha=0.5, alpha_lr=0.1, actor=ActorSettings(AdamW(lr=2e-2, betas=(0.9, 0.999))), target_entropy=-2.0
    )
    batch = transitions(64)
    found = []
    for _ in range(300):
        found.append(float(actor_step(sac, batch)["policy/entropy"]))
        sac.updates += 1
    assert sum(found[-50:]) / 50 == pytest.approx(-4.0, abs=0.7)
    assert 1e-6 < float(sac.temperature.value) < 10  # a wrong sign ends at exp(-30) or exp(30)


# -- the critic -----------------------------------------------------------------------------------


def test_the_ensemble_is_its_members_side_by_side():
    torch.manual_seed(0)
    net = Ensemble(6, num=3, width=8, depth=2).double()
    for p in (*net.gains, *net.shifts):
        torch.nn.init.normal_(p)
    x, a = torch.randn(5, 4).double(), torch.randn(5, 1, 2).double()
    for e in range(3):
        h = torch.cat([x, a.flatten(1)], -1)
        for i in range(2):
            h = h @ net.weights[i][e] + net.biases[i][e]
            h = torch.relu(torch.nn.functional.layer_norm(h, (8,)) * net.gains[i][e] + net.shifts[i][e])
        torch.testing.assert_close(net(x, a)[e], (h @ net.weights[2][e] + net.biases[2][e])[:, 0])


def test_the_target_is_soft_and_terminal_steps_end_it():
    sac, batch = make_sac(), transitions()
    ended = replace(batch, discount=0 * batch.discount)
    noise = sac.noise(8)[0]
    assert torch.equal(sac.target(ended, noise), batch.reward)
    target = sac.target(batch, noise)
    with torch.no_grad():
        cond = sac.policy.encode(batch.next_obs)
        acted = sac.act(cond, noise)
        q = sac.twin.target(cond["pooled"], acted.action).amin(0)
    torch.testing.assert_close(target, batch.reward + 0.9 * (q - 0.2 * acted.log_prob))


def test_each_decisions_entropy_counts_once():
    """Paid r for ever, acting with entropy H: the targets' fixed point is Q = (r + gamma alpha H) / (1 - gamma).

    The entropy of the first decision is the actor's affair; all that follow it are in Q, in full.
    """
    policy = FlowPolicy(MLPField(4, (1, 2), 8), FlowSDE(), num_steps=3).double()  # fixed noise, and no squash
    sac, batch = make_sac(policy), transitions(500)
    batch, q = replace(batch, reward=torch.full((500,), 0.3).double()), torch.tensor(0.0).double()
    sac.twin.target_value = lambda cond, action: q.expand(len(action))
    for sac.updates in range(100):
        q = sac.target(batch, sac.noise(500)[0]).mean()
    assert float(q) == pytest.approx((0.3 + 0.9 * 0.2 * highest_entropy(policy)) / 0.1, abs=0.15)


def test_masked_rows_teach_nothing():
    """Whatever stands in them, nan too."""
    sac, batch = make_sac(anchor=1.0), transitions()
    weight = torch.ones(8).double()
    weight[3:] = 0
    cond = sac.policy.encode(batch.obs)
    losses = []
    for filler in (0.0, torch.nan):
        action, target = batch.action.clone(), batch.reward.clone()
        target[3:] = filler
        masked = replace(batch, action=action, weight=weight)
        losses.append((sac.twin.loss(cond, action, target, weight), sac.actor_loss(cond, masked, sac.noise(8)[1])[0]))
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))


def test_the_anchor_leaves_actions_alone_that_nobody_carried_out():
    """What stands behind a demonstration's end moves nothing; the others count as much as before."""
    sac, batch = make_sac(make_policy(shape=(3, 2)), anchor=1.0), transitions(shape=(3, 2))
    counts = torch.ones(8, 3).double()
    counts[:4, 1:] = 0
    cond, found = sac.policy.encode(batch.obs), []
    for filler in (0.0, 5.0):
        action = torch.where(counts[..., None] > 0, batch.action, filler)
        found.append(sac.actor_loss(cond, replace(batch, action=action, counts=counts), sac.noise(8)[1]))
    assert torch.equal(found[0][0], found[1][0])
    _, acted, distance = found[0]
    torch.testing.assert_close(distance[0], (acted.action - batch.action)[0, 0].square().mean())
    torch.testing.assert_close(distance[-1], (acted.action - batch.action)[-1].square().mean())


def test_the_critics_gradient_ends_at_the_features():
    """It is the policy's encoder that makes them, and the actor's loss alone that trains it."""
    sac, batch = make_sac(), transitions()
    features = batch.obs.clone().requires_grad_()
    action = batch.action.clone().requires_grad_()
    sac.twin.loss(Cond({"pooled": features}), action, batch.reward, batch.weight).backward()
    assert features.grad is None
    assert action.grad.abs().sum() > 0


def test_masked_rows_have_no_say_in_the_temperature():
    sac, batch = make_sac(), transitions()
    weight = torch.ones(8).double()
    weight[3:] = 0
    acted = sac.act(sac.policy.encode(batch.obs), sac.noise(8)[1])
    means = actor_step(sac, replace(batch, weight=weight))
    torch.testing.assert_close(means["policy/entropy"], -acted.log_prob[:3].mean().detach())


def test_the_controls_rewards_know_nothing_of_the_decision_they_are_paid_to():
    """Later rollouts pay more: shuffled inside theirs alone, rewards still tell early states from late ones."""
    sacs = [make_sac(batch_size=4096, permute=permute) for permute in (False, True)]
    for sac in sacs:
        for first in range(0, 5000, 1000):
            paid = rollout(first, 5, rows=4)
            permute_rewards(paid, torch.Generator().manual_seed(first))
            sac.replay.add(paid, paid.action)
    informed, control = (sac.batch() for sac in sacs)
    assert torch.equal(informed.obs, control.obs)
    assert correlation(informed) > 0.9
    assert abs(correlation(control)) < 0.08  # five standard errors
    torch.testing.assert_close(control.reward.mean(), informed.reward.mean(), rtol=0.1, atol=0)


def correlation(batch):
    """Between what a decision sees and what it is paid."""
    return float(torch.corrcoef(torch.stack([batch.obs[:, 0], batch.reward]))[0, 1])


def test_the_slow_copies_follow_by_tau():
    twin = Twin(6, TwinSettings(width=8, tau=0.1), CPU, torch.float64)
    old = [p.clone() for p in twin.target.parameters()]
    batch = transitions()
    loss = twin.loss(Cond({"pooled": batch.obs}), batch.action, batch.reward, batch.weight)
    twin.step(torch.autograd.grad(loss, twin.optimizer.parameters))
    for before, now, live in zip(old, twin.target.parameters(), twin.net.parameters(), strict=True):
        torch.testing.assert_close(now, 0.9 * before + 0.1 * live)


@pytest.mark.parametrize(("pessimism", "pick"), [("min", torch.amin), ("mean", torch.mean)])
def test_what_of_the_critics_counts(pessimism, pick):
    twin = Twin(6, TwinSettings(width=8, pessimism=pessimism), CPU, torch.float64)
    x, a = torch.randn(5, 4).double(), torch.randn(5, 1, 2).double()
    torch.testing.assert_close(twin.value(Cond({"pooled": x}), a), pick(twin.net(x, a), 0))


# -- the optimiser --------------------------------------------------------------------------------


def test_deferred_steps_are_the_same_steps():
    torch.manual_seed(0)
    a, b = (torch.nn.Parameter(torch.arange(4.0)) for _ in range(2))
    config = AdamW(lr=0.1, warmup=3, max_grad_norm=0.5)
    one, other = Optimizer([a], config), Deferred([b], config)
    for step in range(6):
        gradient = torch.randn(4)
        if step == 2:
            gradient[1] = torch.nan
        a.grad, b.grad = gradient.clone(), gradient.clone()
        one.step(), other.advance()
        other.settle()
    torch.testing.assert_close(a, b)
    assert (other.steps, other.skipped) == (one.steps, one.skipped) == (5, 1)


def test_deferred_refuses_too_many_bad_steps_and_remembers_them_in_its_state():
    p = torch.nn.Parameter(torch.ones(2))
    mine = Deferred([p], AdamW(max_bad_steps=3), "algorithm.critic_lr")
    for _ in range(2):
        p.grad = torch.full((2,), torch.inf)
        mine.advance()
    mine.settle()
    again = Deferred([p], AdamW(max_bad_steps=3), "algorithm.critic_lr")
    again.load_state_dict(mine.state_dict())
    p.grad = torch.full((2,), torch.inf)
    again.advance()
    with pytest.raises(NonFiniteError, match=r"3 optimiser steps in a row .*lower algorithm\.critic_lr"):
        again.settle()
    assert torch.equal(p, torch.ones(2))


# -- the loop -------------------------------------------------------------------------------------


def collector(policy, rows=4):
    world = ToyReach(rows, gamma=0.9)
    return Collector(world, policy, None, All(), Groups(rows, 1), horizon=4, mode="steps")


def test_updates_follow_the_decisions():
    """None before `start`; then as many as the ratio says, whatever the size of an iteration."""
    policy = make_policy(shape=(2, 2), dtype=torch.float32)
    sac = make_sac(policy, start=20, updates_per_step=0.3)
    walker, made = collector(policy), []
    for i in range(5):
        metrics = sac.update(walker.collect(i))
        made.append(sac.updates)
        assert ("critic/loss" in metrics) == (sac.updates > 0)
    assert made == [max(0, int(0.3 * (16 * (i + 1) - 20))) for i in range(5)]
    assert metrics["replay/size"] == 80


@pytest.mark.parametrize(("start", "due"), [(16, 0), (15, 1), (13, 3), (0, 16)])
def test_the_first_update_is_due_with_the_first_decision_after_start(start, due):
    """It draws from what was just stored, and the actor is moved by it and by each `actor_every`-th from there on."""
    policy = make_policy(shape=(2, 2), dtype=torch.float32)
    sac = make_sac(policy, start=start, actor=ActorSettings(every=2))
    seen, real = [], sac.replay.draw
    sac.replay.draw = lambda num, rng: seen.append(len(sac.replay)) or real(num, rng)
    before = [p.clone() for p in sac.optimizer.parameters]
    sac.update(collector(policy).collect(0))
    assert (sac.updates, sac.twin.optimizer.steps, seen) == (due, due, [16] * due)
    assert sac.optimizer.steps == sac.temperature.optimizer.steps == -(-due // 2)
    assert any(not torch.equal(p, q) for p, q in zip(before, sac.optimizer.parameters, strict=True)) is (due > 0)


def test_an_update_keeps_what_the_environment_took_and_moves_what_follows_the_run():
    """The action after the squash; the running normaliser; the bounds of the noise."""
    field = GatedField(4, (2, 2), width=12, gate_width=6, running=True)
    sac = make_sac(make_policy(field, shape=(2, 2), dtype=torch.float32), start=1000)
    seen = collector(sac.policy).collect(0)
    assert float((seen.action - seen.action.tanh()).abs().max()) > 1e-3
    before, kernel = float(field.candidate.normalizer.moments[0, 0]), sac.policy.kernel
    sac.update(seen)
    assert torch.equal(sac.replay.data["action"][:4], seen.action.tanh())
    assert float(field.candidate.normalizer.moments[0, 0]) == before + seen.num_rows
    kernel.hold, high = 0.5, float(kernel.hi)
    sac.set_progress(1.0)
    assert kernel.hi < high


def test_every_update_has_a_batch_and_noise_of_its_own():
    """With one key for all, the actor would be judged on the same noise for ever."""
    sac, paid = make_sac(), rollout(0, 50, rows=4)
    sac.replay.add(paid, paid.action)
    cond, seen = sac.policy.encode(transitions().obs), []
    for update in range(2):
        sac.updates = update
        seen.append((sac.batch().obs, *(sac.act(cond, noise).action for noise in sac.noise(8))))
    assert not any(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert not torch.equal(seen[0][1], seen[0][2])


def test_what_sac_cannot_do_is_refused():
    policy = make_policy()
    with pytest.raises(ValueError, match="use steps=all"):
        SAC(policy, AllButLast(), Replay(10, 0.9))
    with pytest.raises(ValueError, match="temperature must be positive"):
        make_sac(alpha=0.0)


def test_sac_keeps_to_one_process(ranks):
    with pytest.raises(ValueError, match="--processes 1"):
        ranks(2, lambda rank: make_sac())


# -- against stable-baselines3 --------------------------------------------------------------------


def test_one_update_is_that_of_stable_baselines3(monkeypatch):
    """Same networks, batch and noise: losses, critics, slow copies, mean network and temperature after one step."""
    sb3 = pytest.importorskip("stable_baselines3")
    gym = pytest.importorskip("gymnasium")
    from stable_baselines3.common.buffers import ReplayBufferSamples
    from stable_baselines3.common.logger import Logger

    class World(gym.Env):
        observation_space = gym.spaces.Box(-9, 9, (4,))
        action_space = gym.spaces.Box(-1, 1, (2,))

        def reset(self, seed=None, options=None):
            return self.observation_space.sample(), {}

    theirs = sb3.SAC("MlpPolicy", World(), policy_kwargs={"net_arch": [16, 16]}, gamma=0.9, ent_coef="auto_0.2", seed=0)
    theirs.set_logger(Logger(None, []))
    policy = make_policy(GaussianField(4, (1, 2), width=16), num_steps=1, std=(0.1, 0.9), dtype=torch.float32)
    torch.nn.init.zeros_(policy.kernel.net[-1].weight)  # one std for all, theirs and ours
    shared = OffPolicySettings(batch_size=8, start=0, twin=TwinSettings(width=16, norm=False))
    mine = SAC(policy, All(), Replay(10, 0.9), shared, alpha=0.2, target_entropy=-1.0)
    layers = [theirs.actor.latent_pi[0], theirs.actor.latent_pi[2], theirs.actor.mu]
    for ours, other in zip(list(policy.field.mean)[::2], layers, strict=True):
        ours.load_state_dict(other.state_dict())
    torch.nn.init.zeros_(theirs.actor.log_std.weight)
    torch.nn.init.constant_(theirs.actor.log_std.bias, 0.5 * math.log(0.1 * 0.9))
    for net, twins in ((mine.twin.net, theirs.critic), (mine.twin.target, theirs.critic_target)):
        _take(net, twins)
    b = tree_float(transitions())
    done = torch.zeros(8, 1)
    samples = ReplayBufferSamples(b.obs, b.action[:, 0], b.next_obs, done, b.reward[:, None])
    monkeypatch.setattr(theirs.replay_buffer, "sample", lambda *a, **k: samples)
    target, actor = mine.noise(8)
    drawn = [actor[1], target[1]]  # in the order that they ask for it
    monkeypatch.setattr(torch.distributions.normal, "_standard_normal", lambda *a, **k: drawn.pop(0)[:, 0])
    theirs.train(1, 8)

    monkeypatch.setattr(mine, "batch", lambda: b)
    metrics = mine.step()
    told = theirs.logger.name_to_value
    assert float(metrics["critic/loss"]) == pytest.approx(told["train/critic_loss"], rel=1e-4)
    assert float(metrics["policy/loss"]) == pytest.approx(told["train/actor_loss"], rel=1e-3)
    for ours, other in zip(list(policy.field.mean)[::2], layers, strict=True):
        torch.testing.assert_close(ours.weight, other.weight, rtol=1e-3, atol=2e-5)
    fresh = Ensemble(6, width=16, norm=False)
    for net, twins in ((mine.twin.net, theirs.critic), (mine.twin.target, theirs.critic_target)):
        _take(fresh, twins)
        for x, y in zip(net.parameters(), fresh.parameters(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=2e-5)
    assert float(mine.temperature.log.detach()) == pytest.approx(float(theirs.log_ent_coef.detach()), abs=1e-5)


def tree_float(b):
    return Transitions(**{name: getattr(b, name).float() for name in b.__dataclass_fields__})


@torch.no_grad()
def _take(net, twins):
    """Their critics' weights into one Ensemble."""
    for e, q in enumerate(twins.q_networks):
        for i, layer in enumerate(list(q)[::2]):
            net.weights[i][e] = layer.weight.T
            net.biases[i][e] = layer.bias
