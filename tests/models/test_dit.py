"""The flow transformer: its border to the package's convention, its tokenizer, and what must not matter."""

import pytest
import torch
import torch.nn as nn

from rlflow.envs.captions import scenes, words
from rlflow.flow import path
from rlflow.models.dit import MIN_REMAINING, NULL, PAD, DiT, sincos_2d, sinusoid, split_words
from rlflow.pretrain.average import Span, by_derivative

CAPTIONS = ["three red circles", "a red circle left of a blue square", "a white square and a green triangle"]


def tiny(**changes: object) -> DiT:
    """A small model with random weights everywhere, the zero-initialised layers included."""
    args = {"vocab": scenes.VOCAB, "size": 8, "patch": 2, "width": 16, "depth": 2, "heads": 2} | changes
    torch.manual_seed(0)
    model = DiT(**args)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def inputs(model: DiT, num: int = 3, dtype: torch.dtype = torch.float32) -> tuple:
    x = torch.randn((num, *model.event_shape), dtype=dtype)
    t = torch.linspace(0.1, 0.9, num, dtype=dtype)
    return x, t, torch.zeros_like(t), model.encode([CAPTIONS[i % 3] for i in range(num)])


class Says(nn.Module):
    """A last layer that ignores its input and outputs the patches of a given image."""

    def __init__(self, model: DiT, image: torch.Tensor) -> None:
        super().__init__()
        self.answer = model._patches(image)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.answer


def test_border_a_network_that_knows_the_data_gives_the_velocity_of_the_path():
    """x + (1 - t) v is the predicted image and, with exact data, v is data - noise."""
    model = tiny().double()
    x_0, data = torch.randn((2, 3, *model.event_shape), dtype=torch.float64)
    _, t, dt, cond = inputs(model, dtype=torch.float64)
    model.patch_out = Says(model, data)
    x = path.interpolate(x_0, data, t)
    v = model(x, t, dt, cond)
    torch.testing.assert_close(path.data(x, v, t), data, atol=1e-12, rtol=0)
    torch.testing.assert_close(v, data - x_0, atol=1e-12, rtol=0)


def test_border_the_velocity_stays_bounded_at_the_data_end():
    model = tiny()
    x, _, dt, cond = inputs(model)
    image = torch.randn_like(x)
    model.patch_out = Says(model, image)
    v = model(x, torch.ones(3), dt, cond)
    torch.testing.assert_close(v, (image - x) / MIN_REMAINING)


def test_patches_and_image_are_inverse():
    model = tiny()
    x = torch.randn((2, *model.event_shape))
    torch.testing.assert_close(model._image(model._patches(x)), x, atol=0, rtol=0)


def test_rows_do_not_see_each_other():
    model = tiny()
    x, t, dt, cond = inputs(model)
    order = torch.tensor([2, 0, 1])
    together = model(x, t, dt, cond)
    permuted = model(x[order], t[order], dt, cond.index(order))
    torch.testing.assert_close(permuted, together[order], atol=1e-5, rtol=1e-5)
    alone = model(x[:1], t[:1], dt[:1], cond.index(torch.tensor([0])))
    torch.testing.assert_close(alone, together[:1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("what", ["x", "t", "cond"])
def test_every_input_matters_and_dt_does_not(what):
    model = tiny()
    x, t, dt, cond = inputs(model)
    v = model(x, t, dt, cond)
    assert torch.equal(model(x, t, dt + 0.1, cond), v)
    changed = {"x": x, "t": t, "cond": cond}
    changed[what] = {"x": x.flip(-1), "t": t / 2, "cond": cond.index(torch.tensor([1, 2, 0]))}[what]
    assert (model(changed["x"], changed["t"], dt, changed["cond"]) - v).abs().max() > 1e-3


def test_word_order_and_pixel_position_matter():
    """The same words in another order are another caption; a shifted picture gets another velocity."""
    model = tiny()
    one_way, other = "a red circle left of a blue square", "a blue circle left of a red square"
    first, mirrored = model.encode([one_way, other])["tokens"]
    assert not torch.allclose(first, mirrored)
    x, t, dt, cond = inputs(model)
    rolled = model(x.roll(2, -1), t, dt, cond).roll(-2, -1)
    assert (rolled - model(x, t, dt, cond)).abs().max() > 1e-3


def test_attention_is_softmax_attention_per_head():
    """The written-out CPU form against PyTorch's own, heads laid out as PyTorch lays them out."""
    block = tiny().blocks[0].double()
    h = torch.randn(3, 24, 16, dtype=torch.float64)
    reference = nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64)
    q, k, v = block.qkv(h).chunk(3, -1)
    q, k = (norm(x.unflatten(-1, (2, 8))).flatten(-2) for norm, x in ((block.norm_q, q), (block.norm_k, k)))
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.eye(16, dtype=torch.float64).repeat(3, 1))
    reference.out_proj = block.attend
    torch.testing.assert_close(block.attention(h), reference(q, k, v)[0])


