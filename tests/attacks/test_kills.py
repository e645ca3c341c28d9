"""kill -9 at random moments, of one process or of a group: the run that goes on is bitwise the one left alone."""

import random
from pathlib import Path

import pytest

from tests.interrupted import assert_equal_runs, finish, kill

OFTEN = [
    "train.minutes=",
    "train.checkpoint_every=1",
    "train.keep=2",
    "train.tensorboard=false",
    "train.report=false",
    "eval.every=5",
]
ROBOT = [*OFTEN, "env.num_groups=4", "eval.num=2", "eval.video=0"]
HALVES = ["algorithm.num_minibatches=2", "algorithm.epochs=2"]
RUNS = {
    "images": ("t2i_flow_grpo", [*OFTEN, "eval.num=2", "eval.grid=1", "algorithm.num_minibatches=1"]),
    # episodes under way at every checkpoint, a running scale, a critic
    "simulator": ("robot_reach_reinflow", [*ROBOT, "env.mode=steps", "env.horizon=3", "reward.scale=true", *HALVES]),
    "replay": ("robot_reach_sac", [*ROBOT, "env.horizon=3", "algorithm.start=20", "algorithm.batch_size=8"]),
}


def attack(
    folder: Path, name: str, tiny: list[str], field: str, *, iterations: int, kills: int, world: int = 1
) -> None:
    """Kill a run so many times, let it finish, and compare."""
    recipe, overrides = RUNS[name]
    if name == "images":
        overrides = [*tiny, f"policy.field={field}", *overrides]
    overrides = [*overrides, f"train.iterations={iterations}"]
    finish(folder / "straight", recipe, overrides, world)
    rng, run = random.Random(len(name) + world), folder / "killed"
    hit = sum(kill(run, recipe, overrides, rng, world) > 0 for _ in range(kills))
    assert hit >= kills - 1, "the run was over before it could be killed"
    finish(run, recipe, overrides, world)
    assert_equal_runs(folder / "straight", run)


def test_killed_five_times(tmp_path: Path, scenes_field: str, tiny: list[str]) -> None:
    attack(tmp_path, "images", tiny, scenes_field, iterations=20, kills=5)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", ["images", "simulator"])
def test_killed_again_and_again(tmp_path: Path, scenes_field: str, tiny: list[str], name: str, world: int) -> None:
    attack(tmp_path, name, tiny, scenes_field, iterations=40, kills=8, world=world)


@pytest.mark.slow
def test_killed_with_a_replay(tmp_path: Path, scenes_field: str, tiny: list[str]) -> None:
    attack(tmp_path, "replay", tiny, scenes_field, iterations=40, kills=8)
