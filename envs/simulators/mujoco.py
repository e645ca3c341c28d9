"""MuJoCo tasks: six of Gymnasium's v5 environments as data, on MuJoCo's threaded batch of simulations.

Observation, reward, termination and reset noise are those of gymnasium/envs/mujoco/*_v5.py at their defaults
(the models are the XML files of that package); the reset noise is drawn from the row's seed by our own hash.

    reward = forward (x' - x) / dt + alive [healthy] - control |a|^2 - contact cost,    end when not healthy
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlflow.envs.camera import Camera
from rlflow.envs.seeds import normal, uniform
from rlflow.envs.sim import Outcome, Sim, SimEnv
from rlflow.parallel.dist import num_cpus
from rlflow.ranges import Size, Threads
from rlflow.types import Tree

try:
    import mujoco
    from mujoco.batch import Batch
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: pip install 'rlflow-torch[robots]'", name=error.name) from None

log = logging.getLogger(__name__)

Array = NDArray[Any]
NO_STAGE = mujoco.mjtStage.mjSTAGE_NONE.value
ALL = slice(None)
VELOCITY = 2**40  # added to a seed for the noise of velocities


@contextmanager
def warnings_kept() -> Iterator[None]:
    """MuJoCo's warnings to the log; else deprecations in Gymnasium's files are printed, and written to a file here."""
    said_to = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(log.debug)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(said_to)


def uniform_noise(seeds: Tensor, num_positions: int, num_velocities: int) -> Tensor:
    """(B, nq + nv) uniform in [-1, 1)."""
    return 2 * uniform(seeds, num_positions + num_velocities) - 1


def normal_velocities(seeds: Tensor, num_positions: int, num_velocities: int) -> Tensor:
    """(B, nq + nv): positions uniform in [-1, 1), velocities standard normal."""
    return torch.cat([2 * uniform(seeds, num_positions) - 1, normal(seeds + VELOCITY, num_velocities)], 1)


def root_x(batch: Any) -> Callable[[], Array]:
    """(B,) x of the root joint."""
    qpos = batch.bind("qpos")
    return lambda: qpos[:, 0]


def torso_x(batch: Any) -> Callable[[], Array]:
    """(B,) x of the torso's frame, one substep old as all derived fields are."""
    xpos = batch.bind("xpos")
    return lambda: xpos[:, 1, 0]


def mass_x(batch: Any) -> Callable[[], Array]:
    """(B,) x of the centre of mass, one substep old."""
    xipos, mass = batch.bind("xipos"), batch.model.body_mass
    share = mass / mass.sum()
    return lambda: xipos[:, :, 0] @ share


@dataclass(frozen=True)
class Task:
    """One locomotion task, over the state [qpos, qvel]; without `healthy` an episode ends by time only."""

    name: str
    xml: str
    frame_skip: int
    control: float
    noise: float
    hidden: int = 1  # leading entries of qpos that are not observed
    clip_velocity: float = math.inf
    forward: float = 1.0
    alive: float = 1.0
    healthy: tuple[tuple[int, float, float], ...] = ()  # (entry of the state, low, high), an open interval
    others: tuple[int, float] = (0, math.inf)  # from this entry on, the others keep below this magnitude
    position: Callable[[Any], Callable[[], Array]] = root_x
    spread: Callable[[Tensor, int, int], Tensor] = uniform_noise  # of start states, times `noise`
    derived: tuple[tuple[str, int], ...] = ()  # (field, first row observed) after [qpos, qvel]
    contact: float = 0.0  # price of squared contact forces, which are then observed last; 0 = not computed
    clip_contact: float = math.inf
    max_contact: float = math.inf

    def bounds(self, num: int) -> tuple[Array, Array]:
        """(low, high) of the healthy state, (nq + nv,) each; open intervals."""
        first, limit = self.others
        high = np.full(num, np.inf)
        high[first:] = limit
        low = -high
        for entry, smallest, largest in self.healthy:
            low[entry], high[entry] = smallest, largest
        return low, high

    def load(self) -> Any:
        """The compiled model."""
        spec = find_spec("gymnasium")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("the models come with gymnasium: pip install 'rlflow-torch[robots]'")
        path = Path(spec.origin).parent / "envs" / "mujoco" / "assets" / self.xml
        with warnings_kept():
            return mujoco.MjModel.from_xml_path(str(path))


