"""Videos before rewards: frames for those that read them, a mean over stated ones for rewards of images."""

import pytest
import torch
from torch import Tensor

from rlflow.rewards.base import Elsewhere, Reward, RewardSet
from rlflow.rewards.colour import brightness
from rlflow.rewards.component import differentiable, make_reward
from rlflow.rewards.frames import OverFramesElsewhere, frame_ids, made_columns, of_videos
from rlflow.rewards.judges import base_distance, diversity
from rlflow.rewards.remote.wire import Batch, pack, unpack
from rlflow.rewards.scorer import RewardScorer
from rlflow.rewards.scores import SomeRows

NUM, FRAMES = 6, 9


@pytest.fixture
def videos() -> Tensor:
    return torch.rand(NUM, FRAMES, 3, 4, 6)


def score(fn: object, videos: Tensor, which: int | list[int] = 4, **columns: object) -> Tensor:
    rewards = RewardSet([of_videos(Reward("r", fn), which, FRAMES)])  # type: ignore[arg-type]
    return rewards.compute({"frames": videos, **columns}, len(videos))["r"]


def test_the_frames_are_the_middles_of_equal_parts_or_those_that_are_named() -> None:
    assert frame_ids(1, 81) == [40]
    assert frame_ids(4, 81) == [10, 30, 50, 70]
    assert frame_ids(3, 2) == [0, 1], "no more than there are"
    assert frame_ids([0, -1, 5], 9) == [0, 8, 5]
    for which, why in (
        (0, "names no frame"),
        ([], "names no frame"),
        ([9], "9 is no frame of 9"),
        ([-10], "-10 is no"),
    ):
        with pytest.raises(ValueError, match=why):
            frame_ids(which, 9)


@pytest.mark.parametrize("which", [1, 4, [0, -1]])
def test_a_reward_of_images_is_its_mean_over_them(which: int | list[int], videos: Tensor) -> None:
    by_hand = torch.stack([brightness(videos[:, i]) for i in frame_ids(which, FRAMES)]).mean(0)
    torch.testing.assert_close(score(brightness, videos, which), by_hand)
    assert (
        score(brightness, videos, which) - brightness(videos.flatten(0, 1)).view(NUM, -1).mean(1)
    ).abs().max() > 1e-3


def test_columns_stand_beside_every_frame(videos: Tensor) -> None:
    """A judge that compares a group's images compares frames of one moment; the base's frames are of it too."""
    group, base = torch.tensor([0, 0, 0, 1, 1, 1]), torch.rand_like(videos)
    by_hand = torch.stack([diversity(videos[:, i], group) for i in (0, 4)]).mean(0)
    torch.testing.assert_close(score(diversity, videos, [0, 4], group=group), by_hand)
    by_hand = torch.stack([base_distance(videos[:, i], base[:, i]) for i in (0, 4)]).mean(0)
    torch.testing.assert_close(score(base_distance, videos, [0, 4], base_frames=base), by_hand)


def motion(frames: Tensor, prompt: list[str]) -> Tensor:
    return (frames[:, 1:] - frames[:, :-1]).abs().mean((1, 2, 3, 4))


def test_a_reward_of_videos_gets_all_frames(videos: Tensor) -> None:
    torch.testing.assert_close(score(motion, videos, prompt=["a"] * NUM), motion(videos, []))


def test_one_that_reads_no_images_is_left_alone_and_so_is_every_reward_of_pictures() -> None:
    plain, moves = Reward("r", brightness), Reward("m", motion)
    assert of_videos(plain, 4, None) is plain
    assert of_videos(moves, 4, FRAMES) is moves
    with pytest.raises(ValueError, match="reads column 'frames', known: .*'images'"):
        RewardSet([moves]).check_columns(["images", "prompt", "group"])


