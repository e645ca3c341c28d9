"""Masking, weights, normalisation and bookkeeping of RewardSet."""

import logging
import threading
import time
from array import array
from fractions import Fraction

import numpy as np
import pytest
import torch

from rlflow.rewards.base import Elsewhere, Reward, RewardSet, column_names, standardise, to_uint8
from rlflow.rewards.scores import SomeRows

NAN = float("nan")
INF = float("inf")


def reward(name, fn, **options):
    return Reward(name, fn, **options)


def constant(values):
    return lambda prompt: values


def raises(prompt):
    raise ValueError("no such thing")


def exits(prompt):
    raise SystemExit(3)


def sleeps(prompt):
    time.sleep(0.5)
    return [1.0] * len(prompt)


PROMPTS = {"prompt": ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ([1.0, None, 3.0], [1.0, NAN, 3.0]),
        (np.array([1.0, NAN, 3.0]), [1.0, NAN, 3.0]),
        (torch.tensor([1.0, INF, -INF]), [1.0, NAN, NAN]),
        (torch.tensor([True, False, True]), [1.0, 0.0, 1.0]),
        (torch.tensor([1, 2, 3]), [1.0, 2.0, 3.0]),
        (None, [NAN] * 3),
    ],
)
def test_none_nan_and_inf_are_masked_and_never_zero(returned, expected):
    rewards = RewardSet([reward("r", constant(returned))])
    scores = rewards.compute(PROMPTS, 3)["r"]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor(expected), equal_nan=True)
    assert rewards.masked["r"] == int(torch.tensor(expected).isnan().sum())
    assert rewards.errors["r"] == 0


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (raises, "no such thing"),
        (exits, "SystemExit"),
        (sleeps, "0.05 s"),
        (constant([1.0, 2.0]), "(2,)"),
        (constant([1.0] * 4), "(4,)"),
        (constant(torch.ones(3, 1)), "(3, 1)"),
    ],
)
def test_a_failed_call_masks_the_whole_batch_of_that_reward_only(fn, message):
    limit = 0.05 if fn is sleeps else 60.0
    rewards = RewardSet([reward("bad", fn, timeout_s=limit), reward("good", constant([1.0, 2.0, 3.0]))])
    scores = rewards.compute(PROMPTS, 3)
    assert scores["bad"].isnan().all()
    assert scores["good"].tolist() == [1.0, 2.0, 3.0]
    assert rewards.errors == {"bad": 1, "good": 0}
    assert rewards.masked == {"bad": 3, "good": 0}
    assert message in rewards.last_error["bad"]


@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: SomeRows(value, "some")], ids=["whole", "some"])
@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ({1.0: "a", 2.0: "b", 3.0: "c"}, "dict"),
        ({"a": [1.0, 2.0, 3.0]}, "dict"),
        ({1.0, 2.0, 3.0}, "set"),
        (b"123", "bytes"),
        (bytearray(b"123"), "bytearray"),
        (memoryview(b"123"), "memoryview"),
        ("123", "str '123'"),
        (["1", "2", "3"], "list of shape (3,), whose element 0 is str '1'"),
        ([1.0, "2", 3.0], "element 1 is str '2'"),
        ([1.0, 2.0, 3j], "element 2 is complex 3j"),
        (torch.ones(3, dtype=torch.complex64), "Tensor of shape (3,) and complex64"),
        (np.ones(3, complex), "ndarray of shape (3,) and complex128"),
        (np.array(["1", "2", "3"]), "ndarray of shape (3,) and <U1"),
        (np.array([b"1", b"2", b"3"]), "ndarray of shape (3,) and |S1"),
        (np.array([1, 2, 3], "datetime64[s]"), "datetime64"),
        (np.array([1, "2", None], object), "element 1 is str '2'"),
        (torch.ones(3).to_sparse(), "Tensor of shape (3,)"),
        (([1.0, 2.0, 3.0], {"n": 1}), "tuple of shape (2,), whose element 0 is list of shape (3,)"),
        (([1.0], [2.0], [3.0]), "tuple of shape (3, 1)"),
        ([[1.0]] * 3, "list of shape (3, 1)"),
        ([torch.ones(1)] * 3, "list of shape (3, 1), whose element 0 is Tensor of shape (1,)"),
        (np.ones((3, 1)), "ndarray of shape (3, 1)"),
        (torch.ones(1, 3), "Tensor of shape (1, 3)"),
        (1.0, "float 1.0"),
        (iter([1.0, 2.0, 3.0]), "list_iterator"),
        ([1.0, 2.0], "list of shape (2,)"),
    ],
)
def test_what_is_not_one_real_number_a_row_is_masked_and_named(returned, said, wrap):
    def fn(prompt):
        if isinstance(value := wrap(returned), SomeRows):
            raise value
        return value

    rewards = RewardSet([reward("bad", fn), reward("good", constant([1.0, 2.0, 3.0]))])
    scores = rewards.compute(PROMPTS, 3)
    assert scores["bad"].isnan().all()
    assert scores["good"].tolist() == [1.0, 2.0, 3.0]
    assert said in rewards.last_error["bad"]
    assert rewards.last_error["bad"].endswith("for 3 rows, must be real numbers or None in shape (3,)")


