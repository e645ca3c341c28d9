"""Export: what leaves comes back the same, and the other libraries read it; info and show say what is there."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from rlflow import cli
from rlflow.datasets.acting import Options
from rlflow.datasets.bring import import_demos
from rlflow.datasets.info import info, lines
from rlflow.datasets.open import open_source
from rlflow.datasets.out import Writer, export_demos
from rlflow.datasets.show import show
from rlflow.datasets.to_lerobot import ToLeRobot
from rlflow.datasets.to_minari import ToMinari
from rlflow.envs.demos.dataset import Demos, Episode, write_demos
from rlflow.report.video import gif
from rlflow.types import as_bytes

LENGTHS = [4, 9, 2]
TABLETOP = {"name": "tabletop"}
PENDULUM = {"name": "gym", "settings": {"env_id": "Pendulum-v1"}}


def demos(folder: Path, env: dict) -> Demos:
    """Of the tabletop with pictures and a success, of the pendulum without."""
    rng, made = torch.Generator().manual_seed(0), []
    for i, length in enumerate(LENGTHS):
        if env is TABLETOP:
            pixels = torch.randint(256, (length, 24, 24, 3), generator=rng).byte()
            text = torch.randint(9, (length, 5), generator=rng)
            obs, num = {"pixels": pixels, "state": torch.randn(length, 2, generator=rng), "text": text}, 2
        else:
            obs, num = torch.randn(length, 3, generator=rng), 1
        action = torch.rand(length, num, generator=rng) * 2 - 1
        success = (i == 1) if env is TABLETOP else None
        made.append(Episode(obs, action, torch.randn(length, generator=rng), i == 1, i != 1, success))
    return write_demos(folder, made, env, {"tasks": ["push the cube"], "fps": 20.0}, shard_rows=5)


def same(one: Demos, two: Demos) -> bool:
    index = torch.arange(sum(LENGTHS))
    a, b = one.observations(index), two.observations(index)
    pairs = [(a[n], b[n]) for n in a] if isinstance(a, dict) else [(a, b)]
    pairs += [(one.rewards(index), two.rewards(index))]
    torch.testing.assert_close(one.actions(index), two.actions(index), atol=1e-6, rtol=0)
    return one.episodes == two.episodes and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


WRITERS = {"lerobot": ToLeRobot, "minari": ToMinari}


@pytest.mark.parametrize("env", [TABLETOP, PENDULUM], ids=["tabletop", "pendulum"])
@pytest.mark.parametrize("form", WRITERS)
def test_what_leaves_comes_back_the_same(tmp_path, form, env):
    """Pictures to the byte, ends and returns to the last digit; actions through the environment's own units."""
    pytest.importorskip("h5py" if form == "minari" else "pyarrow")
    pytest.importorskip("gymnasium")
    before = demos(tmp_path / "d", env)
    export_demos(tmp_path / "d", tmp_path / "out", WRITERS[form]())
    after = import_demos(tmp_path / "out", tmp_path / "again", env, Options(convert="keep"), "")
    if form == "lerobot" and env is PENDULUM:  # says of no end whether it is by the task
        for row in before.episodes:
            row |= {"terminated": False, "truncated": True}
    assert same(before, after)


def test_a_datasets_own_environment_is_its_default(tmp_path):
    pytest.importorskip("h5py")
    pytest.importorskip("gymnasium")
    demos(tmp_path / "d", PENDULUM)
    export_demos(tmp_path / "d", tmp_path / "out", ToMinari())
    source = open_source(tmp_path / "out")
    assert float(np.abs(np.concatenate([e.columns["actions"] for e in source.episodes({"actions": None})])).max()) > 1
    assert import_demos(tmp_path / "out", tmp_path / "again", None, Options(convert="keep"), "").env == PENDULUM
    with pytest.raises(ValueError, match=r"says that actions are in \[-2, 2\], the environment takes \[-1, 1\]"):
        import_demos(tmp_path / "out", tmp_path / "b", PENDULUM, Options(units="unit"), "")


