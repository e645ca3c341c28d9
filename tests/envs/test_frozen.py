"""A frozen policy inside the environment: with the noise it would draw, or corrected by nothing, it is the policy."""

import math

import pytest
import torch
from torch import Tensor

from rlflow.assembly.environment import acted_in
from rlflow.envs.base import VecEnv
from rlflow.envs.frozen import BasePolicy, Frozen, Residual, StartNoise
from rlflow.envs.sim import SimEnv
from rlflow.envs.simulators.mujoco import HOPPER, MujocoSim
from rlflow.envs.simulators.toy import ToyBandit, ToyReach, ToyRoutes
from rlflow.flow.field import VelocityField
from rlflow.flow.kernels import Ancestral
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import NoSteps
from rlflow.models.io import load_field
from rlflow.models.mlp import MLPField
from rlflow.rl.collector import Collector
from rlflow.rl.groups import Groups
from rlflow.types import Cond, Tree, tree_leaves


def hopper(num_envs: int = 6) -> VecEnv:
    """Episodes of 10 primitive steps, so that some end by time and others by a fall."""
    return SimEnv(MujocoSim(HOPPER, num_envs, 1, 10), 4, 0.99)


def hopper_policy() -> FlowPolicy:
    return FlowPolicy(load_field("hopper"), Ancestral(), num_steps=4)


def routes_policy(shape: tuple[int, ...] = (2, 2)) -> FlowPolicy:
    torch.manual_seed(1)
    return FlowPolicy(MLPField(2, shape, 16), Ancestral(), num_steps=3)


class Still(VelocityField):
    """A flow that stands still: its action is the start noise, N(0, I)."""

    def __init__(self, obs_dim: int, shape: tuple[int, ...]):
        super().__init__()
        self.event_shape, self.num_features = shape, obs_dim
        self.scale = torch.nn.Parameter(torch.zeros(()))

    def encode(self, obs: Tree) -> Cond:
        return Cond({"pooled": obs})

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        return self.scale * x


def collected(env: VecEnv, policy: FlowPolicy, horizon: int = 12):
    groups = Groups(env.num_envs, 1)
    made = Collector(env, policy, None, NoSteps(), groups, seed=5, horizon=horizon, mode="steps", rows_per_call=4)
    return made.collect(0)


OUTCOME = ("obs", "reward", "terminated", "truncated", "weight", "final_obs", "last_obs", "num_steps")


@pytest.mark.parametrize(
    "world", [(hopper, hopper_policy, 11), (ToyRoutes, routes_policy, 2)], ids=["hopper", "routes"]
)
def test_start_noise_drawn_from_the_normal_law_is_the_plain_policy_to_the_bit(world) -> None:
    """Twelve decisions of each row, with ends in between: the learner is a flow that stands still."""
    env, policy, obs_dim = world
    plain = collected(env(6), policy())
    flow = BasePolicy(policy())
    steered = collected(
        Frozen(env(6), StartNoise(flow, bound=math.inf)), FlowPolicy(Still(obs_dim, flow.noise_shape), Ancestral())
    )
    assert plain.truncated.any() or plain.terminated.any()
    for name in OUTCOME:
        assert torch.equal(getattr(plain, name), getattr(steered, name)), name
    assert not torch.equal(plain.action, steered.action), "what was learnt on is the noise"


@pytest.mark.parametrize("world", [(hopper, hopper_policy), (ToyRoutes, routes_policy)], ids=["hopper", "routes"])
def test_a_correction_of_nothing_is_the_frozen_policy_to_the_bit(world) -> None:
    """And what the learner was shown as "base" is what was carried out."""
    make, policy = world
    flow = BasePolicy(policy())
    env, bare = Frozen(make(6), Residual(flow, scale=0.3)), make(6)
    seen, obs = env.reset(torch.arange(6)), bare.reset(torch.arange(6))
    ends = 0
    for _ in range(12):
        assert torch.equal(seen["obs"], obs)
        assert torch.equal(seen["base"], flow(obs, env.starts))
        step, raw = env.step(torch.zeros(6, *env.action_shape)), bare.step(seen["base"])
        for name in ("reward", "terminated", "truncated", "num_steps"):
            assert torch.equal(getattr(step, name), getattr(raw, name)), name
        assert torch.equal(step.final_obs["obs"], raw.final_obs)
        seen, obs, ends = step.obs, raw.obs, ends + int(raw.ended.sum())
    assert ends > 0


def test_a_correction_is_bounded_and_added() -> None:
    env, bare = Frozen(ToyRoutes(5), Residual(BasePolicy(routes_policy()), scale=0.25)), ToyRoutes(5)
    seen, _ = env.reset(torch.arange(5)), bare.reset(torch.arange(5))
    u = torch.linspace(-3, 3, 20).view(5, 2, 2)
    step, raw = env.step(u), bare.step(seen["base"] + 0.25 * u.clamp(-1, 1))
    assert torch.equal(step.obs["obs"], raw.obs)


