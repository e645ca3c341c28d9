"""Foreign datasets: every format gives back the episodes that were written into it, and what is unsafe is refused."""

import io
import json
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlflow.datasets import source as limits
from rlflow.datasets.open import open_source
from rlflow.datasets.pictures import Video
from rlflow.datasets.source import inside
from rlflow.report.video import write_video

LENGTHS = [7, 3, 12, 5]
SIZE, BOUND, ENV_ID = (32, 48), 1.0, "Reacher-v5"


def episodes() -> list[dict]:
    """Observation, action and reward of each; the last shows where it ended; odd ones succeed in the end."""
    rng = np.random.default_rng(0)
    made = []
    for number, length in enumerate(LENGTHS):
        rows = {
            "obs": rng.normal(size=(length + 1, 3)).astype(np.float32),
            "action": rng.uniform(-1, 1, (length, 2)).astype(np.float32),
            "reward": np.zeros(length, np.float32),
        }
        rows["reward"][-1] = number % 2
        made.append(rows)
    return made


def flat(trailing: bool = False) -> dict[str, np.ndarray]:
    """All episodes as one table; `trailing` keeps where they ended, with an action that is not carried out."""
    told = episodes()
    extra = [np.zeros_like(told[0]["action"][:1])] if trailing else []
    ends = [np.eye(1, n + trailing, n + trailing - 1)[0] for n in LENGTHS]
    return {
        "observations": np.concatenate([e["obs"] if trailing else e["obs"][:-1] for e in told]),
        "actions": np.concatenate([np.concatenate([e["action"], *extra]) for e in told]),
        "terminals": np.concatenate(ends).astype(np.float32),
        **({} if trailing else {"rewards": np.concatenate([e["reward"] for e in told])}),
    }


# -- one writer for each format -------------------------------------------------------------------


def npz(folder: Path) -> Path:
    np.savez(folder / "d.npz", **flat())
    return folder / "d.npz"


def npz_compressed(folder: Path) -> Path:
    """Without flags: the lengths say where episodes end."""
    table = flat()
    del table["terminals"]
    np.savez_compressed(folder / "d.npz", **table, traj_lengths=np.array(LENGTHS))
    return folder / "d.npz"


def ogbench(folder: Path) -> Path:
    np.savez_compressed(folder / "cube-play-v0.npz", **flat(trailing=True))
    return folder / "cube-play-v0.npz"