HOPPER = Task(
    name="Hopper-v5",
    xml="hopper.xml",
    frame_skip=4,
    control=1e-3,
    noise=5e-3,
    clip_velocity=10.0,
    healthy=((1, 0.7, math.inf), (2, -0.2, 0.2)),
    others=(2, 100.0),
)
WALKER2D = Task(
    name="Walker2d-v5",
    xml="walker2d_v5.xml",
    frame_skip=4,
    control=1e-3,
    noise=5e-3,
    clip_velocity=10.0,
    healthy=((1, 0.8, 2.0), (2, -1.0, 1.0)),
)
HALFCHEETAH = Task(
    name="HalfCheetah-v5",
    xml="half_cheetah.xml",
    frame_skip=5,
    control=0.1,
    noise=0.1,
    spread=normal_velocities,
)
INVERTED_PENDULUM = Task(
    name="InvertedPendulum-v5",
    xml="inverted_pendulum.xml",
    frame_skip=2,
    control=0.0,
    noise=0.01,
    hidden=0,
    forward=0.0,
    healthy=((1, np.nextafter(-0.2, -1), np.nextafter(0.2, 1)),),  # a closed interval
)
ANT = Task(
    name="Ant-v5",
    xml="ant.xml",
    frame_skip=5,
    control=0.5,
    noise=0.1,
    spread=normal_velocities,
    hidden=2,
    healthy=((2, np.nextafter(0.2, 0), np.nextafter(1.0, 2)),),  # a closed interval
    position=torso_x,
    contact=5e-4,
    clip_contact=1.0,
)
HUMANOID = Task(
    name="Humanoid-v5",
    xml="humanoid.xml",
    frame_skip=5,
    control=0.1,
    noise=1e-2,
    hidden=2,
    forward=1.25,
    alive=5.0,
    healthy=((2, 1.0, 2.0),),
    position=mass_x,
    derived=(("cinert", 1), ("cvel", 1), ("qfrc_actuator", 6)),
    contact=5e-7,
    max_contact=10.0,
)