def test_a_learner_that_sees_features_steers_what_the_frozen_policy_sees() -> None:
    """Its observations, ended ones too, are the policy's own features; the flow still acts on raw ones, as without."""
    flow = BasePolicy(hopper_policy())
    env, bare = Frozen(hopper(), StartNoise(flow, features=True)), Frozen(hopper(), StartNoise(flow))
    assert env.obs_spec.shape == (flow.policy.field.num_features,)
    seen, obs = env.reset(torch.arange(6)), bare.reset(torch.arange(6))
    ends = 0
    for k in range(8):
        assert torch.equal(seen, flow.policy.encode(obs)["pooled"])
        u = torch.full((6, *env.action_shape), 0.1 * k)
        step, raw = env.step(u), bare.step(u)
        assert torch.equal(step.reward, raw.reward)
        assert torch.equal(step.final_obs, flow.features(raw.final_obs))
        seen, obs, ends = step.obs, raw.obs, ends + int(raw.ended.sum())
        again = Frozen(hopper(), StartNoise(flow, features=True))
        again.load_state_dict(env.state_dict())
        env = again
    assert ends > 0


class Padded(Still):
    """A network with units and padding of its own: of samples (3, 4) the first two numbers count, in tenths."""

    decodes_actions = True

    def decode(self, x: Tensor) -> Tensor:
        return x[..., :2] / 10


def test_samples_of_a_network_with_units_of_its_own_are_decoded_inside() -> None:
    """As LeRobot's are: the learner's noise has the padded shape, the environment is sent what it takes."""
    policy = FlowPolicy(Padded(2, (3, 4)), Ancestral(), num_steps=2)
    env, bare = Frozen(acted_in(ToyRoutes(5), policy), StartNoise(BasePolicy(policy))), ToyRoutes(5)
    assert env.action_shape == (3, 4)
    env.reset(torch.arange(5)), bare.reset(torch.arange(5))
    u = torch.rand(5, 3, 4) - 0.5
    step, raw = env.step(u), bare.step(1.5 * u[:, :2, :2] / 10)
    assert torch.equal(step.obs, raw.obs)


@pytest.mark.parametrize("chosen", [(1, 2), (2, 1), (1, 1)])
def test_a_part_of_the_noise_that_is_chosen_as_it_would_be_drawn_is_the_frozen_policy_to_the_bit(chosen) -> None:
    """Ten decisions, with ends in between: the numbers that are not chosen are the frozen policy's own draws."""
    flow = BasePolicy(routes_policy())
    env = Frozen(ToyRoutes(6), StartNoise(flow, bound=math.inf, chosen=chosen))
    bare = Frozen(ToyRoutes(6), StartNoise(flow, bound=math.inf))
    assert (env.action_shape, bare.action_shape) == (chosen, (2, 2))
    env.reset(torch.arange(6)), bare.reset(torch.arange(6))
    ends = 0
    for _ in range(10):
        starts = env.starts
        step, raw = env.step(starts[:, : chosen[0], : chosen[1]]), bare.step(starts)
        for name in ("obs", "reward", "terminated", "truncated"):
            assert torch.equal(getattr(step, name), getattr(raw, name)), name
        ends += int(raw.ended.sum())
    assert ends > 0


def test_rows_that_are_sent_in_pieces_keep_their_own_draws() -> None:
    one, two = (Frozen(ToyRoutes(6), StartNoise(BasePolicy(routes_policy()), chosen=(1, 2))) for _ in range(2))
    one.reset(torch.arange(6)), two.reset(torch.arange(6))
    for _ in range(3):
        u = torch.rand(6, 1, 2)
        whole = one.step(u)
        for first in (0, 2, 4):
            two.send(u[first : first + 2], slice(first, first + 2))
        assert torch.equal(whole.obs, two.recv().obs)


def test_a_chosen_part_is_bounded_the_rest_is_normal_or_repeats_it() -> None:
    flow = BasePolicy(FlowPolicy(Still(2, (3, 4)), Ancestral(), num_steps=1))
    flow.policy.field.scale.data.zero_()  # the action is the noise
    u, x_0, obs = torch.full((5, 2, 3), 7.0), torch.randn(5, 3, 4), torch.zeros(5, 2)
    u[:, -1] = -7.0
    drawn = StartNoise(flow, 1.5, chosen=(2, 3)).act(obs, obs, u, x_0)
    assert torch.equal(drawn[:, :2, :3], u.sign() * 1.5)
    assert torch.equal(drawn[:, 2], x_0[:, 2])
    assert torch.equal(drawn[:, :, 3], x_0[:, :, 3])
    again = StartNoise(flow, 1.5, chosen=(2, 3), repeat=True).act(obs, obs, u, x_0)
    assert bool((again[:, 2, :3] == -1.5).all())
    assert torch.equal(again[:, :2], drawn[:, :2])
    assert torch.equal(again[:, :, 3], x_0[:, :, 3])


