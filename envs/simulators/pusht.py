"""PushT (Chi et al. 2023, package gym-pusht): a disc pushes a T onto its outline; the action is where the disc goes.

The reward is the covered share of the outline, 1 from 95 % on, which is also success and the end; 300 steps, 10 a
second. The disc's goal, 0..512 pixels in x and y, is stretched to [-1, 1].
"""

from __future__ import annotations

from typing import Any

import gymnasium
from numpy.typing import NDArray

from rlflow.envs.sim import SimEnv
from rlflow.envs.simulators.gym import GymRows, registered
from rlflow.ranges import Size

try:
    import gym_pusht  # noqa: F401  (registers its id)
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error}: pip install 'rlflow-torch[pusht]', or beside [image] "
        "pip install --no-deps gym-pusht 'pymunk<7' pygame cffi pycparser",
        name=error.name,
    ) from None

PUSHT = "gym_pusht/PushT-v0"


class Looked(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Draws the picture after every `chunk`-th step of an episode and at its end, all that SimEnv shows of a chunk.

    In between the last picture stays. Drawing takes four times as long as a step.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], chunk: int):
        super().__init__(env)
        self.chunk, self.steps = chunk, 0
        self.picture: NDArray[Any] | None = None
        env.unwrapped.obs_type = "state"  # what its own steps show from now on

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """With a picture."""
        state, info = self.env.reset(seed=seed, options=options)
        self.steps = 0
        return self._seen(state, look=True), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """With the picture of the last look."""
        state, reward, terminated, truncated, info = self.env.step(action)
        self.steps += 1
        look = terminated or truncated or self.steps % self.chunk == 0
        return self._seen(state, look), reward, terminated, truncated, info

    def _seen(self, state: NDArray[Any], look: bool) -> dict[str, Any]:
        inner: Any = self.unwrapped
        if look:
            inner.obs_type = "pixels"
            self.picture = inner.get_obs()
            inner.obs_type = "state"
        return {"pixels": self.picture, "agent_pos": state[:2]}


def pusht(num_envs: int, chunk: Size = 8, gamma: float = 0.99) -> SimEnv:
    """5 numbers observed, not scaled: disc x, y, T x, y in pixels (0..512), its angle (0..2 pi)."""
    options = {"obs_type": "state", "render_mode": "rgb_array"}
    return SimEnv(registered(PUSHT, num_envs, options=options, success="is_success"), chunk, gamma)


def pusht_pixels(num_envs: int, chunk: Size = 8, gamma: float = 0.99, size: Size = 96) -> SimEnv:
    """Observed: {"pixels": (size, size, 3) uint8, "agent_pos": (2,) in pixels (0..512)}."""
    options: dict[str, Any] = {"obs_type": "pixels_agent_pos", "render_mode": "rgb_array", "disable_env_checker": True}
    options |= {"observation_width": size, "observation_height": size}
    envs = [Looked(gymnasium.make(PUSHT, **options), chunk) for _ in range(num_envs)]
    return SimEnv(GymRows(envs, PUSHT, success="is_success"), chunk, gamma)
