"""scripts/robot_baselines.py: a cloned Gaussian starts as its demonstrations play, and both pay what they say."""

import json

import pytest
import torch

pytest.importorskip("stable_baselines3")
pytest.importorskip("mujoco")

from rlflow.envs.demos.dataset import Episode, write_demos
from rlflow.envs.demos.experts import GaussianExpert, embedded_expert, play
from rlflow.envs.seeds import evaluation_seeds
from rlflow.report.metrics_file import METRICS, encode_row


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("robot_baselines")


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """Demonstrations whose action is a linear function of far-off observations, plus noise of std .1."""
    rng, folder = torch.Generator().manual_seed(0), tmp_path_factory.mktemp("demos") / "linear"
    matrix = 0.1 * torch.randn(11, 3, generator=rng)

    def episode():
        seen = torch.randn(200, 11, generator=rng)
        action = seen @ matrix + 0.1 * torch.randn(200, 3, generator=rng)
        return Episode(100 + 30 * seen, action, torch.ones(200), terminated=True, truncated=False)

    return write_demos(folder, (episode() for _ in range(40)), {"name": "hopper"}, {}, bound=None), matrix


def test_the_clones_mean_is_the_demonstrations_and_its_noise_is_as_told(script, linear):
    demos, matrix = linear
    settings = script.Settings("hopper", demos=demos.folder, log_std=-2.0, clone_steps=400)
    model, seen = script.cloned(settings), torch.randn(500, 11)
    law = model.policy.get_distribution(100 + 30 * seen).distribution
    assert (law.mean - seen @ matrix).square().mean() < 0.05**2  # of a signal of .33^2
    torch.testing.assert_close(law.stddev, torch.full((500, 3), -2.0).exp())


def test_ppo_moves_the_clone_but_not_its_normaliser(script, linear):
    settings = script.Settings("hopper", demos=linear[0].folder, clone_steps=1)
    model = script.cloned(settings)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.lr_schedule = lambda _: 3e-4  # the one that falls ends this short a run at 0
    model.learn(script.NUM_ENVS * script.NUM_STEPS)
    moved = {name for name, value in model.policy.state_dict().items() if not torch.equal(value, before[name])}
    assert {"log_std", "action_net.weight", "value_net.weight"} <= moved
    assert not model.get_env().norm_obs
    normalisers = [name for name in before if name.endswith("moments")]
    assert normalisers
    assert not moved & set(normalisers)
    torch.testing.assert_close(before[normalisers[0]], linear[0].moments)


def test_the_judge_plays_the_mean_action_from_the_evaluations_start_states(script):
    """The expert's weights in stable-baselines3's network return what the expert without noise returns."""
    expert, _ = GaussianExpert.load(embedded_expert("hopper"))
    settings = script.Settings("hopper", episodes=3)
    model = script.scratch(settings)
    env, policy = model.get_env(), model.policy
    env.obs_rms.mean, env.obs_rms.var = expert.mean.double().numpy(), expert.std.double().square().numpy()
    for mine, theirs in ((policy.mlp_extractor.policy_net[0], expert.net[0]), (policy.action_net, expert.net[4])):
        mine.load_state_dict(theirs.state_dict())
    policy.mlp_extractor.policy_net[2].load_state_dict(expert.net[2].state_dict())
    expert.log_std.data.fill_(-30)
    played = play(
        settings.simulators(3), lambda obs: expert(obs, torch.Generator()).unsqueeze(1), int(evaluation_seeds(0, 1))
    )
    expected = [float(e.reward.sum()) for e in played]
    torch.testing.assert_close(
        script.judge(model, settings).tolist(), expected, rtol=2e-2, atol=0
    )  # contacts amplify rounding


def test_a_curve_begins_at_0_and_ends_with_the_steps_asked_for(script):
    rollout = script.NUM_ENVS * script.NUM_STEPS
    found = script.run("scratch", script.Settings("hopper", steps=2 * rollout, episodes=2, points=2))
    assert [point["env_steps"] for point in found["curve"]] == [0, rollout, 2 * rollout]
    assert found["return"] == found["curve"][-1]["return"]
    assert found["curve"][0]["seconds"] < found["curve"][1]["seconds"]
    json.dumps(found, allow_nan=False)


def test_steps_are_those_of_a_run(script, tmp_path):
    with pytest.raises(SystemExit, match="--steps"):
        script.steps_of(tmp_path)
    (tmp_path / METRICS).write_bytes(
        encode_row(1, "train", {"cost/samples_total": 5}) + encode_row(2, "eval", {"a": 1})
    )
    assert script.steps_of(tmp_path) == 5
