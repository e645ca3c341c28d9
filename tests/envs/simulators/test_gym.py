"""The Gymnasium adapter: the same numbers as a plain loop, in every autoreset mode, and clear words on what it cannot read."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rlflow.envs.seeds import episode_seeds
from rlflow.envs.simulators.gym import gym
from rlflow.envs.simulators.gym_vector import vector_env
from rlflow.envs.simulators.success import Success


class Walk(gymnasium.Env):
    """x walks by the action (bounds +-2); the end is |x| > 3; pixels and a nested dictionary are observed."""

    def __init__(self, start: float = 1.0):
        box = spaces.Box(-9, 9, (1,), np.float64)
        inner = spaces.Dict({"x": box, "target": box})
        self.observation_space = spaces.Dict({"pixels": spaces.Box(0, 255, (2, 2, 3), np.uint8), "state": inner})
        self.action_space = spaces.Box(-2, 2, (1,), np.float32)
        self.spread, self.count = start, 0

    def observe(self) -> dict[str, Any]:
        state = {"x": self.x, "target": np.ones(1)}
        return {"pixels": np.full((2, 2, 3), round(10 * abs(float(self.x[0]))), np.uint8), "state": state}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-self.spread, self.spread, 1)
        return self.observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.x, self.count = self.x + action, self.count + 1
        done = bool(abs(self.x[0]) > 3)
        return self.observe(), float(self.x[0]), done, False, {"is_success": bool(self.x[0] < -3)} if done else {}


gymnasium.register("rlflow_tests/Walk-v0", entry_point=Walk, max_episode_steps=4)
gymnasium.register("rlflow_tests/Endless-v0", entry_point=Walk)
SEEDS = torch.tensor([3, 8, 11])
ACTIONS = torch.rand(60, 3, 1, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1


def plain(row: int, seeds: list[int] | None = None) -> list[dict[str, Any]]:
    """A loop over one environment with resets of its own, what ends kept apart from what begins."""
    env, episode, found = gymnasium.make("rlflow_tests/Walk-v0"), 0, []
    env.reset(seed=int(SEEDS[row]))
    for action in ACTIONS[:, row, 0].numpy():
        obs, reward, terminated, truncated, info = env.step(2 * action)
        found.append({"x": obs["state"]["x"], "pixels": obs["pixels"], "reward": reward, "terminated": terminated})
        found[-1] |= {"truncated": truncated and not terminated, "success": info.get("is_success", False)}
        if terminated or truncated:
            episode += 1
            env.reset(seed=int(episode_seeds(SEEDS[row], torch.tensor(episode))) if seeds is None else None)
    return found


def matches(step: Any, row: int, expected: dict[str, Any]) -> None:
    assert torch.equal(step.reached["state"]["x"][row], torch.tensor(expected["x"], dtype=torch.float32))
    assert np.array_equal(step.reached["pixels"][row].numpy(), expected["pixels"])
    assert float(step.reward[row]) == pytest.approx(expected["reward"], abs=1e-6)
    assert bool(step.terminated[row]) == expected["terminated"]
    assert bool(step.truncated[row]) == expected["truncated"]


def test_by_id_is_a_plain_loop_with_the_episodes_seeds():
    env = gym(3, "rlflow_tests/Walk-v0")
    obs = env.reset(SEEDS)
    assert obs["pixels"].dtype == torch.uint8
    assert obs["state"]["x"].dtype == torch.float32
    assert env.obs_dim == 12 + 2
    assert env.horizon == 4
    loops, ends = [plain(row) for row in range(3)], 0
    for t, action in enumerate(ACTIONS):
        step = env.step(action)
        ends += int(step.ended.sum())
        for row in range(3):
            matches(step, row, loops[row][t])
    assert ends > 6


@pytest.mark.parametrize("success", ["is_success", None])
@pytest.mark.parametrize("mode", AutoresetMode)
def test_a_vector_env_is_a_plain_loop_in_every_mode(mode, success):
    """Success is found under its usual name, too."""
    own = None if mode == AutoresetMode.DISABLED else []  # else later episodes come from the environment's generator
    vector = SyncVectorEnv([lambda: gymnasium.make("rlflow_tests/Walk-v0")] * 3, autoreset_mode=mode)
    env = vector_env(vector, max_steps=4, success=success)
    env.reset(SEEDS)
    loops, at, lost, succeeded = [plain(row, own) for row in range(3)], [0, 0, 0], 0, 0
    for _ in ACTIONS:
        step = env.step(torch.stack([ACTIONS[at[row], row] for row in range(3)]))  # the next of each row's own loop
        for row in range(3):
            if not step.valid[row]:
                lost += 1
                assert float(step.reward[row]) == 0
                assert not step.ended[row]
                assert int(step.num_steps[row]) == 0
                continue
            matches(step, row, loops[row][at[row]])
            if step.ended[row]:
                told = float(step.info["success"][row].nan_to_num())  # nan before a word was heard
                assert bool(told) == loops[row][at[row]]["success"]
                succeeded += int(told)
            at[row] += 1
    assert succeeded > 0
    assert (lost > 3) == (mode == AutoresetMode.NEXT_STEP)


def test_a_vector_env_that_resets_by_itself_refuses_a_reset_of_some_rows():
    vector = SyncVectorEnv([lambda: gymnasium.make("rlflow_tests/Walk-v0")] * 3, autoreset_mode="SameStep")
    env = vector_env(vector, max_steps=4)
    env.reset(SEEDS)
    with pytest.raises(ValueError, match="make it with autoreset_mode=DISABLED"):
        env.reset(SEEDS, torch.tensor([True, False, False]))


def test_time_limit_options_and_success_can_be_set():
    env = gym(2, "rlflow_tests/Endless-v0", chunk=2, max_steps=6, options={"start": 0.0}, success="is_success")
    assert env.horizon == 3
    assert env.reset(SEEDS[:2])["state"]["x"].tolist() == [[0.0], [0.0]]
    step = env.step(torch.tensor([[[1.0], [1.0]], [[-1.0], [-1.0]]]))
    assert step.terminated.tolist() == [True, True]
    assert step.info["success"].tolist() == [0.0, 1.0]
    assert env.exact_resume is False


def test_a_row_rests_after_its_end():
    env = gym(2, "rlflow_tests/Walk-v0", chunk=3, options={"start": 0.0})
    env.reset(SEEDS[:2])
    actions = torch.tensor([[[0.1]] * 3, [[1.0]] * 3])
    for taken in ([3, 2], [1, 2]):  # the time limit is 4, the edge of the second row 2 steps away
        before = [e.unwrapped.count for e in env.sim.envs]
        step = env.step(actions)
        assert [e.unwrapped.count - b for e, b in zip(env.sim.envs, before, strict=True)] == taken
        assert step.num_steps.tolist() == taken


@pytest.mark.parametrize(
    ("info", "told"),
    [
        ({"is_success": True}, 1.0),
        ({"is_success": np.False_}, 0.0),
        ({"success": np.array([1.0])}, 1.0),
        ({"success": torch.tensor(0.0)}, 0.0),
        ({"goal_achieved": 1}, 1.0),
        ({"is_success": 0, "success": 1}, 0.0),
        ({"is_success": None}, np.nan),
        ({"success": "yes"}, np.nan),
        ({"success": np.ones(2)}, np.nan),
        ({"coverage": 1.0}, np.nan),
    ],
)
def test_success_is_read_under_its_usual_names(info, told):
    np.testing.assert_equal(Success().of_row(info), told)
    if "is_success" in info and told == told:
        final = {"final_info": {"is_success": np.array([info["is_success"]]), "_is_success": np.array([True])}}
        for vector in (final, {"final_info": [info]}, {"is_success": np.array([info["is_success"]], object)}):
            np.testing.assert_equal(Success().of_rows(vector, 1), [told])


@pytest.mark.parametrize(("paid", "found"), [(np.array([2.0]), 2.0), (None, np.nan), (np.float32(2), 2.0)])
def test_a_reward_of_one_number_is_a_reward(monkeypatch, paid, found):
    np.testing.assert_equal(paying(monkeypatch, paid).reward.tolist(), [found])


@pytest.mark.parametrize("paid", [np.ones(2), "much", {"a": 1.0}])
def test_a_reward_that_is_no_number_is_refused_by_its_environment(monkeypatch, paid):
    with pytest.raises(ValueError, match="Walk.step: reward is .* it must be one number"):
        paying(monkeypatch, paid)


def paying(monkeypatch: pytest.MonkeyPatch, paid: Any) -> Any:
    """The first step of an environment that pays this."""
    right = Walk.step
    monkeypatch.setattr(Walk, "step", lambda self, action: (right(self, action)[0], paid, *right(self, action)[2:]))
    env = gym(1, "rlflow_tests/Walk-v0", options={})
    env.reset(SEEDS[:1])
    return env.step(torch.zeros(1, 1, 1))


def test_silence_means_no_success_where_a_word_was_heard_or_a_name_given():
    found = Success()
    assert np.isnan(found.of_rows({}, 2)).all()
    assert found.of_rows(
        {"is_success": np.array([True, False]), "_is_success": np.array([True, False])}, 2
    ).tolist() == [1, 0]
    assert found.of_row({}) == 0
    assert Success("is_success").of_row({}) == 0


@pytest.mark.parametrize("limit", [0, -1, -5])
def test_a_time_limit_below_one_step_is_refused(limit):
    with pytest.raises(ValueError, match=f"max_steps: an episode of .* has at least 1 step, got {limit}"):
        gym(1, "rlflow_tests/Walk-v0", max_steps=limit)
    vector = SyncVectorEnv([lambda: gymnasium.make("rlflow_tests/Walk-v0")])
    with pytest.raises(ValueError, match="max_steps"):
        vector_env(vector, max_steps=limit)


class Half(Walk):
    """Its action has a lower bound alone."""

    def __init__(self):
        super().__init__()
        self.action_space = spaces.Box(np.zeros(1, np.float32), np.full(1, np.inf, np.float32))


gymnasium.register("rlflow_tests/Half-v0", entry_point=Half, max_episode_steps=4)


def test_an_action_stays_in_a_space_with_one_bound():
    env = gym(1, "rlflow_tests/Half-v0", options={})
    env.reset(SEEDS[:1])
    before = env.sim.envs[0].unwrapped.x.copy()
    env.step(torch.full((1, 1, 1), -3.0))
    assert env.sim.envs[0].unwrapped.x == before


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("rlflow_tests/Endless-v0", "has no time limit of its own: set max_steps"),
        ("CartPole-v1", r"the action space of CartPole-v1 is Discrete\(2\), .* use a continuous version"),
        (
            "FrozenLake-v1",
            r"the observation space of FrozenLake-v1 is Discrete\(16\), only Box, Text and Dict of them.*Flatten",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_space_and_the_fix(env_id, message):
    with pytest.raises(ValueError, match=message):
        gym(1, env_id)


def test_a_vector_env_that_does_not_say_how_it_resets_is_refused():
    vector = SyncVectorEnv([lambda: gymnasium.make("rlflow_tests/Walk-v0")])
    vector.metadata = {}
    with pytest.raises(ValueError, match=r"set metadata\['autoreset_mode'\]"):
        vector_env(vector)
