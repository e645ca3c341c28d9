"""From a config to parts: prompts that training and evaluation share out, and what does not fit said at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlflow.assembly.parts import make_parts
from rlflow.config import recipes
from rlflow.envs.prompts import Prompts, load_prompts
from rlflow.rl.off_policy.actor import ActorCritic, ActorSettings
from rlflow.rl.off_policy.sac import SAC
from rlflow.rl.optim import AdamW
from rlflow.train.trainer import Trainer


def test_held_out_prompts_of_a_file_are_never_trained_on(tmp_path: Path, trainer: Callable[..., Trainer]) -> None:
    """A file of its own for evaluation leaves the training file whole."""
    mine, other = tmp_path / "mine.txt", tmp_path / "other.txt"
    captions = dict.fromkeys(load_prompts("scenes:pair").take(range(40))["prompt"])
    mine.write_text("\n".join(captions))
    other.write_text(next(iter(captions)))

    def texts(prompts: Prompts) -> set[str]:
        return {row["prompt"] for row in prompts.rows}

    made = trainer(tmp_path / "a", f"env.prompts={mine}")
    trained, held_out = texts(made.collector.env.prompts), texts(made.evaluator.prompts)
    assert trained | held_out == set(captions)
    assert trained.isdisjoint(held_out)
    made = trainer(tmp_path / "b", f"env.prompts={mine}", f"eval.prompts={other}")
    assert texts(made.collector.env.prompts) == set(captions)
    assert texts(made.evaluator.prompts) == {next(iter(captions))}


@pytest.mark.parametrize(("key", "of"), [("env.prompts", "env"), ("eval.prompts", "eval")])
def test_a_prompt_the_model_cannot_read_is_said_before_the_first_iteration(
    tmp_path: Path, trainer: Callable[..., Trainer], key: str, of: str
) -> None:
    path = tmp_path / "p.txt"
    path.write_text("one red circle\n\none pink circle\n")
    with pytest.raises(ValueError, match=rf"^{of}\.prompts: .*p\.txt:3: 'one pink circle': unknown word 'pink'"):
        trainer(tmp_path / "run", f"{key}={path}")


def test_a_toy_field_takes_no_prompts(tmp_path: Path, trainer: Callable[..., Trainer]) -> None:
    with pytest.raises(
        ValueError, match=r"^policy\.field: a network from scratch makes no images: .*shapes.* or a simulator$"
    ):
        trainer(tmp_path / "run", "policy.field=mlp")


@pytest.mark.parametrize("control", [True, False])
def test_a_control_of_sac_is_told_to_be_one(control: bool) -> None:
    algorithm = make_parts(recipes.load("robot_reach_sac", [f"train.permute_rewards={control}"])).algorithm
    assert isinstance(algorithm, SAC)
    assert algorithm.settings.permute is control


@pytest.mark.parametrize(
    ("recipe", "more"),
    [("robot_reach_sac", []), ("robot_fql", ["env.name=toy_reach", "env.settings={}", "algorithm.offline="])],
)
def test_every_setting_of_an_off_policy_learner_arrives(recipe: str, more: list[str]) -> None:
    """Each at a value that nothing else has."""
    own = ["lr=7e-4", "max_grad_norm=3", "actor_every=4", "ema_decay=0.7"]
    shared = ["batch_size=24", "start=11", "updates_per_step=0.3", "num_critics=3", "tau=0.02", "critic_lr=5e-4"]
    overrides = [f"algorithm.{setting}" for setting in (*own, *shared)] + ["train.seed=9", *more]
    algorithm = make_parts(recipes.load(recipe, overrides)).algorithm
    assert isinstance(algorithm, ActorCritic)
    actor = ActorSettings(AdamW(lr=7e-4, betas=(0.9, 0.999), max_grad_norm=3.0), every=4, ema_decay=0.7)
    assert algorithm.actor == actor
    found = algorithm.settings
    assert (found.batch_size, found.start, found.updates_per_step, found.seed) == (24, 11, 0.3, 9)
    assert (found.twin.num, found.twin.tau, found.twin.lr) == (3, 0.02, 5e-4)


class Starts:
    """What the simulators of a run are reset with, in training and in evaluation."""

    def __init__(self, folder: Path, recipe: str, *overrides: str):
        small = [
            "train.iterations=3",
            "train.tensorboard=false",
            "train.report=false",
            "eval.every=0",
            "eval.num=20",
            "env.num_groups=8",
        ]
        self.made = Trainer(recipe, folder, overrides=[*small, *overrides], quiet=True)
        self.training: list[Tensor] = []
        self.evaluation: list[Tensor] = []
        self._watch(self.made.collector.env.unwrapped.sim, self.training)
        self._watch(self.made.evaluator.env.unwrapped.sim, self.evaluation)
        self.made.fit()

    def _watch(self, sim: Any, seen: list[Tensor]) -> None:
        real = sim.reset

        def reset(seeds: Tensor, mask: Tensor) -> Any:
            seen.append(seeds[mask])
            return real(seeds, mask)

        sim.reset = reset


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("robot_reach_reinflow", []),
        ("robot_reach_reinflow", ["env.mode=steps"]),
        ("robot_reach_reinflow", ["advantage=group", "env.group_size=4"]),
        ("robot_reach_sac", []),
    ],
    ids=["episodes", "steps", "groups", "sac"],
)
def test_runs_of_other_seeds_share_no_start_and_none_is_one_of_evaluation(
    tmp_path: Path, recipe: str, overrides: list[str]
) -> None:
    """Nor does a run start twice in the same state, but for the rows of a group; all are judged from the same ones."""
    runs = [Starts(tmp_path / str(s), recipe, *overrides, f"train.seed={s}") for s in (0, 1, 2**63 - 1)]
    used = [torch.cat(run.training) for run in runs]
    size = runs[0].made.groups.group_size
    for seeds in used:
        assert seeds.unique(return_counts=True)[1].tolist() == [size] * (len(seeds) // size)
    assert len(torch.cat(used).unique()) * size == sum(map(len, used))
    judged = [torch.cat(run.evaluation)[:20] for run in runs]
    assert torch.equal(judged[0], judged[1])
    assert not set(judged[0].tolist()) & set(torch.cat(used).tolist())


def test_prompts_are_counted_from_the_first_under_every_seed(tmp_path: Path, trainer: Callable[..., Trainer]) -> None:
    """So none is seen twice before all were seen; their order is the seed's."""
    made = [trainer(tmp_path / str(seed), f"train.seed={seed}") for seed in (0, 1)]
    seen = []
    for run in made:
        env, groups = run.collector.env, run.groups
        epoch = -(-len(env.prompts) // groups.num_groups)
        rows = []
        for iteration in range(epoch):
            env.reset(groups.seeds(iteration))
            rows += env.rows[:: groups.group_size]
        assert sorted(rows[: len(env.prompts)]) == list(range(len(env.prompts)))
        seen.append(rows)
    assert seen[0] != seen[1]