def test_tokenizer_is_one_to_one_on_both_worlds():
    for vocab, captions in (
        (scenes.VOCAB, [scenes.caption(s) for s in scenes.all_scenes()]),
        (words.VOCAB, words.heldout_captions()),
    ):
        ids = tiny(vocab=vocab).tokenize(captions)
        assert ids.shape == (len(captions), 8)
        assert len(ids.unique(dim=0)) == len(captions)
        assert not (ids == NULL).any()


def test_quoted_text_is_spelt_and_words_are_lower_case():
    assert split_words('The  Word "ABa"') == ["the", "word", "A", "B", "a"]
    model = tiny(vocab=words.VOCAB)
    assert model.tokenize(['the word "ABA"'])[0].tolist()[4:] == [model.vocab["A"], PAD, PAD, PAD]


def test_unknown_word_and_long_caption_are_named():
    model = tiny()
    with pytest.raises(ValueError, match=r"unknown word 'sqare'; the nearest this model knows is 'square'"):
        model.tokenize(["one red sqare"])
    with pytest.raises(ValueError, match=r"9 tokens, this model reads 8: 'a red"):
        model.tokenize(["a red red circle left of a blue square"])


def test_token_ids_and_captions_encode_alike():
    model = tiny()
    by_text, by_ids = model.encode(CAPTIONS), model.encode(model.tokenize(CAPTIONS))
    assert torch.equal(by_text["tokens"], by_ids["tokens"])
    assert by_text["tokens"].shape == (3, 8, 16)
    assert by_text["pooled"].shape == (3, model.num_features)


def test_null_says_nothing_for_as_many_rows():
    model = tiny()
    cond = model.encode(CAPTIONS).repeat(2)
    null = model.null(cond)
    assert len(null) == 6
    assert null.data["tokens"].shape[0] == 1, "stored once"
    assert (null["tokens"] == null["tokens"][0]).all()
    empty = model.encode(torch.full((1, 8), PAD))
    for other in (cond["pooled"], empty["pooled"]):
        assert not (null["pooled"][:1] == other).all(1).any()
    x, t, dt, _ = inputs(model, 6)
    assert model(x, t, dt, null).shape == x.shape


def test_double_precision_is_kept_throughout():
    """A float32 step anywhere would leave an error near 10 in so narrow a central difference."""
    model = tiny().double()
    x, t, dt, cond = inputs(model, dtype=torch.float64)
    assert model(x, t, dt, cond).dtype == torch.float64
    h = 1e-8
    difference = (model(x, t + h, dt, cond) - model(x, t - h, dt, cond)) / (2 * h)
    t_grad = torch.func.jvp(lambda s: model(x, s, dt, cond), (t,), (torch.ones_like(t),))[1]
    torch.testing.assert_close(difference, t_grad, atol=1e-5, rtol=1e-5)


def test_autocast_answers_in_single_precision_and_close():
    model = tiny()
    x, t, dt, cond = inputs(model)
    exact = model(x, t, dt, cond)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x, t, dt, model.encode(CAPTIONS))
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()
    assert not torch.equal(rough, exact)


