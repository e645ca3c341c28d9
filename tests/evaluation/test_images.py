"""Evaluation: the same prompts and noise every time, exactly `num` samples, and no trace left in the training."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlflow.assembly.environment import heldout_prompts
from rlflow.assembly.parts import make_parts
from rlflow.assembly.policy import make_policy
from rlflow.config import recipes
from rlflow.envs.prompts import Prompts, load_prompts
from rlflow.evaluation.images import Evaluation, Evaluator, evenly
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.select import BestOf
from rlflow.flow.solvers import Heun
from rlflow.rewards.base import Reward, RewardSet
from rlflow.rewards.judges import base_distance
from rlflow.rewards.scorer import RewardScorer
from rlflow.train.checkpoint import Checkpoints
from rlflow.train.trainer import Trainer


def brightness(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


def table(num: int) -> Prompts:
    return Prompts(tuple({"prompt": text} for text in load_prompts("scenes:pair").take(range(num))["prompt"]))


@pytest.fixture
def policy(tiny: list[str], scenes_field: str) -> FlowPolicy:
    overrides = [*tiny, f"policy.field={scenes_field}", "train.minutes=", "train.iterations=1", "policy.num_steps=4"]
    made = make_policy(recipes.load("t2i_flow_grpo", overrides))
    made.weights.snapshot("ema")
    return made


def make(policy: FlowPolicy, num: int = 10, prompts: Prompts | None = None, **more) -> Evaluator:
    judges = RewardSet([Reward("bright", brightness), Reward("base_distance", base_distance)])
    return Evaluator(policy, prompts or table(4), judges, num=num, **more)


@pytest.mark.parametrize("num", [1, 3, 4, 7, 10, 24])
def test_every_prompt_as_often_as_any_other(num: int) -> None:
    """Exactly `num` rows, give or take one of each; spread over the table where it is longer."""
    rows = evenly(table(6), num)
    counts = torch.bincount(torch.tensor(rows), minlength=6)
    assert len(rows) == num
    assert counts.max() - counts.min() <= 1
    if num < 6:
        assert len(set(rows)) == num


def test_the_same_images_every_time_and_for_every_batch_size(policy: FlowPolicy) -> None:
    evaluate = make(policy)
    torch.rand(3)
    assert torch.equal(evaluate.images(), evaluate.images())
    for rows_per_call in (1, 3, 7):
        torch.testing.assert_close(make(policy, rows_per_call=rows_per_call).images(), evaluate.images())
    assert not torch.equal(make(policy, seed=1).images(), evaluate.images())


def test_more_samples_begin_with_the_same_ones(policy: FlowPolicy) -> None:
    """Noise belongs to the row: a longer evaluation extends a shorter one."""
    torch.testing.assert_close(make(policy, 12).images()[:8], make(policy, 8).images())


def test_exactly_num_scores_each_of_its_own_row(policy: FlowPolicy) -> None:
    """No padding is counted: the scores are those of the images one by one."""
    result = make(policy, 7, rows_per_call=3)()
    assert {n: len(s) for n, s in result.scores.items()} == {"bright": 7, "base_distance": 7}
    torch.testing.assert_close(result.scores["bright"], brightness(result.images))
    assert result.caption_id.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert [result.captions[i] for i in (0, 4)] == [result.captions[0]] * 2


def test_no_noise_after_the_first_draw(policy: FlowPolicy, tiny: list[str], scenes_field: str) -> None:
    """The deployment sampler: which kernel trained does not matter."""
    overrides = [*tiny, f"policy.field={scenes_field}", "train.minutes=", "train.iterations=1", "policy.num_steps=4"]
    other = make_policy(recipes.load("t2i_flow_grpo", [*overrides, "policy.kernel={name: cps, eta: 0.5}"]))
    assert torch.equal(make(policy).images(), make(other).images())


def test_weights_are_swapped_in_and_out(policy: FlowPolicy) -> None:
    """`ema` evaluates the averaged weights; the live ones come back, also when a judge fails."""
    evaluate = make(policy)
    before = evaluate("live").images
    with torch.no_grad():
        for parameter in policy.weights.parameters().values():
            parameter.add_(0.1)
    live = [p.clone() for p in policy.parameters()]
    assert torch.equal(evaluate("ema").images, before)
    assert not torch.equal(evaluate("live").images, before)
    evaluate.prompts = evaluate.columns = None  # type: ignore[assignment]
    with pytest.raises(AttributeError):
        evaluate("ema")
    assert all(torch.equal(a, b) for a, b in zip(live, policy.parameters(), strict=True))


def test_the_distance_is_to_the_first_evaluation(policy: FlowPolicy) -> None:
    """0 for an unchanged policy, the RMS pixel difference afterwards."""
    evaluate = make(policy)
    first = evaluate()
    assert first.scores["base_distance"].abs().max() == 0
    with torch.no_grad():
        policy.field.patch_out.bias.add_(0.3)
    second = evaluate()
    expected = (second.images - first.images).square().mean((1, 2, 3)).sqrt()
    assert expected.min() > 0
    torch.testing.assert_close(second.scores["base_distance"], expected)


def test_other_steps_and_solver_for_evaluation_only(policy: FlowPolicy) -> None:
    """The policy's own sampler is as before, and the calls are those of the evaluation's."""
    before = policy.network_rows
    make(policy, 4, num_steps=3, solver=Heun()).images()
    assert policy.network_rows - before == 4 * 2 * 3
    assert type(policy.solver).__name__ == "Euler"
    assert policy.num_steps == 4


def test_network_calls_of_a_picture_are_told(policy: FlowPolicy) -> None:
    """Every sample that is chosen from counts; the other policy that pictures are compared with does not."""
    evaluate = make(policy, num=3, rows_per_call=2)
    evaluate.compare_with(policy)
    assert evaluate().means()["calls"] == 4
    assert make(policy, num=3, num_steps=3, solver=Heun())().means()["calls"] == 6
    several = BestOf(2, lambda made, asked: made.flatten(2).mean(2))
    assert make(policy, num=3, select=several)().means()["calls"] == 8


def test_the_best_of_several_is_as_good_as_its_scorer_says(policy: FlowPolicy) -> None:
    """N times the network rows, whatever the batch; a row's score never below that of its plain sample."""
    prompts = table(3)
    plain, before = make(policy, 5, prompts), policy.network_rows
    single = plain().scores["bright"]
    spent = policy.network_rows - before
    scorer = RewardScorer(Reward("bright", brightness))
    images = {}
    for rows_per_call in (1, 100):
        before = policy.network_rows
        evaluate = make(policy, 5, prompts, select=BestOf(4, scorer), rows_per_call=rows_per_call)
        images[rows_per_call] = evaluate.images()
        assert policy.network_rows - before == 4 * spent
    torch.testing.assert_close(images[1], images[100])
    best = brightness(images[100])
    assert bool((best > single - 1e-6).all())
    assert float(best.mean()) > float(single.mean())


