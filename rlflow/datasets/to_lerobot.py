"""Demonstrations as a LeRobot v3 dataset: steps, episodes and tasks in parquet; pictures as PNG in the table, lossless.

A plain observation is `observation.state`, as is `agent_pos`; other entries of a dict are `observation.NAME`, pictures
`observation.images.NAME`; a name that begins so already is kept. What `task`, a sentence as bytes, asks at the start of
an episode is the episode's task.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rlflow.datasets.out import Leaving, Played, Writer, by_name, colours_last, is_picture
from rlflow.datasets.source import EXTRA, Array
from rlflow.types import sentences

FILE_BYTES = 100 * 2**20
"""At which a file of steps is closed."""
FILES = 1000
"""In a folder (chunk)."""
PATH = "chunk-{chunk_index:03d}/file-{file_index:03d}"
TASK = "task"
WHOLE = ("frame_index", "episode_index", "index", "task_index")


class ToLeRobot(Writer):
    """`data/`, `meta/`; no videos."""

    def write(self, leaving: Leaving, folder: Path) -> None:
        """One episode after the other."""
        steps = _Steps(folder)
        tasks: dict[str, int] = {}  # their numbers
        asked = []
        for played in leaving.episodes():
            asked.append(_task(played) or leaving.task)
            steps.add(_columns(played, steps.rows, leaving.fps, tasks.setdefault(asked[-1], len(tasks))))
        steps.close()
        meta = folder / "meta"
        (meta / "episodes" / "chunk-000").mkdir(parents=True)
        rows = [row | {"tasks": [task]} for row, task in zip(steps.episodes, asked, strict=True)]
        _save(steps.arrow.Table.from_pylist(rows), meta / "episodes" / "chunk-000" / "file-000.parquet")
        _save(_tasks(steps.arrow, list(tasks)), meta / "tasks.parquet")
        for name, value in (("stats", steps.stats()), ("info", _info(leaving, steps, len(tasks)))):
            (meta / f"{name}.json").write_text(json.dumps(value, indent=4), encoding="utf-8")


def _task(played: Played) -> str:
    """What an episode was asked at its start; nothing where nothing was said."""
    told = by_name(played.obs).get(TASK)
    return "" if told is None or told.dtype != torch.uint8 else sentences(told[:1])[0]


def _columns(played: Played, start: int, fps: float, task: int) -> dict[str, Array]:
    """The steps of an episode (L, ...) under LeRobot's names."""
    length = len(played.reward)
    frames, last = np.arange(length), np.arange(length) == length - 1
    seen = {name: value for name, value in by_name(played.obs).items() if name != TASK or value.dtype != torch.uint8}
    found = {_name(name, value): _array(value) for name, value in seen.items()}
    found |= {"action": _array(played.action), "next.reward": played.reward.numpy(), "next.done": last}
    if played.told["success"] is not None:
        found["next.success"] = last & played.told["success"]
    counters = (frames, np.full(length, played.number), start + frames, np.full(length, task))
    return found | {"timestamp": (frames / fps).astype(np.float32)} | dict(zip(WHOLE, counters, strict=True))


def _name(name: str, value: Tensor) -> str:
    if name.startswith("observation."):
        return name
    if is_picture(value):
        return f"observation.images.{name}"
    return "observation.state" if name == "agent_pos" else f"observation.{name}"


def _array(value: Tensor) -> Array:
    """Pictures (L, H, W, 3), all else (L, D), of one number (L,)."""
    if is_picture(value):
        return colours_last(value).numpy()
    flat = value.flatten(1) if value.ndim > 1 else value
    return (flat[:, 0] if flat.ndim == 2 and flat.shape[1] == 1 else flat).numpy()