def parquet(folder: Path) -> Path:
    """Two files; lists of variable type; a number for each episode."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table, numbers = flat(), np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    for i, rows in enumerate((slice(0, 15), slice(15, None))):
        columns = {name: pa.array(list(table[name][rows])) for name in ("observations", "actions", "rewards")}
        pq.write_table(pa.table(columns | {"episode_id": numbers[rows]}), folder / f"{i}.parquet")
    return folder


def d4rl(folder: Path) -> Path:
    h5py = pytest.importorskip("h5py")
    table = flat()
    with h5py.File(folder / "d.hdf5", "w") as file:
        for name, value in table.items():
            file[name] = value
        file["timeouts"] = file["terminals"][:]
        file["terminals"][:] = 0
        file["metadata/algorithm"] = "SAC"
    return folder / "d.hdf5"


def robomimic(folder: Path) -> Path:
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "low_dim.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(
            {"env_name": "Lift", "env_kwargs": {"controller_configs": {"control_delta": True}}}
        )
        for i, e in reversed(list(enumerate(episodes()))):
            demo = data.create_group(f"demo_{i}")
            demo.attrs["num_samples"] = len(e["reward"])
            demo["actions"], demo["rewards"], demo["obs/state"] = e["action"], e["reward"], e["obs"][:-1]
            demo["next_obs/state"], demo["dones"] = e["obs"][1:], np.eye(1, len(e["reward"]), len(e["reward"]) - 1)[0]
        file["mask/train"] = np.array([b"demo_0"])
    return folder / "low_dim.hdf5"


def minari_layout(folder: Path) -> Path:
    h5py = pytest.importorskip("h5py")
    (folder / "data").mkdir()
    with h5py.File(folder / "data" / "main_data.hdf5", "w") as file:
        for i, e in enumerate(episodes()):
            group, last = file.create_group(f"episode_{i}"), np.arange(len(e["reward"])) == len(e["reward"]) - 1
            group["observations"], group["actions"], group["rewards"] = e["obs"], e["action"], e["reward"]
            group["terminations"], group["truncations"] = last & (i % 2 == 1), last & (i % 2 == 0)
            group["infos/success"] = last & (i % 2 == 1)
    size = episodes()[0]["action"].shape[1]
    box = {"type": "Box", "dtype": "float32", "shape": [size], "low": [-BOUND] * size, "high": [BOUND] * size}
    about = {"action_space": json.dumps(box), "env_spec": json.dumps({"id": ENV_ID}), "data_format": "hdf5"}
    (folder / "data" / "metadata.json").write_text(json.dumps(about))
    return folder


def minari_by_itself(folder: Path) -> Path:
    minari = pytest.importorskip("minari")
    pytest.importorskip("h5py")
    from gymnasium.spaces import Box
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    seen, done = (episodes()[0][name].shape[1:] for name in ("obs", "action"))
    spaces = Box(-np.inf, np.inf, seen, np.float32), Box(-BOUND, BOUND, done, np.float32)
    storage = MinariStorage.new(folder / "data", *spaces, data_format="hdf5")
    storage.update_metadata({"dataset_id": "test/d-v0", "minari_version": minari.__version__})
    buffers = []
    for i, e in enumerate(episodes()):
        last = [step == len(e["reward"]) - 1 for step in range(len(e["reward"]))]
        ends = [[end and i % 2 == which for end in last] for which in (1, 0)]
        told = {"success": np.array(ends[0])}
        buffers.append(EpisodeBuffer(i, None, None, list(e["obs"]), list(e["action"]), list(e["reward"]), *ends, told))
    storage.update_episodes(buffers)
    return folder


def frame(episode: int, step: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A grey that tells episode and step."""
    return np.full((*size, 3), 10 + 40 * episode + 3 * step, np.uint8)


