"""Rewards on CLIP: the numbers of transformers' own forward pass, each image with its own prompt, one network for all."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("transformers")
from transformers import CLIPConfig

from rlflow.rewards.base import Reward, RewardSet, to_uint8
from rlflow.rewards.component import is_differentiable
from rlflow.rewards.networks.aesthetic import Aesthetic, linear_layers
from rlflow.rewards.networks.clip import ClipScore
from rlflow.rewards.networks.embed import Clip, Pixels, load_clip, vector
from rlflow.rewards.networks.hps import HPS, convert
from rlflow.rewards.networks.hub import OnDevice, Source, pick_device, read_weights
from rlflow.rewards.networks.pickscore import PickScore
from rlflow.rewards.networks.similarity import ImageSimilarity

SIDE, WIDTH = 32, 32  # of the tiny CLIP
TEXTS = ["a red circle", "two blue squares", "a red circle", "cat", "a dog on a mat", "tea"]


def expected(folder: Path, images: Tensor, texts: list[str]) -> tuple[Tensor, float]:
    """(N, N) cosines of all images (rows) and texts, and the temperature, by transformers alone; pictures by Pillow."""
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    small = [Image.fromarray(p).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for p in to_uint8(images)]
    values = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) / 255 for p in small])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.4, 0.45, 0.5], [0.25, 0.3, 0.35]))
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=(values - mean) / std, **tokens)
    scale = float(model.logit_scale.detach().exp())
    return out.logits_per_image / scale, scale


def test_scores_are_those_of_transformers_forward_pass(clip_folder: Path, pictures: Tensor) -> None:
    cosines, scale = expected(clip_folder, pictures, TEXTS)
    own = cosines.diagonal()
    assert own.std() > 0.02, "the tiny model tells nothing apart"
    folder = str(clip_folder)
    assert torch.allclose(ClipScore(folder)(pictures, TEXTS), 2.5 * own.clamp(min=0), atol=2e-3)
    assert torch.allclose(PickScore(folder, folder)(pictures, TEXTS), scale * own, atol=2e-3 * scale)
    assert torch.allclose(PickScore(folder, folder, divide=26.0)(pictures, TEXTS), scale * own / 26, atol=2e-3)


def test_every_image_is_scored_with_its_own_prompt(clip_folder: Path, pictures: Tensor) -> None:
    """A permutation of the rows permutes the scores; other prompts give other scores."""
    score = PickScore(str(clip_folder), str(clip_folder))
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    straight = score(pictures, TEXTS)
    assert torch.allclose(score(pictures[order], [TEXTS[i] for i in order]), straight[order], atol=1e-5)
    assert not torch.allclose(score(pictures, [TEXTS[i] for i in order]), straight, atol=1e-2)


def test_long_prompts_are_cut_and_a_prefix_counts(clip_folder: Path, pictures: Tensor) -> None:
    folder = str(clip_folder)
    score = PickScore(folder, folder)
    long = ["abcdefghijklmn" + "x" * n for n in range(1, 7)]  # 14 letters and two special tokens fill it
    assert torch.allclose(score(pictures, long), score(pictures, [long[0]] * 6), atol=1e-4)
    prefixed = ClipScore(folder, prefix="of ", scale=1.0)(pictures, TEXTS)
    assert torch.equal(prefixed, ClipScore(folder, scale=1.0)(pictures, ["of " + t for t in TEXTS]))


@pytest.mark.parametrize(("height", "width"), [(40, 40), (16, 16), (48, 64), (75, 50)])
def test_pictures_are_made_small_as_pillow_does(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    rough = rng.integers(0, 256, (2, 6, 6, 3), np.uint8)
    pixels = np.stack([np.array(Image.fromarray(p).resize((width, height))) for p in rough])
    found = Pixels(SIDE, (0.0,) * 3, (1.0,) * 3)(pixels) * 255
    scale = SIDE / min(height, width)
    size = (max(SIDE, int(width * scale)), max(SIDE, int(height * scale)))
    left, top = ((s - SIDE) // 2 for s in size)
    wanted = [
        np.array(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC))[top : top + SIDE, left : left + SIDE]
        for p in pixels
    ]
    assert (found - torch.from_numpy(np.stack(wanted)).permute(0, 3, 1, 2)).abs().max() <= 1.01


@pytest.mark.parametrize(("height", "width"), [(40, 40), (16, 16), (48, 64), (75, 50)])
def test_tensors_are_prepared_as_the_image_processor_does(clip_folder: Path, height: int, width: int) -> None:
    """But for the 8 bits that it rounds to; and a gradient reaches every pixel of the crop."""
    pil = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    rough = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    images = (torch.nn.functional.interpolate(rough, (height, width), mode="bilinear") * 255).round() / 255
    processor = pil.CLIPImageProcessorPil.from_pretrained(clip_folder)
    wanted = processor(list(to_uint8(images)), return_tensors="pt")["pixel_values"]
    pixels = Pixels.read(Source(str(clip_folder), "model").preprocessor())
    found = pixels.graded(images.requires_grad_())
    levels = (found - wanted).abs() * 255 * 0.25  # of 256, at least: the smallest std
    assert levels.max() <= 1.6, "it rounds twice, once for each axis"
    assert levels.mean() < 0.4
    found.square().sum().backward()
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    assert (images.grad[..., top + 1 : top + side - 1, left + 1 : left + side - 1] != 0).float().mean() > 0.99


def every_reward(folder: str, head: Path) -> dict[str, Any]:
    """Those that read a CLIP, on one checkpoint."""
    torch.save({"weight": torch.linspace(-1, 1, WIDTH)[None], "bias": torch.zeros(1)}, head)
    torch.manual_seed(0)
    torch.save(OpenClip(CLIPConfig.from_pretrained(folder)).state_dict(), head.with_name("hps.pt"))
    scores = {"clip_score": ClipScore(folder), "pickscore": PickScore(folder, folder)}
    return scores | {"hps": HPS(str(head.with_name("hps.pt")), folder), "aesthetic": Aesthetic(str(head), folder)}


@pytest.mark.parametrize("name", ["clip_score", "pickscore", "hps", "aesthetic"])
def test_scores_with_a_graph_are_the_scores_and_their_slope(
    clip_folder: Path, tmp_path: Path, pictures: Tensor, name: str
) -> None:
    """Equal but for the rounding to 8 bits; the gradient by a picture is that of a finite difference."""
    score = every_reward(str(clip_folder), tmp_path / "head.pth")[name]
    assert is_differentiable(score)

    def of(images: Tensor) -> Tensor:
        return score(images, *([TEXTS] if name != "aesthetic" else []))

    images = (0.1 + 0.8 * pictures).requires_grad_()  # away from 0 and 1, where the preparation cuts off
    with_graph = of(images)
    plain = of(images.detach())
    assert not plain.requires_grad
    size = plain.abs().mean()
    assert torch.allclose(with_graph.detach(), plain, atol=0.02 * float(size) + 2e-3)
    (found,) = torch.autograd.grad(with_graph.sum(), images)
    way = torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    up, down = (of((images + sign * 1e-3 * way).detach().requires_grad_()).detach() for sign in (1, -1))
    slopes = (found * way).flatten(1).sum(1)
    assert slopes.abs().max() > 1e-4
    torch.testing.assert_close((up - down) / 2e-3, slopes, rtol=0.05, atol=0.02 * float(slopes.abs().max()))


def test_a_network_lent_to_the_device_stays_for_the_way_back() -> None:
    """With `offload` the weights go home with the next user that needs no graph; the way back needs them there."""
    placed = OnDevice(torch.nn.Linear(2, 1), "cpu", offload=True)
    went: list[str] = []
    placed.network.to = lambda place: went.append(str(place))  # type: ignore[method-assign]
    x = torch.ones(1, 2, requires_grad=True)
    with placed.use(graph=True) as network:
        y = network(x)
    y.sum().backward()
    assert x.grad is not None
    with placed.use():
        pass
    assert went == ["cpu", "cpu", "cpu"], "there, there again, and home"


def test_preprocessors_are_read_in_every_spelling() -> None:
    rest = {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    for size in ({"crop_size": 8}, {"crop_size": {"height": 8, "width": 8}}, {"size": {"shortest_edge": 8}}):
        assert Pixels.read(size | rest).size == 8
    with pytest.raises(ValueError, match="names no size"):
        Pixels.read({"size": {"longest_edge": 8}, **rest})


def test_both_generations_of_transformers_are_understood(clip_folder: Path, pictures: Tensor) -> None:
    """transformers 4 returns the vectors themselves."""

    class Old(torch.nn.Module):
        def __init__(self, new: torch.nn.Module) -> None:
            super().__init__()
            self.new, self.config = new, new.config

        def get_image_features(self, pixel_values: Tensor) -> Tensor:
            return vector(self.new.get_image_features(pixel_values=pixel_values))

        def get_text_features(self, **tokens: Tensor) -> Tensor:
            return vector(self.new.get_text_features(**tokens))

    new = load_clip(Source(str(clip_folder), "model"), Source(str(clip_folder), "model"), "cpu", False, "float32")
    old = Clip(OnDevice(Old(new.network.network), "cpu"), new.tokenizer, new.pixels)
    assert torch.equal(old.cosine(pictures, TEXTS), new.cosine(pictures, TEXTS))


def test_rewards_of_one_checkpoint_share_its_network_and_its_pass(
    clip_folder: Path, pictures: Tensor, tmp_path: Path
) -> None:
    folder = str(clip_folder)
    torch.save({"weight": torch.ones(1, WIDTH), "bias": torch.zeros(1)}, tmp_path / "head.pth")
    first, second = ClipScore(folder), Aesthetic(str(tmp_path / "head.pth"), folder)
    assert first.clip is second.clip
    before = first.clip.memory.calls
    RewardSet([Reward("a", first), Reward("b", second)]).compute(
        {"images": pictures * 0.5, "prompt": TEXTS, "group": torch.zeros(6)}, 6
    )
    assert first.clip.memory.calls == before + 1


# -- aesthetic ------------------------------------------------------------------------------------


def test_the_head_is_its_layers_one_after_the_other(clip_folder: Path, pictures: Tensor, tmp_path: Path) -> None:
    """As LAION stores it: layers.0, .2, .4, .6, .7 of 1024, 128, 64, 16 and 1 numbers, and nothing between them."""
    sizes = [WIDTH, 1024, 128, 64, 16, 1]
    weights: dict[str, Tensor] = {}
    product, offset = torch.eye(WIDTH), torch.zeros(WIDTH)
    for number, (a, b) in zip((0, 2, 4, 6, 7), pairwise(sizes), strict=True):
        w, bias = torch.randn(b, a) / a**0.5, torch.randn(b)
        weights |= {f"layers.{number}.weight": w, f"layers.{number}.bias": bias}
        product, offset = w @ product, w @ offset + bias
    scrambled = dict(sorted(weights.items(), reverse=True))
    torch.save(scrambled, tmp_path / "head.pth")
    reward = Aesthetic(str(tmp_path / "head.pth"), str(clip_folder))
    assert torch.allclose(reward(pictures), (reward.clip.images(pictures) @ product.T + offset)[:, 0], atol=1e-4)


def test_a_head_that_does_not_fit_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file; give LAION"):
        Aesthetic(str(tmp_path / "absent.pth"), str(clip_folder))
    torch.save({"weight": torch.ones(1, 7), "bias": torch.zeros(1)}, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=rf"reads vectors of 7 numbers, model .* makes {WIDTH}"):
        Aesthetic(str(tmp_path / "head.pth"), str(clip_folder))
    for bad in ({}, {"weight": torch.ones(2, 7), "bias": torch.zeros(2)}):
        with pytest.raises(ValueError, match="do not lead from a vector to one number"):
            linear_layers(bad)


class Foreign:
    """What a pickle could bring."""


def test_weights_files_run_no_code(tmp_path: Path) -> None:
    torch.save({"state_dict": Foreign()}, tmp_path / "x.pt")
    with pytest.raises(Exception, match="weights_only|Unsupported|Weights only"):
        read_weights(tmp_path / "x.pt")
    torch.save([1, 2], tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds no table of weights"):
        read_weights(tmp_path / "x.pt")


# -- hps ------------------------------------------------------------------------------------------


class OpenTower(torch.nn.Module):
    """One tower in open_clip's layout, written from its names: blocks with nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.resblocks = torch.nn.ModuleList(OpenBlock(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenBlock(torch.nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.attn = torch.nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = torch.nn.ModuleDict(
            {"c_fc": torch.nn.Linear(width, 2 * width), "c_proj": torch.nn.Linear(2 * width, width)}
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        h = torch.nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x)))
        return x + self.mlp["c_proj"](h)


