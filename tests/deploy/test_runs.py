"""Runs and checkpoints opened again: the weights asked for, the same images, judged by what they were trained for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rlflow as rf
from rlflow.assembly.evaluator import judged_by
from rlflow.deploy.runs import Asked, evaluator_of, judging_config
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.noise import Key
from rlflow.models.io import read_config, save_field
from rlflow.pretrain.images import IMAGES
from rlflow.report.metrics_file import read_metrics
from rlflow.train.checkpoint import Checkpoints
from rlflow.train.trainer import Trainer
from tests.conftest import TINY

WORDS = ("env.prompts=words", "eval.metrics={brightness: brightness}", "eval.num=4")


# -- what judges it -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMAGES)
def test_an_embedded_checkpoint_is_judged_by_its_own_world(name: str) -> None:
    config = judging_config(name)
    assert read_config(name)["judged_by"] == IMAGES[name].judged_by, "what pre-training would write"
    assert (config.env.prompts, config.eval.metrics) == (IMAGES[name].prompts, IMAGES[name].metrics)
    evaluator = evaluator_of(name, Asked(num=3))
    evaluator.policy.field.unguided.tokenize(evaluator.columns["prompt"])


def test_the_model_of_a_run_is_judged_as_the_run(
    tmp_path: Path, trainer: Callable[..., Trainer], words_field: str
) -> None:
    """Also where it was copied to, once it carries `judged_by`."""
    run = tmp_path / "run"
    made = trainer(run, f"policy.field={words_field}", *WORDS)
    made.fit()
    expected = made.last_eval["eval/heldout/brightness"]
    assert rf.evaluate(run / "model")["brightness"] == pytest.approx(expected, rel=1e-5)
    save_field(made.policy.field.unguided, tmp_path / "live", judged_by=judged_by(made.config))
    evaluator = evaluator_of(tmp_path / "live")
    assert evaluator.columns == made.evaluator.columns
    assert (evaluator.num_steps, evaluator.judges.weights) == (6, {"brightness": 1.0})


def test_a_checkpoint_that_says_nothing_and_reads_no_scenes_is_an_error(words_field: str) -> None:
    with pytest.raises(ValueError, match=r"is judged by scenes: prompt row 0: .*unknown word"):
        evaluator_of(words_field)


# -- a run opened again ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, scenes_field: str) -> Path:
    """Three iterations at a rate that moves every weight set apart from the others."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    overrides = [*TINY, f"policy.field={scenes_field}", "train.minutes=", "train.iterations=3"]
    overrides += ["algorithm.optimizer.lr=1e-2", "train.checkpoint_every=1"]
    Trainer("t2i_flow_grpo", folder, overrides=overrides, quiet=True).fit()
    return folder


def weights_of(policy: rf.FlowPolicy) -> torch.Tensor:
    return torch.cat([p.flatten() for p in policy.parameters()])


def test_load_gives_the_weights_asked_for(run: Path, scenes_field: str) -> None:
    """The tuned ones, averaged where the run evaluates those; live and averaged ones differ from the base."""
    base, ema = weights_of(rf.load(scenes_field)), weights_of(rf.load(run))
    live = weights_of(rf.load(run, weights="live"))
    sets = Checkpoints(run).load("last")[1]["weight_sets"]
    assert not torch.equal(ema, base)
    assert not torch.equal(live, base)
    assert not torch.equal(live, ema)
    policy = rf.load(run, weights="ema")
    assert all(torch.equal(p, sets[f"ema/{n}"]) for n, p in policy.named_parameters() if f"ema/{n}" in sets)
    assert not torch.equal(weights_of(rf.load(run, checkpoint="1")), ema)


@pytest.mark.parametrize("weights", ["ref", "best"])
def test_other_weights_are_refused(run: Path, weights: str) -> None:
    with pytest.raises(ValueError, match=rf"weights '{weights}': .* has live and ema"):
        rf.load(run, weights=weights)


@pytest.mark.parametrize("choice", [{"weights": "ema"}, {"checkpoint": "best"}])
def test_a_choice_that_only_runs_have_is_refused_elsewhere(scenes_field: str, choice: dict[str, str]) -> None:
    for ask in (rf.load, rf.evaluate):
        with pytest.raises(ValueError, match="is no run folder: checkpoint and weights are of those"):
            ask(scenes_field, **choice)


def test_a_saved_policy_samples_as_before(run: Path, tmp_path: Path) -> None:
    policy = rf.load(run)
    again = rf.load(rf.save(policy, tmp_path / "mine"))
    again.autocast, prompts = policy.autocast, ["one red circle", "two blue squares"]  # what is saved is the network
    images = rf.sample(policy, prompts, num_steps=4)
    assert images.shape == (2, 3, 16, 16)
    assert torch.equal(rf.sample(again, prompts, num_steps=4), images)
    assert not torch.equal(rf.sample(policy, prompts, seed=1, num_steps=4), images)


