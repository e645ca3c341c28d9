"""A run whose learner acts on a frozen policy: trained, opened again and deployed, the two make the robot's actions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rlflow as rf
from rlflow.assembly.environment import make_steering
from rlflow.config import recipes
from rlflow.deploy.predict import export
from rlflow.deploy.record import ROWS, InTurn
from rlflow.deploy.steered import Steered
from rlflow.envs.bounds import Bounds
from rlflow.envs.frozen import BasePolicy, Flow, StartNoise
from rlflow.flow.kernels import Ancestral
from rlflow.flow.noise import Key, noise
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.select import Select
from rlflow.models.io import save_field
from rlflow.models.mlp import MLPField
from rlflow.train.trainer import Trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained policy of toy_routes, evaluated at three steps."""
    torch.manual_seed(0)
    judged = {"policy": {"num_steps": 3}, "env": {"name": "toy_routes"}}
    return str(save_field(MLPField(2, (2, 2), 16), tmp_path_factory.mktemp("base") / "model", judged_by=judged))


STEERINGS = {"start_noise": {"name": "start_noise", "bound": 2.0}, "residual": {"name": "residual", "scale": 0.3}}
STEERINGS["part"] = STEERINGS["start_noise"] | {"chosen": [1, 2]}


def config(base: str, steering: str) -> dict[str, Any]:
    return {
        "base": "robot_dsrl",
        "policy": {"field": {"name": "gaussian", "width": 8}},
        "algorithm": {"start": 0, "batch_size": 8, "updates_per_step": 0.25, "critic_width": 8},
        "env": {"name": "toy_routes", "settings": {"chunk": 2}, "num_groups": 4, "horizon": 4}
        | {"frozen": {"policy": base, "steering": STEERINGS[steering]}},
        "train": {"iterations": 2, "tensorboard": False, "report": False},
        "eval": {"num": 6, "every": 0},
    }


