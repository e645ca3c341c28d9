"""MuJoCo Warp: the tasks of mujoco.py as thousands of worlds on one GPU; same reward, health and observation.

Physics, reward and observation are float32, against float64 in mujoco.py: one trajectory of both agrees until contacts
have amplified the rounding. On the CPU it runs too, for tests, and slower than mujoco.py.

Nothing here waits for the GPU: the substeps of an action are one CUDA graph, torch reads and writes the simulator's own
arrays, and a reset writes the rows of a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlflow.envs.sim import Outcome, Sim, SimEnv
from rlflow.envs.simulators.mujoco import HALFCHEETAH, HOPPER, INVERTED_PENDULUM, WALKER2D, Task, root_x
from rlflow.ranges import Size
from rlflow.types import Tree

try:
    import mujoco_warp
    import warp
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: pip install 'rlflow-torch[robots,warp]'", name=error.name) from None

warp.config.log_level = warp.LOG_WARNING  # its start-up lines go to stdout, where --json is read from
warp.init()

MAX_CONSTRAINTS = 128  # rows of one world; the default of 64 is too few for a HalfCheetah on its back


class WarpSim(Sim):
    """B worlds of one Task on `device` (default: the GPU of this process, else the CPU)."""

    exact_resume = True

    def __init__(self, task: Task, num_envs: int, device: torch.device | str | None = None, horizon: int = 1000):
        if task.contact or task.derived or task.position is not root_x:
            raise ValueError(
                f"{task.name} needs contact forces or body frames, in which MuJoCo Warp differs from MuJoCo "
                "(Ant) or cannot run the model as it is (Humanoid): use the MuJoCo environment"
            )
        self.task, self.num_envs, self.horizon = task, num_envs, horizon
        # with its number, which warp asks for
        self.device = torch.zeros(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
        model = task.load()
        self._dt, self._nq, self._nv = model.opt.timestep * task.frame_skip, model.nq, model.nv
        self.low, self.high = self._tensor(model.actuator_ctrlrange).unbind(1)
        self._low, self._high = map(self._tensor, task.bounds(model.nq + model.nv))
        self._rest = torch.cat([self._tensor(model.qpos0), torch.zeros(model.nv, device=self.device)])
        self._worlds(model)
        self.obs_spec = torch.empty(model.nq + model.nv - task.hidden, device="meta")
        self._place(torch.ones(num_envs, dtype=torch.bool, device=self.device), self._rest.expand(num_envs, -1))

    def _tensor(self, value: Any) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float32, device=self.device)

    def _worlds(self, model: Any) -> None:
        """The simulations, and torch views of the arrays that outlive a step."""
        with warp.ScopedDevice(warp.device_from_torch(self.device)):
            self._model = mujoco_warp.put_model(model)
            self._data = data = mujoco_warp.make_data(model, nworld=self.num_envs, njmax=MAX_CONSTRAINTS)
            arrays = (data.ctrl, data.qpos, data.qvel, data.qacc_warmstart, data.time, data.overflow)
            views = map(warp.to_torch, arrays)
            self._ctrl, self._qpos, self._qvel, self._warm, self._time, self._overflow = views
            self._launch = self._captured() if self.device.type == "cuda" else self._substeps

    def _substeps(self) -> None:
        for _ in range(self.task.frame_skip):
            mujoco_warp.step(self._model, self._data)

    def _captured(self) -> Callable[[], None]:
        """The substeps as one CUDA graph, launched on torch's stream so that both work in turn."""
        self._substeps()  # compiles, which a capture must not
        with warp.ScopedCapture() as capture:
            self._substeps()
        warp.synchronize_device()
        return lambda: warp.capture_launch(capture.graph, stream=warp.stream_from_torch(self.device))

    def reset(self, seeds: Tensor, mask: Tensor) -> Tree:
        """The model's rest state plus noise from each row's seed, as in mujoco.py."""
        noise = self.task.noise * self.task.spread(seeds, self._nq, self._nv)
        self._place(mask, (self._rest + noise).float())
        return self._observe()

    def _place(self, mask: Tensor, state: Tensor) -> None:
        """Put the rows of `mask` (B,) into `state` (B, nq + nv), without a warm start."""
        rows = mask.unsqueeze(1)
        self._qpos.copy_(torch.where(rows, state[:, : self._nq], self._qpos))
        self._qvel.copy_(torch.where(rows, state[:, self._nq :], self._qvel))
        self._warm.copy_(torch.where(rows, 0.0, self._warm))  # not times 0, which keeps a nan
        self._time.copy_(torch.where(mask, 0.0, self._time))

    def _observe(self) -> Tensor:
        limit = self.task.clip_velocity
        return torch.cat([self._qpos[:, self.task.hidden :], self._qvel.clamp(-limit, limit)], 1)

    def advance(self, action: Tensor) -> Outcome:
        """`frame_skip` physics steps under one control."""
        task, before = self.task, self._qpos[:, 0].clone()
        self._ctrl.copy_(action)
        self._launch()
        reward = (self._qpos[:, 0] - before) * (task.forward / self._dt) - task.control * action.square().sum(1)
        fallen = torch.zeros_like(before, dtype=torch.bool)
        if task.healthy:
            state = torch.cat([self._qpos, self._qvel], 1)
            fallen = ~((state > self._low) & (state < self._high)).all(1)
            reward = reward + task.alive * ~fallen
        return Outcome(self._observe(), reward, fallen)

    @property
    def overflow(self) -> bool:
        """True when a world had more contacts or constraints than fit, and so wrong physics; waits for the device."""
        return bool(self._overflow.any())

    def state_dict(self) -> dict[str, Any]:
        """Positions, velocities, warm starts and times; all else is computed anew by a step."""
        return {name: view.clone() for name, view in self._state().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        for name, view in self._state().items():
            view.copy_(state[name])

    def _state(self) -> dict[str, Tensor]:
        return {"qpos": self._qpos, "qvel": self._qvel, "warm": self._warm, "time": self._time}


def warp_hopper(num_envs: int, chunk: Size = 4, gamma: float = 0.99) -> SimEnv:
    """Hopper-v5 on MuJoCo Warp: `hopper` in float32, for thousands of rows on a GPU."""
    return SimEnv(WarpSim(HOPPER, num_envs), chunk, gamma)


def warp_walker2d(num_envs: int, chunk: Size = 4, gamma: float = 0.99) -> SimEnv:
    """Walker2d-v5 on MuJoCo Warp: `walker2d` in float32, for thousands of rows on a GPU."""
    return SimEnv(WarpSim(WALKER2D, num_envs), chunk, gamma)


def warp_halfcheetah(num_envs: int, chunk: Size = 4, gamma: float = 0.99) -> SimEnv:
    """HalfCheetah-v5 on MuJoCo Warp: `halfcheetah` in float32, for thousands of rows on a GPU."""
    return SimEnv(WarpSim(HALFCHEETAH, num_envs), chunk, gamma)


def warp_inverted_pendulum(num_envs: int, chunk: Size = 4, gamma: float = 0.99) -> SimEnv:
    """InvertedPendulum-v5 on MuJoCo Warp: `inverted_pendulum` in float32, for thousands of rows on a GPU."""
    return SimEnv(WarpSim(INVERTED_PENDULUM, num_envs), chunk, gamma)
