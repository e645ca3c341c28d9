"""Predictor: numpy in, numpy out, chunks from a queue, bounds as in training; and an export that needs no rlflow."""

import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from rlflow.deploy.predict import Predictor, export
from rlflow.flow.kernels import LearnedNoise
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.solvers import Heun
from rlflow.flow.squash import Tanh
from rlflow.models.mlp import MLPField

SPEC = torch.empty(4, device="meta")


def make_policy(obs_dim: int = 4, event_shape: tuple[int, ...] = (3, 2), **settings) -> FlowPolicy:
    torch.manual_seed(0)
    field = MLPField(obs_dim, event_shape, width=16)
    kernel = LearnedNoise(field.num_features, event_shape, 0.1, 0.3)
    return FlowPolicy(field, kernel, num_steps=3, **settings)


class TestQueue:
    def test_a_chunk_is_given_out_before_the_next_is_made(self):
        policy = make_policy()
        predictor = Predictor(policy, SPEC)
        obs, state, given = np.ones((5, 4), np.float32), None, []
        calls = policy.encoder_rows
        for i in range(4):
            before = None if state is None else {n: np.copy(v) for n, v in state.items()}
            old = state
            action, state = predictor.predict(obs + i, state)
            if before is not None:
                assert all(np.array_equal(before[n], old[n]) for n in before)  # nothing handed over is changed
            given.append(action)
            assert policy.encoder_rows - calls == (5 if i < 3 else 10)
        assert all(a.shape == (5, 2) and a.dtype == np.float32 for a in given)
        np.testing.assert_array_equal(np.stack(given[:3], 1), state["queue"] * 0 + predictor.predict(obs)[1]["queue"])

    def test_a_new_episode_drops_the_rest_of_its_rows_chunk(self):
        predictor, obs = Predictor(make_policy(), SPEC), np.ones((3, 4), np.float32)
        _, state = predictor.predict(obs)
        going, _ = predictor.predict(obs, state)
        started, after = predictor.predict(obs, state, np.array([False, True, False]))
        np.testing.assert_array_equal(started[[0, 2]], going[[0, 2]])
        assert not np.array_equal(started[1], going[1])
        assert after["left"].tolist() == [1, 2, 1]

    def test_one_observation_gives_one_action(self):
        predictor = Predictor(make_policy(), SPEC)
        action, state = predictor.predict(np.ones(4, np.float32))
        batched, _ = predictor.predict(np.ones((1, 4), np.float32))
        assert action.shape == (2,)
        np.testing.assert_array_equal(action, batched[0])
        assert predictor.predict(np.ones(4), state, np.array([True]))[0].shape == (2,)

    def test_dict_observations(self):
        spec = {"goal": torch.empty(1, device="meta"), "state": torch.empty(3, device="meta")}
        obs = {"state": np.ones((2, 3)), "goal": np.zeros((2, 1))}
        assert Predictor(make_policy(), spec).predict(obs)[0].shape == (2, 2)


class TestNoise:
    def test_deterministic_is_the_deployed_chain_and_repeats(self):
        policy, obs = make_policy(), np.ones((2, 4), np.float32)
        one, two = Predictor(policy, SPEC).predict(obs)[1]["queue"], Predictor(policy, SPEC).predict(obs)[1]["queue"]
        np.testing.assert_array_equal(one, two)
        other = Predictor(policy, SPEC, seed=1).predict(obs)[1]["queue"]
        assert not np.array_equal(one, other)
        assert not np.array_equal(one[0], one[1])  # rows have start noises of their own

    def test_otherwise_it_explores(self):
        policy, obs = make_policy(), np.ones((2, 4), np.float32)
        calm, wild = (Predictor(policy, SPEC).predict(obs, deterministic=d)[1]["queue"] for d in (True, False))
        assert 0.01 < float(np.abs(calm - wild).mean()) < 1

    def test_the_weights_that_were_asked_for_act(self):
        policy, obs = make_policy(), np.ones((2, 4), np.float32)
        policy.weights.snapshot("ema")
        before = Predictor(policy, SPEC).predict(obs)[0]
        with torch.no_grad():
            policy.field.net[-1].bias += 0.1
        np.testing.assert_array_equal(Predictor(policy, SPEC, weights="ema").predict(obs)[0], before)
        assert not np.array_equal(Predictor(policy, SPEC).predict(obs)[0], before)