def test_gradient_checkpointing_changes_no_gradient():
    plain, saving = tiny(), tiny(grad_checkpointing=True)
    for model in (plain, saving):
        torch.manual_seed(1)
        model(*inputs(model)).square().mean().backward()
    calls = []
    saving.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-7, rtol=1e-6)
    saving(*inputs(saving)).mean().backward()
    assert len(calls) == 2, "the block ran again in the backward pass"


def test_encoder_parameters_are_exactly_what_encode_reads():
    model = tiny()
    cond = model.encode(CAPTIONS)
    (cond["tokens"].sum() + cond["pooled"].sum()).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    listed = {name for name, p in model.named_parameters() if any(p is q for q in model.encoder_parameters())}
    assert reached == listed


def test_every_parameter_gets_a_gradient():
    model = tiny()
    model(*inputs(model)).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_arguments_rebuild_the_model():
    model = tiny()
    twin = DiT(**model.args)
    twin.load_state_dict(model.state_dict())
    torch.manual_seed(3)
    batch = inputs(model)
    assert torch.equal(model(*batch), twin(*batch))


def test_default_size_is_small():
    assert 1.3e6 < sum(p.numel() for p in DiT(scenes.VOCAB).parameters()) < 1.5e6


@pytest.mark.parametrize("wrong", [{"patch": 3}, {"heads": 3}, {"width": 18}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match="must be a multiple of"):
        tiny(**wrong)
    with pytest.raises(ValueError, match="twice"):
        tiny(vocab=["a", "a"])


def test_decode_maps_the_latent_range_to_colours():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    assert tiny().decode(x).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_positions_and_times_are_all_different():
    assert sincos_2d(16, 8).unique(dim=0).shape == (64, 16)
    assert torch.cdist(sinusoid(torch.linspace(0, 1000, 11), 16), sinusoid(torch.zeros(1), 16))[1:].min() > 0.5


class TestDecoupled:
    """With `average_from`, the later blocks and the output read the end of the step."""

    @pytest.mark.parametrize("average_from", [0, 1, 2])
    def test_at_dt_0_it_is_the_network_it_was_bit_for_bit(self, average_from):
        plain, made = tiny(), tiny(average_from=average_from)
        assert plain.state_dict().keys() == made.state_dict().keys()
        x, t, dt, _ = inputs(plain)
        assert torch.equal(plain(x, t, dt, plain.encode(CAPTIONS)), made(x, t, dt, made.encode(CAPTIONS)))
        assert not plain.uses_dt
        assert made.uses_dt

    def test_the_blocks_before_read_the_beginning_and_the_others_the_end(self):
        """What each block is told, by hand."""
        model, told = tiny(average_from=1), []
        for block in model.blocks:
            block.register_forward_pre_hook(lambda _, args: told.append(args[1]))
        x, t, _, cond = inputs(model)
        model(x, t, torch.full_like(t, 0.1), cond)
        model(x, t + 0.1, torch.zeros_like(t), cond)
        (early, late), (both, same) = told[:2], told[2:]
        assert torch.equal(both, same)
        assert torch.equal(late, both)
        assert not torch.equal(early, both)

    def test_its_derivative_is_that_of_finite_differences(self):
        """MeanFlow's needs forward-mode differentiation of the whole network."""
        model = tiny(average_from=1).double().requires_grad_(False)
        x, t, _, cond = inputs(model, dtype=torch.float64)
        dt, v = torch.full_like(t, 0.2), torch.randn_like(x)
        span = Span(x, t, dt, v, cond)
        with torch.no_grad():
            slope = (by_derivative(model, span) - v) / 0.2
        h = 1e-6
        change = model(x + h * v, t + h, dt - h, cond) - model(x - h * v, t - h, dt + h, cond)
        torch.testing.assert_close(slope, change / (2 * h), rtol=1e-5, atol=1e-5)

    def test_arguments_rebuild_it_and_refuse_what_it_has_not(self):
        assert DiT(**tiny(average_from=1).args).average_from == 1
        with pytest.raises(ValueError, match="average_from 3 is beyond the 2 blocks"):
            tiny(average_from=3)
