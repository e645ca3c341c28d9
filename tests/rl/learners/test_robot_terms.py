"""Terms that robots need: anchor, per-step ratios, the published ratio, mid-chunk ends, the critic's books."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlflow.flow.field import VelocityField
from rlflow.flow.gaussian import Gaussian
from rlflow.flow.kernels import Kernel
from rlflow.flow.noise import Key, noise
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import All, AllButLast, LastN, OneRandom, Window
from rlflow.parallel import dist
from rlflow.rl.advantages import GAE
from rlflow.rl.critic import explained_variance
from rlflow.rl.groups import Groups
from rlflow.rl.likelihoods.chain import ChainLikelihood
from rlflow.rl.objectives.clip import Clip, clipped_surrogate, step_clip, step_index
from rlflow.types import Chain, Cond, Evidence

JOINT = ChainLikelihood("sum", joint=True)


def close(a: Any, b: Any, atol: float = 1e-10) -> None:
    a, b = (torch.as_tensor(v, dtype=torch.float64) for v in (a, b))
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


class Linear(VelocityField):
    """v = w x + c, so that K Euler steps are known: a = x_0 q^K + c (q^K - 1) / w, q = 1 + w / K."""

    def __init__(self, event_shape: tuple[int, ...], w: float = 0.5, c: float = 0.2):
        super().__init__()
        self.event_shape, self.num_features = event_shape, 4
        self.w, self.c = nn.Parameter(torch.tensor(w)), nn.Parameter(torch.tensor(c))

    def encode(self, obs):
        return Cond({"pooled": obs.to(self.w.dtype)})

    def forward(self, x, t, dt, cond):
        return self.w * x + self.c


def deployed(x_0: Tensor, w: Tensor, c: Tensor, num_steps: int) -> Tensor:
    growth = (1 + w / num_steps) ** num_steps
    return x_0 * growth + c * (growth - 1) / w


class TestAnchor:
    def test_is_zero_with_a_zero_gradient_at_unchanged_weights(self, make, gradient):
        parts, without = (make("reach", anchor=a) for a in (3.0, 0.0))
        rollout = parts.collect()
        grad, metrics = gradient(parts, rollout)
        assert metrics["policy/anchor"] <= 1e-30
        close(grad, gradient(without, rollout)[0], 1e-14)

    def test_is_the_distance_of_two_deployed_chains_from_one_start(self, make, gradient):
        """Closed form of value and gradient, through all five steps; rewards without spread teach nothing else."""
        parts = make(field=Linear((2,)), anchor=0.7, num_steps=5, micro_batch=6)
        rollout = parts.collect()
        rollout.reward[:] = 1.0
        field = parts.policy.field
        with torch.no_grad():
            field.w += 0.3
            field.c -= 0.1
        grad, metrics = gradient(parts, rollout)
        x_0 = noise(Key(0, "anchor", 0), rollout.row_ids.flatten(), (2,), torch.float64)
        w, c = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.8, 0.1))
        old = deployed(x_0, torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64), 5)
        distance = (deployed(x_0, w, c, 5) - old).square().mean()
        (0.7 * distance).backward()
        close(metrics["policy/anchor"], distance.detach(), 1e-7)  # .2 and .5 were rounded to float32
        assert w.grad is not None
        assert c.grad is not None
        close(grad[:2], torch.stack([w.grad, c.grad]), 1e-6)
        assert float(grad.norm()) > 0.01

    def test_its_start_is_noise_of_the_row_and_the_iteration(self, make):
        parts = make(anchor=0.1)
        rollout, seen = parts.collect(), []
        for _ in range(2):
            seen.append(parts.algorithm._prepare(rollout).anchor.x_0)
            parts.algorithm.iteration += 1
        assert float(seen[0].std()) > 0.5
        assert len(seen[0].unique()) == seen[0].numel()
        assert not torch.equal(*seen)

    def test_ignores_masked_rows_and_costs_what_it_says(self, make, gradient):
        from rlflow.cost.formula import iteration_cost

        parts = make(anchor=0.5, epochs=2)
        rows = parts.policy.network_cost
        parts.iterate(0)
        assert parts.policy.network_cost - rows == iteration_cost(parts).total
        rollout = parts.collect(1)
        rollout.reward[:], rollout.weight[:] = torch.nan, 0.0
        assert not gradient(parts, rollout)[0].any()


class TestPerStep:
    K = torch.arange(5, dtype=torch.float64)

    def test_schedules_in_closed_form(self):
        clip = [0.01 + 0.19 * (math.exp(3 * k / 4) - 1) / (math.exp(3) - 1) for k in range(5)]
        close(step_clip(self.K, 5, 0.01, 0.2), clip)
        assert clip[0] == 0.01
        assert clip[-1] == pytest.approx(0.2)

    def test_the_only_step_is_the_last(self):
        close(step_clip(torch.zeros(1, dtype=torch.float64), 1, 0.01, 0.2), [0.2])

    @pytest.mark.parametrize(
        "steps", [All(), Window(size=2, every=1), Window(size=2, every=1, compress=0.5), OneRandom()], ids=repr
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_columns_know_their_denoising_step_in_any_plan(self, make, steps, dtype):
        parts = make("reach", "learned", steps, dtype=dtype)
        evidence = parts.collect(1).evidence
        k = step_index(evidence.t, parts.policy.grid(5))
        close(evidence.t, parts.policy.grid(5)[k], 1e-6)
        assert len(k.unique()) == {"All": 5, "Window": 2, "OneRandom": 4}[type(steps).__name__]

    @pytest.mark.parametrize("micro_batch", [3, 1000])
    def test_the_loss_is_each_steps_own(self, make, gradient, micro_batch):
        """A window of the last two of five steps; at moved weights, so that some pairs are clipped."""
        settings = {"steps": LastN(2), "kernel": "learned"}
        parts = make(
            "reach",
            objective=partial(Clip, low=0.05, high=0.08, gamma=0.5, base=0.001),
            micro_batch=micro_batch,
            **settings,
        )
        rollout = parts.collect()
        with torch.no_grad():
            for p in parts.policy.parameters():
                p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype)
        grad, metrics = gradient(parts, rollout)
        evidence, out = rollout.evidence, parts.algorithm.advantage(rollout, None, None)
        log_prob = ChainLikelihood("mean").score(parts.policy, rollout.cond, evidence).log_prob
        advantage = out.advantage.reshape(-1, 1) * torch.tensor([[0.5, 1.0]])
        share = (math.exp(3 * 3 / 4) - 1) / (math.exp(3) - 1)
        low, high = (torch.tensor([[0.001 + (top - 0.001) * share, top]]) for top in (0.05, 0.08))
        parts.algorithm.optimizer.zero_grad()
        loss = clipped_surrogate(log_prob - evidence.old_log_prob, advantage, low, high).mean()
        loss.backward()
        close(metrics["policy/loss"], loss.detach(), 1e-7)
        close(grad, torch.cat([p.grad.flatten() for p in parts.algorithm.optimizer.parameters]), 1e-7)
        assert 0 < metrics["policy/clip_frac"] < 1

    def test_a_joint_ratio_has_none(self, make):
        for by_step in ({"gamma": 0.9}, {"base": 0.01}):
            with pytest.raises(ValueError, match="joint ratio has no single steps"):
                Clip(JOINT, **by_step)


class TestPublished:
    def test_is_the_geometric_mean_over_steps_start_and_entries(self, make):
        parts = make("reach", "learned", All(), JOINT)
        rollout = parts.collect()
        with torch.no_grad():
            parts.policy.field.net[0].weight += 0.05
        ours, theirs = JOINT, ChainLikelihood("mean", joint=True, published=True)
        evidence, cond = rollout.evidence, rollout.cond
        exact = ours.log_ratio(ours.score(parts.policy, cond, evidence).log_prob, evidence)
        old = Gaussian(evidence.old_mean, evidence.old_std).log_prob(evidence.x_next, "mean", 2)
        published = theirs.score(parts.policy, cond, evidence).log_prob - old
        close(theirs.log_ratio(published + evidence.old_log_prob, evidence), exact / (6 * 4))

    @pytest.mark.parametrize("wrong", [{"joint": False}, {"reduce": "sum"}])
    def test_of_anything_else_is_refused(self, wrong):
        with pytest.raises(ValueError, match="joint=true and reduce=mean"):
            ChainLikelihood(**{"reduce": "mean", "joint": True, "published": True} | wrong)


class Pushed(VelocityField):
    """Chunk of two: the executed action is moved by the other one of the step before, which theta moves."""

    def __init__(self):
        super().__init__()
        self.event_shape, self.num_features = (2, 1), 1
        self.theta = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x, t, dt, cond):
        return torch.stack([x[:, 1], self.theta.expand_as(x[:, 1])], 1)


class Fixed(Kernel):
    velocity = "step"

    def step(self, x, v, t, t_next, hidden):
        return Gaussian(x + v * (t_next - t), torch.full_like(t, 0.4))


def every_chain(policy: FlowPolicy, cond: Cond, eps: Tensor) -> Chain:
    """Chains of two steps from 0 whose noise is eps (N, 2, 2, 1)."""
    n, x, parts = len(eps), torch.zeros_like(eps[:, 0]), []
    for k in range(2):
        t, t_next = torch.full((2, n), 0.5 * k, dtype=torch.float64) + torch.tensor([[0.0], [0.5]])
        dist_ = policy.transition(x, t, t_next, cond)
        x_next = dist_.sample(eps[:, k]).detach()
        parts.append((x, x_next, t, t_next, dist_.mean.detach(), dist_.std))
        x = x_next
    return Chain(x, *(torch.stack(z, 1) for z in zip(*parts, strict=True)))


class TestMidChunkEnds:
    """Reward a_0, the executed action; E a_0 = dt^2 theta, so the true gradient is 1/4.

    Score times reward is quadratic in four standard normals: +-1 in every combination gives its expectation.
    """

    def of(self, mask: str | None) -> tuple[Tensor, float]:
        """(gradient estimate of each chain (16,), their mean)."""
        policy = FlowPolicy(Pushed(), Fixed(), num_steps=2)
        eps = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4).reshape(16, 2, 2, 1)
        cond = Cond({"pooled": torch.zeros(16, 1, dtype=torch.float64)})
        likelihood = ChainLikelihood("sum", joint=True, mask=mask or "last")
        evidence = likelihood.record(policy, cond, every_chain(policy, cond, eps), Key(0, "test"), torch.arange(16))
        reward = evidence.x_next[:, -1, 0, 0]
        evidence = likelihood.executed(evidence, torch.full((16,), 1 if mask else 2))
        ratio = likelihood.log_ratio(likelihood.score(policy, cond, evidence).log_prob, evidence)
        close(ratio.detach(), torch.zeros(16, 1), 0.0)
        each = torch.stack([torch.autograd.grad(r, policy.field.theta, retain_graph=True)[0] for r in ratio[:, 0]])
        return each * reward, float((each * reward).mean())

    def test_masked_at_the_last_step_the_gradient_is_exact_and_less_noisy(self):
        (whole, mean), (last, masked) = self.of(None), self.of("last")
        assert mean == pytest.approx(0.25, abs=1e-12)
        assert masked == pytest.approx(0.25, abs=1e-12)
        assert float(last.var()) < float(whole.var())

    def test_masked_everywhere_it_is_lost(self):
        assert self.of("all")[1] == pytest.approx(0.0, abs=1e-12)

    @pytest.mark.parametrize("likelihood", [JOINT, ChainLikelihood("sum"), ChainLikelihood("mean")], ids=repr)
    @pytest.mark.parametrize("micro_batch", [2, 1000])
    def test_an_action_never_carried_out_has_no_influence_on_the_update(self, make, gradient, likelihood, micro_batch):
        def of(change: float, column: int) -> Tensor:
            parts = make("reach", "learned", All(), likelihood, micro_batch=micro_batch)
            rollout = parts.collect()
            rollout.num_steps[:, :7] = 1
            rollout.evidence.x_next.view(4, 16, 5, 2, 2)[:, :7, column, 1] += change
            return gradient(parts, rollout)[0]

        close(of(3.0, -1), of(0.0, -1))
        assert float((of(3.0, -2) - of(0.0, -2)).abs().max()) > 1e-3

    @pytest.mark.parametrize("mask", ["last", "all"])
    def test_the_padding_of_an_action_is_left_out_as_undone_actions_are(self, mask):
        """A chunk of two actions of one number whose second is undone, and one action of two numbers, one of padding."""
        likelihood = ChainLikelihood("sum", mask=mask)
        x, x_next, mean = torch.randn(3, 6, 2, 2, 1, dtype=torch.float64)
        std, t = torch.rand(6, 2, 1, 1, dtype=torch.float64) + 0.5, torch.tensor([[0.0, 0.5]]).expand(6, 2)
        old = Gaussian(mean, std).log_prob(x_next, "sum", batch_dims=2)
        undone = Evidence(x, x_next, t, t + 0.5, old, mean, std, torch.ones(6, 2, dtype=torch.bool))
        padded = undone.map(lambda v: v.transpose(2, 3) if v.ndim == 4 else v)
        one = torch.ones(6, dtype=torch.long)
        found, wanted = likelihood.executed(padded, one, num_actions=1), likelihood.executed(undone, one)
        close(found.old_log_prob, wanted.old_log_prob)
        assert not torch.allclose(found.old_log_prob[:, -1], old[:, -1])
        assert torch.equal(found.old_log_prob[:, 0], old[:, 0]) == (mask == "last")
        assert torch.equal(likelihood.executed(padded, one, num_actions=2).old_log_prob, old)

    def test_carried_out_to_the_end_it_changes_nothing(self, make):
        rollout = make("reach", "learned", All(), JOINT).collect()
        evidence = JOINT.executed(rollout.evidence, rollout.num_steps.flatten())
        assert bool((rollout.num_steps == 2).all())
        assert torch.equal(evidence.old_log_prob, rollout.evidence.old_log_prob)
        assert make("image").collect().num_steps is None


class TestCriticsBooks:
    def test_only_ended_rows_are_encoded_again(self, make):
        parts = make("reach", advantage=GAE())
        rollout = parts.collect()
        rollout.truncated[:], rollout.terminated[:] = False, False
        rollout.truncated[1, 2] = rollout.terminated[2, 5] = rollout.truncated[3, 5] = True
        rows = parts.policy.encoder_rows
        parts.algorithm.critic.values(rollout, rollout.cond.index, 2)
        assert parts.policy.encoder_rows - rows == 16 + 3

    def test_values_do_not_depend_on_rows_per_call(self, make):
        parts = make("reach", advantage=GAE(), critic_width=16)
        rollout = parts.collect()
        few, many = (parts.algorithm.critic.values(rollout, rollout.cond.index, n) for n in (3, 1000))
        close(few[0], many[0])
        close(few[1], many[1])
        assert parts.algorithm.critic.net.net[0].out_features == 16

    def test_warms_up_while_the_policy_rests_bit_for_bit(self, make):
        parts = make("reach", "learned", advantage=GAE(), critic_warmup=2, epochs=2, num_minibatches=4, anchor=0.1)
        for i in range(3):
            policy = [p.detach().clone() for p in parts.policy.parameters()]
            critic = [p.detach().clone() for p in parts.algorithm.critic.net.parameters()]
            metrics = parts.iterate(i)
            same = [torch.equal(a, b) for a, b in zip(policy, parts.policy.parameters(), strict=True)]
            assert all(same) if i < 2 else not any(same)
            assert metrics["optim/steps"] == (8 if i == 2 else 0)
            for a, b in zip(critic, parts.algorithm.critic.net.parameters(), strict=True):
                assert not torch.equal(a, b)
            assert "critic/loss" in metrics

    def test_explained_variance_in_closed_form(self, ranks):
        value, weight = torch.tensor([1.0, 2, 3, 4, 9]), torch.tensor([1.0, 1, 1, 1, 0])
        returns = torch.tensor([1.0, 2, 3, 6, -50])
        expected = 1 - float((returns - value)[:4].var()) / float(returns[:4].var())
        assert explained_variance(value, returns, weight) == pytest.approx(expected)
        assert explained_variance(returns, returns, weight) == pytest.approx(1.0)
        assert math.isnan(explained_variance(value, torch.ones(5), weight))
        halves = [slice(0, 2), slice(2, 5)]
        two = ranks(2, lambda r: explained_variance(value[halves[r]], returns[halves[r]], weight[halves[r]]))
        assert two == [pytest.approx(expected)] * 2

    def test_metrics_of_the_noise_and_the_critic_are_logged(self, make):
        parts = make("reach", "learned", advantage=GAE(), num_minibatches=8, epochs=3, critic_lr=1e-2)
        first = parts.iterate(0)
        std = [parts.iterate(i)["critic/explained_variance"] for i in (1, 2, 3)]
        assert 0.1 < first["policy/std_mean"] < 0.4
        assert all(v <= 1 for v in std)
        assert "policy/std_mean" not in make().iterate(0)


class TestBooks:
    @pytest.mark.parametrize("num_minibatches", [5, 7])
    def test_processes_agree_with_one_whatever_the_number_of_minibatches(self, make, ranks, num_minibatches):
        def of(rank: int, world: int) -> Any:
            return make(
                "reach", "learned", advantage=GAE(), groups=Groups(8, 1, rank, world), num_minibatches=num_minibatches
            )

        def train(parts: Any) -> list[Tensor]:
            parts.iterate(0)
            return [*parts.policy.parameters(), *parts.algorithm.critic.net.parameters()]

        one, made = train(of(0, 1)), [of(r, 2) for r in range(2)]
        for a, b, c in zip(one, *ranks(2, lambda rank: train(made[rank])), strict=True):
            close(a, b, 1e-9)
            assert torch.equal(b, c)

    def test_a_kl_stop_looks_at_whole_epochs(self, make):
        parts = make("reach", epochs=5, num_minibatches=4, objective=partial(Clip, target_kl=1e-9))
        metrics = parts.iterate(0)
        assert (metrics["policy/early_stop"], metrics["optim/steps"]) == (1.0, 4)

    def test_the_field_sees_the_first_observations_and_all_once_after_the_update(self, make, monkeypatch):
        parts, seen = make("reach", epochs=3), []
        field = parts.policy.field
        monkeypatch.setattr(field, "observe", lambda obs: seen.append((obs, parts.algorithm.optimizer.steps)))
        parts.iterate(0)
        (first, before), (obs, after) = seen
        assert (before, after) == (0, 3)
        assert len(first["state"]) < 64
        assert obs["state"].shape == (64, 2)

    def test_noise_bounds_move_with_progress_and_ratios_start_at_1(self, make):
        parts = make("reach", "learned", AllButLast(), JOINT, micro_batch=16)
        kernel = parts.policy.kernel
        kernel.hold, widths = 0.5, []
        for i, progress in enumerate((0.0, 0.5, 1.0)):
            parts.algorithm.set_progress(progress)
            metrics = parts.iterate(i)
            assert metrics["policy/first_log_ratio_max"] <= 1e-14
            widths.append(metrics["policy/std_mean"])
        assert math.exp(kernel.hi) == pytest.approx(0.1 + 0.7 * 0.3)
        assert widths[2] < widths[1] - 0.005
        assert dist.world() == 1
