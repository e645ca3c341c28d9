"""A LoRA as one product is the LoRA: values, gradients, first ratio; one that adds nothing is not computed."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from rlflow.flow.guidance import CFG
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import AllButLast
from rlflow.models.pretrained import lora as lora_files
from rlflow.models.pretrained.lora import MergedProduct
from rlflow.models.pretrained.pipeline import PretrainedField, pretrained
from rlflow.rl.likelihoods.chain import ChainLikelihood


@pytest.fixture
def fields(tiny_pipeline, monkeypatch):
    """fields(moved=True) -> ours, and peft's own, with the same LoRA."""

    def fields(moved: bool = True) -> tuple[PretrainedField, PretrainedField]:
        settings = {"resolution": 32, "max_sequence_length": 24, "lora": 2}
        ours = pretrained(str(tiny_pipeline("sd3")), **settings)
        with monkeypatch.context() as patch:
            patch.setattr(lora_files, "merge", lambda network: None)
            theirs = pretrained(str(tiny_pipeline("sd3")), **settings)
        torch.manual_seed(3)
        for mine, other in zip(lora(ours), lora(theirs), strict=True):
            with torch.no_grad():
                mine += 0.2 * torch.randn_like(mine) * moved
                other.copy_(mine)
        return ours, theirs

    return fields


def lora(field: PretrainedField) -> list[nn.Parameter]:
    return list(lora_files.parameters(field.transformer).values())


def velocity(field: PretrainedField) -> Tensor:
    x = torch.randn(4, *field.event_shape, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.2, 0.7, 0.5, 0.9])
    return field(x, t, 0 * t, field.encode(field.tokenize(["a red cat", "", "a dog", "a red cat"])))


@pytest.mark.parametrize(("rank", "wide", "narrow"), [(2, 12, 10), (8, 12, 10)], ids=["by A and B", "by the weight"])
def test_the_product_and_its_gradients_are_autograds(rank, wide, narrow):
    """Both ways back, in float64; for a rank above and below where they cost the same."""
    torch.manual_seed(0)
    x, w, bias = torch.randn(3, 5, narrow), torch.randn(wide, narrow), torch.randn(wide)
    a, b = torch.randn(rank, narrow), torch.randn(wide, rank)
    x, w, bias, a, b = (v.double() for v in (x, w, bias, a, b))
    trained = [v.requires_grad_() for v in (x, a, b)]
    ours = MergedProduct.apply(x, w, bias, a, b, 0.7)
    plain = F.linear(x, w, bias) + 0.7 * (x @ a.T @ b.T)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    towards = torch.randn_like(plain)
    for got, want in zip(*(torch.autograd.grad(y, trained, towards) for y in (ours, plain)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_velocities_and_gradients_are_pefts_to_1e_6(fields):
    found = []
    for field in fields():
        v = velocity(field)
        found.append([v, *torch.autograd.grad(v.square().mean(), lora(field))])
    assert float((found[1][0] - velocity(fields(moved=False)[1])).abs().max()) > 1e-2, "a LoRA that adds nothing"
    for got, want in zip(*found, strict=True):
        assert float((got - want).norm()) <= 2e-6 * float(want.norm())


def test_every_layer_of_the_attention_is_one_product(fields, monkeypatch):
    ours, theirs = fields()
    calls = []
    apply = MergedProduct.apply
    monkeypatch.setattr(MergedProduct, "apply", lambda *args: calls.append(1) or apply(*args))
    velocity(theirs)
    assert not calls
    velocity(ours)
    assert len(calls) == len(lora(ours)) // 2
    with torch.autocast("cpu", torch.bfloat16):
        velocity(ours)
    assert len(calls) == len(lora(ours)) // 2, "a small step would be lost in bfloat16"


def test_nothing_of_the_old_weights_is_left_where_another_set_is_used(fields):
    """Weights changed in place, and sets that are blended while they are not in use."""
    policy = FlowPolicy(fields()[0], FlowSDE())
    policy.weights.snapshot("ema")
    with policy.using("ema"):
        before = velocity(policy.field)
    with torch.no_grad():
        for p in lora(policy.field):
            p += 0.3
    policy.weights.blend("ema", 0.5)
    with policy.using("ema"):
        after = velocity(policy.field)
    assert float((before - after).detach().abs().max()) > 1e-4


@pytest.mark.parametrize("rows", [1, 3, 5])
@pytest.mark.parametrize("guided", [False, True])
def test_the_first_ratio_is_exactly_one_in_pieces_of_any_size(fields, rows, guided):
    """Eight sampled without a graph, both halves of guidance in one pass, some scored with one: the time's and the text's own layers are filled up alone."""
    field = fields()[0]
    policy = FlowPolicy(CFG(field, 2.0, detach=True) if guided else field, FlowSDE(), num_steps=4)
    likelihood = ChainLikelihood("mean")
    seen: list[int] = []
    field.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    with torch.no_grad():
        cond = policy.encode(field.tokenize(["a red cat", "a dog"] * 4))
        chain = policy.sample(cond, AllButLast()(0, policy.grid(4), torch.arange(8)))
        evidence = likelihood.record(policy, cond, chain, Key(0, "test"), torch.arange(8))
    assert set(seen) == {16 if guided else 8}
    score = likelihood.score(policy, cond.index(torch.arange(rows)), evidence.index(torch.arange(rows)))
    assert score.log_prob.requires_grad
    assert torch.equal(score.log_prob, evidence.old_log_prob[:rows])


@pytest.mark.parametrize("moved", [False, True])
def test_a_reference_that_adds_nothing_is_the_base_alone(fields, moved):
    """Nothing of the LoRA is computed then, the same numbers come out, and gradients stay as they were switched."""
    field = fields(moved)[0]
    before, ran = velocity(field), []
    hook = MergedProduct.forward
    MergedProduct.forward = staticmethod(lambda *args: ran.append(1) or hook(*args))
    try:
        with torch.no_grad(), field.without_idle():
            inside = velocity(field)
    finally:
        MergedProduct.forward = staticmethod(hook)
    assert torch.equal(inside, before.detach())
    assert bool(ran) == moved
    assert all(p.requires_grad for p in lora(field))
    assert velocity(field).requires_grad