def lerobot(folder: Path) -> Path:
    """Steps in two files; a film of all episodes, of which the last has a file of its own; pictures in the table."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    fps, told = 10, episodes()
    features = {
        "observation.state": {"dtype": "float32", "shape": [3], "names": None},
        "observation.image": {"dtype": "image", "shape": [8, 8, 3], "names": ["height", "width", "channels"]},
        "observation.images.top": {"dtype": "video", "shape": [*SIZE, 3], "names": ["height", "width", "channels"]},
        "action": {"dtype": "float32", "shape": [2], "names": ["x", "y"]},
    }
    info = {
        "codebase_version": "v3.0",
        "fps": fps,
        "features": features,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    for name in ("meta/episodes/chunk-000", "data/chunk-000"):
        (folder / name).mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    tasks = pa.table({"task_index": [0], "__index_level_0__": ["reach the goal"]})
    pq.write_table(tasks, folder / "meta" / "tasks.parquet")
    rows, starts = [], np.cumsum([0, *LENGTHS])
    for i, length in enumerate(LENGTHS):
        alone, first = i == 3, 0 if i == 3 else starts[i] / fps
        top = {
            "chunk_index": 0,
            "file_index": int(alone),
            "from_timestamp": first,
            "to_timestamp": first + length / fps,
        }
        place = {"data/chunk_index": 0, "data/file_index": int(i > 1)}
        place |= {"dataset_from_index": int(starts[i]), "dataset_to_index": int(starts[i + 1])}
        videos = {f"videos/observation.images.top/{name}": value for name, value in top.items()}
        rows.append({"episode_index": i, "tasks": ["reach the goal"], "length": length, **place, **videos})
    pq.write_table(pa.Table.from_pylist(rows), folder / "meta/episodes/chunk-000/file-000.parquet")
    for number, numbers in enumerate(([0, 1], [2, 3])):
        columns = {
            "observation.state": [list(row) for i in numbers for row in told[i]["obs"][:-1]],
            "action": [list(row) for i in numbers for row in told[i]["action"]],
            "next.reward": np.concatenate([told[i]["reward"] for i in numbers]),
            "next.success": np.concatenate([told[i]["reward"] > 0 for i in numbers]),
            "episode_index": np.repeat(numbers, [LENGTHS[i] for i in numbers]),
            "observation.image": [{"bytes": png(i, s), "path": None} for i in numbers for s in range(LENGTHS[i])],
        }
        kinds = {"observation.state": pa.list_(pa.float32(), 3), "action": pa.list_(pa.float32(), 2)}
        table = pa.table({name: pa.array(value, kinds.get(name)) for name, value in columns.items()})
        pq.write_table(table, folder / "data" / "chunk-000" / f"file-{number:03d}.parquet", row_group_size=4)
    for number, numbers in enumerate(([0, 1, 2], [3])):
        film(folder / f"videos/observation.images.top/chunk-000/file-{number:03d}.mp4", numbers, fps)
    return folder


def film(path: Path, numbers: list[int], fps: int) -> None:
    import torch

    write_video((torch.from_numpy(frame(i, step)) for i in numbers for step in range(LENGTHS[i])), path, fps)


def png(episode: int, step: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame(episode, step, (8, 8))).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def lerobot_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("imageio_ffmpeg")
    return lerobot(tmp_path_factory.mktemp("lerobot"))


# -- what is read ---------------------------------------------------------------------------------

ENDS = {
    # format, and whether episodes 0 and 1 (which succeeds) are said to end by the task, and to succeed
    npz: ("npz", (True, True), None),
    npz_compressed: ("npz", (False, False), None),
    ogbench: ("OGBench npz", (False, False), None),
    parquet: ("parquet", (False, False), None),
    d4rl: ("HDF5", (False, False), None),
    robomimic: ("robomimic", (False, True), (False, True)),
    minari_layout: ("Minari", (False, True), (False, True)),
    minari_by_itself: ("Minari", (False, True), (False, True)),
}


def check(path: Path, form: str, terminated: tuple[bool, bool], success: tuple[bool, bool] | None) -> None:
    source = open_source(path)
    assert (source.format, source.lengths, len(source.observed)) == (form, LENGTHS, source.format != "LeRobot v3" or 3)
    obs = next(name for name in source.observed if "image" not in name)
    wanted = dict.fromkeys([obs, source.action, *([source.reward] if source.reward else [])])
    found = list(source.episodes(wanted))
    for one, truth in zip(found, episodes(), strict=True):
        np.testing.assert_array_equal(one.columns[obs], truth["obs"][:-1])
        np.testing.assert_array_equal(one.columns[source.action], truth["action"])
        if source.reward:
            np.testing.assert_array_equal(one.columns[source.reward], truth["reward"])
        assert one.terminated != one.truncated
    assert tuple(one.terminated for one in found[:2]) == terminated
    assert success is None or tuple(one.success for one in found[:2]) == success


@pytest.mark.parametrize("writer", ENDS, ids=lambda writer: writer.__name__)
def test_episodes_come_back(writer, tmp_path):
    check(writer(tmp_path), *ENDS[writer])


def test_ogbench_reads_the_same_transitions(tmp_path):
    """Its own reader, of the file that this one reads: both leave out the last row of an episode."""
    utils = pytest.importorskip("ogbench.utils")
    source, theirs = open_source(ogbench(tmp_path)), utils.load_dataset(tmp_path / "cube-play-v0.npz")
    ours = list(source.episodes(dict.fromkeys(["observations", "actions"])))
    for name in ("observations", "actions"):
        np.testing.assert_array_equal(np.concatenate([one.columns[name] for one in ours]), theirs[name])
    assert (np.flatnonzero(theirs["terminals"]) + 1).tolist() == np.cumsum(source.lengths).tolist()


def test_lerobot_episodes_come_back(lerobot_folder):
    check(lerobot_folder, "LeRobot v3", (False, True), (False, True))
    assert open_source(lerobot_folder).said.tasks == ["reach the goal"]


@pytest.mark.parametrize(("column", "size"), [("observation.images.top", SIZE), ("observation.image", (8, 8))])
@pytest.mark.parametrize("scaled", [False, True])
def test_pictures_are_those_of_their_steps(lerobot_folder, column, size, scaled):
    """Films are lossy: a grey comes back within 2 of 3 that the next one is away."""
    size = (4, 6) if scaled else size
    for i, one in enumerate(open_source(lerobot_folder).episodes({column: size if scaled else None})):
        assert one.columns[column].shape == (LENGTHS[i], *size, 3)
        truth = np.stack([frame(i, step, size) for step in range(LENGTHS[i])]).astype(int)
        assert np.abs(one.columns[column] - truth).max() <= (1 if column.endswith("top") else 0)


def test_frames_are_found_from_anywhere(lerobot_folder):
    """Behind a gap, and back again: episodes of a film need not lie side by side."""
    path, film = lerobot_folder / "videos/observation.images.top/chunk-000/file-000.mp4", Video((*SIZE, 3), (2, 2))
    greys = [int(frame(i, step)[0, 0, 0]) for i in range(3) for step in range(LENGTHS[i])]
    for first, num in ((3, 2), (9, 4), (0, 3)):
        assert np.abs(film.take(path, first, num)[:, 0, 0, 0].astype(int) - greys[first : first + num]).max() <= 1
    with pytest.raises(ValueError, match="ends after 22 frames, more belong to its episodes"):
        film.take(path, 20, 5)
    film.close()


def test_what_datasets_say_of_themselves(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    said = open_source(minari_layout(tmp_path / "a")).said
    assert said.env == {"name": "gym", "settings": {"env_id": "Reacher-v5"}}
    assert said.low.tolist() == [-1, -1]
    assert open_source(robomimic(tmp_path / "b")).said.control == "delta"


def test_jpegs_of_minari_are_pictures(tmp_path):
    """As the library keeps them: lists of bytes."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "main_data.hdf5", "w") as file:
        group = file.create_group("episode_0")
        group["actions"], group["rewards"] = np.zeros((2, 1), np.float32), np.zeros(2)
        group["terminations"], group["truncations"] = [False, True], [False, False]
        jpegs = group.create_dataset("observations", (3,), h5py.vlen_dtype(np.uint8))
        for step in range(3):
            data = io.BytesIO()
            Image.fromarray(frame(0, step)).save(data, "JPEG")
            jpegs[step] = np.frombuffer(data.getvalue(), np.uint8)
    source = open_source(tmp_path)
    assert source.columns["observations"].is_picture
    (one,) = source.episodes({"observations": (16, 24)})
    assert one.columns["observations"].shape == (2, 16, 24, 3)
    assert np.abs(one.columns["observations"][1].astype(int) - 13).max() <= 1