@pytest.fixture(scope="module", params=STEERINGS)
def run(request: pytest.FixtureRequest, base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs") / request.param
    Trainer(config(base, request.param), folder, quiet=True).fit()
    return folder, request.param


def test_what_is_deployed_is_the_frozen_policy_under_the_learners_hand(run: tuple[Path, str]) -> None:
    folder, kind = run
    policy, obs, key, ids = rf.load(folder), torch.randn(5, 2), Key(0, "test"), torch.arange(5)
    flow = policy.select.steering.flow
    with torch.no_grad():
        action = policy.select.act(policy, obs, policy.plan(), key, ids)
        x_0 = noise(Key(0, "test/frozen"), ids, (2, 2))
        base = flow(obs, x_0)
        seen = {"obs": obs, "base": base} if kind == "residual" else obs
        u = policy.squash(policy.sample(policy.encode(seen), key=key, row_ids=ids).final)
        started = torch.cat([2.0 * u, x_0[:, 1:]], 1) if kind == "part" else 2.0 * u
        expected = base + 0.3 * u if kind == "residual" else flow(obs, started)
    assert torch.equal(action, expected)
    assert float(u.abs().max()) > 0


def test_the_model_of_the_run_is_evaluated_as_the_run(run: tuple[Path, str]) -> None:
    """What lies inside its environment is told by its config.json, from wherever the folder is."""
    folder, _ = run
    assert rf.evaluate(folder / "model") == rf.evaluate(folder)


def test_a_predictor_gives_actions_of_the_robot(run: tuple[Path, str]) -> None:
    folder, _ = run
    predictor = rf.Predictor(rf.load(folder), torch.empty(2, device="meta"))
    action, state = predictor.predict(torch.zeros(3, 2).numpy())
    assert action.shape == (3, 2)
    assert state["queue"].shape == (3, 2, 2)


class Server:
    """A black box: six numbers of noise, chunks of one action of two."""

    noise_shape = (6,)

    def __call__(self, obs: Tensor, x_0: Tensor) -> Tensor:
        return x_0[:, None, :2] - x_0[:, None, 4:]

    def features(self, obs: Tensor) -> Tensor:
        return obs


def around(flow: Flow, shape: tuple[int, ...]) -> FlowPolicy:
    policy = FlowPolicy(MLPField(2, shape, 16), Ancestral(), num_steps=2)
    policy.select = Steered(Select(), StartNoise(flow))
    return policy


def test_a_predictor_around_a_black_box_plans_what_the_box_makes() -> None:
    predictor = rf.Predictor(around(Server(), (6,)), torch.empty(2, device="meta"))
    assert predictor.chunk_shape == (1, 2)
    action, state = predictor.predict(torch.zeros(3, 2).numpy())
    assert action.shape == (3, 2)
    assert state["left"].tolist() == [0, 0, 0], "one action, then it plans anew"


class OwnUnits(MLPField):
    decodes_actions = True

    def decode(self, x: Tensor) -> Tensor:
        return x[..., :2] / 10


def test_a_predictor_around_a_policy_with_units_of_its_own_is_refused() -> None:
    frozen = FlowPolicy(OwnUnits(2, (3, 4), 16), Ancestral(), num_steps=2)
    with pytest.raises(ValueError, match="what acts on a LeRobot policy is played by rlflow eval"):
        rf.Predictor(around(BasePolicy(frozen), (3, 4)), torch.empty(2, device="meta"))


@pytest.mark.parametrize("inside", [False, True], ids=["plain", "frozen"])
def test_what_is_recorded_of_a_policy_with_units_of_its_own_is_in_the_environments(inside: bool) -> None:
    """The first two of the three actions that it plans, stretched, in turn."""
    policy = FlowPolicy(OwnUnits(2, (3, 4), 16), Ancestral(), num_steps=2)
    policy = around(BasePolicy(policy), (3, 4)) if inside else policy
    bounds, obs = Bounds(torch.full((2,), -0.5), torch.full((2,), 0.5)), torch.randn(ROWS, 2)
    turn = InTurn(policy, bounds, seed=7, length=2)
    with torch.no_grad():
        made = policy.select.act(policy, obs, policy.plan(), Key(7, "record", 0), torch.arange(ROWS))[..., :2] / 10
    for step in range(2):
        torch.testing.assert_close(bounds(turn(obs))[:, 0], made[:, step].clamp(-0.5, 0.5), atol=1e-6, rtol=0)
    assert turn.made == 1
    turn(obs)
    assert turn.made == 2


def test_a_plain_policys_chunk_is_recorded_whole() -> None:
    """Whatever the settings of its environment say, or leave to their default."""
    policy = FlowPolicy(MLPField(2, (3, 2), 16), Ancestral(), num_steps=2)
    turn = InTurn(policy, None, seed=7, length=1)
    for _ in range(3):
        turn(torch.zeros(ROWS, 2))
    assert turn.made == 1


def test_an_export_would_leave_the_frozen_policy_behind(run: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="acts on a frozen policy, which is not exported: use a Predictor"):
        export(rf.load(run[0]), torch.empty(2, device="meta"), tmp_path / "x.pt2")


def test_best_of_n_by_a_critic_of_start_noises_is_refused(run: tuple[Path, str]) -> None:
    with pytest.raises(ValueError, match="a critic of what is done to its env.frozen"):
        rf.load(run[0], select={"name": "best_of", "num": 2, "scorer": "critic"})


def test_the_frozen_policy_samples_as_it_is_evaluated(base: str) -> None:
    steering = make_steering(recipes.load(config(base, "start_noise")))
    assert steering is not None
    assert steering.flow.policy.num_steps == 3  # type: ignore[attr-defined]
    assert not any(p.requires_grad for p in steering.flow.policy.parameters())  # type: ignore[attr-defined]
    more = recipes.load(config(base, "start_noise"), ["env.frozen.num_steps=5"])
    assert make_steering(more).flow.policy.num_steps == 5  # type: ignore[union-attr, attr-defined]


class TestRefused:
    """Before anything is played, with the path of the setting."""

    def refused(self, base: str, message: str, *overrides: str) -> None:
        with pytest.raises(ValueError, match=message):
            make_steering(recipes.load(config(base, "start_noise"), list(overrides)))

    def test_a_network_from_scratch(self, base: str) -> None:
        self.refused(base, r"env\.frozen\.policy: mlp is a network from scratch", "env.frozen.policy=mlp")

    def test_a_run_that_acts_on_a_frozen_policy_itself(self, base: str, run: tuple[Path, str]) -> None:
        self.refused(base, "acts on a frozen policy of its own", f"env.frozen.policy={run[0] / 'model'}")

    def test_no_checkpoint(self, base: str) -> None:
        self.refused(base, r"env\.frozen\.policy: no checkpoint 'nothing'", "env.frozen.policy=nothing")

    def test_a_setting_that_there_is_not(self, base: str) -> None:
        self.refused(base, r"env\.frozen\.steering\.bnd: .*did you mean 'bound'", "env.frozen.steering.bnd=1")

    def test_demonstrations(self, base: str) -> None:
        self.refused(base, "demonstrations hold actions", "algorithm.offline={demos: demos/x}")

    def test_images(self) -> None:
        with pytest.raises(ValueError, match=r"env\.frozen: is of simulators"):
            recipes.load("t2i_nft", ["env.frozen={policy: shapes}"])
