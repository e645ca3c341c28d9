"""Gymnasium environments with pictures, numbers and sentences, by name: rows here, rows in processes, a VectorEnv."""

import gymnasium
import numpy as np
import pytest
import torch

from rlflow import registry
from rlflow.envs.conformance import CHECKS, Subject
from rlflow.envs.simulators.gym_vector import gym_vector
from rlflow.envs.simulators.spoken import Spoken
from rlflow.envs.simulators.task_rows import TaskRows
from rlflow.types import sentences

GOALS = ("left", "rechts außen")


class Slide(gymnasium.Env):
    """A dot on a line of eight pixels, a picture of it, and the sentence that says to which end it shall go."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, goal: int | None = None, picture: int = 8):
        self.goal, self.given, self.size = 0, goal, picture
        self.observation_space = gymnasium.spaces.Dict(
            {
                "pixels": gymnasium.spaces.Dict({"top": gymnasium.spaces.Box(0, 255, (picture, picture, 3), np.uint8)}),
                "agent_pos": gymnasium.spaces.Box(-1, 1, (1,), np.float64),
                "task": gymnasium.spaces.Text(16, charset="abcdefghijklmnopqrstuvwxyzß "),
            }
        )
        self.action_space = gymnasium.spaces.Box(-0.5, 0.5, (1,), np.float32)

    @property
    def task_description(self) -> str:
        return f"go {GOALS[self.goal]}"

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.goal = int(self.np_random.integers(2)) if self.given is None else self.given
        self.place = self.np_random.uniform(-0.4, 0.4, 1)
        return self.seen(), {}

    def seen(self):
        picture = np.zeros((self.size, self.size, 3), np.uint8)
        picture[:, int((self.place[0] + 1) * 0.499 * self.size)] = 255
        return {"pixels": {"top": picture}, "agent_pos": self.place.copy(), "task": GOALS[self.goal]}

    def step(self, action):
        self.place = np.clip(self.place + action, -1, 1)
        done = bool(abs(self.place[0] - (1, -1)[self.goal == 0]) < 0.1)
        return self.seen(), float(done), done, False, {"is_success": done}


def slides(num_envs: int, limit: int = 6, mode: str = "NextStep") -> gymnasium.vector.VectorEnv:
    """What `make` names."""
    makers = [lambda: gymnasium.wrappers.TimeLimit(Slide(), limit)] * num_envs
    return gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=gymnasium.vector.AutoresetMode(mode))


class Careless(Slide):
    """Its goal comes from NumPy's global generator, as the task of OGBench's goal-conditioned arms does."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.goal = int(np.random.randint(2))
        return self.seen(), {}


gymnasium.register("Careless-v0", entry_point=Careless, max_episode_steps=6)
gymnasium.register("Slide-v0", entry_point=Slide, max_episode_steps=6)
MAKE = f"{__name__}:slides"


def by_id(chunk: int, limit: int = 6, **settings):
    return lambda n: gym_vector(n, "Slide-v0", chunk=chunk, gamma=0.9, max_steps=limit, **settings)


def by_make(mode: str, limit: int = 6):
    return lambda n: gym_vector(n, make=MAKE, max_steps=limit, options={"limit": limit, "mode": mode})


SUBJECTS = {
    "rows": Subject(by_id(2), by_id(2, 20), by_id(1), gamma=0.9),
    "processes": Subject(by_id(2, processes=True), by_id(2, 20), by_id(1), gamma=0.9, num_envs=2, num_steps=12),
    "make_next_step": Subject(by_make("NextStep"), by_make("NextStep", 20), masked_reset=False),
    "make_same_step": Subject(by_make("SameStep"), by_make("SameStep", 20), masked_reset=False),
    "make_disabled": Subject(by_make("Disabled"), by_make("Disabled", 20)),
    "sentence": Subject(
        by_id(3, sentence_from="task_description"), None, by_id(1, sentence_from="task_description"), gamma=0.9
    ),
}


@pytest.mark.parametrize("one", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "processes" else n for n in SUBJECTS])
def test_environment_conforms(name, one):
    one(SUBJECTS[name])


def test_pictures_are_bytes_and_sentences_are_read():
    env = gym_vector(4, "Slide-v0")
    obs = env.reset(torch.arange(4))
    assert obs["pixels"]["top"].shape == (4, 8, 8, 3)
    assert obs["pixels"]["top"].dtype == obs["task"].dtype == torch.uint8
    assert sentences(obs["task"]) == [GOALS[env.sim.envs[i].unwrapped.goal] for i in range(4)]
    assert set(sentences(obs["task"])) == set(GOALS)