def test_a_prompt_is_a_text_or_a_list_of_texts(run: Path) -> None:
    """One text is one picture, not one of each letter; what is neither is refused."""
    policy = rf.load(run)
    images = rf.sample(policy, "one red circle", num_steps=2)
    assert torch.equal(images, rf.sample(policy, ["one red circle"], num_steps=2))
    for wrong in ([], 3, None, ["one red circle", 3], [["one red circle"]], b"one red circle"):
        with pytest.raises(ValueError, match="prompts: give a text, or a list of texts, got"):
            rf.sample(policy, wrong)


def darkness(images: torch.Tensor) -> torch.Tensor:
    return 1 - images.mean(dim=(1, 2, 3))


class Quiet(FlowSDE):
    """A kernel of one's own."""


def test_functions_and_classes_train_evaluate_and_resume(tmp_path: Path, scenes_field: str) -> None:
    """A reward, a judge and a kernel by themselves; config.yaml names them, and a notebook's is given again."""

    def redness(images: torch.Tensor) -> torch.Tensor:
        return images[:, 0].mean(dim=(1, 2))

    def train(**more: Any) -> Trainer:
        values = {
            "base": "t2i_flow_grpo",
            "policy": {"field": scenes_field, "kernel": {"name": Quiet, "a": 0.6}},
            "reward": {"weights": {darkness: 1.0, redness: 0.5}},
            "eval": {"metrics": {"red": redness}},
        }
        overrides = [o for o in TINY if not o.startswith(("reward.weights", "eval.metrics"))]
        overrides += ["train.minutes=", "train.iterations=1"]
        with pytest.warns(UserWarning, match="redness lies in no module"):
            trainer = Trainer(values, tmp_path / "run", overrides=overrides, quiet=True, **more)
        trainer.fit()
        return trainer

    assert isinstance(train().policy.kernel, Quiet)
    (row,) = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
    assert {"reward/darkness/mean", "reward/redness/mean"} <= set(row)
    text = (tmp_path / "run/config.yaml").read_text()
    assert f"{__name__}:Quiet" in text
    assert "given:redness: 0.5" in text
    assert set(rf.evaluate(tmp_path / "run")) == {"red", "calls"}
    assert train(resume="last").iteration == 1


def test_evaluate_is_the_runs_last_evaluation(run: Path) -> None:
    """Of all metrics, the distance to the base too; and what is asked for is passed on."""
    last = [row for row in read_metrics(run) if row["kind"] == "eval"][-1]
    found = rf.evaluate(run)
    assert set(found) == {"brightness", "base_distance", "calls"}
    for name, value in found.items():
        assert value == pytest.approx(last[f"eval/heldout/{name}"], rel=1e-5)
    assert found["base_distance"] > 0
    for more in ({"weights": "live"}, {"checkpoint": "1"}, {"solver": "heun"}, {"num_steps": 3}, {"num": 2}):
        assert rf.evaluate(run, **more) != found, more
    with pytest.raises(ValueError, match="code outside rlflow"):
        rf.evaluate(run, solver="os:getcwd")
    with pytest.raises(ValueError, match="has no"):
        rf.evaluate(run, solver="os:nothing", trust_code=True)


def test_what_is_loaded_samples_as_it_is_evaluated(run: Path, scenes_field: str, tmp_path: Path) -> None:
    """Of a run and of the folder it saved: steps, solver and precision of `eval`, not those of training."""
    more = ("eval.num_steps=3", "eval.solver=heun", "policy.solver=dpm2m", "policy.precision=bfloat16")
    overrides = [*TINY, f"policy.field={scenes_field}", "train.minutes=", "train.iterations=1", *more]
    trainer = Trainer("t2i_flow_grpo", tmp_path / "run", overrides=overrides, quiet=True)
    trainer.fit()
    asked, row = trainer.evaluator, torch.zeros(1, dtype=torch.long)
    images = asked._batch(row)
    for name in ("run", "run/model"):
        policy = rf.load(tmp_path / name, **({"weights": "live"} if name == "run" else {}))
        assert (policy.num_steps, type(policy.solver).__name__) == (3, "Heun")
        assert policy.autocast == torch.bfloat16
    policy = rf.load(tmp_path / "run", weights="live")
    prompts = [asked.columns["prompt"][0]]
    cond = policy.encode(policy.field.tokenize(prompts))
    chain = policy.sample(cond, policy.plan(), key=Key(asked.seed, "evaluate"), row_ids=row)
    torch.testing.assert_close(policy.field.decode(policy.squash(chain.final)).float(), images)
