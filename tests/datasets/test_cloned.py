"""From a dataset in each format to a policy that acts: imported, cloned and evaluated by the commands."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rlflow as rf
from rlflow import cli
from rlflow.envs.demos.dataset import Demos
from rlflow.models.io import read_config
from tests.datasets import test_sources as sources

NUM, STEPS, GRAVITY, ENOUGH = 24, 200, 10.0, 0.9
WORLD = ["--env", "gym", "env.settings.env_id=Pendulum-v1"]


def swing(seed: int) -> dict[str, np.ndarray]:
    """An episode of a controller that pumps energy into the pendulum, and holds it near the top."""
    gymnasium = pytest.importorskip("gymnasium")
    env = gymnasium.make("Pendulum-v1")
    obs, rows = env.reset(seed=seed)[0], []
    for _ in range(STEPS):
        cos, sin, speed = obs
        energy = speed**2 / 6 + GRAVITY / 2 * cos
        push = -10 * np.arctan2(sin, cos) - 2 * speed if cos > ENOUGH else 2 * speed * (GRAVITY / 2 - energy)
        action = np.clip([push], -2, 2).astype(np.float32)
        seen, (obs, reward, *_) = obs, env.step(action)
        rows.append((seen, action, np.float32(reward)))
    seen, done, paid = (np.stack(column) for column in zip(*rows, strict=True))
    return {"obs": np.concatenate([seen, obs[None]]), "action": done, "reward": paid}


def lerobot(folder: Path) -> Path:
    """As `rlflow demos export` writes it, and LeRobot reads it."""
    pytest.importorskip("pyarrow")
    cli.main(["demos", "import", str(sources.npz(folder)), *WORLD, "--out", str(folder / "d")])
    cli.main(["demos", "export", str(folder / "d"), "--format", "lerobot", "--fps", "20", "--out", str(folder / "v3")])
    return folder / "v3"


def lerobot_by_itself(folder: Path) -> Path:
    module = pytest.importorskip("lerobot.datasets.lerobot_dataset")
    sizes = {"observation.state": 3, "action": 1}
    features = {n: {"dtype": "float32", "shape": (k,), "names": [str(i) for i in range(k)]} for n, k in sizes.items()}
    features |= {"next.reward": {"dtype": "float32", "shape": (1,), "names": None}}
    made = module.LeRobotDataset.create("me/d", 20, features, root=folder / "v3", use_videos=False)
    for e in sources.episodes():
        for seen, done, paid in zip(e["obs"][:-1], e["action"], e["reward"], strict=True):
            row = {"observation.state": seen, "action": done, "next.reward": np.array([paid])}
            made.add_frame(row | {"task": "stand up"})
        made.save_episode()
    made.finalize()
    return folder / "v3"


WRITERS: list[Callable[[Path], Path]] = [
    sources.npz,
    sources.npz_compressed,
    sources.ogbench,
    sources.parquet,
    sources.d4rl,
    sources.robomimic,
    sources.minari_layout,
    sources.minari_by_itself,
    lerobot,
    lerobot_by_itself,
]


@pytest.fixture(scope="module")
def told() -> list[dict[str, np.ndarray]]:
    return [swing(seed) for seed in range(NUM)]


def imported(writer: Callable[[Path], Path], told: Any, folder: Path) -> Demos:
    """By way of a file that `writer` wrote."""
    changes = {"episodes": lambda: told, "LENGTHS": [STEPS] * NUM, "BOUND": 2.0, "ENV_ID": "Pendulum-v1"}
    with pytest.MonkeyPatch.context() as change:
        for name, value in changes.items():
            change.setattr(sources, name, value)
        source = writer(folder)
    cli.main(["demos", "import", str(source), *WORLD, "--out", str(folder / "imported")])
    return Demos.open(folder / "imported")


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_the_format_makes_no_difference_to_what_is_cloned(
    writer: Callable[[Path], Path], told: Any, tmp_path: Path
) -> None:
    """What cloning reads, to the bit: observations, actions in [-1, 1], rewards, and moments for the normaliser."""
    demos, every = imported(writer, told, tmp_path), torch.arange(NUM * STEPS)
    for read, name, scale in ((demos.observations, "obs", 1), (demos.actions, "action", 2)):
        wanted = np.concatenate([e[name][:STEPS] for e in told]) / np.float32(scale)
        assert torch.equal(read(every), torch.from_numpy(wanted)), name
    assert [e["length"] for e in demos.episodes] == [STEPS] * NUM
    if writer is not sources.ogbench:  # whose files hold no rewards
        assert torch.equal(demos.rewards(every), torch.from_numpy(np.concatenate([e["reward"] for e in told])))


@pytest.mark.slow
def test_and_the_clone_of_it_acts(told: Any, tmp_path: Path) -> None:
    """Close to the controller's -145; an untrained policy returns -1,194. The command tells it, and eval again."""
    imported(sources.npz, told, tmp_path)
    made = str(tmp_path / "policy")
    command = ["--demos", str(tmp_path / "imported"), "--chunk", "1", "--steps", "2000", "--judged", "8", "--out", made]
    cli.main(["pretrain", "robot_bc", *command])
    assert read_config(made)["made_by"]["return"] > -300
    assert rf.evaluate(made, num=8)["return"] > -300
