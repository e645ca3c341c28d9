"""LeRobot's datasets, version 3: meta/info.json, tables of episodes and steps in parquet, videos of many episodes.

An episode is rows `dataset_from_index` to `dataset_to_index` of the steps, and of each camera the frames from
`from_timestamp` on. There is no row for where it ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rlflow.datasets.pictures import Video, all_scaled
from rlflow.datasets.source import (
    REWARD,
    SUCCESS,
    Array,
    Column,
    Recorded,
    Said,
    Source,
    Wanted,
    action_of,
    inside,
    one_of,
    read_json,
)
from rlflow.datasets.tables import ParquetTable, Take

VERSION = "v3."
EPISODE = ("episode_index", "length", "data/chunk_index", "data/file_index", "dataset_from_index")
PLACE = ("chunk_index", "file_index", "from_timestamp")


class LeRobotSource(Source):
    """A folder of LeRobot's."""

    format = "LeRobot v3"

    def __init__(self, path: Path):
        self.path = path
        self.info = read_json(path / "meta" / "info.json")
        self._check_version()
        self.fps = float(self.info["fps"])
        self.cameras = {n: _camera(path, n, f) for n, f in self.info["features"].items() if f["dtype"] == "video"}
        self.table_of_episodes = self._episodes()
        files = dict.fromkeys(self._data_file(row) for row in self.table_of_episodes)
        self.steps = ParquetTable(path, list(files))
        self.columns = self.steps.columns | self.cameras
        self.action, self.reward = action_of(path, self.columns), one_of(self.columns, REWARD)
        self.observed = [name for name in self.columns if name.startswith("observation")]
        self.lengths = [int(row["length"]) for row in self.table_of_episodes]
        self.said = Said(fps=self.fps, tasks=self._tasks())
        self.said.notes += [f"{name} {why}" for name, why in self.steps.unread.items() if name in self.info["features"]]
        if (total := sum(self.lengths)) != self.steps.rows:
            raise ValueError(
                f"{path}: its episodes have {total} steps, its data {self.steps.rows}: fetch all its files"
            )

    def _check_version(self) -> None:
        version = str(self.info.get("codebase_version"))
        if not version.startswith(VERSION):
            raise ValueError(
                f"{self.path} is a LeRobot dataset of version {version}, v3.0 is read: convert it with LeRobot's "
                "lerobot.datasets.v30.convert_dataset_v21_to_v30"
            )
        if missing := [name for name in ("fps", "features", "data_path") if name not in self.info]:
            raise ValueError(f"{self.path}/meta/info.json lacks {missing}")
        features, fps = self.info["features"], self.info["fps"]
        if not isinstance(features, dict) or not all(isinstance(f, dict) and "dtype" in f for f in features.values()):
            raise ValueError(f"{self.path}/meta/info.json: features are an object with dtype and shape for each column")
        if not isinstance(fps, int | float) or not fps > 0:
            raise ValueError(f"{self.path}/meta/info.json: fps must be positive, got {fps!r}")

    def _episodes(self) -> list[dict[str, Any]]:
        """A row for each, in the order of their steps."""
        places = [f"videos/{name}/{part}" for name in self.cameras for part in PLACE]
        files = sorted((self.path / "meta" / "episodes").glob("*/*.parquet"))
        table = ParquetTable(self.path / "meta" / "episodes", files)
        if missing := [name for name in (*EPISODE, *places) if name not in table.columns]:
            raise ValueError(f"{table.path} lacks {missing}")
        columns = {name: np.concatenate(list(table.scan(name))) for name in (*EPISODE, *places)}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return sorted(rows, key=lambda row: int(row["dataset_from_index"]))

    def _tasks(self) -> list[str]:
        """What the robot was told to do: the one column of text."""
        import pyarrow

        path = self.path / "meta" / "tasks.parquet"
        if not path.exists():
            return []
        table = self.steps.opened(path).read()
        kinds = (pyarrow.string(), pyarrow.large_string())
        texts = [name for name in table.schema.names if table.schema.field(name).type in kinds]
        return [str(text) for text in table[texts[0]].to_pylist()] if texts else []

    def _file(self, pattern: str, row: dict[str, Any], at: str, camera: str = "") -> Path:
        numbers = {name: int(row[f"{at}/{name}"]) for name in ("chunk_index", "file_index")}
        try:
            name = self.info[pattern].format(video_key=camera, **numbers)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ValueError(f"{self.path}/meta/info.json: {pattern} {self.info.get(pattern)!r}: {error}") from None
        return inside(self.path, name)

    def _data_file(self, row: dict[str, Any]) -> Path:
        return self._file("data_path", row, "data")

    def episodes(self, wanted: Wanted) -> Iterator[Recorded]:
        """Rows and frames, both from the first to the last."""
        marks = [name for name in ("next.done", one_of(self.columns, SUCCESS)) if name in self.columns]
        numbers = {*(n for n in wanted if n not in self.cameras), *marks, "episode_index"}
        readers = {name: self.steps.open(name, wanted.get(name)) for name in numbers}
        films = {name: Video(self.cameras[name].shape, size) for name, size in wanted.items() if name in self.cameras}
        try:
            for number, row in enumerate(self.table_of_episodes):
                self.check_bytes(number, wanted)
                rows = self._steps(readers, row)
                pictures = {name: self._frames(film, name, row) for name, film in films.items()}
                found = {n: pictures[n] if n in films else all_scaled(rows[n], size) for n, size in wanted.items()}
                yield self._ended(found, rows)
        finally:
            for film in films.values():
                film.close()

    def _steps(self, readers: dict[str, Take], row: dict[str, Any]) -> dict[str, Array]:
        rows = {name: take(int(row["length"])) for name, take in readers.items()}
        if not bool((rows["episode_index"] == row["episode_index"]).all()):
            raise ValueError(
                f"{self.path}: the steps of episode {row['episode_index']} are not where meta/episodes says"
            )
        return rows

    def _frames(self, film: Video, name: str, row: dict[str, Any]) -> Array:
        at = f"videos/{name}"
        path = self._file("video_path", row, at, name)
        return film.take(path, round(float(row[f"{at}/from_timestamp"]) * self.fps), int(row["length"]))

    def _ended(self, columns: dict[str, Array], rows: dict[str, Array]) -> Recorded:
        """Success ends by the task; `next.done` alone does not say why, and counts as time."""
        told = one_of(rows, SUCCESS)
        success = bool(rows[told].any()) if told else None
        return Recorded(columns, bool(success), not success, success)


def _camera(path: Path, name: str, feature: dict[str, Any]) -> Column:
    """A video's frames, which LeRobot keeps as (H, W, 3) and may describe as (3, H, W)."""
    shape = tuple(int(n) for n in feature.get("shape", ()))
    axes = feature.get("names") or ()
    if len(axes) == len(shape) == 3 and "channel" in str(next(iter(axes))):
        shape = (*shape[1:], shape[0])
    if len(shape) != 3 or shape[2] != 3 or min(shape) < 1:
        raise ValueError(f"{path}: {name} has shape {shape}, pictures of three colours are read")
    return Column(shape, np.dtype(np.uint8), coded=True)
