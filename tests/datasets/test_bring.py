"""Import: columns to what an environment shows, actions to what it takes; what does not fit is named before it is written."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rlflow.datasets.acting import Options
from rlflow.datasets.actions import control, played, step_env
from rlflow.datasets.bring import import_demos
from rlflow.envs.bounds import Bounds
from rlflow.envs.demos import dataset
from rlflow.envs.demos.dataset import Demos
from rlflow.envs.sim import Outcome, SimEnv
from rlflow.envs.simulators.toy import ReachSim

PENDULUM = {"name": "gym", "settings": {"env_id": "Pendulum-v1"}}
STEPS, LONG = 120, 30


def save(folder: Path, **changes) -> Path:
    """Four episodes of numbers for the toy `toy_reach`, but for the changes; None leaves a column out."""
    rng = np.random.default_rng(1)
    columns = {
        "state": rng.normal(size=(STEPS, 2)).astype(np.float32),
        "goal": rng.normal(size=(STEPS, 2)).astype(np.float32),
        "action": rng.uniform(-1, 1, (STEPS, 2)).astype(np.float32),
        "reward": rng.normal(size=STEPS).astype(np.float32),
        "done": np.arange(STEPS) % LONG == LONG - 1,
    } | changes
    np.savez(folder / "d.npz", **{name: value for name, value in columns.items() if value is not None})
    return folder / "d.npz"


def bring(folder: Path, env: dict | None = None, **options) -> Demos:
    return import_demos(folder / "d.npz", folder / "out", env or {"name": "toy_reach"}, Options(**options), "command")


def pendulum(folder: Path, scale: float, **changes) -> Path:
    action = np.linspace(-scale, scale, STEPS, dtype=np.float32)[:, None]
    return save(folder, state=np.zeros((STEPS, 3), np.float32), goal=None, action=action, **changes)


def test_what_was_recorded_is_what_is_learnt_from(tmp_path):
    columns = np.load(save(tmp_path))
    demos = bring(tmp_path)
    index = torch.arange(STEPS)
    for name in ("state", "goal"):
        np.testing.assert_array_equal(demos.observations(index)[name].numpy(), columns[name])
    np.testing.assert_allclose(demos.actions(index).numpy(), columns["action"], atol=1e-6)
    np.testing.assert_array_equal(demos.rewards(index).numpy(), columns["reward"])
    assert [e["length"] for e in demos.episodes] == [LONG] * 4
    assert (demos.env, demos.about["made_by"]["source"]["format"]) == ({"name": "toy_reach"}, "npz")


def test_only_some_episodes(tmp_path):
    save(tmp_path)
    assert len(bring(tmp_path, episodes=2).episodes) == 2


# -- observations ---------------------------------------------------------------------------------


def test_columns_are_put_side_by_side_and_renamed(tmp_path):
    columns = np.load(
        save(tmp_path, state=None, goal=None, x=np.arange(STEPS, dtype=np.float64), rest=np.ones((STEPS, 3)))
    )
    save(tmp_path, state=None, goal=None, x=columns["x"], y=columns["x"] * 2, there=np.ones((STEPS, 2)))
    seen = bring(tmp_path, obs=["state=x+y", "goal=there"]).observations(torch.tensor([7]))
    assert (seen["state"].tolist(), seen["goal"].tolist()) == ([[7, 14]], [[1, 1]])


@pytest.mark.parametrize(
    ("changes", "obs", "message"),
    [
        (
            {"goal": None},
            [],
            r"environment shows goal float32 \(2,\), and which column .* --obs goal=COLUMN; .* state float32",
        ),
        ({}, ["state=stat"], r"--obs: .* has no column stat; .* has state float32 \(2,\)"),
        ({}, ["statt=state"], "--obs statt=state: the environment shows goal, state: write NAME=COLUMN"),
        (
            {},
            ["state=state+goal"],
            r"state float32 \(2,\) \+ goal float32 \(2,\) is 4 numbers, the environment shows state",
        ),
        (
            {"action": np.zeros((STEPS, 3), np.float32)},
            [],
            r"action float32 \(3,\), the environment takes \(2,\): another number",
        ),
        ({"action": np.zeros((STEPS, 2), int)}, [], "a flow policy makes real vectors"),
        ({"state": np.full((STEPS, 2), np.nan)}, [], "episode 0: obs.state is not finite in step 0"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_left(tmp_path, changes, obs, message):
    save(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        bring(tmp_path, obs=obs)
    assert [path.name for path in tmp_path.iterdir()] == ["d.npz"]


def test_a_folder_is_not_overwritten(tmp_path):
    save(tmp_path)
    bring(tmp_path)
    with pytest.raises(FileExistsError, match="give another folder"):
        bring(tmp_path)


@pytest.mark.parametrize("last", [True, False])
def test_pictures_have_their_axes_in_the_environments_order(tmp_path, last):
    """The tabletop shows (24, 24, 3)."""
    pixels = np.zeros((STEPS, 24, 24, 3), np.uint8)
    pixels[:, 3, 5] = (10, 20, 30)
    text = np.ones((STEPS, 5), np.int64)
    moved = pixels if last else pixels.transpose(0, 3, 1, 2)
    save(tmp_path, pixels=moved, text=text, goal=None)
    obs = bring(tmp_path, {"name": "tabletop"}, convert="keep").observations(torch.tensor([3]))
    assert obs["pixels"][0, 3, 5].tolist() == [10, 20, 30]
    assert obs["text"].dtype == torch.int64


def test_pictures_are_scaled_if_asked(tmp_path):
    pixels = np.repeat(np.arange(48, dtype=np.uint8), 48 * 3).reshape(1, 48, 48, 3).repeat(STEPS, 0)
    save(tmp_path, pixels=pixels, text=np.ones((STEPS, 5), int), goal=None)
    with pytest.raises(ValueError, match=r"pixels uint8 \(48, 48, 3\), .* \(24, 24, 3\): pass --resize"):
        bring(tmp_path, {"name": "tabletop"}, convert="keep")
    demos = bring(tmp_path, {"name": "tabletop"}, convert="keep", resize=True)
    rows = demos.observations(torch.tensor([0]))["pixels"][0, :, 0, 0].int()
    assert bool(((rows - (2 * torch.arange(24) + 0.5)).abs() <= 0.5).all())  # mean of two rows
    assert "pixels is scaled from (48, 48) to (24, 24)" in demos.about["made_by"]["notes"]


# -- actions --------------------------------------------------------------------------------------


def test_actions_come_from_the_environments_own_units(tmp_path):
    pytest.importorskip("gymnasium")
    pendulum(tmp_path, scale=2)
    made = bring(tmp_path, PENDULUM).actions(torch.arange(STEPS))
    torch.testing.assert_close(made[:, 0], torch.linspace(-1, 1, STEPS))


@pytest.mark.parametrize(
    ("scale", "options", "largest"), [(1.0, {"units": "unit"}, 1.0), (1.0, {}, 0.5), (3.0, {"clip": True}, 1.0)]
)
def test_units_and_clipping(tmp_path, scale, options, largest):
    pytest.importorskip("gymnasium")
    pendulum(tmp_path, scale)
    demos = bring(tmp_path, PENDULUM, **options)
    assert float(demos.actions(torch.arange(STEPS)).max()) == pytest.approx(largest)
    notes = " ".join(demos.about["made_by"]["notes"])
    assert ("--units unit if 1 is its bound" in notes) == (options == {})
    assert ("40 of 120 steps had actions beyond the bounds: clipped" in notes) == ("clip" in options)


@pytest.mark.parametrize(("units", "takes"), [("env", "-2, 2"), ("unit", "-1, 1")])
def test_actions_beyond_the_bounds_are_named(tmp_path, units, takes):
    pytest.importorskip("gymnasium")
    pendulum(tmp_path, scale=3)
    message = rf"action 0 goes from -3 to 3, the environment takes \[{takes}\]; .*% of the steps are beyond: --clip"
    with pytest.raises(ValueError, match=message):
        bring(tmp_path, PENDULUM, units=units)


def test_stretching_is_undone():
    bounds = Bounds(torch.tensor([-2.0, 0.0, 0.0]), torch.tensor([2.0, 5.0, torch.inf]))
    action = torch.tensor([0.3, -0.9, 7.0])
    torch.testing.assert_close(bounds.inverse(bounds(action)), action)


def moved(k: float, absolute: bool, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """(states, actions) of two numbers that are moved by targets or by changes, half of it by a smooth plan."""
    rng = np.random.default_rng(0)
    state, states, actions = np.zeros(2), [], []
    for step in range(600):
        goal = np.sin(step / np.array([30, 47]))
        wish = goal if absolute else np.clip(3 * (goal - state), -1, 1)
        action = np.clip(wish + noise * rng.normal(size=2), -1, 1)
        states.append(state)
        actions.append(action)
        state = state + k * (action - state if absolute else action)
    return np.array(states), np.array(actions)


@pytest.mark.parametrize("noise", [0.05, 1.0])
@pytest.mark.parametrize("k", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("absolute", [True, False])
def test_targets_are_told_from_changes(k, absolute, noise):
    state, action = moved(k, absolute, noise)
    assert control([(state[:-1], np.diff(state, axis=0), action[:-1])]) == ["absolute" if absolute else "delta"] * 2


def test_what_moves_by_itself_is_neither():
    rng = np.random.default_rng(0)
    state, action = rng.normal(size=(500, 4)), rng.uniform(-1, 1, (500, 2))
    assert control([(state[:-1], np.diff(state, axis=0), action[:-1])]) == [None, None]


class Follow(ReachSim):
    """A point that goes half the way to where it is told to be, at most 2 from the middle on each axis."""

    def __init__(self, num_envs: int):
        super().__init__(num_envs, num_actions=2, horizon=50)
        self.low, self.high = torch.full((2,), -2.0), torch.full((2,), 2.0)

    def advance(self, action: torch.Tensor) -> Outcome:
        self.state["state"] = self.state["state"] + 0.5 * (action - self.state["state"])
        return Outcome(self.observe(), torch.zeros(self.num_envs), torch.zeros(self.num_envs, dtype=torch.bool))


def follow(num_envs: int = 1, chunk: int = 1) -> SimEnv:
    return SimEnv(Follow(num_envs), chunk)


FOLLOW = {"name": "tests.datasets.test_bring:follow"}


@pytest.mark.parametrize(
    ("env", "takes"), [({"name": "toy_reach"}, "delta"), ({"name": "tabletop"}, "delta"), (FOLLOW, "absolute")]
)
def test_environments_are_measured(env, takes):
    """The first two take velocities, the last where to be."""
    assert control(played(step_env(env, True))) == [takes] * 2


def test_targets_for_an_environment_of_changes_are_refused_and_converted(tmp_path):
    """state + k (target - state): the change that does the same is k (target - state) in its own scale."""
    state, action = (part[:STEPS].astype(np.float32) for part in moved(0.25, absolute=True, noise=0.3))
    save(tmp_path, state=state, action=action)
    message = r"action 0 is the target of what it moves, the environment takes a change .* --convert delta --state COLUMN\[0:2\]"
    with pytest.raises(ValueError, match=message):
        bring(tmp_path)
    made = bring(tmp_path, convert="delta", state="state[0:2]", clip=True).actions(torch.arange(STEPS))
    np.testing.assert_allclose(made.numpy(), (action - state).clip(-1, 1), atol=1e-6)


def test_changes_for_an_environment_of_targets_are_refused_and_converted(tmp_path):
    """Half of a change is what the point moves: told the state and the change as its target, it goes where the data went."""
    state, action = (part[:STEPS].astype(np.float32) for part in moved(0.5, absolute=False, noise=0.05))
    save(tmp_path, state=state, action=action)
    message = r"action 0 is a change of what it moves, the environment takes the target .* --convert absolute --state COLUMN\[0:2\]"
    with pytest.raises(ValueError, match=message):
        bring(tmp_path, FOLLOW, trust_code=True)
    made = bring(tmp_path, FOLLOW, trust_code=True, convert="absolute", state="state[0:2]").actions(torch.arange(STEPS))
    np.testing.assert_array_equal(2 * made.numpy(), state + action)  # in [-1, 1] of bounds that are 2
    env = follow()
    env.reset(torch.zeros(1, dtype=torch.long))
    for step in range(LONG):
        reached = env.step(made[step].view(1, 1, 2)).reached["state"]
        np.testing.assert_allclose(reached[0].numpy(), state[step + 1], atol=1e-5)


def test_options_for_converting_are_checked(tmp_path):
    save(tmp_path)
    for options, message in [
        ({"convert": "delta"}, "--convert delta: say with --state COLUMN what the actions move"),
        ({"convert": "delta", "state": "stat"}, r"--state stat: write COLUMN or COLUMN\[0:3\]"),
        ({"convert": "delta", "state": "state[0:1]"}, "1 numbers for 2 actions"),
        ({"action": "actio"}, "--action actio: .* no such column; did you mean 'action'"),
    ]:
        with pytest.raises(ValueError, match=message):
            bring(tmp_path, **options)


# -- size -----------------------------------------------------------------------------------------


def test_pictures_are_written_in_shards_of_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SHARD_BYTES", 24 * 24 * 3 * LONG)
    save(tmp_path, pixels=np.zeros((STEPS, 24, 24, 3), np.uint8), text=np.ones((STEPS, 5), int), goal=None)
    assert [s["rows"] for s in bring(tmp_path, {"name": "tabletop"}, convert="keep").about["shards"]] == [LONG] * 4


GROWTH = """
import resource, sys
from pathlib import Path
from rlflow.datasets.acting import Options
from rlflow.datasets.bring import import_demos
from rlflow.envs.demos import dataset

dataset.SHARD_BYTES = 2**24
begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
folder = Path(sys.argv[1])
import_demos(folder / "d.npz", folder / "out", {"name": "tabletop"}, Options(convert="keep"), "")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begin) // 1024)
"""


@pytest.mark.slow
def test_a_dataset_larger_than_its_share_of_memory_is_imported(tmp_path):
    """1.4 GB of pictures in 16 MiB shards: what the process grows by does not follow the size of the dataset."""
    steps = 800_000
    ends = np.arange(steps) % 500 == 499
    numbers = {"state": np.zeros((steps, 2), np.float32), "action": np.zeros((steps, 2), np.float32)}
    save(tmp_path, **numbers, text=np.ones((steps, 5), int), goal=None, reward=np.zeros(steps), done=ends,
         pixels=np.zeros((steps, 24, 24, 3), np.uint8))  # fmt: skip
    run = subprocess.run([sys.executable, "-c", GROWTH, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 500