class OpenVisual(torch.nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, width, 8, 8, bias=False)
        self.class_embedding = torch.nn.Parameter(torch.randn(width))
        self.positional_embedding = torch.nn.Parameter(torch.randn((SIDE // 8) ** 2 + 1, width))
        self.ln_pre, self.ln_post = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.transformer = OpenTower(width, heads, layers)
        self.proj = torch.nn.Parameter(torch.randn(width, WIDTH))

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x), None)[:, 0]) @ self.proj


class OpenClip(torch.nn.Module):
    """open_clip's CLIP at the size of the tiny one."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        text, vision = config.text_config, config.vision_config
        self.visual = OpenVisual(vision.hidden_size, vision.num_attention_heads, vision.num_hidden_layers)
        self.token_embedding = torch.nn.Embedding(text.vocab_size, text.hidden_size)
        self.positional_embedding = torch.nn.Parameter(torch.randn(text.max_position_embeddings, text.hidden_size))
        self.transformer = OpenTower(text.hidden_size, text.num_attention_heads, text.num_hidden_layers)
        self.ln_final = torch.nn.LayerNorm(text.hidden_size)
        self.text_projection = torch.nn.Parameter(torch.randn(text.hidden_size, WIDTH))
        self.logit_scale = torch.nn.Parameter(torch.tensor(3.0))
        length = text.max_position_embeddings
        self.register_buffer("attn_mask", torch.full((length, length), -torch.inf).triu(1))

    def encode_text(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding
        x = self.ln_final(self.transformer(x, self.attn_mask))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection


def test_a_converted_checkpoint_computes_what_open_clip_computes(
    clip_folder: Path, pictures: Tensor, tmp_path: Path
) -> None:
    theirs = OpenClip(CLIPConfig.from_pretrained(clip_folder)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.save({"epoch": 1, "state_dict": theirs.state_dict()}, tmp_path / "hps.pt")
    reward = HPS(str(tmp_path / "hps.pt"), str(clip_folder))
    with torch.no_grad():
        images = theirs.visual(reward.clip.pixels(to_uint8(pictures)))
        texts = theirs.encode_text(reward.clip.tokenize(TEXTS)["input_ids"])
    wanted = torch.cosine_similarity(images, texts)
    assert wanted.std() > 5e-3
    assert torch.allclose(reward(pictures, TEXTS), wanted, atol=1e-5)


def test_a_checkpoint_of_another_shape_or_kind_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    weights = OpenClip(CLIPConfig.from_pretrained(clip_folder)).state_dict()
    del weights["ln_final.weight"]
    torch.save(weights, tmp_path / "hps.pt")
    with pytest.raises(ValueError, match=r"does not fit base .* lacks \['text_model.final_layer_norm.weight'\]"):
        HPS(str(tmp_path / "hps.pt"), str(clip_folder))
    with pytest.raises(ValueError, match=r"'blocks\.0\.norm' is no weight of open_clip's CLIP"):
        convert({"blocks.0.norm": torch.ones(1)})


# -- similarity -----------------------------------------------------------------------------------


def test_a_picture_is_most_like_itself_and_a_missing_one_is_masked(
    clip_folder: Path, pictures: Tensor, tmp_path: Path
) -> None:
    for i, pixels in enumerate(to_uint8(pictures)):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    reward = ImageSimilarity(str(clip_folder))
    itself = reward(pictures, [str(tmp_path / f"{i}.png") for i in range(6)])
    other = reward(pictures, [str(tmp_path / f"{(i + 1) % 6}.png") for i in range(6)])
    assert torch.allclose(itself, torch.ones(6), atol=1e-5)
    assert (other < itself - 1e-3).all()
    (tmp_path / "bad.png").write_text("no picture")
    some = reward(pictures[:3], [str(tmp_path / "0.png"), str(tmp_path / "absent.png"), str(tmp_path / "bad.png")])
    assert some.isnan().tolist() == [False, True, True]


# -- where the network lies -----------------------------------------------------------------------


class Wanderer(torch.nn.Module):
    """Notes where it is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.trips: list[str] = []

    def to(self, *where: object) -> "Wanderer":  # type: ignore[override]
        self.trips.append(str(where[0]))
        return self


def test_an_offloaded_network_is_on_the_card_only_while_it_is_used() -> None:
    network = Wanderer()
    placed = OnDevice(network, "meta", offload=True)
    with placed.use() as used:
        assert used is network
        assert network.trips == ["cpu", "meta"]
        assert not torch.is_grad_enabled()
    assert network.trips == ["cpu", "meta", "cpu"]
    with pytest.raises(KeyError), placed.use():
        raise KeyError
    assert network.trips[-1] == "cpu", "after an error too"
    stays = Wanderer()
    with OnDevice(stays, "meta").use():
        pass
    assert stays.trips == ["meta"]


def test_wrong_places_are_said() -> None:
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="device: 'gpu'.*write auto, cpu or cuda"):
        pick_device("gpu")
    with pytest.raises(ValueError, match=r"model: '\./here': no such folder, and a name on the hub reads OWNER/NAME"):
        Source("./here", "model")
    assert Source("owner/name", "model") == Source("owner/name", "clip"), "one network, whoever asks"