def test_a_scorer_is_asked_with_its_rows_of_the_prompt_table() -> None:
    """Every column, repeated for the samples of a row, which are a group."""
    seen = {}

    def score(images: Tensor, prompt: list[str], group: Tensor, wanted: list[float]) -> Tensor:
        seen.update(prompt=prompt, group=group.tolist())
        return -(images.mean((1, 2, 3)) - torch.tensor(wanted)).abs()

    with pytest.raises(ValueError, match="'score' reads column 'wanted'"):
        RewardScorer(Reward("score", score), ["prompt"])
    scorer = RewardScorer(Reward("score", score), ["prompt", "wanted"])
    levels = torch.tensor([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5]])
    images = levels[..., None, None, None].expand(2, 3, 3, 4, 4)
    scores = scorer(images, {"prompt": ["dark", "light"], "wanted": [0.0, 1.0]})
    assert seen == {"prompt": ["dark"] * 3 + ["light"] * 3, "group": [0, 0, 0, 1, 1, 1]}
    assert scores.argmax(1).tolist() == [0, 1]


def test_scores_come_back_from_disk(policy: FlowPolicy, tmp_path: Path) -> None:
    result = make(policy)()
    result.save(tmp_path / "scores.safetensors")
    loaded = load_file(tmp_path / "scores.safetensors")
    assert set(loaded) == {"bright", "base_distance", "caption_id", "key"}
    assert torch.equal(loaded["bright"], result.scores["bright"])