def test_minari_reads_it(tmp_path):
    minari = pytest.importorskip("minari")
    pytest.importorskip("h5py")
    kept = demos(tmp_path / "d", PENDULUM)
    export_demos(tmp_path / "d", tmp_path / "out", ToMinari("me/pendulum-v0"))
    found = minari.MinariDataset(tmp_path / "out" / "data")
    assert (found.id, found.total_episodes, found.total_steps) == ("me/pendulum-v0", 3, sum(LENGTHS))
    assert found.env_spec.id == "Pendulum-v1"
    assert found.action_space.high.tolist() == [2]
    for row, episode in zip(kept.episodes, found.iterate_episodes(), strict=True):
        assert episode.observations.shape == (row["length"] + 1, 3)
        assert all(found.action_space.contains(action) for action in episode.actions)
        assert float(episode.rewards.sum(dtype=np.float64)) == pytest.approx(row["return"])
        assert (episode.terminations[-1], episode.truncations[-1]) == (row["terminated"], row["truncated"])


def test_what_an_episode_was_asked_is_its_task(tmp_path):
    """A sentence is no number that is observed, and the state has LeRobot's name for it."""
    parquet, words = pytest.importorskip("pyarrow.parquet"), ["go left", "go right", "go left"]
    seen = [{"agent_pos": torch.randn(4, 3), "task": as_bytes([sentence] * 4, 16)} for sentence in words]
    made = [Episode(obs, torch.rand(4, 1), torch.zeros(4), False, True) for obs in seen]
    write_demos(tmp_path / "d", made, PENDULUM, {"tasks": ["another"], "fps": 20.0})
    export_demos(tmp_path / "d", tmp_path / "out", ToLeRobot())
    steps, episodes, tasks = (
        parquet.read_table(tmp_path / "out" / part).to_pydict()
        for part in ("data", "meta/episodes", "meta/tasks.parquet")
    )
    assert tasks == {"task_index": [0, 1], "__index_level_0__": ["go left", "go right"]}
    assert episodes["tasks"] == [[sentence] for sentence in words]
    assert steps["task_index"] == [0] * 4 + [1] * 4 + [0] * 4
    assert [name for name in steps if name.startswith("observation")] == ["observation.state"]
    assert json.loads((tmp_path / "out" / "meta" / "info.json").read_text())["total_tasks"] == 2


def test_lerobot_reads_it(tmp_path):
    module = pytest.importorskip("lerobot.datasets.lerobot_dataset")
    demos(tmp_path / "d", TABLETOP)
    export_demos(tmp_path / "d", tmp_path / "out", ToLeRobot())
    found = module.LeRobotDataset("me/tabletop", root=tmp_path / "out")
    assert (found.num_episodes, found.num_frames, found.fps) == (3, sum(LENGTHS), 20)
    assert found[5]["task"] == "push the cube"
    kept = Demos.open(tmp_path / "d").observations(torch.tensor([5]))
    torch.testing.assert_close(found[5]["observation.state"], kept["state"][0])
    torch.testing.assert_close(found[5]["observation.images.pixels"].permute(1, 2, 0), kept["pixels"][0] / 255)


