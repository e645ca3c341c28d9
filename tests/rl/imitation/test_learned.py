"""The environment that pays a learned reward: by hand, of nothing but decisions, saved to the bit, fresh when drawn."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlflow.assembly.parts import make_parts
from rlflow.config import recipes
from rlflow.envs.demos.dataset import Demos, Episode, write_demos
from rlflow.envs.simulators.toy import ToyReach
from rlflow.envs.wrappers import RewardScaling
from rlflow.rl.imitation.learned import Fitting, Imitated, LearnedReward
from rlflow.rl.imitation.ratios import Constant, CoupledFlows
from rlflow.rl.off_policy.offline import offline_data
from rlflow.rl.off_policy.sac import SAC
from rlflow.train.checkpoint import pack, unpack
from rlflow.train.trainer import Trainer
from tests.interrupted import assert_equal_runs

ROWS = 8


def best(obs: dict[str, Tensor]) -> Tensor:
    """(N, 2) full speed to the goal, then rest."""
    return ((obs["goal"] - obs["state"]) / 0.25).clamp(-1, 1)


def reach_demos(folder: Path, num: int = 12) -> Demos:
    """Episodes of toy_reach by its best policy; what they earned is left out, and nobody asks for it."""
    env, episodes = ToyReach(num), []
    obs, seen, done = env.reset(100 + torch.arange(num)), [], []
    for _ in range(4):
        first = best(obs)
        second = best({"state": obs["state"] + 0.25 * first, "goal": obs["goal"]})
        for now, action in ((obs, first), ({**obs, "state": obs["state"] + 0.25 * first}, second)):
            seen.append({name: value.clone() for name, value in now.items()})
            done.append(action)
        obs = env.step(torch.stack([first, second], 1)).obs
    for row in range(num):
        told = {name: torch.stack([s[name][row] for s in seen]) for name in ("state", "goal")}
        action = torch.stack([a[row] for a in done])
        episodes.append(Episode(told, action, torch.zeros(len(action)), False, True))
    return write_demos(folder, episodes, {"name": "toy_reach"}, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demos") / "reach"
    reach_demos(path)
    return path


def learned(folder: Path, ratio: Any = None, fitting: Fitting | None = None) -> LearnedReward:
    data, whole = offline_data(Demos.open(folder), 2, 0.99, torch.device("cpu"))
    expert = data.index(whole)
    torch.manual_seed(0)
    ratio = ratio or CoupledFlows(LearnedReward.num_inputs(expert, "state_action"), layers=2, width=8)
    return LearnedReward(ratio, expert, fitting=fitting or Fitting(steps=3, batch_size=32, memory=64, shift=1.5))


def draw(step: int) -> Tensor:
    return torch.randn(ROWS, 2, 2, generator=torch.Generator().manual_seed(step))


def play(env: Any, first: int, steps: int) -> Tensor:
    """(steps, B) rewards of random actions."""
    return torch.stack([env.step(draw(first + step)).reward for step in range(steps)])


def test_pays_minus_the_ratio_of_what_was_done_there(folder: Path) -> None:
    """Before the first fit the shift; after it, by hand from the observation that was acted on, clipped as it acts."""
    env = Imitated(ToyReach(ROWS), learned(folder), every=3)
    obs = env.reset(torch.arange(ROWS))
    torch.testing.assert_close(play(env, 0, 3), torch.full((3, ROWS), 1.5))
    obs, action = env.obs, draw(3)
    step, mine = env.step(action), env.learned
    raw = torch.cat([obs["goal"], obs["state"], action.clamp(-1, 1).flatten(1)], 1)
    scaled = ((raw - mine.mean) / mine.std).clamp(-10, 10)
    x = (mine.ratio.agent.log_prob(scaled) - mine.ratio.expert.log_prob(scaled)).detach()
    torch.testing.assert_close(step.reward, 1.5 - 10 * torch.tanh(x / 10))
    assert float(step.reward.std()) > 1e-3


def test_the_true_return_is_told_and_never_looked_at(folder: Path) -> None:
    """An environment that pays otherwise gets the same learned rewards; info has its own returns."""

    class Generous(ToyReach):
        def recv(self) -> Any:
            step = super().recv()
            return replace(step, reward=step.reward + 100)

    envs = [Imitated(kind(ROWS), learned(folder), every=2) for kind in (ToyReach, Generous)]
    for env in envs:
        env.reset(torch.arange(ROWS))
    for step in range(8):
        ours, others = (env.step(draw(step)) for env in envs)
        assert torch.equal(ours.reward, others.reward)
    bare = ToyReach(ROWS)
    bare.reset(torch.arange(ROWS))
    told = [bare.step(draw(step)).info["episode_return"] for step in range(8)]
    torch.testing.assert_close(ours.info["episode_return"], told[-1], equal_nan=True)


def test_the_agent_that_does_as_the_expert_is_paid_best(folder: Path) -> None:
    """After fits on random play, the expert's decisions earn more than random ones of the same states."""
    env = Imitated(ToyReach(ROWS), learned(folder, fitting=Fitting(steps=60, batch_size=64, lr=3e-3)), every=20)
    env.reset(torch.arange(ROWS))
    play(env, 0, 60)
    mine, noise = env.learned, torch.randn(len(env.learned.expert), 4, generator=torch.Generator().manual_seed(0))
    other = torch.cat([mine.expert[:, :4], noise], 1)
    assert float(mine.reward(mine.expert).mean()) > float(mine.reward(other).mean()) + 1
    assert 0 < env.metrics()["imitation/divergence"] < 20