def test_a_mean_leaves_out_what_has_no_score() -> None:
    scores = {"a": torch.tensor([1.0, torch.nan, 0.0]), "none": torch.full((3,), torch.nan)}
    means = Evaluation(scores, torch.zeros(3, 3, 2, 2), ["x"] * 3, torch.zeros(3).long()).means()
    assert means["a"] == 0.5
    assert means["none"] != means["none"]


def test_a_judge_that_reads_an_unknown_column_is_refused(policy: FlowPolicy) -> None:
    def judge(images: Tensor, txet: list[str]) -> Tensor:
        return images.mean((1, 2, 3))

    with pytest.raises(ValueError, match="'judge' reads column 'txet'"):
        Evaluator(policy, table(2), RewardSet([Reward("judge", judge)]))


def test_held_out_prompts_are_never_trained_on() -> None:
    """Of any recipe; each pair of files once."""
    of_images = [
        name for name in recipes.names() if recipes.read(name).get("env", {}).get("name", "prompt") == "prompt"
    ]
    configs = [recipes.load(name) for name in of_images]
    for config in {(config.env.prompts, config.eval.prompts): config for config in configs}.values():
        rows = load_prompts(config.env.prompts, "train")
        train = set(rows.take(range(len(rows)))["prompt"])
        held_out = heldout_prompts(config)
        assert train.isdisjoint(held_out.take(range(len(held_out)))["prompt"]), config.env.prompts


def test_evaluating_does_not_touch_the_training(tmp_path: Path, trainer: Callable[..., Trainer]) -> None:
    """With and without evaluations in between, of the best of two too: the same weights, bit for bit."""
    best = "policy.select={name: best_of, num: 2, scorer: brightness}"
    for name, more in (("a", ["eval.every=0"]), ("b", ["eval.every=1", best])):
        trainer(tmp_path / name, "train.iterations=3", *more).fit()
    a, b = (Checkpoints(tmp_path / name).load("last")[1] for name in ("a", "b"))
    for part in ("policy", "weight_sets"):
        assert all(torch.equal(value, b[part][name]) for name, value in a[part].items())


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("kind", ["embedded", "sd3"])
def test_pictures_are_float32_from_0_to_1(
    kind: str, precision: str, tiny: list[str], scenes_field: str, tiny_pipeline: Callable
) -> None:
    """Those that rewards are given in training, those that judges are given, and those of an Evaluation."""
    checkpoint = f"{{name: pretrained, checkpoint: {tiny_pipeline('sd3')}, lora: 2, resolution: 32}}"
    field = {"embedded": scenes_field, "sd3": checkpoint}[kind]
    overrides = [*tiny, f"policy.field={field}", "train.minutes=", "train.iterations=1", "policy.num_steps=4"]
    parts = make_parts(
        recipes.load("t2i_flow_grpo", [*overrides, "policy.frozen=null", f"policy.precision={precision}"])
    )
    given: list[Tensor] = []

    def seen(images: Tensor) -> Tensor:
        given.append(images)
        return images.mean((1, 2, 3))

    def compared(images: Tensor, base_images: Tensor) -> Tensor:
        given.extend((images, base_images))
        return images.mean((1, 2, 3))

    parts.collector.env.rewards = RewardSet([Reward("seen", seen)])
    parts.collector.collect(0)
    made = Evaluator(parts.policy, table(4), RewardSet([Reward("compared", compared)]), num=4)()
    assert len(given) == 3
    for images in (*given, made.images):
        assert images.dtype == torch.float32
        assert images.shape[1:] == ((3, 16, 16) if kind == "embedded" else (3, 32, 32))
        assert 0 <= images.min() < images.max() <= 1