class MujocoSim(Sim):
    """B simulations of one Task on `threads` threads (0: one per CPU); float64 physics, float32 observations."""

    exact_resume, arrays = True, True

    def __init__(self, task: Task, num_envs: int, threads: int = 0, horizon: int = 1000):
        self.task, self.num_envs, self.horizon = task, num_envs, horizon
        self.model = model = task.load()
        self.low, self.high = torch.from_numpy(model.actuator_ctrlrange.astype(np.float32)).unbind(1)
        # contact forces are asked of whole MjData, one per row
        self.batch = Batch(model, num_envs, min(threads or num_cpus(), num_envs), bool(task.contact))
        self.step_seconds = model.opt.timestep * task.frame_skip
        # of rows, since a Python number beside an array costs as much as the operation
        self._pace = np.full(num_envs, task.forward / self.step_seconds)
        num = model.nq + model.nv
        self._qpos, self._qvel, self._ctrl = (self.batch.bind(n) for n in ("qpos", "qvel", "ctrl"))
        self._state = self.batch.state[:, 1 : 1 + num]  # mjSTATE_INTEGRATION: time, qpos, qvel, ...
        self._low, self._high = task.bounds(num)
        self._position, self._x = task.position(self.batch), np.zeros(num_envs)
        self._over = np.zeros(num_envs, bool)  # rows that have fallen rest until they are reset
        self.batch.reset(stage=NO_STAGE)
        self._rest = self.batch.state[0].copy()
        derived = [self.batch.bind(n)[:, first:].reshape(num_envs, -1) for n, first in task.derived]
        self._forces = np.zeros((num_envs, model.nbody if task.contact else 1, 6))
        self._data, self._num_contacts = mujoco.MjData(model), self.batch.bind("ncon")
        self._camera: Camera | None = None
        self._layout(self._state[:, task.hidden :], *derived, self._forces[:, 1:].reshape(num_envs, -1))

    def _layout(self, *sources: Array) -> None:
        """The observation, and for each of its parts the simulator's array it is copied from."""
        ends = np.cumsum([0, *(source.shape[1] for source in sources)])
        self._obs = np.zeros((self.num_envs, ends[-1]), np.float32)
        self._parts = [(self._obs[:, a:b], s) for a, b, s in zip(ends, ends[1:], sources, strict=False) if b > a]
        self._velocity = self._obs[:, self.model.nq - self.task.hidden : ends[1]]
        self.obs_spec = torch.empty(int(ends[-1]), device="meta")

    def reset(self, seeds: Tensor, mask: Tensor) -> Tree:
        """The model's rest state plus noise from each row's seed."""
        rows = np.flatnonzero(mask.numpy())
        if len(rows):
            nq, begun = self.model.nq, torch.from_numpy(seeds.numpy()[rows])
            noise = self.task.noise * self.task.spread(begun, nq, self.model.nv).numpy()
            self.place(rows, self.model.qpos0 + noise[:, :nq], noise[:, nq:])
        return torch.from_numpy(self._obs)

    def place(self, rows: Array, qpos: Array, qvel: Array) -> None:
        """Put `rows` into a state as after a reset: no warm start, no contact forces yet."""
        self.batch.state[rows] = self._rest
        self._qpos[rows], self._qvel[rows] = qpos, qvel
        if self.task.derived or self.task.position is not root_x:
            self.batch.forward(rows)
        self._x[rows], self._forces[rows], self._over[rows] = self._position()[rows], 0, False
        self._observe(rows)

    def _observe(self, rows: Array | slice = ALL) -> None:
        for part, source in self._parts:
            part[rows] = source[rows]
        limit = self.task.clip_velocity
        if limit < math.inf:  # np.clip takes thrice the time for a row
            np.minimum(np.maximum(self._velocity, -limit, out=self._velocity), limit, out=self._velocity)

    def advance(self, action: Array) -> Outcome:
        """`frame_skip` physics steps under one control (B, A)."""
        task = self.task
        self._ctrl[:] = action
        self.batch.step(~self._over if np.count_nonzero(self._over) else None, nstep=task.frame_skip)
        x = self._position().copy()
        reward = (x - self._x) * self._pace
        reward -= task.control * np.add.reduce(np.square(action), 1)
        self._x = x
        if task.contact:
            reward -= self._contact_cost()
        self._observe()
        if task.healthy:
            healthy = np.logical_and.reduce((self._state > self._low) & (self._state < self._high), 1)
            reward += task.alive * healthy
            self._over = ~healthy
        return Outcome(self._obs, reward, self._over)

    def _contact_cost(self) -> Array:
        """(B,) price of the forces on the bodies; those are not part of a step, MuJoCo computes them on demand."""
        self._forces[:] = 0
        for row in np.flatnonzero(self._num_contacts):
            self.batch.get_data(int(row), self._data)
            mujoco.mj_rnePostConstraint(self.model, self._data)
            self._forces[row] = self._data.cfrc_ext
        np.clip(self._forces, -self.task.clip_contact, self.task.clip_contact, out=self._forces)
        return np.minimum(self.task.contact * np.square(self._forces).sum((1, 2)), self.task.max_contact)

    def render(self, row: int, size: tuple[int, int]) -> Tensor:
        """Drawn from a copy of the row's positions; the camera follows the torso from the side."""
        if self._camera is None or self._camera.size != size:
            self._camera = Camera(self.model, size)
        shown = mujoco.MjData(self.model)
        shown.qpos[:] = self._qpos[row]
        mujoco.mj_kinematics(self.model, shown)
        mujoco.mj_comPos(self.model, shown)
        mujoco.mj_camlight(self.model, shown)
        return torch.from_numpy(self._camera.photo(shown))

    def state_dict(self) -> dict[str, Any]:
        """Physics with warm starts, and what the next step looks back at."""
        kept = {"physics": self.batch.state, "x": self._x, "obs": self._obs}
        return {name: torch.from_numpy(value.copy()) for name, value in kept.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.batch.state[:] = state["physics"].numpy()
        self._x[:], self._obs[:], self._over[:] = state["x"].numpy(), state["obs"].numpy(), False


def hopper(num_envs: int, chunk: Size = 4, gamma: float = 0.99, threads: Threads = 0) -> SimEnv:
    """Hopper-v5: one leg, 3 motors, 11 numbers observed; falls."""
    return SimEnv(MujocoSim(HOPPER, num_envs, threads), chunk, gamma)


def walker2d(num_envs: int, chunk: Size = 4, gamma: float = 0.99, threads: Threads = 0) -> SimEnv:
    """Walker2d-v5: two legs in a plane, 6 motors, 17 numbers observed; falls."""
    return SimEnv(MujocoSim(WALKER2D, num_envs, threads), chunk, gamma)


def halfcheetah(num_envs: int, chunk: Size = 4, gamma: float = 0.99, threads: Threads = 0) -> SimEnv:
    """HalfCheetah-v5: a running body in a plane, 6 motors, 17 numbers observed; ends by time only."""
    return SimEnv(MujocoSim(HALFCHEETAH, num_envs, threads), chunk, gamma)


def inverted_pendulum(num_envs: int, chunk: Size = 4, gamma: float = 0.99, threads: Threads = 0) -> SimEnv:
    """InvertedPendulum-v5: a pole on a cart, 1 motor, 4 numbers observed; falls."""
    return SimEnv(MujocoSim(INVERTED_PENDULUM, num_envs, threads), chunk, gamma)


def ant(num_envs: int, chunk: Size = 4, gamma: float = 0.99, threads: Threads = 0) -> SimEnv:
    """Ant-v5: four legs, 8 motors, 105 numbers observed, contact forces among them; falls."""
    return SimEnv(MujocoSim(ANT, num_envs, threads), chunk, gamma)


def humanoid(num_envs: int, chunk: Size = 4, gamma: float = 0.99, threads: Threads = 0) -> SimEnv:
    """Humanoid-v5: 17 motors, 348 numbers observed; falls."""
    return SimEnv(MujocoSim(HUMANOID, num_envs, threads), chunk, gamma)
