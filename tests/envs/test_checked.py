"""Numbers that are not finite: masked, counted, named once, and never seen by whoever learns; shapes of a Step."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlflow.envs.base import VecEnv
from rlflow.envs.checked import Checked
from rlflow.envs.prompt import PromptEnv
from rlflow.envs.prompts import Prompts
from rlflow.envs.wrappers import FrameStack, RewardScaling
from rlflow.rewards.base import Reward, RewardSet
from rlflow.types import Step, Tree, tree_leaves

SHAPE = (1, 2)
NAN, INF = torch.nan, torch.inf


class Script(VecEnv):
    """Two rows of two steps an episode; row 0 shows what `shows` says, row 1 its clock; it keeps what it is sent."""

    action_shape, horizon, num_envs = SHAPE, 2, 2

    def __init__(self, shows: list[float], ends: str = "truncated", as_dict: bool = False):
        self.shows, self.ends, self.as_dict = shows, ends, as_dict
        one = torch.empty(1, device="meta")
        self.obs_spec = {"x": one, "n": torch.empty((), dtype=torch.uint8, device="meta")} if as_dict else one
        self.clock, self.sent = 0, torch.zeros(2, *SHAPE)

    def observe(self, at: int) -> Tree:
        x = torch.tensor([[self.shows[at]], [float(at)]])
        return {"x": x, "n": torch.zeros(2, dtype=torch.uint8)} if self.as_dict else x

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tree:
        return self.observe(self.clock)

    def send(self, action: Tensor, rows: slice) -> None:
        self.sent[rows] = action

    def recv(self) -> Step:
        """Every second step ends; what is reached has one number, what comes next the following one."""
        self.clock += 1
        reached, ended = self.observe(self.clock), torch.full((2,), self.clock % 3 == 2)
        if bool(ended[0]):
            self.clock += 1
        no = torch.zeros(2, dtype=torch.bool)
        terminated, truncated = (ended, no) if self.ends == "terminated" else (no, ended)
        return Step(self.observe(self.clock), torch.ones(2), terminated, truncated, reached, ~no)


def play(shows: list[float], **settings) -> tuple[Checked, list[Step]]:
    env = Checked(Script(shows, **settings), "script")
    first = env.reset(torch.arange(2))
    steps = [env.step(torch.zeros(2, *SHAPE)) for _ in range(4)]
    assert all(bool(v.isfinite().all()) for v in tree_leaves([first, [(s.obs, s.final_obs) for s in steps]]))
    return env, steps


def valid(steps: list[Step]) -> list[bool]:
    assert all(bool(step.valid[1]) for step in steps), "the other row does not notice"
    return [bool(step.valid[0]) for step in steps]


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("at", "counted"),
    [
        (0, [False, True, True, True]),  # the first observation: the step that acted on it
        (1, [False, False, True, True]),  # the one that reached it too, whose bootstrap would be of a stand-in
        (2, [True, False, True, True]),  # reached where time ended the episode
        (3, [True, True, False, True]),  # the next episode's first: reached by nobody
        (9, [True, True, True, True]),
    ],
)
def test_steps_that_saw_or_reached_it_are_masked_and_no_others(bad, at, counted, as_dict):
    shows = [bad if i == at else float(i) for i in range(8)]
    assert valid(play(shows, as_dict=as_dict)[1]) == counted


def test_what_a_task_ended_in_is_not_asked_for():
    """A simulator that breaks and ends the episode still teaches not to go there."""
    shows = [0.0, 1.0, NAN, 3.0, 4.0, NAN, 6.0]
    assert valid(play(shows, ends="terminated")[1]) == [True] * 4


def test_in_its_place_stands_what_the_row_showed_last():
    _, steps = play([5.0, NAN, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert steps[0].obs[:, 0].tolist() == [5, 1]
    assert steps[1].final_obs[:, 0].tolist() == [2, 2]


def test_an_action_that_is_not_finite_is_not_sent_and_its_step_not_valid():
    env = Checked(Script([0.0] * 8), "script")
    env.reset(torch.arange(2))
    step = env.step(torch.tensor([[[NAN, 1.0]], [[0.5, 0.5]]]))
    assert env.env.sent.tolist() == [[[0, 0]], [[0.5, 0.5]]]
    assert step.valid.tolist() == [False, True]
    assert env.step(torch.zeros(2, *SHAPE)).valid.tolist() == [True, True]


def test_they_are_counted_and_named_once():
    env, _ = play([0.0, NAN, 2.0, NAN, 4.0, 5.0, 6.0, 7.0])
    with pytest.warns(UserWarning, match="env script: 3 steps met an observation or an action that is not finite"):
        assert env.metrics() == {"env/bad_rows": 3}
    assert env.metrics() == {}
    env.step(torch.full((2, *SHAPE), NAN))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert env.metrics() == {"env/bad_rows": 2}


def test_a_saved_state_knows_who_is_blind():
    shows = [0.0, NAN, 2.0, 3.0, 4.0, 5.0, 6.0]
    env, other = (Checked(Script(shows), "script") for _ in range(2))
    for one in (env, other):
        one.reset(torch.arange(2))
    env.step(torch.zeros(2, *SHAPE))
    other.load_state_dict(env.state_dict())
    other.env.clock = 1
    assert other.step(torch.zeros(2, *SHAPE)).valid.tolist() == [False, True]


def test_wrappers_around_it_stay_finite():
    env = RewardScaling(FrameStack(Checked(Script([0.0, NAN, 2.0, 3.0, NAN, 5.0, 6.0]), "script"), 2))
    env.reset(torch.arange(2))
    for _ in range(4):
        step = env.step(torch.zeros(2, *SHAPE))
        assert bool(step.obs.isfinite().all())
        assert bool(step.reward.isfinite().all())
    assert bool(env.moments.isfinite().all())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("reward", torch.tensor(1.0), r"reward has shape \(\) .* it must be \(2,\) float"),
        ("reward", torch.ones(2, 1), r"reward has shape \(2, 1\)"),
        ("reward", torch.ones(2, dtype=torch.long), "reward has shape .* torch.int64"),
        ("terminated", torch.zeros(2), "terminated has .* it must be .* bool"),
        ("truncated", torch.zeros(2, dtype=torch.long), "truncated has"),
        ("valid", torch.ones(1, dtype=torch.bool), r"valid has shape \(1,\)"),
        ("obs", torch.ones(2), r"obs has shape \(2,\)"),
        ("final_obs", torch.ones(2, 3), r"final_obs has shape \(2, 3\) .* it must be \(2, 1\)"),
        ("num_steps", torch.ones(2), "num_steps has .* it must be .* whole"),
        ("info", {"success": torch.tensor(True)}, r"info\['success'\] has shape \(\)"),
        ("reward_parts", {"a": [1.0, 2.0]}, r"reward_parts\['a'\] is a list"),
    ],
)
def test_a_field_of_another_shape_or_dtype_is_refused_at_the_first_step(monkeypatch, field, value, message):
    env = Checked(Script([0.0] * 4), "my_envs:script")
    right = Script.recv
    monkeypatch.setattr(Script, "recv", lambda self: replace(right(self), **{field: value}))
    env.reset(torch.arange(2))
    with pytest.raises(ValueError, match=f"env my_envs:script: {message}"):
        env.step(torch.zeros(2, *SHAPE))


@pytest.mark.parametrize("spec", [{"y": torch.empty(1, device="meta")}, torch.empty(2, device="meta")])
def test_a_first_observation_that_is_not_obs_spec_is_refused(spec):
    bare = Script([0.0] * 4)
    bare.obs_spec = spec
    with pytest.raises(ValueError, match="env script: the observation of a reset"):
        Checked(bare, "script").reset(torch.arange(2))


def test_a_latent_that_is_not_finite_is_not_painted_and_not_scored():
    """A reward may make a number of it: JPEG's size of a picture of nan is one."""
    seen = []

    def size(images: Tensor) -> Tensor:
        seen.append(images)
        return torch.ones(len(images))

    rewards = RewardSet([Reward("size", size)])
    prompts = Prompts(({"prompt": "a"},))
    env = PromptEnv(prompts, rewards, 3, (3, 2, 2), lambda texts: torch.zeros(len(texts), 1), lambda x: x)
    env.reset(torch.arange(3))
    latents = torch.ones(3, 3, 2, 2)
    latents[1, 0, 0, 0] = NAN
    assert env.step(latents).valid.tolist() == [True, False, True]
    assert bool(seen[0].isfinite().all())
    with pytest.warns(UserWarning, match="env prompt: 1 steps met"):
        assert env.metrics()["env/bad_rows"] == 1
    assert env.step(torch.ones(3, 3, 2, 2)).valid.all()


def test_a_state_from_before_the_check_still_loads():
    """A run that was saved without this wrapper goes on."""
    from rlflow.envs.simulators.toy import ToyReach

    bare, checked = ToyReach(3), Checked(ToyReach(3), "toy")
    bare.reset(torch.arange(3))
    state = bare.state_dict()
    checked.load_state_dict(state)
    action = torch.full((3, *bare.action_shape), 0.1)
    after, wanted = checked.step(action), bare.step(action)
    assert torch.equal(after.reward, wanted.reward)
    again = Checked(ToyReach(3), "toy")
    again.load_state_dict(checked.state_dict())
    assert torch.equal(again.step(action).reward, bare.step(action).reward)