def test_start_noises_stay_within_the_bound() -> None:
    seen: list[Tensor] = []

    class Spy:
        noise_shape = (1, 2)

        def __call__(self, obs: Tree, x_0: Tensor) -> Tensor:
            seen.append(x_0)
            return x_0

        def features(self, obs: Tree) -> Tensor:
            raise NotImplementedError

    env = Frozen(ToyBandit(3), StartNoise(Spy(), bound=1.5))
    env.reset(torch.arange(3))
    env.step(torch.tensor([[[0.5, -0.5]], [[1.0, 7.0]], [[-7.0, 0.0]]]))
    assert torch.equal(seen[-1][:, 0], torch.tensor([[0.75, -0.75], [1.5, 1.5], [-1.5, 0.0]]))


def test_the_frozen_policys_own_noise_is_normal_fresh_at_each_decision_and_the_rows_own() -> None:
    """What a row draws is a function of its seed and of the number of decisions: the other rows have no say."""
    env, alone = (Frozen(ToyRoutes(n), Residual(BasePolicy(routes_policy()))) for n in (400, 1))
    env.reset(torch.arange(400)), alone.reset(torch.tensor([7]))
    draws = []
    for _ in range(10):
        draws.append(env.starts)
        assert torch.equal(draws[-1][7:8], alone.starts)
        env.step(torch.zeros(400, 2, 2)), alone.step(torch.zeros(1, 2, 2))
    z = torch.stack(draws)
    assert abs(float(z.mean())) < 0.03  # of 16,000 numbers: nearly four standard errors
    assert float(z.std()) == pytest.approx(1, abs=0.03)
    assert abs(float((z[:-1] * z[1:]).mean())) < 0.03


def test_what_is_seen_survives_a_save(tmp_path) -> None:
    """The observation in hand is part of the state: without it the next action would be made of nothing."""

    def make() -> Frozen:
        return Frozen(ToyRoutes(4), Residual(BasePolicy(routes_policy())))

    one, two = make(), make()
    one.reset(torch.arange(4))
    one.step(torch.ones(4, 2, 2))
    two.load_state_dict(one.state_dict())
    for _ in range(3):
        a, b = one.step(torch.full((4, 2, 2), 0.5)), two.step(torch.full((4, 2, 2), 0.5))
        assert all(torch.equal(x, y) for x, y in zip(tree_leaves(a.obs), tree_leaves(b.obs), strict=True))


def test_nothing_of_the_frozen_policy_trains() -> None:
    policy = routes_policy()
    env = Frozen(ToyRoutes(4), StartNoise(BasePolicy(policy)))
    env.reset(torch.arange(4))
    action = torch.zeros(4, 2, 2, requires_grad=True)
    env.step(action)
    assert not any(p.requires_grad for p in policy.parameters())


class TestMisfits:
    """A frozen policy that does not fit is refused before anything is played."""

    def test_another_chunk(self) -> None:
        with pytest.raises(
            ValueError, match=r"makes actions \(3, 2\), the environment takes \(2, 2\): set env.settings"
        ):
            Frozen(ToyRoutes(2), StartNoise(BasePolicy(routes_policy((3, 2)))))

    def test_other_observations(self) -> None:
        with pytest.raises(ValueError, match=r"does not read what is observed here, \[\(2,\), \(2,\)\]"):
            Frozen(ToyReach(2), StartNoise(BasePolicy(routes_policy())))

    def test_an_entry_of_that_name(self) -> None:
        flow = BasePolicy(routes_policy())
        with pytest.raises(ValueError, match="an entry 'base' of its own"):
            Residual(flow).see({"base": torch.zeros(1, 2)}, torch.zeros(1, 2, 2))

    @pytest.mark.parametrize("chosen", [(3, 2), (2,), (2, 3), (2, 2, 1), (0, 2), (-1, 2)])
    def test_a_part_that_is_none(self, chosen: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"no part of the frozen policy's start noise, \[2, 2\]: give at most"):
            StartNoise(BasePolicy(routes_policy()), chosen=chosen)

    def test_nothing_left_to_repeat_over(self) -> None:
        with pytest.raises(ValueError, match="repeat: all 2 actions are chosen: let `chosen` have fewer"):
            StartNoise(BasePolicy(routes_policy()), chosen=(2, 1), repeat=True)