class TestBounds:
    def test_are_those_of_training(self):
        """SimEnv's: clipped to [-1, 1] and stretched where both are finite, unchanged elsewhere."""
        low, high = torch.tensor([-2.0, -torch.inf]), torch.tensor([6.0, torch.inf])
        predictor = Predictor(make_policy(), SPEC, low, high)
        raw = Predictor(make_policy(), SPEC, torch.full((2,), -torch.inf), torch.full((2,), torch.inf))
        obs = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
        a, b = predictor.predict(obs)[1]["queue"], raw.predict(obs)[1]["queue"]
        np.testing.assert_allclose(a[..., 0], 2 + 4 * b[..., 0].clip(-1, 1), rtol=1e-6)
        np.testing.assert_array_equal(a[..., 1], b[..., 1])
        assert float(np.abs(b).max()) > 1

    def test_of_a_wrong_shape_are_refused(self):
        with pytest.raises(ValueError, match=r"bounds of shape \(3,\) for actions of shape \(2,\)"):
            Predictor(make_policy(), SPEC, torch.zeros(3), torch.ones(3))
        with pytest.raises(ValueError, match="set a chunk of 1"):
            Predictor(make_policy(event_shape=(2,)), SPEC)


class TestOtherPeoplesLoops:
    def test_stable_baselines3_evaluates_it(self):
        pytest.importorskip("stable_baselines3")
        from stable_baselines3.common.env_util import make_vec_env
        from stable_baselines3.common.evaluation import evaluate_policy

        env = make_vec_env("Pendulum-v1", n_envs=2, seed=0)
        predictor = Predictor.for_spaces(make_policy(3, (4, 1)), env.observation_space, env.action_space)
        returns, lengths = evaluate_policy(predictor, env, n_eval_episodes=2, return_episode_rewards=True)
        assert lengths == [200, 200]
        assert all(-2000 < r < 0 for r in returns)

    def test_a_gymnasium_loop_drives_it(self):
        env = gymnasium.make("Pendulum-v1")
        predictor = Predictor.for_spaces(make_policy(3, (4, 1)), env.observation_space, env.action_space)
        obs, _ = env.reset(seed=0)
        state = None
        for _ in range(10):
            action, state = predictor.predict(obs, state)
            assert env.action_space.contains(action)
            obs, *_ = env.step(action)
        assert state["calls"] == 3


SCRIPT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "rlflow":
            raise ImportError("rlflow is blocked")
sys.meta_path.insert(0, Blocked())
import torch
try:
    import rlflow
except ImportError:
    pass
else:
    raise SystemExit("rlflow was importable")
module = torch.export.load(sys.argv[1]).module()
cases = torch.load(sys.argv[2], weights_only=True)
for obs, x_0, action in cases:
    torch.testing.assert_close(module(obs, x_0), action, rtol=0, atol=1e-6)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor", "dict, heun, tanh"])
def test_an_export_runs_without_rlflow_for_any_number_of_rows(tmp_path: Path, kind: str):
    if kind == "tensor":
        policy, spec = make_policy(), SPEC
    else:
        policy = make_policy(solver=Heun(), squash=Tanh())
        spec = {"goal": torch.empty(1, device="meta"), "state": torch.empty(3, device="meta")}
    policy.weights.snapshot("ema")
    with torch.no_grad():
        policy.field.net[-1].bias += 0.1
    export(policy, spec, tmp_path / "policy.pt2", weights="ema")
    cases = []
    for n in (1, 2, 7):
        obs = torch.randn(n, 4)
        obs = {"goal": obs[:, :1], "state": obs[:, 1:]} if isinstance(spec, dict) else obs
        x_0 = torch.randn(n, 3, 2)
        with torch.no_grad(), policy.using("ema"):
            cases.append((obs, x_0, policy.squash(policy.sample(policy.encode(obs), x_0=x_0).final)))
    torch.save(cases, tmp_path / "cases.pt")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "policy.pt2"), str(tmp_path / "cases.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_policy_with_units_of_its_own_is_refused(tmp_path):
    policy = make_policy()
    policy.field.decodes_actions = True
    with pytest.raises(ValueError, match="rlflow export RUN --format lerobot"):
        Predictor(policy, SPEC)
    with pytest.raises(ValueError, match="rlflow export RUN --format lerobot"):
        export(policy, SPEC, tmp_path / "policy.pt2")