@pytest.mark.parametrize(
    "returned",
    [
        (1, 2.0, True),
        range(1, 4),
        [torch.tensor(1.0), np.float32(2), np.array(3)],
        [Fraction(1), np.int8(2), np.bool_(True)],
        np.array([1, None, 3], object),
        np.array([1, 2, 3], np.uint16),
        np.array([1, 2, 3], np.float16)[::-1],
        torch.tensor([1, 2, 3], dtype=torch.bfloat16, requires_grad=False),
        array("d", [1, 2, 3]),
    ],
)
def test_real_arrays_and_sequences_of_numbers_are_scores(returned):
    rewards = RewardSet([reward("r", constant(returned))])
    expected = [NAN if v is None else float(v) for v in returned]
    torch.testing.assert_close(rewards.compute(PROMPTS, 3)["r"], torch.tensor(expected), equal_nan=True)
    assert rewards.errors["r"] == 0


def through_numpy(images):
    pixels = images.numpy()
    pixels *= 255


def through_data(images):
    images.data.clamp_(0.4, 0.6)


@pytest.mark.parametrize("change", [through_numpy, through_data, lambda images: images[:, 0].mul_(2)])
def test_a_reward_that_changes_images_in_place_is_named_and_reaches_no_other(change, caplog):
    def changes(images):
        change(images)
        return [5.0] * len(images)

    def mean(images):
        return images.mean((1, 2, 3))

    rewards = RewardSet([reward("before", mean), reward("changes", changes), reward("after", mean)])
    images = torch.rand(3, 3, 4, 4)
    first = rewards.compute({"images": images.clone()}, 3)
    assert all(scores.isnan().all() for scores in first.values()), "who saw what cannot be told"
    assert rewards.masked == dict.fromkeys(first, 3)
    assert rewards.errors == {"before": 0, "changes": 1, "after": 0}
    assert "it changes images in place" in rewards.last_error["changes"]
    given = images.clone()
    second = rewards.compute({"images": given}, 3)
    assert torch.equal(given, images), "from now on it has copies of its own"
    assert torch.equal(second["after"], mean(images))
    assert torch.equal(second["before"], mean(images))
    assert second["changes"].tolist() == [5.0] * 3


def test_nothing_is_copied_for_a_reward_that_changes_nothing():
    images, seen = torch.rand(3, 3, 4, 4), []
    rewards = RewardSet([reward("r", lambda images, group: seen.extend([images, group]))])
    rewards.compute({"images": images, "group": torch.arange(3)}, 3)
    assert seen[0] is images


def test_a_list_is_each_rewards_own():
    def changes(prompt):
        prompt.reverse()
        prompt[0][0] = "x"
        return [1.0] * 3

    rewards = RewardSet([reward("a", changes), reward("b", lambda prompt: [float(p[0]) for p in prompt])])
    assert rewards.compute({"prompt": [["1"], ["2"], ["3"]]}, 3)["b"].tolist() == [1.0, 2.0, 3.0]


def test_a_distinct_error_is_logged_once(caplog):
    numbers = iter(range(10))

    def fails(prompt):
        raise RuntimeError(f"connection {next(numbers)} refused")

    rewards = RewardSet([reward("far", fails)])
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            rewards.compute(PROMPTS, 3)
    assert len(caplog.records) == 1
    assert "'far'" in caplog.text
    assert "connection 0 refused" in caplog.text


def test_a_late_answer_is_never_given_to_a_later_batch():
    release = threading.Event()
    batches = []

    def slow_once(prompt):
        batches.append(prompt)
        if len(batches) == 1:
            release.wait(30)
            return [111.0] * len(prompt)
        return [float(len(batches))] * len(prompt)

    rewards = RewardSet([reward("r", slow_once, timeout_s=0.5)])
    assert rewards.compute(PROMPTS, 3)["r"].isnan().all()
    second = rewards.compute(PROMPTS, 3)["r"]
    release.set()
    time.sleep(0.05)
    third = rewards.compute(PROMPTS, 3)["r"]
    assert second.tolist() == [2.0] * 3
    assert third.tolist() == [3.0] * 3


