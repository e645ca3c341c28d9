"""A choice among samples where runs are opened again: by a reward for pictures, by a saved critic for robots."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rlflow as rf
from rlflow.assembly.parts import make_parts
from rlflow.cli import main
from rlflow.config import recipes
from rlflow.deploy.critics import SavedCritic
from rlflow.deploy.predict import Predictor, export
from rlflow.deploy.runs import Asked, evaluator_of, read_run_config
from rlflow.envs.simulators.toy import ToyBandit
from rlflow.evaluation.episodes import EpisodeEvaluator
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.select import BestOf, Select
from rlflow.models.mlp import MLPField
from rlflow.rl.off_policy.sac import SAC
from rlflow.train.trainer import Trainer

BRIGHTEST = {"name": "best_of", "num": 4, "scorer": "brightness"}
PROMPTS = ["one red circle", "two blue squares"]


def light(images: Tensor) -> float:
    return float(images.mean())


# -- pictures -------------------------------------------------------------------------------------


def test_a_policy_samples_the_best_it_was_loaded_to_choose(scenes_field: str) -> None:
    plain, best = rf.load(scenes_field), rf.load(scenes_field, select=BRIGHTEST)
    images, chosen = (rf.sample(p, PROMPTS, num_steps=2) for p in (plain, best))
    assert light(chosen) > light(images)
    assert best.network_rows == 4 * plain.network_rows
    one = rf.load(scenes_field, select=BRIGHTEST | {"num": 1})
    assert torch.equal(rf.sample(one, PROMPTS, num_steps=2), images)


def test_a_pipeline_may_choose_too(tiny_pipeline: Callable[..., Path]) -> None:
    folder = tiny_pipeline("sd3")
    more = {"resolution": 32, "num_steps": 2, "guidance": 1.0}
    images = [rf.sample(rf.load(folder, select=s, **more), ["a cat"]) for s in (None, BRIGHTEST)]
    assert light(images[1]) > light(images[0])


def test_a_recipe_s_choice_is_of_its_evaluations_and_of_whoever_loads_it(
    tmp_path: Path, trainer: Callable[..., Trainer]
) -> None:
    """Of the run and of the model it saves, unless another is asked for; training collects single samples."""
    made = trainer(tmp_path / "run", "train.iterations=1", "policy.select={name: best_of, num: 3, scorer: brightness}")
    assert made.policy.select.num == made.collector.policy.select.num == 1
    made.fit()
    chosen = made.last_eval["eval/heldout/brightness"]
    for name in ("run", "run/model"):
        assert rf.load(tmp_path / name).select.num == 3
        assert rf.evaluate(tmp_path / name)["brightness"] == pytest.approx(chosen, rel=1e-5)
        plain = rf.evaluate(tmp_path / name, select={"name": "best_of", "num": 1, "scorer": "brightness"})
        assert plain["brightness"] < chosen


def test_a_scorer_of_columns_that_no_prompt_has_is_refused_at_construction(
    tmp_path: Path, trainer: Callable[..., Trainer]
) -> None:
    best = "policy.select={name: best_of, num: 2, scorer: base_distance}"
    with pytest.raises(ValueError, match=r"^policy\.select\.scorer: reward 'base_distance' reads column 'base_images'"):
        trainer(tmp_path / "run", best)


def test_a_rollout_refuses_a_chosen_sample(tiny: list[str], scenes_field: str) -> None:
    overrides = [*tiny, f"policy.field={scenes_field}", "train.minutes=", "train.iterations=1"]
    collector = make_parts(recipes.load("t2i_flow_grpo", overrides)).collector
    collector.policy.select = BestOf(4, lambda made, asked: made.flatten(2).sum(2), "size")
    arguments = (collector.env, collector.policy, collector.likelihood, collector.steps, collector.groups)
    with pytest.raises(ValueError, match="no density describes a sample that is the best of 4 by size"):
        type(collector)(*arguments)


def test_the_command_line_chooses(scenes_field: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["eval", scenes_field, "--num", "2", "--steps", "2", "--best-of", "3", "--scorer", "brightness"])
    assert "deployment sampler, best of 3 by brightness" in capsys.readouterr().out
    picture = tmp_path / "x.png"
    words = ["sample", scenes_field, "--prompt", PROMPTS[0], "--num", "1", "--steps", "2", "--out", str(picture)]
    main([*words, "--best-of", "2", "--scorer", "brightness"])
    assert picture.stat().st_size > 0
    with pytest.raises(SystemExit):
        main([*words, "--best-of", "2"])
    assert "--best-of N and --scorer NAME go together" in capsys.readouterr().err


# -- robots ---------------------------------------------------------------------------------------

REACH = (
    "train.iterations=1",
    "algorithm.start=16",
    "env.num_groups=4",
    "eval.num=3",
    "train.tensorboard=false",
    "train.report=false",
)


@pytest.fixture(scope="module")
def sac_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("sac") / "run"
    Trainer("robot_reach_sac", run, overrides=REACH, quiet=True).fit()
    return run


def test_a_saved_critic_is_the_critic(sac_run: Path) -> None:
    """Its values are those the learner had when it was saved."""
    trainer = Trainer("robot_reach_sac", sac_run, overrides=REACH, resume="last", quiet=True)
    trainer.folder.leave()
    assert isinstance(trainer.algorithm, SAC)
    torch.manual_seed(1)
    obs, actions = torch.randn(5, 4), torch.rand(5, 3, *trainer.policy.event_shape) * 2 - 1
    values = SavedCritic(str(sac_run), trainer.policy.event_shape)(actions, obs)
    assert values.shape == (5, 3)
    cond = trainer.policy.encode(obs)
    for n in range(3):
        with torch.no_grad():
            torch.testing.assert_close(values[:, n], trainer.algorithm.twin.value(cond, actions[:, n]))
    assert float(values.std()) > 0


def test_a_run_of_sac_is_evaluated_by_its_own_critic(sac_run: Path) -> None:
    plain = evaluator_of(sac_run)
    best = evaluator_of(sac_run, Asked(select={"name": "best_of", "num": 5, "scorer": "critic"}))
    assert isinstance(best.select.scorer, SavedCritic)
    before = [e.policy.network_rows for e in (plain, best)]
    scores = [e("live").scores["return"] for e in (plain, best)]
    spent = [e.policy.network_rows - b for e, b in zip((plain, best), before, strict=True)]
    assert spent[1] == 5 * spent[0]
    assert not torch.equal(*scores)


def test_a_critic_of_something_else_is_refused(sac_run: Path, tmp_path: Path, trainer: Callable[..., Trainer]) -> None:
    trainer(tmp_path / "images", "train.iterations=1").fit()
    for run, said in (
        (tmp_path / "images", "has no critic of actions: name a run of algorithm=sac"),
        (tmp_path / "absent", "is no run folder"),
    ):
        with pytest.raises(ValueError, match=rf"^policy\.select\.scorer\.run: .*{said}"):
            evaluator_of(
                sac_run, Asked(select={"name": "best_of", "num": 2, "scorer": {"name": "critic", "run": str(run)}})
            )
    with pytest.raises(ValueError, match=r"critic of actions \(2, 2\), the policy makes \(7, 2\)"):
        SavedCritic(str(sac_run), (7, 2))
    config = read_run_config(sac_run)
    with pytest.raises(ValueError, match=r"^eval\.noise: chains that start at zero end alike"):
        recipes.load(
            replace(config, eval=replace(config.eval, noise="zero")).to_dict(),
            [f"policy.select={{name: best_of, num: 2, scorer: {{name: critic, run: {sac_run}}}}}"],
        )


def test_a_critic_is_found_from_any_folder(sac_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config's paths are absolute from the start, bare names of folders too."""
    monkeypatch.chdir(sac_run.parent)
    select = "policy.select={name: best_of, num: 2, scorer: {name: critic, run: run}}"
    assert recipes.load("robot_reach_sac", [select]).policy.select["scorer"]["run"] == str(sac_run)


def bandit_reward(actions: Tensor, obs: Tensor) -> Tensor:
    """What ToyBandit pays."""
    return -(actions.flatten(2) - 0.5).square().sum(2)


def test_episodes_and_predictors_act_by_the_best_action() -> None:
    torch.manual_seed(0)
    policy = FlowPolicy(MLPField(1, (1, 2), width=16), FlowSDE(0.5), num_steps=2)
    means = [
        EpisodeEvaluator(policy, ToyBandit, num=50, select=s, rows_per_call=8)().means()["return"]
        for s in (Select(), BestOf(16, bandit_reward))
    ]
    assert means[1] > 2 * means[0]
    spec, obs = torch.empty(1, device="meta"), torch.zeros(20, 1).numpy()
    queues = [Predictor(policy, spec).predict(obs)[1]["queue"]]
    policy.select = BestOf(16, bandit_reward)
    queues.append(Predictor(policy, spec).predict(obs)[1]["queue"])
    reward = [float(bandit_reward(torch.from_numpy(q).unsqueeze(1), torch.zeros(20, 1)).mean()) for q in queues]
    assert reward[1] > reward[0]
    with pytest.raises(ValueError, match="best of 16 needs its scorer, which is not exported"):
        export(policy, spec, "x.pt2")
