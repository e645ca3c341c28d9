"""Toys: known optima and values, seeds that decide everything, an episode that can be taken up in the middle."""

import pytest
import torch
from torch import Tensor

from rlflow.envs.seeds import episode_seeds
from rlflow.envs.sim import SimEnv
from rlflow.envs.simulators.toy import CENTRES, RoutesSim, ToyBandit, ToyImage, ToyMDP, ToyReach, ToyRoutes
from rlflow.types import tree_leaves

SEEDS = torch.tensor([0, 1, 2, 3, 4, 2**40 + 1])
ENVS = [ToyImage, ToyReach]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def play(env: ToyReach, actions: Tensor) -> Tensor:
    """Rewards (T, B) of the actions (T, B, 2, 2)."""
    return torch.stack([env.step(a).reward for a in actions])


@pytest.mark.parametrize("kind", ENVS)
class TestBoth:
    def test_an_episode_is_a_function_of_its_seed(self, kind):
        order = torch.tensor([5, 3, 0, 1, 2, 4])
        straight, shuffled = kind(6), kind(6)
        a = tree_leaves(straight.reset(SEEDS))
        b = tree_leaves(shuffled.reset(SEEDS[order]))
        assert all(torch.equal(y, x[order]) for x, y in zip(a, b, strict=True))
        action = draw(6, *kind.action_shape)
        assert torch.equal(shuffled.step(action[order]).reward, straight.step(action).reward[order])

    def test_rows_sent_in_pieces_are_the_whole(self, kind):
        whole, pieces = kind(6), kind(6)
        whole.reset(SEEDS), pieces.reset(SEEDS)
        action = draw(6, *kind.action_shape)
        for start in (4, 0, 2):  # in any order
            pieces.send(action[start : start + 2], slice(start, start + 2))
        assert torch.equal(pieces.recv().reward, whole.step(action).reward)

    def test_a_step_says_everything_for_every_row(self, kind):
        env = kind(6)
        env.reset(SEEDS)
        step = env.step(torch.zeros(6, *kind.action_shape))
        assert {len(v) for v in (step.reward, step.terminated, step.truncated, step.valid)} == {6}
        assert bool(step.valid.all())
        assert all(len(v) == 6 for v in tree_leaves(step.obs))


class TestImage:
    def test_the_centre_of_the_prompt_is_the_one_best_answer(self):
        env = ToyImage(4)
        env.reset(torch.arange(4))
        step = env.step(CENTRES)
        assert step.reward.tolist() == [0.0] * 4
        assert bool(step.terminated.all())
        assert not step.truncated.any()
        assert step.final_obs is None
        env.reset(torch.arange(4))
        assert env.step(CENTRES.roll(1, 0)).reward.tolist() == [-2.0] * 4