def test_a_function_reads_the_columns_its_signature_names():
    seen = {}

    def fn(prompt, text, scale=2.0):
        seen.update(prompt=prompt, text=text, scale=scale)
        return [0.0] * len(prompt)

    assert column_names(fn) == ("prompt", "text")
    rewards = RewardSet([reward("r", fn)])
    assert rewards.columns == ("prompt", "text")
    rewards.compute(PROMPTS | {"text": ["x", "y", "z"], "scale": [9.0] * 3, "other": [1] * 3}, 3)
    assert seen == {"prompt": ["a", "b", "c"], "text": ["x", "y", "z"], "scale": 2.0}


def test_an_unknown_column_is_an_error_that_names_the_nearest():
    rewards = RewardSet([reward("r", lambda promt: promt)])
    with pytest.raises(ValueError, match=r"'r' reads column 'promt'.*did you mean 'prompt'"):
        rewards.check_columns(["images", "prompt"])
    with pytest.raises(ValueError, match="promt"):
        rewards.compute(PROMPTS, 3)


@pytest.mark.parametrize("fn", [lambda *columns: 0, lambda **columns: 0, lambda: 0, lambda prompt, /: 0])
def test_a_signature_that_names_no_columns_is_refused(fn):
    with pytest.raises(ValueError, match=r"names no column|reads no column"):
        reward("r", fn)


