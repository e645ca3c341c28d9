"""Rewards with a graph: the same numbers as without, whose gradient is their slope; whatever has none says so."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlflow.envs.prompt import PromptEnv
from rlflow.envs.prompts import Prompts
from rlflow.rewards.base import Reward, RewardSet
from rlflow.rewards.colour import brightness, redness
from rlflow.rewards.component import differentiable, make_reward
from rlflow.rewards.judges import cnn_judge, cnn_judge_soft, second_judge_soft
from tests.rewards.test_judges import draw

CAPTIONS = [
    "two red circles",
    "a blue square left of a green circle",
    "three yellow triangles",
    "a red square above a blue circle",
]


@differentiable
def contrast(images: Tensor, prompt: list[str], power: float = 2.0) -> Tensor:
    return images.std((1, 2, 3)) ** power


@differentiable
def lies(images: Tensor) -> Tensor:
    return brightness(images.detach())


def pictures(num: int = 4) -> Tensor:
    return torch.rand(num, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1


def graded(rewards: RewardSet, images: Tensor) -> tuple[Tensor, Tensor]:
    """(scores, gradient of their sum by the images)."""
    images = images.clone().requires_grad_()
    scores = rewards.graded({"images": images, "prompt": CAPTIONS, "group": torch.arange(4)}, 4)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    return scores.detach(), gradient


def test_the_weighted_sum_and_its_gradient() -> None:
    """Settings filled in; a reward of weight 0 need not have a gradient."""
    power = make_reward("contrast", {"contrast": {"name": f"{__name__}:contrast", "power": 3.0}}, trust_code=True)
    found = [Reward("brightness", brightness, 2.0), Reward("redness", redness, -1.0), Reward("contrast", power, 0.5)]
    rewards = RewardSet([*found, Reward("cnn_judge", cnn_judge, 0.0)])
    images = pictures()
    scores, gradient = graded(rewards, images)
    wanted = 2 * brightness(images) - redness(images) + 0.5 * images.std((1, 2, 3)) ** 3
    torch.testing.assert_close(scores, wanted)
    assert gradient[:, 0].mean() < gradient[:, 1].mean(), "less red"
    assert rewards.metrics() == {f"reward/{r.name}/{k}": 0 for r in rewards.rewards for k in ("masked_frac", "seconds")}


@pytest.mark.parametrize(
    ("rewards", "normalize", "reason"),
    [
        ([Reward("strict", cnn_judge)], "none", "reward 'strict' gives no gradient by the images: give it weight 0"),
        ([Reward("own", lambda images: brightness(images))], "none", "'own' gives no gradient.*@differentiable"),
        ([Reward("brightness", brightness)], "reward", "normalize='reward' compares a batch's scores.*use none"),
        ([Reward("lies", lies)], "none", "'lies' is declared differentiable and returned Tensor of shape .* a graph"),
    ],
)
def test_what_has_no_gradient_is_named(rewards: list[Reward], normalize: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        graded(RewardSet(rewards, normalize), pictures())


@pytest.mark.parametrize("fn", [brightness, redness, cnn_judge_soft, second_judge_soft])
def test_gradients_are_slopes(fn: Callable[..., Tensor]) -> None:
    images = pictures()
    rewards = RewardSet([Reward("it", fn)])
    _, gradient = graded(rewards, images)
    way = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    up, down = (graded(rewards, images + sign * 1e-2 * way)[0] for sign in (1, -1))
    torch.testing.assert_close((up - down) / 2e-2, (gradient * way).flatten(1).sum(1), rtol=0.05, atol=1e-4)


def test_the_soft_judge_prefers_what_the_strict_one_accepts() -> None:
    """Near 0 for a picture's own caption, lower for another's, on pictures of any size."""
    images, other = draw(CAPTIONS), [*CAPTIONS[1:], CAPTIONS[0]]
    own = cnn_judge_soft(images, CAPTIONS)
    assert cnn_judge(images, CAPTIONS).all()
    assert (own > -0.5).all()
    assert (own > cnn_judge_soft(images, other) + 1).all()
    turned = cnn_judge_soft(images, [c.replace("left of", "right of").replace("above", "below") for c in CAPTIONS])
    assert ((own - turned) > 1).tolist() == [" of " in c or " above " in c for c in CAPTIONS], "the relation counts"
    large = torch.nn.functional.interpolate(images, (64, 64)).requires_grad_()
    torch.testing.assert_close(cnn_judge_soft(large, CAPTIONS).detach(), own, rtol=0, atol=1e-3)
    assert cnn_judge_soft(large, CAPTIONS).requires_grad


def test_a_batch_of_prompts_judges_rows_by_their_own(tmp_path: Any) -> None:
    """PromptEnv.graded is what `recv` tells, with a graph through the decoder; rows in any order, repeats allowed."""
    prompts = Prompts(tuple({"prompt": c, "value": i} for i, c in enumerate(CAPTIONS)))

    @differentiable
    def shows(images: Tensor, value: list[int]) -> Tensor:
        return -(images.mean((1, 2, 3)) - torch.tensor(value, dtype=torch.float32)).abs()

    env = PromptEnv(
        prompts,
        RewardSet([Reward("shows", shows)]),
        4,
        (3, 2, 2),
        lambda texts: torch.zeros(len(texts), 1),
        lambda x: 2 * x,
    )
    env.reset(torch.arange(4))
    x = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(1), requires_grad=True)
    env.send(x, slice(0, 4))
    told = env.recv().reward
    rows = torch.tensor([2, 0, 2, 3])
    found = env.graded(x[rows], rows)
    torch.testing.assert_close(found.detach(), told[rows])
    (gradient,) = torch.autograd.grad(found[0], x)
    assert (gradient[2].abs() - 2 / 12).abs().max() < 1e-6
    assert (gradient[[0, 1, 3]] == 0).all()