# -- what is refused ------------------------------------------------------------------------------


def test_pickles_are_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "loaded",))

    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        for name, value in flat().items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, value)
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "|O", "fortran_order": False, "shape": (27,)})
        archive.writestr("extra.npy", head.getvalue() + pickle.dumps(Bomb()))
    source = open_source(tmp_path / "d.npz")
    assert any("extra is pickled, which is never loaded" in note for note in source.said.notes)
    assert len(list(source.episodes(dict.fromkeys(source.columns)))) == 4
    assert not (tmp_path / "loaded").exists()


@pytest.mark.parametrize("name", ["../outside.parquet", "/etc/passwd", "data/../../x", "a/../.."])
def test_names_never_lead_out_of_the_folder(tmp_path, name):
    with pytest.raises(ValueError, match="lies outside of the dataset's folder"):
        inside(tmp_path / "d", name)
    assert inside(tmp_path / "d", "data/../meta/x") == tmp_path / "d" / "meta" / "x"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_path": "../{chunk_index}{file_index}.parquet"}, "'../00.parquet' lies outside"),
        ({"data_path": "{secret}"}, "data_path '{secret}'"),
        ({"codebase_version": "v2.1"}, "version v2.1, v3.0 is read: convert it with LeRobot's"),
        ({"features": None}, None),
        ({"features": ["action"]}, "features are an object with dtype and shape for each column"),
        ({"fps": "fast"}, "fps must be positive, got 'fast'"),
    ],
)
def test_what_a_lerobot_folder_says_wrong_is_named(lerobot_folder, tmp_path, change, message):
    info = json.loads((lerobot_folder / "meta" / "info.json").read_text()) | change
    if message is None:
        del info["features"]
        message = r"info.json lacks \['features'\]"
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_text(json.dumps(info))
    for name in ("meta/episodes", "data", "videos"):
        (tmp_path / name).symlink_to(lerobot_folder / name)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path)