class TestReach:
    def test_the_state_after_each_command_is_what_is_paid_for(self):
        env = ToyReach(4)
        obs = env.reset(torch.arange(4))
        action = torch.tensor([[[1.0, 0.0], [0.0, 0.5]]]).expand(4, 2, 2)
        step = env.step(action)
        first, second = torch.tensor([0.25, 0.0]), torch.tensor([0.25, 0.125])
        expected = -((first - obs["goal"]).norm(dim=-1) + (second - obs["goal"]).norm(dim=-1)) / 2
        torch.testing.assert_close(step.reward, expected)
        assert torch.equal(step.obs["state"], second.expand(4, 2))

    def test_commands_have_a_top_speed(self):
        fast, full = ToyReach(6), ToyReach(6)
        fast.reset(SEEDS), full.reset(SEEDS)
        action = draw(6, 2, 2).sign()
        assert torch.equal(fast.step(100 * action).reward, full.step(action).reward)

    def test_goals_stand_in_the_four_corners_and_at_many_distances(self):
        goal = ToyReach(64).reset(torch.arange(64))["goal"]
        assert torch.equal(goal.sign(), CENTRES[torch.arange(64) % 4])
        assert 0.6 <= float(goal.abs().min()) < 0.7
        assert 1.3 < float(goal.abs().max()) <= 1.4
        assert len(goal.unique(dim=0)) == 64

    def test_time_runs_out_without_being_an_end(self):
        env = ToyReach(6, horizon=3)
        env.reset(SEEDS)
        for t in range(7):
            before = env.sim.state["state"]
            step = env.step(torch.full((6, 2, 2), 0.5))
            over = t % 3 == 2
            assert step.truncated.tolist() == [over] * 6
            assert not step.terminated.any()
            assert torch.allclose(step.final_obs["state"], before + 0.25)  # truly reached
            assert torch.equal(step.obs["state"], torch.zeros(6, 2) if over else step.final_obs["state"])

    def test_the_next_episode_has_a_goal_of_its_own(self):
        env, other = ToyReach(6, horizon=1), ToyReach(6)
        goal = env.reset(SEEDS)["goal"]
        step = env.step(torch.zeros(6, 2, 2))
        assert torch.equal(step.final_obs["goal"], goal)
        assert torch.equal(step.obs["goal"], other.reset(episode_seeds(SEEDS, torch.tensor(1)))["goal"])
        assert not (step.obs["goal"] == goal).any()

    def test_a_masked_reset_leaves_the_other_rows(self):
        env = ToyReach(6)
        env.reset(SEEDS)
        env.step(draw(6, 2, 2))
        state, goal = (env.sim.state[name].clone() for name in ("state", "goal"))
        obs = env.reset(SEEDS + 10, torch.arange(6) < 2)
        assert torch.equal(obs["state"][2:], state[2:])
        assert torch.equal(obs["goal"][2:], goal[2:])
        assert not obs["state"][:2].any()
        assert not torch.equal(obs["goal"][:2], goal[:2])
        assert env.elapsed.tolist() == [0, 0, 2, 2, 2, 2]

    def test_observations_handed_out_do_not_change_later(self):
        env = ToyReach(6)
        obs = env.reset(SEEDS)
        kept = {k: v.clone() for k, v in obs.items()}
        env.step(draw(6, 2, 2))
        env.reset(SEEDS + 3)
        assert all(torch.equal(obs[k], v) for k, v in kept.items())

    def test_a_saved_state_goes_on_exactly(self):
        env, other = ToyReach(6), ToyReach(6)
        actions = draw(10, 6, 2, 2)
        env.reset(SEEDS)
        play(env, actions[:3])
        saved = env.state_dict()
        rest = play(env, actions[3:])
        other.load_state_dict(saved)
        assert torch.equal(play(other, actions[3:]), rest)
        other.load_state_dict(saved)  # and is not used up
        assert torch.equal(play(other, actions[3:]), rest)


class TestBandit:
    def test_the_first_peak_is_the_best_and_the_middle_of_them_is_worth_nothing(self):
        env = ToyBandit(5)
        env.reset(torch.arange(5))
        at = torch.cat([0.5 * CENTRES, torch.zeros(1, 2)])
        step = env.step(at.unsqueeze(1))
        torch.testing.assert_close(step.reward[:4], torch.tensor([1.0, 0.8, 0.6, 0.4]))
        assert float(step.reward[4]) == pytest.approx(torch.e**-11.11, rel=0.01)
        assert bool(step.terminated.all())

    def test_nothing_pays_more_than_1(self):
        env = ToyBandit(4096)
        env.reset(torch.arange(4096))
        reward = env.step(2 * draw(4096, 1, 2)).reward
        assert 0.9 < float(reward.max()) <= 1