def test_what_lerobot_writes_is_read(tmp_path):
    """Its own table of steps and its own film, AV1 as it encodes by default."""
    module = pytest.importorskip("lerobot.datasets.lerobot_dataset")
    axes = ["height", "width", "channels"]
    features = {
        "observation.state": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
        "observation.image": {"dtype": "image", "shape": (24, 24, 3), "names": axes},
        "observation.images.top": {"dtype": "video", "shape": (64, 96, 3), "names": axes},
        "action": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
    }
    made = module.LeRobotDataset.create("me/d", 10, features, root=tmp_path / "d", use_videos=True)
    rng = np.random.default_rng(0)
    for length in LENGTHS:
        for step in range(length):
            row = {"observation.state": np.full(2, step, np.float32), "action": np.full(2, length, np.float32)}
            row["observation.image"] = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            row["observation.images.top"] = np.full((64, 96, 3), 20 * length + 5 * step, np.uint8)
            made.add_frame(row | {"task": "go"})
        made.save_episode()
    made.finalize()
    source = open_source(tmp_path / "d")
    assert (source.lengths, source.said.tasks, source.said.fps) == (LENGTHS, ["go"], 10)
    rng = np.random.default_rng(0)
    for length, one in zip(LENGTHS, source.episodes(dict.fromkeys([*source.observed, "action"])), strict=True):
        steps = np.arange(length)
        assert one.columns["observation.state"][:, 0].tolist() == steps.tolist()
        assert one.columns["action"][:, 1].tolist() == [length] * length
        images = rng.integers(0, 256, (length, 24, 24, 3), dtype=np.uint8)
        np.testing.assert_array_equal(one.columns["observation.image"], images)
        assert np.abs(one.columns["observation.images.top"].mean((1, 2, 3)) - 20 * length - 5 * steps).max() < 2


def test_a_failed_export_leaves_nothing(tmp_path):
    class Broken(Writer):
        def write(self, leaving, folder):
            (folder / "half").touch()
            raise RuntimeError("disk")

    demos(tmp_path / "d", TABLETOP)
    with pytest.raises(RuntimeError):
        export_demos(tmp_path / "d", tmp_path / "out", Broken())
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_lerobots_statistics_are_those_of_all_steps(tmp_path):
    pytest.importorskip("pyarrow")
    kept = demos(tmp_path / "d", TABLETOP)
    export_demos(tmp_path / "d", tmp_path / "out", ToLeRobot())
    stats, seen = json.loads((tmp_path / "out/meta/stats.json").read_text()), kept.observations(torch.arange(15))
    np.testing.assert_allclose(stats["observation.state"]["std"], seen["state"].std(0, correction=0), rtol=1e-5)
    pixels = (seen["pixels"].double() / 255).mean((0, 1, 2)).view(3, 1, 1)
    np.testing.assert_allclose(stats["observation.images.pixels"]["mean"], pixels)


# -- info and show --------------------------------------------------------------------------------


def test_info_of_demonstrations(tmp_path):
    kept = demos(tmp_path / "d", TABLETOP)
    found = info(tmp_path / "d")
    assert found["episodes"]["number"] == 3
    assert (found["episodes"]["shortest"], found["episodes"]["longest"], found["episodes"]["terminated"]) == (2, 9, 1)
    action = kept.actions(torch.arange(15)).double()
    figures = found["columns"]["action"]
    assert figures["over"] == "each number"
    assert figures["mean"] == pytest.approx(action.mean(0).tolist())
    assert figures["std"] == pytest.approx(action.std(0, correction=0).tolist())
    assert (figures["min"], figures["max"]) == (action.amin(0).tolist(), action.amax(0).tolist())


def test_info_tells_of_each_number_where_they_are_few(tmp_path, monkeypatch):
    """16 have figures each, 17 together; read in blocks of three rows or so, across shards."""
    monkeypatch.setattr("rlflow.datasets.info.BLOCK", 50)
    rng = torch.Generator().manual_seed(0)
    obs = {"few": torch.randn(12, 4, 4, generator=rng), "many": torch.randn(12, 17, generator=rng)}
    rows = [{name: value[i : i + 4] for name, value in obs.items()} for i in (0, 4, 8)]
    made = (Episode(seen, torch.zeros(4, 1), torch.arange(4.0), False, True) for seen in rows)
    write_demos(tmp_path / "d", made, {"name": "toy_reach"}, {"notes": []}, shard_rows=4)
    found = info(tmp_path / "d")
    few, many, reward = (found["columns"][name] for name in ("obs.few", "obs.many", "reward"))
    assert (few["over"], many["over"]) == ("each number", "all numbers")
    for key, of in {"mean": torch.mean, "std": lambda x, dim: x.std(dim, correction=0), "min": torch.amin}.items():
        torch.testing.assert_close(torch.tensor(few[key], dtype=torch.float64), of(obs["few"].double(), 0))
        assert many[key] == pytest.approx(float(of(obs["many"].double().flatten(), 0)))
    assert (reward["mean"], reward["max"]) == (1.5, 3)
    printed = {line.split(":")[0].strip(): line for line in lines(found)}
    assert re.search(r"of each number:  mean( \S+){16}  std( \S+){16}  min( \S+){16}  max", printed["obs.few"])
    assert re.search(r"of all numbers:  mean \S+  std \S+  min", printed["obs.many"])
    assert printed["reward"].endswith("reward: float32 ()  mean 1.5  std 1.118  min 0  max 3")


