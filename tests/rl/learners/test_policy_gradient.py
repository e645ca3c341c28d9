"""PolicyGradient: what its gradient does not depend on, masks, first and second ratios, stops, state, and refusals."""

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlflow.flow.kernels import FlowSDE
from rlflow.flow.steps import AllButLast, Fraction, LastN, OneRandom, RandomWindow, Window
from rlflow.models.mlp import MLPField
from rlflow.rl.advantages import GAE, GroupAdvantage
from rlflow.rl.groups import Groups
from rlflow.rl.learners.regularizers import KL
from rlflow.rl.likelihoods.chain import ChainLikelihood
from rlflow.rl.objectives.clip import Clip
from rlflow.rl.objectives.guard import Guard
from rlflow.rl.optim import AdamW, NonFiniteError
from rlflow.types import Cond, Rollout, tree_map

JOINT = ChainLikelihood("sum", joint=True)
KERNELS = ["flow", "constant", "cps", "ancestral", "learned"]
PLANS = [AllButLast(), LastN(1, skip_last=1), Window(size=2), RandomWindow(2), OneRandom(), Fraction(0.6)]
LIKELIHOODS = [ChainLikelihood("mean"), ChainLikelihood("sum"), JOINT]
TERMS = {
    "plain": {},
    "guard": {"objective": partial(Guard, low=0.02)},
    "kl": {"kl": KL(0.5, "exact")},
    "velocity": {"kl": KL(0.5, "velocity")},
    "joint": {"likelihood": JOINT, "kl": KL(0.5)},
    "anchor, per step": {"anchor": 0.5, "objective": partial(Clip, low=0.02, gamma=0.8, base=0.005)},
    "entropy": {"kernel": "learned", "entropy": 0.1, "kl": KL(0.5)},
    "joint entropy": {"kernel": "learned", "likelihood": JOINT, "entropy": 0.1, "kl": KL(0.5)},
}


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def shaken(parts: Any) -> None:
    """Move the weights after the rollout was collected, so that ratios, KL and clipping are all alive."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parts.policy.parameters():
            p += 0.01 * torch.randn(p.shape, generator=g, dtype=p.dtype)


def rows_of(rollout: Rollout, keep: Tensor) -> Rollout:
    """The rollout of the environments `keep` (B',) alone."""
    flat = torch.arange(rollout.num_rows).reshape(rollout.reward.shape)[:, keep].flatten()
    names = ["action", "reward", "terminated", "truncated", "weight", "row_ids", "num_steps"]
    names = [n for n in names if getattr(rollout, n) is not None]
    cut = {n: getattr(rollout, n)[:, keep] for n in names}
    cut |= {n: tree_map(lambda v: v[:, keep], getattr(rollout, n)) for n in ("obs", "final_obs")}
    cut |= {"last_obs": tree_map(lambda v: v[keep], rollout.last_obs), "group": rollout.group[keep]}
    return replace(rollout, **cut, evidence=rollout.evidence.index(flat), cond=rollout.cond.index(flat))


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
class TestGradientIsOfTheMinibatch:
    @pytest.mark.parametrize("env", ["image", "reach"])
    def test_not_of_the_micro_batch(self, make, gradient, terms, env):
        """1 and 3 pairs a pass are fewer than the 4 columns of a row: joint ratios go column by column."""

        def of(micro_batch: int) -> tuple[Tensor, dict[str, float]]:
            parts = make(
                env, groups=Groups(2, 3), micro_batch=micro_batch, **({"objective": partial(Clip, low=0.02)} | terms)
            )
            rollout = parts.collect()
            shaken(parts)
            return gradient(parts, rollout)

        whole, metrics = of(10_000)
        assert float(whole.norm()) > 1e-3
        for micro_batch in (1, 3, 10):
            part, again = of(micro_batch)
            close(part, whole)
            for name in ("policy/loss", "policy/ratio_mean", "policy/clip_frac", "policy/approx_kl"):
                assert again[name] == pytest.approx(metrics[name], abs=1e-10), name

    def test_not_of_the_number_of_processes(self, make, gradient, ranks, terms):
        def part(rank: int, world: int) -> tuple[Any, Rollout]:
            made = make("reach", groups=Groups(4, 4, rank, world), num_minibatches=2, micro_batch=9, **terms)
            rollout = made.collect()
            rollout.weight[1, 3] = 0.0
            shaken(made)
            return made, rollout

        whole, metrics = gradient(*part(0, 1))
        made = [part(rank, 2) for rank in range(2)]
        for rollout in (made[1][1],):
            rollout.weight[1, 3] = 1.0  # the mask belongs to the first process
        for other, again in ranks(2, lambda rank: gradient(*made[rank])):
            close(other, whole)
            for name in ("policy/loss", "advantage/used_frac", "optim/grad_norm"):
                assert again[name] == pytest.approx(metrics[name], abs=1e-10), name

    def test_not_of_masked_rows(self, make, gradient, terms):
        """One row of each group has no reward: the gradient is that of groups which never had it."""

        def part(size: int) -> Any:
            return make("reach", groups=Groups(4, size), micro_batch=9, **terms)

        parts, small = part(4), part(3)
        rollout = parts.collect()
        gone = torch.tensor([0, 5, 10, 15])
        kept = torch.tensor([i for i in range(16) if i not in gone])
        without = rows_of(rollout, kept)
        rollout.reward[:, gone], rollout.weight[:, gone] = torch.nan, 0.0
        shaken(parts), shaken(small)
        rows = parts.policy.network_rows
        masked, metrics = gradient(parts, rollout)
        calls = parts.policy.network_rows - rows
        dropped, _ = gradient(small, without)
        close(masked, dropped)
        assert metrics["rollout/masked_frac"] == 0.25
        parts.collector.env.reset(parts.groups.seeds(0))
        full = parts.collect()
        rows = parts.policy.network_rows
        gradient(parts, full)
        assert parts.policy.network_rows - rows == calls  # masked rows keep their place


class TestMasks:
    @pytest.mark.parametrize("advantage", [GroupAdvantage(), GAE()], ids=["group", "gae"])
    @pytest.mark.parametrize(
        "terms", [{}, {"kl": KL(1.0)}, {"objective": Guard}, {"likelihood": JOINT, "micro_batch": 2}]
    )
    def test_without_any_reward_the_gradient_is_zero_and_not_nan(self, make, gradient, advantage, terms):
        parts = make(advantage=advantage, **terms)
        rollout = parts.collect()
        rollout.reward[:], rollout.weight[:] = torch.nan, 0.0
        shaken(parts)
        grad, metrics = gradient(parts, rollout)
        assert not grad.any()
        assert metrics["policy/loss"] == 0.0
        assert metrics["rollout/masked_frac"] == 1.0
        assert metrics["advantage/used_frac"] == 0.0

    @pytest.mark.parametrize("advantage", [GroupAdvantage(), GAE()], ids=["group", "gae"])
    def test_a_process_without_any_reward_neither_hangs_nor_counts(self, make, gradient, ranks, advantage):
        def part(rank: int, world: int) -> tuple[Any, Rollout]:
            made = make(groups=Groups(4, 4, rank, world), advantage=advantage, kl=KL(0.5), micro_batch=9)
            rollout = made.collect()
            dead = slice(0, 16) if world == 2 else slice(8, 16)
            if rank == world - 1:
                rollout.reward[:, dead], rollout.weight[:, dead] = torch.nan, 0.0
            shaken(made)
            return made, rollout

        whole, _ = gradient(*part(0, 1))
        made = [part(rank, 2) for rank in range(2)]
        for grad, _ in ranks(2, lambda rank: gradient(*made[rank])):
            close(grad, whole)
            assert bool(grad.any())

    def test_groups_without_spread_teach_nothing_but_stay_near_the_reference(self, make, gradient):
        """The KL term averages over every sampled pair, zero advantage or not."""

        def of(terms: dict[str, Any]) -> Tensor:
            parts = make(**terms)
            rollout = parts.collect()
            rollout.reward[:] = 1.0
            shaken(parts)
            return gradient(parts, rollout)[0]

        assert not of({}).any()
        assert bool(of({"kl": KL(0.5)}).any())


class TestGradientByHand:
    def test_at_unchanged_weights_is_minus_the_advantage_times_the_score(self, make, gradient):
        parts = make()
        rollout = parts.collect()
        grad, _ = gradient(parts, rollout)
        parts.algorithm.optimizer.zero_grad()
        advantage = GroupAdvantage()(rollout, None, None).advantage.reshape(-1, 1)
        score = ChainLikelihood("mean").score(parts.policy, rollout.cond, rollout.evidence).log_prob
        (-advantage * score).mean().backward()
        close(grad, torch.cat([p.grad.flatten() for p in parts.algorithm.optimizer.parameters]))

    def test_every_optimiser_step_starts_from_nothing(self, make, monkeypatch):
        """Two epochs at weights that do not move have the same gradient twice, not a sum."""
        parts, seen = make(epochs=2), []
        optimizer = parts.algorithm.optimizer

        def step() -> float:
            seen.append(torch.cat([p.grad.flatten() for p in optimizer.parameters]))
            return 0.0

        monkeypatch.setattr(optimizer, "step", step)
        parts.iterate(0)
        close(seen[0], seen[1])

    def test_the_loss_that_is_logged_is_the_policys_alone(self, make, gradient):
        def of(**terms: Any) -> dict[str, float]:
            parts = make(kernel="learned", **terms)
            rollout = parts.collect()
            shaken(parts)
            return gradient(parts, rollout)[1]

        assert of(kl=KL(10.0), entropy=3.0)["policy/loss"] == pytest.approx(of()["policy/loss"], abs=1e-12)
        assert of(kl=KL(10.0))["kl/ref"] > 0

    def test_guard_multiplies_each_step_by_its_std_over_its_dt(self, make, gradient):
        """At unchanged weights, where the re-centring has no gradient; one scored step, so one factor."""
        plain, guarded = (
            make(steps=LastN(1, skip_last=1), objective=partial(kind, low=10.0)) for kind in (Clip, Guard)
        )
        rollout = plain.collect()
        t, t_next = rollout.evidence.t[0, 0], rollout.evidence.t_next[0, 0]
        std = 0.7 * ((1 - t) / t * (t_next - t)).sqrt()
        close(gradient(guarded, rollout)[0], gradient(plain, rollout)[0] * std / (t_next - t))

    def test_entropy_widens_the_noise_and_nothing_else(self, make, gradient):
        with_it, without = (make(kernel="learned", entropy=e) for e in (0.3, 0.0))
        rollout = with_it.collect()
        difference = gradient(with_it, rollout)[0] - gradient(without, rollout)[0]
        policy = with_it.policy
        with_it.algorithm.optimizer.zero_grad()
        dist = ChainLikelihood().score(policy, rollout.cond, rollout.evidence).dist
        (-0.3 * dist.entropy("mean", 2).mean()).backward()
        expected = [p.grad if p.grad is not None else torch.zeros_like(p) for p in policy.parameters()]
        close(difference, torch.cat([g.flatten() for g in expected]))
        assert bool(difference.any())

    @pytest.mark.parametrize("micro_batch", [3, 1000])
    @pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
    def test_the_kl_estimate_is_of_the_ratio_that_is_clipped(self, make, gradient, likelihood, micro_batch):
        """mean (r - 1 - log r), of the sum of the columns where they are joint."""
        parts = make(likelihood=likelihood, micro_batch=micro_batch)
        rollout = parts.collect()
        shaken(parts)
        metrics = gradient(parts, rollout)[1]
        with torch.no_grad():
            score = likelihood.score(parts.policy, rollout.cond, rollout.evidence)
        log_ratio = likelihood.log_ratio(score.log_prob, rollout.evidence)
        expected = (log_ratio.exp() - 1 - log_ratio).mean()
        assert metrics["policy/approx_kl"] == pytest.approx(float(expected), rel=1e-9)

    def test_clip_metrics_are_of_the_ratio_that_is_clipped(self, make, gradient):
        """Ten joint columns leave the range when a single one does not."""

        def of(likelihood: ChainLikelihood) -> dict[str, float]:
            parts = make(likelihood=likelihood, num_steps=8, objective=partial(Clip, low=0.02))
            rollout = parts.collect()
            shaken(parts)
            return gradient(parts, rollout)[1]

        single, joint = of(ChainLikelihood("sum")), of(JOINT)
        assert joint["policy/approx_kl"] > 3 * single["policy/approx_kl"]
        assert joint["policy/clip_frac"] > single["policy/clip_frac"] > 0
        assert joint["policy/ratio_mean"] != pytest.approx(single["policy/ratio_mean"], abs=1e-6)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
@pytest.mark.parametrize("steps", PLANS, ids=repr)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_first_ratio_is_1_and_the_second_epochs_is_not(make, kernel, steps, likelihood):
    """Exactly, where one column is scored in the row batches it was sampled in: a matrix product rounds by the shape
    of its batch and by a row's place in it, which is a unit in the last place otherwise.
    """
    parts = make("reach", kernel, steps, likelihood, epochs=2, micro_batch=16)
    metrics = parts.iterate(0)
    exact = parts.collector.collect(0).evidence.t.shape[1] == 1
    assert metrics["policy/first_log_ratio_max"] <= (0.0 if exact else 1e-14)
    assert moved(metrics)


def moved(metrics: dict[str, float]) -> bool:
    """Whether a second epoch saw that the weights had changed since the rollout."""
    return metrics["policy/approx_kl"] > 1e-12 and abs(metrics["policy/ratio_mean"] - 1) > 1e-12


class Embedding(MLPField):
    """An encoder with weights of its own, which train unless frozen."""

    def __init__(self, event_shape: tuple[int, ...], frozen: bool):
        super().__init__(4, event_shape, width=8)
        self.embed = nn.Linear(4, 4)
        self.embed.requires_grad_(not frozen)

    def encode(self, obs):
        cond = super().encode(obs)
        return cond.map(self.embed)

    def encoder_parameters(self):
        return list(self.embed.parameters())


class TestEncoder:
    @pytest.mark.parametrize("env", ["image", "reach"])
    @pytest.mark.parametrize("advantage", [GroupAdvantage(), GAE()], ids=["group", "gae"])
    def test_a_frozen_one_is_not_run_again_during_the_update(self, make, env, advantage):
        field = Embedding((2,) if env == "image" else (2, 2), frozen=True)
        parts = make(env, field=field, advantage=advantage, epochs=3, kl=KL(0.1), micro_batch=5)
        rollout = parts.collect()
        # one per group where the group shares its observation, otherwise one per row and step
        assert parts.policy.encoder_rows == (4 if env == "image" else 64)
        assert rollout.cond is not None
        rows = parts.policy.encoder_rows
        parts.algorithm.update(rollout)
        last_states = 16 * (1 + (1 if rollout.final_obs is not None else 0))
        assert parts.policy.encoder_rows - rows == (last_states if isinstance(advantage, GAE) else 0)

    def test_one_that_trains_gets_a_gradient_and_runs_once_per_row_of_a_micro_batch(self, make, gradient):
        parts = make(field=Embedding((2,), frozen=False), micro_batch=8)
        rollout = parts.collect()
        assert rollout.cond is None
        rows = parts.policy.encoder_rows
        gradient(parts, rollout)
        assert parts.policy.encoder_rows - rows == 16
        assert float(parts.policy.field.embed.weight.grad.norm()) > 0

    def test_the_gradient_is_the_same_whole_or_pair_by_pair(self, make, gradient):
        def of(micro_batch: int) -> Tensor:
            parts = make(field=Embedding((2,), frozen=False), micro_batch=micro_batch, likelihood=JOINT)
            return gradient(parts, parts.collect())[0]

        close(of(3), of(1000))


class TestWeightSets:
    def test_the_average_is_kept_apart_from_the_live_weights(self, make):
        slow, none = (make(ema_decay=d) for d in (0.99, 0.0))
        for i in range(3):
            slow.iterate(i), none.iterate(i)
        live = [dict(p.policy.named_parameters()) for p in (slow, none)]
        assert all(torch.equal(live[0][n], live[1][n]) for n in live[0])
        ema = slow.policy.weights.sets["ema"]
        assert all(not torch.equal(live[0][n], ema[n]) for n in ema)
        assert all(torch.equal(live[1][n], v) for n, v in none.policy.weights.sets["ema"].items())

    def test_the_average_by_hand(self, make):
        """Decay min(d, (1 + s) / (10 + s)) after optimiser step s, so that the start is soon forgotten."""
        parts = make(ema_decay=0.3)
        name = "field.net.0.weight"
        expected = dict(parts.policy.named_parameters())[name].detach().clone()
        for i in range(4):
            parts.iterate(i)
            decay = min(0.3, (2 + i) / (11 + i))
            expected = decay * expected + (1 - decay) * dict(parts.policy.named_parameters())[name].detach()
        close(parts.policy.weights.sets["ema"][name], expected, 1e-14)

    def test_the_reference_never_moves(self, make):
        parts = make(kl=KL(0.1))
        start = {n: p.detach().clone() for n, p in parts.policy.named_parameters()}
        for i in range(2):
            parts.iterate(i)
        assert all(torch.equal(parts.policy.weights.sets["ref"][n], v) for n, v in start.items())

    def test_a_strong_kl_term_keeps_the_policy_near_it(self, make):
        def drift(beta: float) -> float:
            parts = make(kl=KL(beta), epochs=10, objective=partial(Clip, low=10.0), likelihood=ChainLikelihood("sum"))
            parts.iterate(0)
            ref = parts.policy.weights.sets["ref"]
            return sum(float((p.detach() - ref[n]).square().sum()) for n, p in parts.policy.named_parameters())

        assert drift(1000.0) < 0.5 * drift(1e-9)


class TestStops:
    def test_an_update_ends_when_the_policy_has_moved_too_far(self, make):
        free, held = (
            make("reach", epochs=10, num_minibatches=2, objective=partial(Clip, target_kl=k)) for k in (None, 1e-6)
        )
        assert free.iterate(0)["policy/early_stop"] == 0.0
        metrics = held.iterate(0)
        assert metrics["policy/early_stop"] == 1.0
        assert 1 < metrics["optim/steps"] < 20

    def test_all_processes_stop_together(self, make, ranks):
        made = [
            make(
                "reach",
                groups=Groups(4, 4, r, 2),
                epochs=10,
                num_minibatches=2,
                objective=partial(Clip, target_kl=1e-6),
            )
            for r in (0, 1)
        ]
        steps = ranks(2, lambda rank: made[rank].iterate(0)["optim/steps"])
        assert steps[0] == steps[1] < 20

    def test_bad_steps_leave_the_weights_alone_and_finally_stop_the_run(self, make):
        parts = make(optimizer=AdamW(lr=1e-2, max_bad_steps=3))
        parts.iterate(0)
        rollout = parts.collect(1)
        rollout.evidence.x_next[0, 0, 0] = torch.nan
        before = copy.deepcopy(parts.policy.state_dict())
        moments = copy.deepcopy(parts.algorithm.optimizer.state_dict()["moments"])
        for i in (1, 2):
            assert parts.algorithm.update(rollout)["optim/skipped_steps"] == i
        with pytest.raises(NonFiniteError, match="3 optimiser steps in a row"):
            parts.algorithm.update(rollout)
        assert all(torch.equal(v, before[n]) for n, v in parts.policy.state_dict().items())
        after = parts.algorithm.optimizer.state_dict()["moments"]
        assert all(torch.equal(v, moments[n]) for n, v in after.items())

    def test_a_good_step_forgives_the_bad_ones(self, make):
        parts = make(optimizer=AdamW(lr=1e-2, max_bad_steps=2))
        good, bad = parts.collect(0), parts.collect(0)
        bad.evidence.x_next[0, 0, 0] = torch.nan
        for rollout in (bad, good, bad, good):
            metrics = parts.algorithm.update(rollout)
        assert (metrics["optim/skipped_steps"], metrics["optim/steps"]) == (2, 2)

    def test_one_processs_bad_gradient_is_everyones(self, make, ranks):
        made = [make(groups=Groups(4, 4, r, 2)) for r in (0, 1)]
        rollouts = [m.collect() for m in made]
        rollouts[1].evidence.x_next[0, 0, 0] = torch.nan
        skipped = ranks(2, lambda rank: made[rank].algorithm.update(rollouts[rank])["optim/skipped_steps"])
        assert skipped == [1, 1]


class TestCritic:
    def test_fits_the_returns(self, make):
        parts = make(advantage=GAE(), critic_steps=30, critic_lr=1e-2)
        rollout = parts.collect()
        rollout.reward[:] = rollout.obs @ torch.tensor([3.0, -1.0, 0.5, 2.0])
        losses = [parts.algorithm.update(rollout)["critic/loss"] for _ in range(4)]
        assert losses[-1] < 0.1 * losses[0]

    def test_ignores_masked_rows(self, make):
        """Its loss is the mean over the others."""
        parts = make(advantage=GAE())
        rollout = parts.collect()
        values = parts.algorithm.critic.net(rollout.cond).detach()
        gone = torch.arange(16) < 5
        expected = (values - rollout.reward[0]).square()[~gone].mean()
        rollout.reward[:, gone], rollout.weight[:, gone] = torch.nan, 0.0
        assert parts.algorithm.update(rollout)["critic/loss"] == pytest.approx(float(expected), rel=1e-12)

    def test_trains_only_itself(self, make):
        """No gradient leaves it for the features, whoever asks it for a value."""
        critic = make(advantage=GAE()).algorithm.critic.net
        features = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        critic(Cond({"pooled": features})).sum().backward()
        assert features.grad is None
        assert all(p.grad is not None for p in critic.parameters())

    @pytest.mark.parametrize("truncated", [True, False], ids=["time limit", "terminal"])
    def test_values_of_the_next_state_are_of_the_one_truly_reached(self, make, truncated):
        """Row 2 ends at step 1 in a state that is in no later observation."""
        parts = make("reach", advantage=GAE())
        rollout, algorithm = parts.collect(), parts.algorithm
        rollout.truncated[1, 2], rollout.terminated[1, 2] = truncated, not truncated
        rollout.final_obs["state"][1, 2] = 7.0
        v, v_next = algorithm.critic.values(rollout, rollout.cond.index, 64)

        def value(obs: Any) -> Tensor:
            return algorithm.critic.net(parts.policy.encode(obs)).detach()

        goal = rollout.final_obs["goal"][1, 2:3]
        close(v_next[1, 2:3], value({"goal": goal, "state": torch.full((1, 2), 7.0)}))
        close(v_next[1, :2], v[2, :2])
        close(v_next[3], value(tree_map(lambda z: z[3], rollout.final_obs)))  # ToyReach's own time limit

    def test_processes_agree_with_one(self, make, ranks):
        def train(rank: int, world: int) -> list[Tensor]:
            parts = made[rank, world]
            for i in range(2):
                parts.iterate(i)
            return [*parts.algorithm.critic.net.parameters(), *parts.policy.parameters()]

        made = {(r, w): make("reach", groups=Groups(4, 4, r, w), advantage=GAE()) for r, w in [(0, 1), (0, 2), (1, 2)]}
        one, two = train(0, 1), ranks(2, lambda rank: train(rank, 2))
        for a, b, c in zip(one, *two, strict=True):
            close(a, b, 1e-9)
            assert torch.equal(b, c)


class TestState:
    @pytest.mark.parametrize("env", ["image", "reach"])
    @pytest.mark.parametrize("mode", ["episodes", "steps"])
    @pytest.mark.parametrize("advantage", [GroupAdvantage(), GAE()], ids=["group", "gae"])
    def test_2_plus_2_iterations_are_4_bit_for_bit(self, make, env, mode, advantage):
        if (env, mode) == ("image", "steps"):
            return

        def fresh() -> Any:
            return make(env, "learned", advantage=advantage, kl=KL(0.1), num_minibatches=2, collector={"mode": mode})

        straight, first, second = fresh(), fresh(), fresh()
        for i in range(4):
            straight.iterate(i)
        for i in range(2):
            first.iterate(i)
        shaken(second)
        second.policy.load_state_dict(copy.deepcopy(first.policy.state_dict()))
        second.policy.weights.load_state_dict(copy.deepcopy(first.policy.weights.state_dict()))
        second.algorithm.load_state_dict(copy.deepcopy(first.algorithm.state_dict()))
        second.collector.load_state_dict(copy.deepcopy(first.collector.state_dict()))
        for i in (2, 3):
            metrics = second.iterate(i)
        assert metrics["optim/steps"] == 8
        for name, value in straight.policy.state_dict().items():
            assert torch.equal(value, second.policy.state_dict()[name]), name
        for name, value in straight.policy.weights.state_dict().items():
            assert torch.equal(value, second.policy.weights.state_dict()[name]), name
        if straight.algorithm.critic is not None:
            for a, b in zip(
                straight.algorithm.critic.net.parameters(), second.algorithm.critic.net.parameters(), strict=True
            ):
                assert torch.equal(a, b)

    def test_minibatches_are_drawn_anew_each_iteration_and_epoch(self, make, monkeypatch):
        parts, seen = make(groups=Groups(16, 2), num_minibatches=2, epochs=2), []
        draw = parts.algorithm._minibatches

        def spy(rollout: Rollout, epoch: int) -> list[Tensor]:
            seen.append(tuple(draw(rollout, epoch)[0].tolist()))
            return draw(rollout, epoch)

        monkeypatch.setattr(parts.algorithm, "_minibatches", spy)
        for i in range(2):
            parts.iterate(i)
        assert len(set(seen)) == 4
        parts.algorithm.iteration = 0
        assert tuple(draw(parts.collect(), 1)[0].tolist()) == seen[1]


class TestRefusals:
    """Every refusal at construction names its fix."""

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"groups": Groups(4, 1)}, "set group_size >= 2, or use advantage=gae"),
            ({"critic_warmup": 1}, "use critic_warmup=0"),
            ({"objective": Guard, "likelihood": JOINT}, "use likelihood.joint=false"),
            ({"objective": Guard, "kernel": "learned"}, "LearnedNoise learns: use objective=clip"),
            ({"kl": KL(0.1, "released"), "kernel": "learned"}, "use kl.kind=exact"),
            ({"entropy": 0.1}, "no gradient: use entropy=0 or kernel=learned_noise"),
        ],
        ids=lambda v: v if isinstance(v, str) else None,
    )
    def test_name_the_fix(self, make, settings, message):
        with pytest.raises(ValueError, match=message):
            make(**settings)

    def test_without_their_terms_the_same_parts_are_fine(self, make):
        make(kernel="learned", kl=KL(0.0, "released"), entropy=0.1)
        make(groups=Groups(4, 1), advantage=GAE())
        assert isinstance(make(objective=Guard).policy.kernel, FlowSDE)