def test_is_saved_to_the_bit_between_two_fits(folder: Path) -> None:
    """Ratio, moments of its optimiser, what it remembers and where it stands."""
    envs = [RewardScaling(Imitated(ToyReach(ROWS), learned(folder), every=4)) for _ in range(2)]
    for env in envs:
        env.reset(torch.arange(ROWS))
    play(envs[0], 0, 6)
    envs[1].load_state_dict(unpack(*pack(envs[0].state_dict())))
    first, second = (play(env, 6, 9) for env in envs)
    assert torch.equal(first, second)
    (a, b), fresh = (env.env.learned for env in envs), learned(folder)
    for mine, other in zip(a.ratio.parameters(), b.ratio.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert not torch.equal(a.ratio.expert.mean, fresh.ratio.expert.mean)
    assert torch.equal(a.seen, b.seen)


def test_what_is_masked_is_not_remembered(folder: Path) -> None:
    mine = learned(folder, fitting=Fitting(memory=8))
    mine.see(torch.full((6, 8), 7.0), torch.tensor([True, False] * 3))
    assert mine.counts.tolist() == [True, False] * 3 + [False] * 2
    mine.see(torch.full((4, 8), 9.0), torch.ones(4, dtype=torch.bool))  # the ring goes round
    assert mine.seen[:, 0].tolist() == [9, 9, 7, 7, 7, 7, 9, 9]
    assert mine.head == 2


def test_relabelling_touches_rewards_only(folder: Path) -> None:
    data, _ = offline_data(Demos.open(folder), 2, 0.99, torch.device("cpu"))
    data = replace(data, weight=(torch.arange(len(data)) > 0).float())
    mine = learned(folder)
    mine.see(torch.randn(64, 8), torch.ones(64, dtype=torch.bool))
    mine.fit()
    paid = mine.relabel(data)
    assert all(torch.equal(getattr(paid, n), getattr(data, n)) for n in ("action", "discount", "weight", "counts"))
    assert paid.obs is data.obs
    assert paid.reward[0] == 0
    decisions = mine.decisions(data.obs, data.action, data.next_obs)
    torch.testing.assert_close(paid.reward[1:], mine.reward(decisions)[1:])


SMALL = ("train.tensorboard=false", "train.report=false", "eval.num=4", "env.num_groups=8")
PG = ("robot_reach_reinflow", ["algorithm.epochs=1", "algorithm.num_minibatches=2"])
OFF = ("robot_reach_sac", ["algorithm.start=8", "algorithm.batch_size=16", "env.horizon=2"])


def overrides(folder: Path, *more: str) -> list[str]:
    told = f"imitation={{demos: {folder}, fits: 2, batch_size: 16, shift: 1.0}}"
    return [told, *SMALL, *more]


def test_sac_draws_rewards_of_today(folder: Path) -> None:
    """The replay keeps what was paid; a batch is paid by the ratio after the last fit."""
    config = recipes.load(OFF[0], overrides(folder, *OFF[1]))
    parts = make_parts(config)
    for iteration in range(3):
        parts.algorithm.update(parts.collector.collect(iteration))
    assert isinstance(parts.algorithm, SAC)
    assert isinstance(parts.collector.env, Imitated)
    batch, mine = parts.algorithm.batch(), parts.collector.env.learned
    decisions = mine.decisions(batch.obs, batch.action, batch.next_obs)
    torch.testing.assert_close(batch.reward, mine.reward(decisions))
    parts.algorithm.relabel = None
    assert not torch.allclose(parts.algorithm.batch().reward, batch.reward)


@pytest.mark.parametrize(("recipe", "more"), [PG, OFF], ids=["policy_gradient", "sac"])
def test_two_and_two_are_four(folder: Path, tmp_path: Path, recipe: str, more: list[str]) -> None:
    given = overrides(folder, *more, "train.iterations=4")

    def stop(made: Trainer, iteration: int, metrics: dict[str, float]) -> None:
        if iteration == 2:
            made.stop()

    def run(name: str, callbacks: list[Callable[..., None]], resume: str | None = None) -> None:
        Trainer(recipe, tmp_path / name, overrides=given, callbacks=callbacks, resume=resume, quiet=True).fit()

    run("straight", [])
    run("broken", [stop])
    run("broken", [], "last")
    assert_equal_runs(tmp_path / "straight", tmp_path / "broken")


class TestRefusals:
    @pytest.mark.parametrize(
        ("recipe", "given", "said"),
        [
            ("t2i_nft", "imitation={demos: x}", "imitation: rewards are learnt in simulators"),
            ("robot_reach_sac", "imitation={ratio: cfill}", "imitation.ratio: unknown ratio 'cfill'"),
            ("robot_reach_sac", "imitation={ratio: {name: cfil, caps: 3}}", "cfil has no such setting"),
            ("robot_reach_sac", "imitation={fitz: 3}", "imitation.fitz"),
        ],
    )
    def test_of_the_config(self, recipe: str, given: str, said: str) -> None:
        with pytest.raises(ValueError, match=said):
            recipes.load(recipe, [given])

    def test_of_rewards_beside_it(self) -> None:
        weights = "reward.weights={tests.rl.imitation.test_learned:best: 1}"
        with pytest.raises(ValueError, match=r"imitation: is the reward; leave reward\.weights out"):
            recipes.load("robot_reach_sac", ["imitation={}", weights], trust_code=True)

    def test_of_more_episodes_than_there_are(self, folder: Path) -> None:
        config = recipes.load("robot_reach_sac", [f"imitation={{demos: {folder}, episodes: 13}}"])
        with pytest.raises(ValueError, match=r"imitation\.episodes: .* has 12, fewer than 13"):
            make_parts(config)

    def test_of_pictures(self, folder: Path) -> None:
        data, _ = offline_data(Demos.open(folder), 2, 0.99, torch.device("cpu"))
        seen = replace(data, obs={**data.obs, "camera": torch.zeros(len(data), 8, 8, 3, dtype=torch.uint8)})
        with pytest.raises(ValueError, match="densities are of numbers"):
            LearnedReward(Constant(8), seen)
