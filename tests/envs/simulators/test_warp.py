"""MuJoCo Warp is MuJoCo to float32, resets rows in place, and on a GPU never makes the program wait.

The first run compiles its kernels, for minutes; they are kept in ~/.cache/warp.
"""

import mujoco as c_mujoco
import numpy as np
import pytest
import torch

from rlflow.bench.robot import flow_policy
from rlflow.envs.conformance import CHECKS, Subject
from rlflow.envs.sim import SimEnv
from rlflow.envs.simulators import mujoco
from rlflow.flow.steps import All
from rlflow.rl.collector import Collector
from rlflow.rl.groups import Groups
from rlflow.rl.likelihoods.chain import ChainLikelihood
from rlflow.types import Step

pytest.importorskip("mujoco_warp")
from rlflow.envs.simulators import warp

TASKS = {t.name: t for t in (mujoco.HOPPER, mujoco.WALKER2D, mujoco.HALFCHEETAH, mujoco.INVERTED_PENDULUM)}
SEEDS = torch.tensor([3, 11])
EVERY = torch.ones(2, dtype=torch.bool)


def actions(num: int, *shape: int) -> torch.Tensor:
    """(num, *shape) uniform in [-1, 1)."""
    return torch.rand(num, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def single(data: c_mujoco.MjData) -> None:
    """Round the state of MuJoCo to float32."""
    for value in (data.qpos, data.qvel, data.qacc_warmstart):
        value[:] = value.astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_positions_are_mujocos_over_200_physics_steps(name):
    """From one start under random controls, on the ground too, and no contact is lost.

    Contacts amplify rounding without end (HalfCheetah: from 5e-8 to 3e-3). So only the first 40 steps have a bound
    of their own; after these the distance is at most ten times that of a MuJoCo whose state alone is float32.
    """
    sim = warp.WarpSim(TASKS[name], 2, "cpu")
    sim.reset(SEEDS, EVERY)
    model = TASKS[name].load()
    exact, rounded = c_mujoco.MjData(model), c_mujoco.MjData(model)
    for data in (exact, rounded):
        data.qpos[:], data.qvel[:] = sim._qpos[1].double().numpy(), sim._qvel[1].double().numpy()
    ours, theirs = [], []
    for action in actions(200 // TASKS[name].frame_skip, *sim.low.shape) * sim.high:
        sim.advance(action.expand(2, -1))
        for _ in range(TASKS[name].frame_skip):
            exact.ctrl[:] = rounded.ctrl[:] = action.numpy()
            c_mujoco.mj_step(model, exact)
            c_mujoco.mj_step(model, rounded)
            single(rounded)
        ours.append(np.abs(sim._qpos[1].double().numpy() - exact.qpos).max())
        theirs.append(np.abs(rounded.qpos - exact.qpos).max())
    assert max(ours[: 40 // TASKS[name].frame_skip]) < 1e-5
    assert max(ours) < 1e-6 + 10 * max(theirs)
    assert not sim.overflow


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_steps_are_those_of_the_mujoco_environment(name):
    """Observations, rewards and ends over several episodes, from the same seeds; automatic resets included.

    Episodes of at most 24 primitive steps; of 8 for HalfCheetah, which amplifies rounding faster than the others.
    """
    horizon = 8 if name == mujoco.HALFCHEETAH.name else 24
    pair = [SimEnv(kind(TASKS[name], 2, horizon=horizon), 2) for kind in (warp.WarpSim, mujoco.MujocoSim)]
    torch.testing.assert_close(*[env.reset(SEEDS) for env in pair], atol=1e-6, rtol=1e-6)
    ended = 0
    for action in actions(30, 2, *pair[0].action_shape):
        ours, theirs = (env.step(action) for env in pair)
        torch.testing.assert_close(ours.reward, theirs.reward, atol=1e-3, rtol=1e-3)
        for part in ("obs", "final_obs"):
            torch.testing.assert_close(getattr(ours, part), getattr(theirs, part), atol=2e-3, rtol=2e-3)
        for part in ("terminated", "truncated", "num_steps"):
            assert torch.equal(getattr(ours, part), getattr(theirs, part))
        ended += int(ours.ended.sum())
    assert ended >= 4


def subject() -> Subject:
    """Hoppers, whose episodes last ten primitive steps unless they fall before."""

    def make(limit: int, size: int):
        return lambda num_envs: SimEnv(warp.WarpSim(mujoco.HOPPER, num_envs, "cpu", limit), size, 0.9)

    return Subject(make(10, 2), make(24, 2), make(10, 1), num_envs=3, num_steps=12, gamma=0.9)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conforms(check):
    check(subject())


@pytest.mark.slow
def test_a_reset_heals_a_world_that_blew_up_and_no_other_row_notices():
    """Not-a-number ends the episode; nothing of it is left in the next one, warm start of the solver included."""
    env, healthy = (SimEnv(warp.WarpSim(mujoco.HOPPER, 2, "cpu"), 1) for _ in range(2))
    env.reset(SEEDS), healthy.reset(SEEDS)
    for view in (env.sim._qpos, env.sim._qvel, env.sim._warm, env.sim._time):
        view[0] = torch.nan
    first, *rest = actions(6, 2, 1, 3)
    step, other = env.step(first), healthy.step(first)
    assert step.terminated.tolist() == [True, False]
    assert torch.equal(step.obs[1], other.obs[1])
    fresh = SimEnv(warp.WarpSim(mujoco.HOPPER, 2, "cpu"), 1)
    fresh.first, fresh.episode = env.first + 0, env.episode + 0
    assert torch.equal(step.obs[0], fresh._begin(EVERY.numpy())[0])
    for action in rest:
        mine = env.step(action)
        assert torch.equal(mine.obs[0], fresh.step(action).obs[0])
        assert torch.equal(mine.obs[1], healthy.step(action).obs[1])


@pytest.mark.parametrize("task", [mujoco.ANT, mujoco.HUMANOID], ids=lambda task: task.name)
def test_models_that_differ_from_mujocos_are_refused(task):
    with pytest.raises(ValueError, match=r"use the MuJoCo environment"):
        warp.WarpSim(task, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", TASKS)
def test_a_step_never_waits_for_the_gpu(name):
    """Ends, resets and statistics included; and the graph does what plain launches do."""
    env, plain = (SimEnv(warp.WarpSim(TASKS[name], 256, "cuda"), 4) for _ in range(2))
    plain.sim._launch = plain.sim._substeps
    chunks = actions(50, 256, *env.action_shape).cuda()
    env.reset(torch.arange(256)), plain.reset(torch.arange(256))
    with torch.no_grad():
        torch.testing.assert_close(env.step(chunks[0]).obs, plain.step(chunks[0]).obs, atol=1e-3, rtol=1e-3)
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps: list[Step] = [env.step(chunk) for chunk in chunks]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(step.obs.isfinite().all() for step in steps)
    assert not env.sim.overflow


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_rollout_never_waits_for_the_gpu():
    """Encoding, noise, chains, evidence, steps and resets: the host only queues work."""
    env = SimEnv(warp.WarpSim(mujoco.HOPPER, 1024, "cuda"), 4)
    policy, likelihood = flow_policy(env, width=64, depth=2, num_steps=4), ChainLikelihood("sum", joint=True)
    groups = Groups(1024, 1)
    collector = Collector(env, policy, likelihood, All(), groups, horizon=20, mode="steps", rows_per_call=1024)
    collector.collect(0)  # starts the episodes from seeds that lie on the host
    torch.cuda.set_sync_debug_mode("error")
    try:
        rollout = collector.collect(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert rollout.reward.device.type == "cuda"
    assert rollout.terminated.any()
    assert rollout.reward.isfinite().all()