@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_success_is_told_and_a_row_waits_after_its_end_in_mid_chunk(processes):
    env = gym_vector(2, "Slide-v0", chunk=5, processes=processes)
    env.reset(torch.arange(2))
    goal = [1.0 if text == GOALS[1] else -1.0 for text in sentences(env.sim._obs["task"])] if processes else [
        (1.0, -1.0)[sim.unwrapped.goal == 0] for sim in env.sim.envs
    ]  # fmt: skip
    step = env.step(torch.tensor(goal)[:, None, None].expand(2, 5, 1))
    assert step.terminated.all()
    assert step.info["success"].tolist() == [1, 1]
    assert (step.num_steps < 5).all(), "half a unit a step, one and a bit to go"
    assert step.info["episode_length"].tolist() == step.num_steps.tolist()


@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_start_from_numpys_global_generator_follows_the_seed_too(processes):
    """Training's seeds and evaluation's differ; the caller's own draws go on as if nothing had happened."""
    env, seeds = gym_vector(16, "Careless-v0", processes=processes), torch.arange(16)
    np.random.seed(0)
    told = [sentences(env.reset(s)["task"]) for s in (seeds, seeds, seeds.flip(0), seeds + 2**40)]
    assert np.random.randint(2**31) == np.random.RandomState(0).randint(2**31)
    assert told[0] == told[1] == told[2][::-1] != told[3]
    assert set(told[0]) == set(GOALS)


def test_a_sentence_given_is_observed_beside_numbers():
    env = gym_vector(2, "Pendulum-v1", sentence="stand up")
    obs = env.reset(torch.arange(2))
    assert set(obs) == {"state", "task"}
    assert sentences(obs["task"]) == ["stand up"] * 2
    assert {n: tuple(v.shape) for n, v in env.obs_spec.items()} == {"state": (3,), "task": (256,)}


def test_what_is_asked_is_asked_again_after_a_reset():
    env = gym_vector(3, "Slide-v0", sentence_from="task_description", max_steps=2, chunk=2)
    told = set(sentences(env.reset(torch.arange(3))["task"]))
    for _ in range(4):
        obs = env.step(torch.zeros(3, 2, 1)).obs
        assert sentences(obs["task"]) == [sim.unwrapped.task_description for sim in env.sim.sim.envs]
        told |= set(sentences(obs["task"]))
    assert told == {"go left", "go rechts außen"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "env_id.*or make.*one of the two"),
        ({"env_id": "Slide-v0", "make": MAKE}, "one of the two"),
        ({"make": MAKE, "processes": True}, "leave processes out"),
        ({"env_id": "Slide-v0", "sentence": "a", "sentence_from": "b"}, "give one of them"),
        ({"make": "nowhere.at_all:f"}, "'nowhere.at_all:f' cannot be imported.*module:function"),
        ({"make": MAKE, "chunk": 3, "max_steps": 6}, "cannot hold a row that ended in mid-chunk: use chunk=1"),
        ({"env_id": "Slide-v0", "options": {"goal": 0}, "max_steps": 0}, "at least 1 step"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        gym_vector(2, **settings)


def test_a_function_of_ones_own_needs_trust():
    with pytest.raises(ValueError, match="--trust-code"):
        registry.build("env", "env.settings", {"name": "gym_vector", "make": MAKE}, {"num_envs": 1, "gamma": 0.9})


def test_rows_borrow_environments_of_the_task_of_their_seed():
    made = []

    def maker(goal):
        return lambda: made.append(goal) or gymnasium.wrappers.TimeLimit(Slide(goal), 4)

    sim = TaskRows({"left": maker(0), "right": maker(1)}, 3, max_steps=4)
    everyone = torch.ones(3, dtype=torch.bool)
    for seeds in ([0, 1, 2], [1, 3, 4], [0, 2, 5]):
        obs = sim.reset(torch.tensor(seeds), everyone)
        assert sim.asked.tolist() == [seed % 2 for seed in seeds]
        assert sentences(obs["task"]) == [GOALS[seed % 2] for seed in seeds]
        assert len({id(env) for env in sim.envs}) == 3
    assert sorted(made) == [0, 0, 1, 1], "two of each at once: no more are made"
    assert Spoken(sim, lambda: ["a"] * 3).tasks == ["left", "right"]
