"""PushT (Chi et al. 2023, package gym-pusht): a disc pushes a T onto its outline; the action is where the disc goes.

The reward is the covered share of the outline, 1 from 95 % on, which is also success and the end; 300 steps, 10 a
second. The disc's goal, 0..512 pixels in x and y, is stretched to [-1, 1].
"""

from __future__ import annotations

from rlflow.envs.sim import SimEnv
from rlflow.envs.simulators.gym import registered
from rlflow.ranges import Size

try:
    import gym_pusht  # noqa: F401  (registers its id)
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error}: pip install 'rlflow-torch[pusht]', or beside [image] "
        "pip install --no-deps gym-pusht 'pymunk<7' pygame cffi pycparser",
        name=error.name,
    ) from None


def made(num_envs: int, chunk: int, gamma: float, observed: str) -> SimEnv:
    """gym_pusht/PushT-v0 with the kind of observation asked for."""
    options = {"obs_type": observed, "render_mode": "rgb_array"}
    return SimEnv(registered("gym_pusht/PushT-v0", num_envs, options=options, success="is_success"), chunk, gamma)


def pusht(num_envs: int, chunk: Size = 8, gamma: float = 0.99) -> SimEnv:
    """5 numbers observed, not scaled: disc x, y, T x, y in pixels (0..512), its angle (0..2 pi)."""
    return made(num_envs, chunk, gamma, "state")


def pusht_pixels(num_envs: int, chunk: Size = 8, gamma: float = 0.99) -> SimEnv:
    """Observed: {"pixels": (96, 96, 3) uint8, "agent_pos": (2,) in pixels (0..512)}."""
    return made(num_envs, chunk, gamma, "pixels_agent_pos")