class _Steps:
    """The tables of steps while they are written, with the rows of the table of episodes and running statistics."""

    def __init__(self, folder: Path):
        try:
            import pyarrow
            import pyarrow.parquet
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{error}: {EXTRA}", name=error.name) from None
        self.arrow, self.folder = pyarrow, folder
        self.writer: Any = None
        self.rows = self.file = self.size = 0
        self.episodes: list[dict[str, Any]] = []
        self.features: dict[str, dict[str, Any]] = {}
        self.sums: dict[str, Array] = {}  # (5, D): number, sum, squares, least, largest

    def add(self, columns: dict[str, Array]) -> None:
        """One episode."""
        if not self.features:
            self.features = {name: _feature(value) for name, value in columns.items()}
        table = self.arrow.table({name: self._arrow(value) for name, value in columns.items()})
        if self.writer is None:
            path = self.folder / "data" / f"{self._place(PATH)}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            self.writer = self.arrow.parquet.ParquetWriter(path, table.schema)
        self.writer.write_table(table)
        length, number = table.num_rows, len(self.episodes)
        place = {f"data/{name}": value for name, value in self._indices().items()}
        meta = {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        ends = {"dataset_from_index": self.rows, "dataset_to_index": self.rows + length}
        self.episodes.append({"episode_index": number, "length": length, **place, **ends, **meta})
        self._count(columns)
        self.rows, self.size = self.rows + length, self.size + table.nbytes
        if self.size >= FILE_BYTES:
            self.close()

    def _indices(self) -> dict[str, int]:
        return {"chunk_index": self.file // FILES, "file_index": self.file % FILES}

    def _place(self, pattern: str) -> str:
        return pattern.format(**self._indices())

    def close(self) -> None:
        """End the file; the next episode begins another."""
        if self.writer is not None:
            self.writer.close()
            self.writer, self.size, self.file = None, 0, self.file + 1

    def _arrow(self, value: Array) -> Any:
        if value.ndim == 4:
            pictures = [{"bytes": _png(picture), "path": None} for picture in value]
            kind = self.arrow.struct([("bytes", self.arrow.binary()), ("path", self.arrow.string())])
            return self.arrow.array(pictures, kind)
        if value.ndim == 1:
            return self.arrow.array(value)
        return self.arrow.FixedSizeListArray.from_arrays(self.arrow.array(value.reshape(-1)), value.shape[1])

    def _count(self, columns: dict[str, Array]) -> None:
        for name, value in columns.items():
            rows = value.reshape(-1, value.shape[-1]) / 255 if value.ndim == 4 else value.reshape(len(value), -1)
            rows = rows.astype(np.float64)
            new = np.stack([np.full(rows.shape[1], len(rows)), rows.sum(0), (rows**2).sum(0), rows.min(0), rows.max(0)])
            old = self.sums.get(name)
            self.sums[name] = new if old is None else _merged(old, new)

    def stats(self) -> dict[str, dict[str, Any]]:
        """Of each feature: min, max, mean, std and count; of a picture's colours (3, 1, 1), in [0, 1]."""
        made = {}
        for name, (num, total, squares, least, most) in self.sums.items():
            mean = total / num
            values = {"min": least, "max": most, "mean": mean, "std": np.sqrt(np.maximum(squares / num - mean**2, 0))}
            shape = (3, 1, 1) if self.features[name]["dtype"] == "image" else (-1,)
            made[name] = {n: v.reshape(shape).tolist() for n, v in values.items()} | {"count": [self.rows]}
        return made


def _merged(old: Array, new: Array) -> Array:
    return np.stack([*(old[:3] + new[:3]), np.minimum(old[3], new[3]), np.maximum(old[4], new[4])])


def _feature(value: Array) -> dict[str, Any]:
    if value.ndim == 4:
        return {"dtype": "image", "shape": list(value.shape[1:]), "names": ["height", "width", "channels"]}
    return {"dtype": str(value.dtype), "shape": list(value.shape[1:]) or [1], "names": None}


def _png(picture: Array) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(file, "PNG")
    return file.getvalue()


def _tasks(arrow: Any, tasks: list[str]) -> Any:
    """The texts are the index of a pandas table, which its metadata say."""
    place = "__index_level_0__"
    kinds = (("task_index", "task_index", "int64", "int64"), (None, place, "unicode", "object"))
    names = ("name", "field_name", "pandas_type", "numpy_type")
    columns = [dict(zip(names, kind, strict=True)) | {"metadata": None} for kind in kinds]
    about = {"index_columns": [place], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
    made = arrow.table({"task_index": list(range(len(tasks))), place: tasks})
    return made.replace_schema_metadata({"pandas": json.dumps(about)})


def _save(table: Any, path: Path) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(table, path)


def _info(leaving: Leaving, steps: _Steps, num_tasks: int) -> dict[str, Any]:
    num = len(steps.episodes)
    return {
        "codebase_version": "v3.0",
        "robot_type": leaving.title,
        "total_episodes": num,
        "total_frames": steps.rows,
        "total_tasks": num_tasks,
        "chunks_size": FILES,
        "data_files_size_in_mb": FILE_BYTES // 2**20,
        "video_files_size_in_mb": 200,
        "fps": int(leaving.fps) if float(leaving.fps).is_integer() else leaving.fps,
        "splits": {"train": f"0:{num}"},
        "data_path": f"data/{PATH}.parquet",
        "video_path": None,
        "features": steps.features,
    }