@pytest.mark.parametrize(
    "options",
    [
        *({"weight": NAN}, {"weight": INF}, {"name": "a/b"}),
        *({"timeout_s": seconds} for seconds in (0.0, NAN, -1.0, -INF, 1e-300, 1e300)),
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=r"weight|timeout_s|letters"):
        Reward(**({"name": "r", "fn": constant([1.0])} | options))


def test_bad_sets_are_refused():
    one = reward("r", constant([1.0]))
    with pytest.raises(ValueError, match="twice"):
        RewardSet([one, one])
    with pytest.raises(ValueError, match="at least one"):
        RewardSet([])
    with pytest.raises(ValueError, match="normalize"):
        RewardSet([one], normalize="advantages")
    with pytest.raises(ValueError, match="weight 0"):
        RewardSet([reward("r", constant([1.0]), weight=0.0)]).total({"r": torch.ones(1)})


def test_total_is_the_weighted_sum_and_a_missing_part_invalidates_its_row():
    names = {"plus": 2.0, "minus": -1.0, "logged": 0.0}
    rewards = RewardSet([reward(n, constant(None), weight=w) for n, w in names.items()])
    scores = {
        "plus": torch.tensor([1.0, NAN, 1.0, 4.0]),
        "minus": torch.tensor([1.0, 1.0, NAN, 3.0]),
        "logged": torch.tensor([NAN, 1.0, 1.0, NAN]),
    }
    total, valid = rewards.total(scores)
    assert valid.tolist() == [True, False, False, True]
    torch.testing.assert_close(total, torch.tensor([1.0, NAN, NAN, 5.0]), equal_nan=True)


def _two(normalize):
    return RewardSet([reward("a", constant(None), weight=0.5), reward("b", constant(None), weight=2.0)], normalize)


def test_reward_normalisation_is_invariant_to_affine_maps_of_one_reward():
    a, b = torch.randn(50), torch.rand(50)
    a[3], b[7] = NAN, NAN
    rewards = _two("reward")
    total, valid = rewards.total({"a": a, "b": b})
    mapped, _ = rewards.total({"a": a, "b": 250 * b - 40})
    torch.testing.assert_close(total, mapped, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert valid.sum() == 48
    raw, _ = _two("none").total({"a": a, "b": b})
    raw_mapped, _ = _two("none").total({"a": a, "b": 250 * b - 40})
    assert (raw - raw_mapped)[valid].abs().max() > 1


def test_standardised_scores_have_mean_zero_and_std_one_over_the_entries_that_exist():
    scores = torch.tensor([1.0, NAN, 5.0, 9.0])
    z = standardise(scores)
    assert z.isnan().tolist() == [False, True, False, False]
    kept = z[~z.isnan()]
    assert kept.mean().abs() < 1e-6
    assert (kept.std(correction=0) - 1).abs() < 1e-6
    assert standardise(torch.full((5,), 0.1)).tolist() == [0.0] * 5
    assert standardise(torch.full((2,), NAN)).isnan().all()


def test_a_part_normalised_by_its_population_equals_that_part_of_the_whole():
    rewards = _two("reward")
    scores = {"a": torch.randn(40), "b": torch.rand(40)}
    whole, _ = rewards.total(scores)
    part, _ = rewards.total({n: s[10:20] for n, s in scores.items()}, population=scores)
    torch.testing.assert_close(part, whole[10:20])


def test_advantage_normalisation_leaves_the_scores_to_the_learner():
    scores = {"a": torch.randn(6), "b": torch.rand(6)}
    assert torch.equal(_two("advantage").total(scores)[0], _two("none").total(scores)[0])
    combined, valid = _two("advantage").combine({n: standardise(s) for n, s in scores.items()})
    torch.testing.assert_close(combined, _two("reward").total(scores)[0])
    assert valid.all()


def test_permuting_rows_permutes_scores():
    images = torch.rand(6, 3, 4, 4)
    prompts = ["red", "blue", "red", "red", "blue", "red"]  # duplicates on purpose

    def channel_of_prompt(images, prompt):
        return [float(image[0 if p == "red" else 2].mean()) for image, p in zip(images, prompt, strict=True)]

    rewards = RewardSet([reward("r", channel_of_prompt)])
    plain = rewards.compute({"images": images, "prompt": prompts}, 6)["r"]
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    shuffled = rewards.compute({"images": images[order], "prompt": [prompts[i] for i in order]}, 6)["r"]
    assert torch.equal(shuffled, plain[order])
    assert len(plain.unique()) == 6


def test_a_row_whose_image_is_not_finite_has_no_score():
    images = torch.rand(3, 3, 4, 4)
    images[1, 0, 0, 0] = NAN
    rewards = RewardSet([reward("r", lambda images: torch.ones(len(images)))])
    assert rewards.compute({"images": images}, 3)["r"].isnan().tolist() == [False, True, False]


def test_functions_run_without_gradients_in_the_thread_that_serves_them():
    def fn(images):
        assert not torch.is_grad_enabled()
        return images.mean((1, 2, 3))

    rewards = RewardSet([reward("r", fn), reward("s", fn, timeout_s=INF)])
    scores = rewards.compute({"images": torch.rand(3, 3, 4, 4, requires_grad=True)}, 3)
    assert not any(s.isnan().any() or s.requires_grad for s in scores.values())


def test_metrics_cover_what_happened_since_the_last_call():
    rewards = RewardSet([reward("r", constant([1.0, None, 3.0])), reward("bad", raises, weight=0.0)])
    for _ in range(2):
        rewards.total(rewards.compute(PROMPTS, 3))
    metrics = rewards.metrics()
    assert metrics["reward/r/mean"] == 2.0
    assert metrics["reward/r/std"] == 1.0
    assert metrics["reward/r/masked_frac"] == pytest.approx(1 / 3)
    assert metrics["reward/r/seconds"] > 0
    assert metrics["reward/bad/masked_frac"] == 1.0
    assert metrics["reward/bad/errors"] == 2.0
    assert "reward/bad/mean" not in metrics  # the mean of nothing is not zero
    assert metrics["reward/masked_frac"] == pytest.approx(1 / 3)
    rewards.compute({"prompt": []}, 0)
    assert "reward/r/mean" not in rewards.metrics()
    assert rewards.masked["r"] == 2 + 0


def test_to_uint8_rounds_clips_and_moves_channels_last():
    images = torch.tensor([-1.0, 0.0, 0.5, 2.0, NAN, 1.0]).view(1, 3, 2, 1).to(torch.float64)
    pixels = to_uint8(images)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (1, 2, 1, 3)
    assert pixels[0, :, 0].T.ravel().tolist() == [0, 0, 128, 255, 0, 255]


class Waits(Elsewhere):
    """Answers only once the reward beside it was called."""

    def __init__(self, beside: threading.Event, seconds: float = 20.0) -> None:
        self.beside, self.seconds = beside, seconds

    def __call__(self, prompt: list[str]) -> list[float]:
        return [1.0 if self.beside.wait(self.seconds) else 0.0] * len(prompt)


def test_rewards_elsewhere_are_asked_first_and_the_others_computed_meanwhile():
    """Whichever comes first in the table; two of them at once."""
    called = threading.Event()

    def here(prompt):
        called.set()
        return [2.0] * len(prompt)

    rewards = RewardSet([Reward("a", Waits(called)), Reward("b", here), Reward("c", Waits(called))])
    scores = rewards.compute({"prompt": ["x", "y"]}, 2)
    assert list(scores) == ["a", "b", "c"]
    assert {n: s.tolist() for n, s in scores.items()} == {"a": [1.0, 1.0], "b": [2.0, 2.0], "c": [1.0, 1.0]}


def test_a_late_reward_elsewhere_masks_its_own_rows_alone():
    rewards = RewardSet(
        [Reward("late", Waits(threading.Event(), 5.0), timeout_s=0.05), Reward("b", lambda prompt: [2.0] * len(prompt))]
    )
    scores = rewards.compute({"prompt": ["x"]}, 1)
    assert scores["late"].isnan().all()
    assert scores["b"].tolist() == [2.0]
    assert "no answer within" in rewards.last_error["late"]
