"""Demonstrations as decisions of chunks, by hand; and a flow that is cloned from them."""

import pytest
import torch

from rlflow.envs.demos.dataset import Episode, write_demos
from rlflow.flow.kernels import LearnedNoise
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.squash import Tanh
from rlflow.flow.steps import All
from rlflow.models.gated import GatedField
from rlflow.rl.off_policy.learner import OffPolicySettings
from rlflow.rl.off_policy.offline import Offline, clone, offline_data
from rlflow.rl.off_policy.replay import Replay
from rlflow.rl.off_policy.sac import SAC
from rlflow.rl.off_policy.twin import TwinSettings

GAMMA, CPU = 0.5, torch.device("cpu")


def demos(folder, *episodes):
    """Episodes (length, terminated): step i of the folder sees i, does i / 100 and earns i."""
    made, first = [], 0
    for length, terminated in episodes:
        clock = torch.arange(first, first + length).float()
        action = (clock / 100)[:, None].expand(-1, 2)
        made.append(Episode(clock[:, None].expand(-1, 3), action, clock, terminated, not terminated))
        first += length
    return write_demos(folder / "demos", made, {"name": "hopper"}, {})


def test_windows_of_two_actions_by_hand(tmp_path):
    """The first episode falls at its end, the second is cut off by time: of that one the last two windows go."""
    data, whole = offline_data(demos(tmp_path, (3, True), (4, False)), 2, GAMMA, CPU)
    assert data.obs[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert data.next_obs[[0, 3, 4], 0].tolist() == [2, 5, 6]
    assert data.reward.tolist() == [0 + 1 * GAMMA, 1 + 2 * GAMMA, 2, 3 + 4 * GAMMA, 4 + 5 * GAMMA]
    assert data.discount.tolist() == [GAMMA**2, 0, 0, GAMMA**2, GAMMA**2]
    torch.testing.assert_close(data.action[:, :, 0], torch.tensor([[0, 1], [1, 2], [2, 0], [3, 4], [4, 5]]) / 100)
    assert data.counts.tolist() == [[1, 1], [1, 1], [1, 0], [1, 1], [1, 1]]
    assert whole.tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize("episode", [(3, True), (4, False)])
def test_episodes_shorter_than_a_chunk_are_refused(tmp_path, episode):
    """Of one that time ended the last window does not count."""
    with pytest.raises(ValueError, match="no episode that counts has 4 steps: take shorter chunks"):
        offline_data(demos(tmp_path, episode), 4, GAMMA, CPU)


def make_policy():
    torch.manual_seed(0)
    field = GatedField(3, (2, 2), width=32, gate_width=8, running=True)
    return FlowPolicy(field, LearnedNoise(3, (2, 2), 0.03, 0.1), num_steps=4, squash=Tanh())


def test_the_cloned_flow_does_what_was_done(tmp_path):
    """After the squash: fitting raw actions would end at tanh(a)."""
    obs = torch.randn(40, 3)
    action = torch.tensor([[0.9, -0.9]]).expand(40, 2)
    again = write_demos(
        tmp_path / "demos", [Episode(obs, action, torch.zeros(40), False, True)], {"name": "hopper"}, {}
    )
    data, whole = offline_data(again, 1, GAMMA, CPU)
    policy = make_policy()
    policy.field = GatedField(3, (1, 2), width=64, gate_width=8, running=True)
    clone(policy, Offline(data, whole, clone=600), 64, seed=0)
    with torch.no_grad():
        done = policy.squash(policy.sample(policy.encode(obs)).final)[:, 0]
    torch.testing.assert_close(done.mean(0), action[0], atol=0.06, rtol=0)
    assert float(policy.field.candidate.normalizer.moments[0, 0]) == len(data)


def make_sac(tmp_path, batch_size=8, **settings):
    data, whole = offline_data(demos(tmp_path, (30, True)), 2, GAMMA, CPU)
    offline = Offline(data, whole, clone=2, updates=3, share=0.25)
    shared = OffPolicySettings(batch_size, start=0, twin=TwinSettings(width=8), offline=offline, **settings)
    return SAC(make_policy(), All(), Replay(100, GAMMA), shared)


def test_every_batch_has_its_share_and_offline_steps_are_not_owed_again(tmp_path):
    sac = make_sac(tmp_path, updates_per_step=0.5)
    sac.begin()
    average, live = sac.policy.weights.sets["ema"], sac.policy.weights.parameters()
    assert all(torch.equal(average[name], live[name]) for name in live), "the average starts at what was cloned"
    assert sac.updates == 3
    from tests.rl.off_policy.test_replay import rollout

    steps = rollout(500, 6)
    steps.obs, steps.final_obs = steps.obs.expand(-1, -1, 3), steps.final_obs.expand(-1, -1, 3)
    steps.action = torch.zeros(6, 1, 2, 2)
    sac.update(steps)
    assert sac.updates == 3 + 3
    old = sac.batch().obs[:, 0] < 500
    assert int(old.sum()) == 2


@pytest.mark.parametrize("permute", [False, True])
def test_the_controls_rewards_do_not_tell_demonstrations_from_the_rest(tmp_path, permute):
    """Demonstrations earn less than 30 here and the replay more than 500."""
    from tests.rl.off_policy.test_replay import rollout

    sac = make_sac(tmp_path, batch_size=4000, permute=permute)
    steps = rollout(500, 6)
    steps.obs, steps.final_obs = steps.obs.expand(-1, -1, 3), steps.final_obs.expand(-1, -1, 3)
    sac.replay.add(steps, torch.zeros(6, 1, 2, 2))
    batch = sac.batch()
    demonstrated, poor = batch.obs[:, 0] < 500, batch.reward < 500
    assert poor.float().mean() == pytest.approx(0.25)
    assert poor[demonstrated].float().mean() == pytest.approx(0.25 if permute else 1.0, abs=0.05)
    assert torch.equal(batch.discount < GAMMA, poor), "the discount goes with the reward: ends tell a story too"


@pytest.mark.parametrize(
    ("shape", "numbers", "message"),
    [
        ((3, 2), 3, r"chunks of actions there are \(2, 2\), the policy's \(3, 2\)"),
        ((2, 2), 4, r"the network of policy.field does not read what is seen there, \[\(3,\)\]"),
        ((2, 2), 1, r"the network of policy.field does not read"),
    ],
)
def test_demonstrations_of_other_shapes_are_refused_at_construction(tmp_path, shape, numbers, message):
    """One number would be broadcast over three, and be noticed in the middle of a batch."""
    data, whole = offline_data(demos(tmp_path, (30, True)), 2, GAMMA, CPU)
    kernel = LearnedNoise(numbers, shape, 0.03, 0.1)
    policy = FlowPolicy(GatedField(numbers, shape, width=8, gate_width=4), kernel, squash=Tanh())
    with pytest.raises(ValueError, match=f"offline.demos: {message}"):
        SAC(policy, All(), Replay(100, GAMMA), OffPolicySettings(offline=Offline(data, whole)))


def test_a_batch_of_demonstrations_alone_is_refused(tmp_path):
    data, whole = offline_data(demos(tmp_path, (30, True)), 2, GAMMA, CPU)
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\)"):
        Offline(data, whole, share=1.0)