@pytest.mark.parametrize("kind", ["external", "soft", "storage", "virtual", "episode", "data"])
def test_hdf5_is_read_from_its_own_file_only(tmp_path, kind):
    h5py = pytest.importorskip("h5py")
    (tmp_path / "secret.bin").write_bytes(bytes(1000))
    with h5py.File(tmp_path / "other.hdf5", "w") as other:
        other["obs"] = np.ones((27, 3))
    path = d4rl(tmp_path)
    with h5py.File(path, "a") as file:
        if kind == "external":
            file["obs"] = h5py.ExternalLink("other.hdf5", "obs")
        elif kind == "soft":
            file["loop"] = h5py.SoftLink("/")
        elif kind == "episode":
            file["episode_0"] = h5py.ExternalLink("other.hdf5", "/")
        elif kind == "data":
            file["data"] = h5py.ExternalLink("other.hdf5", "/")
        elif kind == "storage":
            file.create_dataset("obs", (27, 3), "f4", external=[(str(tmp_path / "secret.bin"), 0, 324)])
        else:
            layout = h5py.VirtualLayout((27, 3), "f8")
            layout[:] = h5py.VirtualSource("other.hdf5", "obs", shape=(27, 3))
            file.create_virtual_dataset("obs", layout)
    with pytest.raises(ValueError, match="is a link, which is not followed|keeps its numbers in another file"):
        open_source(path)


@pytest.mark.parametrize("writer", [npz_compressed, parquet, robomimic], ids=lambda writer: writer.__name__)
def test_an_episode_that_would_not_fit_is_refused_before_it_is_read(writer, tmp_path, monkeypatch):
    source = open_source(writer(tmp_path))
    monkeypatch.setattr(limits, "MOST_BYTES", 140)
    found = source.episodes({source.observed[0]: None})
    next(found), next(found)
    with pytest.raises(ValueError, match="episode 2 has 12 steps, .* name fewer columns"):
        next(found)


def test_a_table_promises_no_more_than_its_bytes(tmp_path):
    """A head of 2**40 rows over a few bytes."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 3)})
    np.savez(tmp_path / "d.npz", **flat())
    with zipfile.ZipFile(tmp_path / "d.npz", "a") as archive:
        archive.writestr("big.npy", head.getvalue() + bytes(64))
    assert any("big holds 64 bytes, not those of" in note for note in open_source(tmp_path / "d.npz").said.notes)


def test_what_is_no_dataset_is_named(tmp_path):
    (tmp_path / "d.npz").write_bytes(b"no zip")
    (tmp_path / "d.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, message in (("d.npz", "is no .npz file"), ("d.txt", "give a LeRobot v3"), ("empty", "give a LeRobot v3")):
        with pytest.raises(ValueError, match=message):
            open_source(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no dataset"):
        open_source(tmp_path / "none")
    table = flat()
    del table["terminals"]
    np.savez(tmp_path / "e.npz", **table)
    with pytest.raises(ValueError, match="does not say where episodes end: name a column as one of terminals"):
        open_source(tmp_path / "e.npz")
    np.savez(tmp_path / "e.npz", obs=np.zeros(3))
    with pytest.raises(ValueError, match="has no column actions or action, it has"):
        open_source(tmp_path / "e.npz")


def test_gaps_and_ragged_lists_are_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    for name, obs in (("a", [[1.0], [2.0, 3.0]]), ("b", [[1.0], None]), ("c", [[1.0], [None]])):
        table = {"obs": pa.array(obs), "action": pa.array([[0.5], [0.5]]), "done": [False, True]}
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
        source = open_source(tmp_path / f"{name}.parquet")
        with pytest.raises(ValueError, match="obs has gaps"):
            list(source.episodes({"obs": None}))


@pytest.mark.parametrize(("library", "name"), [("h5py", "d.hdf5"), ("pyarrow.parquet", "d.parquet")])
def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch, library, name):
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'rlflow-torch\[data\]'"):
        open_source(tmp_path / name)
