"""The normaliser: merging equals one batch, what is constant keeps its scale, the first ratio stays exactly 1."""

import pytest
import torch

from rlflow.flow.guidance import CFG
from rlflow.flow.kernels import LearnedNoise
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import All
from rlflow.models.io import load_field, save_field
from rlflow.models.mlp import MLPField
from rlflow.models.normalizer import Normalizer
from rlflow.parallel import dist
from rlflow.parallel.moments import merge, no_moments, scale
from rlflow.rl.likelihoods.chain import ChainLikelihood


def draw(num: int = 100, seed: int = 0) -> torch.Tensor:
    """Features of very different size and spread; the last is constant."""
    z = torch.randn(num, 4, generator=torch.Generator().manual_seed(seed))
    return z * torch.tensor([1.0, 1e-3, 1e3, 0.0]) + torch.tensor([0.0, 1.0, -5e3, 1e6])


def fitted(obs: torch.Tensor) -> Normalizer:
    normalizer = Normalizer(obs.shape[1])
    normalizer.fit(obs)
    return normalizer


def test_identity_before_anything_was_seen():
    obs = 1e4 * torch.randn(7, 4)
    assert torch.equal(Normalizer(4)(obs), obs)


def test_output_has_mean_zero_and_std_one():
    out = fitted(draw())(draw())
    torch.testing.assert_close(out.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std(0, correction=0), torch.tensor([1.0, 1.0, 1.0, 0.0]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("cuts", [(50,), (1, 2, 99), (10, 20, 30, 90)])
def test_merged_batches_equal_one(cuts):
    obs, parts = draw(), Normalizer(4)
    for part in torch.tensor_split(obs, cuts):
        parts.update(part)
    torch.testing.assert_close(parts.moments, fitted(obs).moments, rtol=1e-9, atol=1e-3)
    torch.testing.assert_close(scale(parts.moments), scale(fitted(obs).moments), rtol=1e-9, atol=0)
    expected = obs.double().std(0, correction=0)[:3]
    torch.testing.assert_close(scale(parts.moments)[:3], expected, rtol=1e-9, atol=0)


def test_two_processes_equal_one(monkeypatch):
    """The sums of the other process are added to ours."""
    mine, other = draw(60, 1), draw(40, 2) + 3
    before = fitted(draw(50, 3)).moments
    sent = []
    monkeypatch.setattr(dist, "all_sum", lambda sums: sent.append(sums) or sums)
    merge(before, other, torch.ones(40, dtype=torch.bool))
    monkeypatch.setattr(dist, "all_sum", lambda sums: sums + sent[0])
    both = merge(before, mine, torch.ones(60, dtype=torch.bool))
    monkeypatch.undo()
    alone = merge(before, torch.cat([mine, other]), torch.ones(100, dtype=torch.bool))
    torch.testing.assert_close(both, alone, rtol=1e-9, atol=1e-3)


def test_rows_that_do_not_count_change_nothing():
    obs = draw()
    spoiled = torch.cat([obs, torch.full((3, 4), torch.nan)])
    counts = torch.arange(103) < 100
    assert torch.equal(merge(no_moments((4,)), spoiled, counts), merge(no_moments((4,)), obs, counts[:100]))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e6, -123456.7])
def test_constant_feature_keeps_scale_one(value):
    """Also where the rounding of large squares leaves a variance above zero."""
    normalizer = fitted(torch.full((1000, 1), value))
    assert scale(normalizer.moments).item() == 1
    torch.testing.assert_close(normalizer(torch.tensor([[value + 2]])), torch.tensor([[2.0]]), atol=0.02, rtol=0)


def test_rounding_of_float32_is_no_variation():
    flicker = torch.tensor([1e6, 1e6 + 0.0625]).repeat(50)[:, None]
    assert flicker.unique().numel() == 2
    assert scale(fitted(flicker).moments).item() == 1
    assert scale(fitted(flicker + torch.randn(100, 1) * 10).moments).item() > 5


def test_clipped_at_ten():
    out = fitted(draw())(torch.tensor([[1e6, -1e6, 0.0, 1e9]]))
    assert out[0].tolist()[:2] == [10, -10]
    assert out[0, 3] == 10


def test_fit_forgets_update_does_not():
    a, b = draw(50, 1), draw(50, 2) + 1
    normalizer = fitted(a)
    normalizer.update(b)
    assert normalizer.moments[0, 0] == 100
    normalizer.fit(b)
    assert torch.equal(normalizer.moments, fitted(b).moments)


def test_statistics_stay_in_float64_whatever_the_network():
    normalizer = fitted(draw())
    kept = normalizer.moments.clone()
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert torch.equal(normalizer.to(dtype).moments, kept)
    assert normalizer(draw().double()).dtype == torch.float64
    assert normalizer(draw().byte()).dtype == torch.float32


class TestInsideTheField:
    def test_comes_first_in_encode(self):
        field = MLPField(4, (2,), width=8)
        field.normalizer.fit(draw())
        assert torch.equal(field.encode(draw())["pooled"], field.normalizer(draw()))
        parts = {"b": draw()[:, 1:], "a": draw()[:, :1]}
        assert torch.equal(field.encode(parts)["pooled"], field.normalizer(draw()))

    def test_only_a_running_one_observes(self):
        for running in (False, True):
            field = MLPField(4, (2,), width=8, running=running)
            CFG(field, 2.0).observe(draw())
            assert bool(field.normalizer.moments.any()) is running

    def test_checkpoint_folder_carries_it(self, tmp_path):
        field = MLPField(4, (2,), width=8, running=True)
        field.observe(draw())
        again = load_field(str(save_field(field, tmp_path / "field")))
        assert torch.equal(again.encode(draw())["pooled"], field.encode(draw())["pooled"])
        again.observe(draw())
        assert again.normalizer.moments[0, 0] == 200

    def test_first_ratio_is_one_until_it_observes(self):
        """Which is why the learner lets it observe after its update only."""
        field = MLPField(4, (2,), width=64, running=True)
        field.observe(draw())
        policy, likelihood = FlowPolicy(field, LearnedNoise(4, (2,)), num_steps=4), ChainLikelihood("sum", True)
        obs = draw(96, 5)
        plan = All()(0, policy.grid(4), torch.arange(96))
        with torch.no_grad():
            cond = policy.encode(obs)
            chain = policy.sample(cond, plan)
            evidence = likelihood.record(policy, cond, chain, Key(0, "test"), torch.arange(96))
            again = likelihood.score(policy, policy.encode(obs), evidence).log_prob
            assert torch.equal(again, evidence.old_log_prob)
            field.observe(draw(50, 6) + 2)
            moved = likelihood.score(policy, policy.encode(obs), evidence).log_prob
            assert float((moved - again).abs().max()) > 0.01