class TestMDP:
    @pytest.mark.parametrize(("p", "gamma"), [(1.0, 0.9), (0.0, 0.9), (0.6, 0.9), (0.3, 0.99)])
    def test_the_values_solve_their_own_equations(self, p, gamma):
        """V = r + gamma P V, written out as a linear system."""
        q, back = 1 - p, -0.05
        moves = torch.tensor([[q, p, 0], [q, 0, p], [q, 0, 0]], dtype=torch.float64)
        pay = torch.tensor([q * back, q * back, p + q * back], dtype=torch.float64)
        expected = torch.linalg.solve(torch.eye(3, dtype=torch.float64) - gamma * moves, pay)
        torch.testing.assert_close(torch.tensor(ToyMDP.values(p, gamma), dtype=torch.float64), expected)

    def test_episodes_have_the_value_of_their_start_on_average(self):
        """4,096 rows that go right with probability .6, followed until every one has ended."""
        env, p, gamma = ToyMDP(4096, horizon=200), 0.6, 0.9
        env.reset(torch.arange(4096))
        alive, total = torch.ones(4096), torch.zeros(4096)
        for t in range(150):
            step = env.step(p - torch.rand(4096, 1, 1, generator=torch.Generator().manual_seed(t)))
            total += gamma**t * alive * step.reward
            alive *= ~step.ended
        assert not alive.any()
        assert float(total.mean()) == pytest.approx(ToyMDP.values(p, gamma)[0], abs=4 * float(total.std()) / 64)

    def test_bootstrapping_at_the_time_limit_is_what_makes_the_values_true(self):
        """TD fixed point from rollouts with many cut-offs: the closed form with V(final_obs), far off without."""
        env, p, gamma = ToyMDP(4096, horizon=3), 0.6, 0.9
        obs = env.reset(torch.arange(4096))
        found = {}
        for cut_is_end in (False, True):
            counts, pay, moves = torch.zeros(3), torch.zeros(3), torch.zeros(3, 3)
            for t in range(30):
                step = env.step(p - torch.rand(4096, 1, 1, generator=torch.Generator().manual_seed(t)))
                goes_on = ~step.ended if cut_is_end else ~step.terminated
                counts, pay = counts + obs.sum(0), pay + obs.T @ step.reward
                moves += obs.T @ (goes_on[:, None] * step.reached)
                obs = step.obs
            model = torch.eye(3) - gamma * moves / counts[:, None].clamp(min=1)
            found[cut_is_end] = torch.linalg.solve(model, pay / counts.clamp(min=1))
        true = torch.tensor(ToyMDP.values(p, gamma))
        assert float((found[False] - true).abs().max()) < 0.02
        assert float((found[True] - true)[0]) < -0.1


class TestRoutes:
    @staticmethod
    def command(position: Tensor, above: Tensor) -> Tensor:
        """(B, 1, 2) at full speed eastwards, on one side of the obstacle and back to the middle."""
        x, y = position.unbind(1)
        target = torch.where(x < 0.35, torch.where(above, 0.65, -0.65), 0.0)
        towards = torch.stack([1 - x, target - y], 1) / RoutesSim.SPEED
        return towards.clamp(-1, 1).unsqueeze(1)

    def play(self, above: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Start distance, return, length and success of one episode per row."""
        env = SimEnv(RoutesSim(64, 2, 24))
        obs = env.reset(torch.arange(64))
        start = (obs - torch.tensor([1.0, 0.0])).norm(dim=-1)
        found = torch.full((3, 64), torch.nan)
        for _ in range(24):
            straight = torch.tensor([[[1.0, 0.0]]]).expand(64, 1, 2)
            step = env.step(straight if above is None else self.command(obs, above))
            new = torch.stack([step.info[n] for n in ("episode_return", "episode_length", "success")])
            found = torch.where(found.isnan(), new, found)
            obs = step.obs
        return start, *found

    @pytest.mark.parametrize("above", [True, False])
    def test_both_ways_round_arrive_at_full_speed(self, above):
        start, returns, length, success = self.play(torch.full((64,), above))
        assert success.tolist() == [1.0] * 64
        assert length.tolist() == [10.0] * 64
        assert bool((returns > 1 + start - RoutesSim.NEAR).all())

    def test_the_average_of_the_two_crashes(self):
        _, returns, length, success = self.play(None)
        assert success.tolist() == [0.0] * 64
        assert bool((returns < 0).all())
        assert bool((length < 5).all())

    def test_thousands_at_once(self):
        env = ToyRoutes(8192)
        env.reset(torch.arange(8192))
        lengths = torch.cat([s.info["episode_length"] for s in (env.step(draw(8192, 2, 2, seed=i)) for i in range(14))])
        assert int(lengths.isfinite().sum()) > 8192
