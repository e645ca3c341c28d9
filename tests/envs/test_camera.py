"""Pictures: of the row asked for, followed, the same twice, and nothing of the simulation moves by it."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from rlflow.envs import camera
from rlflow.envs.sim import Sim, SimEnv
from rlflow.envs.simulators.mujoco import HOPPER, MujocoSim, ant, halfcheetah, hopper
from rlflow.types import tree_leaves


def picture_or_skip(env: SimEnv, row: int = 0) -> torch.Tensor:
    """The one place where a machine without OpenGL skips."""
    try:
        return env.render(row)
    except RuntimeError as error:
        pytest.skip(str(error))


def actions(env: SimEnv, steps: int) -> torch.Tensor:
    shape = (steps, env.num_envs, *env.action_shape)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("make", [hopper, ant])
def test_looking_changes_nothing_and_shows_what_changes(make):
    env, other = make(3, threads=1), make(3, threads=1)
    env.reset(torch.arange(3)), other.reset(torch.arange(3))
    first = picture_or_skip(env)
    assert first.shape == (192, 192, 3)
    assert first.dtype == torch.uint8
    assert torch.equal(first, env.render(0))
    for action in actions(env, 6):
        env.render(1)
        one, two = env.step(action), other.step(action)
        assert all(map(torch.equal, tree_leaves([one.obs, one.reward]), tree_leaves([two.obs, two.reward])))
    assert not torch.equal(first, env.render(0))
    assert not torch.equal(env.render(0), env.render(2))


def test_sizes_are_height_by_width_and_sky_is_above_the_floor():
    env = hopper(1)
    env.reset(torch.zeros(1, dtype=torch.long))
    picture_or_skip(env)
    picture = env.render(0, (700, 900)).float()  # larger than the buffer the model asks for
    assert picture.shape == (700, 900, 3)
    assert float(picture[:150].std()) < float(picture[-150:].std()) / 3  # one colour above, squares below


def test_the_camera_follows():
    """The body, brown, stands in the middle columns however far it has gone; the floor, periodic, does not."""
    env = halfcheetah(2, threads=1)
    env.reset(torch.arange(2))
    picture_or_skip(env)
    for metres in (0.0, 40.0):
        env.sim._qpos[0, 0] = metres
        picture = env.render(0).float()
        brown = (picture[..., 0] - picture[..., 2] > 40).float().sum(0)
        columns = torch.arange(192.0)
        assert float((brown * columns).sum() / brown.sum()) == pytest.approx(96, abs=12)


def test_watch_is_called_after_every_primitive_step():
    env, seen = hopper(2, chunk=4, threads=1), []
    env.reset(torch.arange(2))
    env.watch = lambda: seen.append(env.sim._qpos[0].copy())
    env.step(actions(env, 1)[0])
    assert len(seen) == 4
    single = hopper(2, chunk=1, threads=1)
    single.reset(torch.arange(2))
    for i, action in enumerate(actions(env, 1)[0].unbind(1)):
        single.step(action[:, None])
        assert (seen[i] == single.sim._qpos[0]).all()


def test_a_simulator_without_pictures_says_so():
    class Blind(MujocoSim):
        render = Sim.render

    with pytest.raises(NotImplementedError, match=r"Blind draws no pictures: give it a `render\(row, size\)`"):
        SimEnv(Blind(HOPPER, 1)).render(0)


def test_without_any_opengl_the_packages_are_named(monkeypatch):
    monkeypatch.setattr(camera, "HEADLESS", ("nonsense", "neither"))
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    camera.context.cache_clear()
    with pytest.raises(RuntimeError, match="nonsense: .*neither: .*libosmesa6.*libegl1"):
        camera.context(11, 13)


def test_simulations_run_without_the_opengl_that_was_chosen():
    """MuJoCo's own import ends where MUJOCO_GL names a library that is missing; a picture is then refused, no more."""
    code = (
        "import sys; sys.modules['mujoco.osmesa'] = type('Missing', (), {'__getattr__': lambda *_: 1 / 0})()\n"
        "from rlflow.envs.simulators.mujoco import hopper; import torch\n"
        "e = hopper(1); e.reset(torch.zeros(1).long()); e.step(torch.zeros(1, 4, 3)); e.render(0)"
    )
    environment = os.environ | {"MUJOCO_GL": "osmesa"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: no picture can be drawn without a screen (osmesa: ")
    assert "apt-get install libosmesa6" in last


def test_the_kind_of_opengl_is_the_users_where_set(monkeypatch):
    monkeypatch.setattr(camera.platform, "system", lambda: "Linux")
    for name, expected in (("osmesa", ("osmesa",)), ("", ("egl", "osmesa")), (" EGL ", ("egl",))):
        monkeypatch.setenv("MUJOCO_GL", name)
        assert tuple(camera.backends()) == expected


def test_nothing_is_complained_of_at_the_end():
    code = "from rlflow.envs.simulators.mujoco import hopper; import torch; e = hopper(1); e.reset(torch.zeros(1).long()); e.render(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "no picture can be drawn" in done.stderr:
        pytest.skip("no OpenGL here")
    assert done.returncode == 0
    assert done.stderr == ""


BALL, RADIUS = (0.1, 0.05, 0.3), 0.15
SCENE = f"""<mujoco><worldbody><camera name="c" pos=".6 -1.2 .8" xyaxes="1 .5 0 -.25 .5 1" fovy="50"/>
<geom type="plane" size="2 2 .1"/><body pos="{" ".join(map(str, BALL))}"><geom type="sphere" size="{RADIUS}"/></body>
</worldbody></mujoco>"""


def test_points_lie_where_things_are():
    """On the ball or on the floor, to two millimetres; the sky has none."""
    mujoco = pytest.importorskip("mujoco")
    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    try:
        eye = camera.Camera(model, (60, 84), fixed="c")
    except RuntimeError as error:
        pytest.skip(str(error))
    found, picture = eye.points(data), eye.photo(data)
    assert found.shape == (60, 84, 3)
    camera.Camera(model, (60, 84), fixed="c")  # another of that size takes nothing away
    assert np.array_equal(eye.points(data), found)
    assert np.array_equal(eye.photo(data), picture)
    shown = np.isfinite(found).all(-1)
    assert not shown[0].any()
    assert shown[-1].all()
    off = np.abs(np.linalg.norm(found[shown] - BALL, axis=-1) - RADIUS)
    assert np.minimum(off, np.abs(found[shown][:, 2])).max() < 2e-3
    on_ball = found[shown][off < 1e-3]
    assert len(on_ball) > 50
    assert (((on_ball - BALL) * (np.array([0.6, -1.2, 0.8]) - on_ball)).sum(1) > 0).all()  # the near side


def test_clouds_are_thinned_by_cubes_and_filled_by_repetition():
    points = np.random.default_rng(0).uniform(-1, 1, (40, 50, 3))
    points[0, 0] = np.inf
    box = (-0.5, -0.5, 0.0), (0.5, 0.5, 0.5)
    few, many = camera.cloud(points, 64, *box, cell=0.1), camera.cloud(points, 512, *box, cell=0.1)
    for cloud in (few, many):
        assert ((cloud >= box[0]) & (cloud <= box[1])).all()
        cubes = np.unique(np.floor((cloud - box[0]) / 0.1), axis=0)
        places = np.unique(cloud, axis=0)
        assert len(cubes) == len(places)  # one of each cube
    assert len(np.unique(few, axis=0)) == 64
    assert set(map(tuple, few)) < set(map(tuple, many))
    assert camera.cloud(points + 9, 8, *box, cell=0.1).tolist() == [list(box[1])] * 8