def test_films_have_a_frame_for_each_step(tmp_path):
    from PIL import Image

    pytest.importorskip("imageio_ffmpeg")
    demos(tmp_path / "d", TABLETOP)
    assert "length 9" in show(tmp_path / "d", tmp_path / "x.mp4", episode=1)
    (tmp_path / "x.gif").write_bytes(gif(tmp_path / "x.mp4", fps=20))
    with Image.open(tmp_path / "x.gif") as film:
        assert (film.n_frames, film.size) == (9, (192, 192))


def test_curves_are_drawn_of_numbers(tmp_path):
    demos(tmp_path / "d", PENDULUM)
    show(tmp_path / "d", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    for out, episode, message in [
        ("x.mp4", 0, "it has no pictures: name a .png for curves"),
        ("x.png", 3, "--episode 3: .* has episodes 0 to 2"),
        ("x.txt", 0, "name a file that ends in"),
    ]:
        with pytest.raises(ValueError, match=message):
            show(tmp_path / "d", tmp_path / out, episode)


def test_films_of_others_are_drawn_without_an_import(tmp_path, monkeypatch):
    """Episode 1 of three, from its own first frame to its last; the pictures asked for, in either order of axes."""
    pytest.importorskip("imageio_ffmpeg")
    drawn = {}
    monkeypatch.setattr("rlflow.datasets.show.write_video", lambda frames, out, fps: drawn.update({fps: list(frames)}))
    greys = torch.arange(sum(LENGTHS), dtype=torch.uint8)
    pixels = greys.view(-1, 1, 1, 1).expand(-1, 3, 24, 24).numpy()
    flags = np.isin(np.arange(len(greys)), np.cumsum(LENGTHS) - 1)
    table = {"top": pixels, "side": 255 - pixels, "actions": np.zeros((len(greys), 2), np.float32)}
    np.savez(tmp_path / "d.npz", **table, rewards=np.ones(len(greys)), timeouts=flags)
    said = show(tmp_path / "d.npz", tmp_path / "x.mp4", episode=1, name="side")
    assert said == f"episode 1 (length 9, return 9.0) in {tmp_path / 'x.mp4'}"
    assert {frame.shape for frame in drawn[25]} == {(192, 192, 3)}
    assert [int(frame[0, 0, 0]) for frame in drawn[25]] == [255 - grey for grey in range(4, 13)]
    with pytest.raises(ValueError, match="no pictures front, its pictures are top, side"):
        show(tmp_path / "d.npz", tmp_path / "x.mp4", name="front")
    with pytest.raises(ValueError, match="--episode 3: .* has episodes 0 to 2"):
        show(tmp_path / "d.npz", tmp_path / "x.mp4", episode=3)


def test_curves_of_others_are_those_of_all_their_numbers(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("rlflow.datasets.show._curves", lambda columns, out: drawn.update(columns))
    rows = np.arange(6, dtype=np.float64)[:, None]
    table = {
        "state": rows,
        "pixels": np.zeros((6, 4, 4, 3), np.uint8),
        "actions": rows + 10,
        "dones": rows[:, 0] % 3 == 2,
    }
    np.savez(tmp_path / "d.npz", **table)
    assert show(tmp_path / "d.npz", tmp_path / "x.png", episode=1).startswith("episode 1 (length 3) in")
    assert {name: value.flatten().tolist() for name, value in drawn.items()} == {
        "state": [3, 4, 5],
        "actions": [13, 14, 15],
    }


# -- the command ----------------------------------------------------------------------------------


def test_the_command_goes_round(tmp_path, capsys):
    """export, info, import and show, by what they print; what the command line says wrong is one line."""
    pytest.importorskip("pyarrow")
    kept = demos(tmp_path / "d", TABLETOP)
    d, out, again = (str(tmp_path / name) for name in ("d", "out", "again"))
    cli.main(["demos", "export", d, "--format", "lerobot", "--out", out, "--task", "tidy up"])
    cli.main(["demos", "info", out])
    assert "observation.images.pixels: uint8 (24, 24, 3)  observed" in capsys.readouterr().out
    cli.main(["demos", "import", out, "--env", "tabletop", "--out", again, "--convert", "keep"])
    assert same(kept, Demos.open(again))
    assert Demos.open(again).about["made_by"]["tasks"] == ["tidy up"]
    cli.main(["demos", "info", again, "--json"])
    told = capsys.readouterr().out
    assert json.loads(told[told.index("{") :])["episodes"]["steps"] == 15
    for words, message in [
        (["import", out, "env.settings.env_id=x", "--out", again + "2"], "say of which environment, with --env NAME"),
        (["import", out, "train.seed=1", "--env", "gym", "--out", again + "2"], "no other part of a config"),
        (["import", out, "--env", "tabeltop", "--out", again + "2"], "did you mean 'tabletop'"),
        (["import", out, "--out", again + "2"], "--env NAME: .* does not say of which environment"),
        (["export", d, "--format", "lerobot", "--out", out], "is not empty"),
    ]:
        with pytest.raises(SystemExit):
            cli.main(["demos", *words])
        assert re.search(message, capsys.readouterr().err)


def test_imported_cloned_recorded_and_exported(tmp_path, capsys):
    """A table of the pendulum becomes a policy, whose own episodes leave; its chunks of two are played one by one."""
    pytest.importorskip("gymnasium")
    pytest.importorskip("pyarrow")
    rng, steps = np.random.default_rng(0), 60
    table = {"observations": rng.normal(size=(steps, 3)), "actions": rng.uniform(-2, 2, (steps, 1))}
    np.savez(tmp_path / "d.npz", **table, rewards=np.ones(steps), timeouts=np.arange(steps) % 20 == 19)
    d, policy, own, out = (str(tmp_path / name) for name in ("d", "policy", "own", "out"))
    world = ["--env", "gym", "env.settings.env_id=Pendulum-v1", "env.settings.max_steps=7"]
    cli.main(["demos", "import", str(tmp_path / "d.npz"), *world, "--out", d])
    cli.main(["pretrain", "robot_bc", "--demos", d, "--chunk", "2", "--steps", "2", "--judged", "2", "--out", policy])
    cli.main(["demos", "record", policy, "--out", own, "--num", "33", "--seed", "5"])
    cli.main(["demos", "export", own, "--format", "lerobot", "--out", out])
    kept = Demos.open(own)
    assert [row["length"] for row in kept.episodes] == [7] * 33
    assert kept.env == Demos.open(d).env
    assert open_source(Path(out)).lengths == [7] * 33
    first = kept.observations(torch.tensor([0, 7 * 32]))  # of seeds 5 and 37
    from rlflow.datasets.actions import step_env

    assert torch.equal(first, step_env(kept.env, False, 2).reset(torch.tensor([5, 37])))
    with pytest.raises(SystemExit):
        cli.main(["demos", "record", "shapes", "--out", own + "2"])
    assert "makes images, demonstrations are of robots" in capsys.readouterr().err
