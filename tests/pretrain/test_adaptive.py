"""Spread heads: learnt with a policy, fitted anew to what a policy does, and spent where demonstrations part."""

import json
from dataclasses import replace

import pytest
import torch

from rlflow.envs.simulators.toy import ToyRoutes, routes_command, routes_episodes
from rlflow.evaluation.episodes import EpisodeEvaluator
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.solvers import Adaptive
from rlflow.models.gaussian import GaussianField
from rlflow.models.io import load_field, save_field
from rlflow.models.mlp import MLPField
from rlflow.pretrain.adaptive import ADAPTIVE, fit_head, played, with_head
from rlflow.pretrain.worlds import main


class ToPoint(MLPField):
    """The exact velocity to one point, above a network whose spread alone is learnt."""

    def forward(self, x, t, dt, cond):
        return (0.5 - x) / (1 - t.clamp(max=0.99))[:, None, None]

    def with_spread(self, x, t, dt, cond):
        return torch.cat([self.forward(x, t, dt, cond).flatten(1), super().with_spread(x, t, dt, cond)[:, -1:]], -1)


def calls(field: MLPField, solver=None) -> float:
    """Network rows of an action."""
    policy = FlowPolicy(field.requires_grad_(False), FlowSDE(), solver or Adaptive(0.1), num_steps=10)
    policy.sample(policy.encode(torch.zeros(64, 2)))
    return policy.network_rows / 64


def test_after_a_refit_the_steps_are_not_stale():
    """A head that learnt of parted data asks for many calls; fitted to what is done now, a point, for one."""
    field = ToPoint(2, (2, 2), width=32, spread=True)
    torch.nn.init.constant_(field.spread_head[-1].bias, 1.0)
    before = {name: p.clone() for name, p in field.net.named_parameters()}
    assert calls(field) == 10
    fitted = fit_head(field, torch.zeros(64, 2), torch.full((64, 2, 2), 0.5), steps=150, rows=64)
    assert calls(fitted) < 1.5
    assert all(torch.equal(p, before[name]) for name, p in fitted.net.named_parameters())


def test_a_head_is_added_without_changing_the_policy():
    field = MLPField(3, (2, 2), width=16)
    made = with_head(field)
    x, t, cond = torch.randn(4, 2, 2), torch.rand(4), field.encode(torch.randn(4, 3))
    assert torch.equal(field(x, t, t, cond), made(x, t, t, cond))
    again = with_head(made)
    assert torch.equal(made.with_spread(x, t, 0 * t, cond), again.with_spread(x, t, 0 * t, cond))
    with pytest.raises(ValueError, match="GaussianField cannot have a spread head, an mlp can"):
        with_head(GaussianField(3, (2, 2)))


def test_a_policy_plays_for_its_own_head():
    policy = FlowPolicy(MLPField(2, (2, 2), width=16), FlowSDE(), num_steps=2)
    obs, action = played(policy, ToyRoutes(3), chunks=4)
    assert obs.shape == (12, 2)
    assert action.shape == (12, 2, 2)


def test_calls_of_an_action_are_told_in_evaluations():
    policy = FlowPolicy(MLPField(2, (2, 2), width=16, spread=True), FlowSDE(), num_steps=6)
    assert EpisodeEvaluator(policy, ToyRoutes, num=5)().means()["calls"] == 6
    assert EpisodeEvaluator(policy, ToyRoutes, num=5, solver=Adaptive(1e6))().means()["calls"] == 1
    plain = FlowPolicy(MLPField(2, (2, 2), width=16), FlowSDE(), num_steps=6)
    with pytest.raises(ValueError, match=r"eval.solver: Adaptive needs a spread head"):
        EpisodeEvaluator(plain, ToyRoutes, num=5, solver=Adaptive())


def test_demonstrations_take_both_routes_and_arrive():
    episodes = list(routes_episodes(6, 0, noise=0.15))
    assert all(episode.success and episode.terminated for episode in episodes)
    highest = [episode.obs[episode.obs[:, 0].abs().argmin(), 1] for episode in episodes]
    assert [bool(y > 0) for y in highest] == [True, False] * 3
    at = torch.tensor([[-1.0, 0.0]])
    up, down = (routes_command(at, torch.tensor([side]), noise=0.0) for side in (1.0, -1.0))
    assert torch.equal(up * torch.tensor([1.0, -1.0]), down)


def test_commands_make_a_head_and_fit_it_anew(tmp_path):
    cloning = replace(ADAPTIVE["robot_bc_routes_adaptive"], judged=4, num_demos=10)
    common = ["--steps", "2"]
    main(cloning, [*common, "--demos", str(tmp_path / "demos"), "--out", str(tmp_path / "cloned")])
    cloned = load_field(str(tmp_path / "cloned"))
    assert cloned.has_spread
    main(
        replace(ADAPTIVE["robot_spread"], chunks=2),
        [*common, "--from", str(tmp_path / "cloned"), "--out", str(tmp_path / "fit")],
    )
    fitted = load_field(str(tmp_path / "fit"))
    assert all(torch.equal(a, b) for a, b in zip(cloned.net.parameters(), fitted.net.parameters(), strict=True))
    assert json.loads((tmp_path / "fit/config.json").read_text())["judged_by"]["env"] == {"name": "toy_routes"}
    of_run = {"env": {"name": "toy_routes", "targets": None}, "policy": {"num_steps": 2}}  # a run names all settings
    save_field(MLPField(2, (2, 2)), tmp_path / "run", {}, of_run)
    quick = [*common, "--from", str(tmp_path / "run"), "--out", str(tmp_path / "refit")]
    main(replace(ADAPTIVE["robot_spread"], chunks=2), quick)
    save_field(MLPField(2, (2, 2)), tmp_path / "homeless")
    with pytest.raises(ValueError, match="does not name the simulator"):
        main(ADAPTIVE["robot_spread"], [*common, "--from", str(tmp_path / "homeless"), "--out", str(tmp_path / "no")])
