"""Pictures of MuJoCo states without a screen, and the points that they show, by whichever OpenGL of the machine works.

Shadows, reflections and smoothing of edges are off: a picture takes 4 to 18 ms of one CPU core, ten times less.
"""

from __future__ import annotations

import atexit
import copy
import importlib
import os
import platform
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    import mujoco
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: pip install 'rlflow-torch[robots]'", name=error.name) from None
except Exception:  # MuJoCo loads what MUJOCO_GL names: that it is missing is said when a picture is wanted
    chosen = os.environ.pop("MUJOCO_GL", None)
    if chosen is None:
        raise
    import mujoco

    os.environ["MUJOCO_GL"] = chosen

OFF = (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION)
BACKENDS = {"Darwin": ("cgl",), "Windows": ("glfw",)}
HEADLESS = ("egl", "osmesa")


def backends() -> Sequence[str]:
    """Kinds of OpenGL to try, in this order: MUJOCO_GL where it is set, else what needs no screen."""
    chosen = os.environ.get("MUJOCO_GL", "").strip().lower()
    return (chosen,) if chosen in (*HEADLESS, "glfw", "cgl") else BACKENDS.get(platform.system(), HEADLESS)


@cache
def context(width: int, height: int) -> Any:
    """The OpenGL context of pictures of this size; RuntimeError that says what to install where none can be had."""
    failed = []
    for name in backends():
        os.environ.pop("PYOPENGL_PLATFORM", None)  # left behind by the one that failed before
        try:
            made = importlib.import_module(f"mujoco.{name}").GLContext(width, height)
        except Exception as error:  # a missing library is an ImportError, AttributeError or OSError; no device others
            failed.append(f"{name}: {error}")
            continue
        atexit.register(made.free)  # later, Python has taken apart what it needs
        return made
    raise RuntimeError(
        f"no picture can be drawn without a screen ({'; '.join(failed)}): `apt-get install libosmesa6` and "
        "MUJOCO_GL=osmesa, or `apt-get install libegl1` and MUJOCO_GL=egl (with an NVIDIA driver: its graphics "
        "libraries, in a container NVIDIA_DRIVER_CAPABILITIES=all)"
    )


class Camera:
    """Pictures (H, W, 3) of the states of `model`, which it copies; it follows the body `follow`, or looks from
    the model's camera `fixed`."""

    def __init__(
        self, model: Any, size: tuple[int, int], follow: int = 1, distance: float = 4.0, fixed: str | None = None
    ):
        self.size, (height, width) = size, size
        self._model = model = copy.copy(model)
        model.vis.quality.shadowsize, model.vis.quality.offsamples = 1, 0
        model.vis.global_.offheight, model.vis.global_.offwidth = height, width
        self._gl = context(width, height)
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        self._scene, self._option = mujoco.MjvScene(model, maxgeom=2000), mujoco.MjvOption()
        for flag in OFF:
            self._scene.flags[flag] = 0
        self._view = self._fixed(fixed) if fixed else self._tracking(follow, distance)

    def _fixed(self, name: str) -> Any:
        view = mujoco.MjvCamera()
        view.type, view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, self._model.camera(name).id
        return view

    def _tracking(self, body: int, distance: float) -> Any:
        """From the side, a little from above; it keeps to the centre of mass."""
        view = mujoco.MjvCamera()
        view.type, view.trackbodyid = mujoco.mjtCamera.mjCAMERA_TRACKING, body
        view.distance, view.azimuth, view.elevation = distance, 90.0, -15.0
        return view

    def photo(self, data: Any) -> NDArray[np.uint8]:
        """(H, W, 3) of an MjData whose positions of bodies and lights are up to date."""
        picture = np.empty((*self.size, 3), np.uint8)
        self._draw(data, picture, None)
        return np.flipud(picture).copy()  # OpenGL counts rows from below

    def points(self, data: Any) -> NDArray[np.float64]:
        """(H, W, 3) places in the world, in metres, that the pixels of `photo` show; inf where they show none."""
        depth = np.empty(self.size, np.float32)
        self._draw(data, None, depth)
        eyes = self._scene.camera[:2]
        place, ahead, up = (np.mean([getattr(eye, name) for eye in eyes], 0) for name in ("pos", "forward", "up"))
        near, far, top, bottom = (
            float(getattr(eyes[0], f"frustum_{name}")) for name in ("near", "far", "top", "bottom")
        )
        (height, width), span = self.size, top - bottom
        across = span / height * (np.arange(width) + 0.5 - width / 2)  # square pixels, of the nearest plane
        above = bottom + span / height * (np.arange(height) + 0.5)
        ray = near * ahead + above[:, None, None] * up + across[:, None] * np.cross(ahead, up)
        away = far / (far - depth.astype(np.float64) * (far - near))  # in distances of the nearest plane
        found = place + away[..., None] * ray
        found[depth >= 1] = np.inf
        return np.flipud(found).copy()

    def _draw(self, data: Any, picture: NDArray[np.uint8] | None, depth: NDArray[np.float32] | None) -> None:
        (height, width), everything = self.size, mujoco.mjtCatBit.mjCAT_ALL
        frame = mujoco.MjrRect(0, 0, width, height)
        self._gl.make_current()
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)  # another camera's may be in place
        mujoco.mjv_updateScene(self._model, data, self._option, None, self._view, everything, self._scene)
        mujoco.mjr_render(frame, self._scene, self._context)
        mujoco.mjr_readPixels(picture, depth, frame, self._context)


def cloud(
    points: NDArray[np.float64], num: int, low: Sequence[float], high: Sequence[float], cell: float
) -> NDArray[np.float32]:
    """(num, 3) of the points (..., 3) in metres inside [low, high]: one of each cube of side `cell` that holds any.

    Evenly fewer where those are too many, and again where they are too few; `high` where there is none at all.
    """
    places = points.reshape(-1, 3)
    places = places[((places >= low) & (places <= high)).all(1)]
    if not len(places):
        return np.tile(np.asarray(high, np.float32), (num, 1))
    cubes = np.floor((places - low) / cell).astype(np.int64)
    key = (cubes[:, 0] * 2**20 + cubes[:, 1]) * 2**20 + cubes[:, 2]
    places = places[np.unique(key, return_index=True)[1]]
    return places[np.arange(num) * len(places) // num].astype(np.float32)