def test_a_row_without_a_score_in_one_frame_has_none(videos: Tensor) -> None:
    def some(images: Tensor) -> list[float | None]:
        return [None if image.mean() == 0 else 1.0 for image in images]

    videos[2, 4] = 0
    assert score(some, videos, [0, 4]).isnan().tolist() == [False, False, True, False, False, False]
    assert not score(some, videos, [0]).isnan().any()
    videos[1, 7] = torch.nan
    assert score(brightness, videos, [0]).isnan().tolist() == [False, True] + [False] * 4, "a broken frame is no video"


def test_why_some_rows_have_none_is_passed_on(videos: Tensor) -> None:
    def half(images: Tensor) -> Tensor:
        raise SomeRows(torch.tensor([1.0, torch.nan] * 3), "one server is down")

    rewards = RewardSet([of_videos(Reward("r", half), 2, FRAMES)])
    found = rewards.compute({"frames": videos}, NUM)["r"]
    assert found.isnan().tolist() == [False, True] * 3
    assert rewards.last_error["r"] == "one server is down"


def test_gradients_reach_the_frames_that_were_seen(videos: Tensor) -> None:
    reward = of_videos(Reward("r", brightness), [0, 4], FRAMES)
    videos.requires_grad_()
    total = RewardSet([reward]).graded({"frames": videos}, NUM)
    (found,) = torch.autograd.grad(total.sum(), videos)
    assert found[:, [0, 4]].flatten(2).sum(2) == pytest.approx(torch.full((NUM, 2), 0.5))
    assert found[:, [1, 2, 3, 5, 6, 7, 8]].abs().max() == 0
    with pytest.raises(ValueError, match="'r' gives no gradient"):
        RewardSet([of_videos(Reward("r", diversity), 2, FRAMES)]).check_graded()

    @differentiable
    def cut(images: Tensor) -> Tensor:
        return images.detach().mean((1, 2, 3))

    with pytest.raises(ValueError, match="without a graph"):
        RewardSet([of_videos(Reward("r", cut), 2, FRAMES)]).graded({"frames": videos}, NUM)


def test_a_reward_of_another_machine_stays_one(videos: Tensor) -> None:
    class Far(Elsewhere):
        def __call__(self, images: Tensor) -> Tensor:
            return images.mean((1, 2, 3))

    made = of_videos(Reward("r", Far()), 2, FRAMES)
    assert isinstance(made.fn, OverFramesElsewhere)
    torch.testing.assert_close(score(Far(), videos, 2), score(brightness, videos, 2))


def test_frames_go_over_the_wire_as_eight_bits(videos: Tensor) -> None:
    batch = unpack(pack(Batch("a", NUM, {"frames": videos, "prompt": ["x"] * NUM})))
    assert batch.columns["frames"].shape == videos.shape
    assert (batch.columns["frames"] - videos).abs().max() <= 0.5 / 255 + 1e-6
    with pytest.raises(ValueError, match=r"'frames' is not \(N, F, 3, H, W\) of 8 bits"):
        unpack(pack(Batch("a", NUM, {"frames": videos[:, 0]})))


def test_the_best_of_several_videos(videos: Tensor) -> None:
    scorer = RewardScorer(of_videos(Reward("r", brightness), 2, FRAMES), ["prompt"], videos=True)
    found = scorer(videos.view(2, 3, *videos.shape[1:]), {"prompt": ["a", "b"]})
    torch.testing.assert_close(found.flatten(), score(brightness, videos, 2))


def test_a_rank_is_of_frames_of_one_moment(videos: Tensor) -> None:
    ranked = make_reward("group_rank", {"group_rank": {"of": "brightness"}})
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    by_hand = torch.stack([ranked(images=videos[:, i], group=group) for i in (0, 4)]).mean(0)
    torch.testing.assert_close(score(ranked, videos, [0, 4], group=group), by_hand)


def test_what_was_made_has_a_name_by_its_shape(videos: Tensor) -> None:
    assert set(made_columns(videos)) == {"frames"}
    assert set(made_columns(videos[:, 0], videos[:, 1])) == {"images", "base_images"}
