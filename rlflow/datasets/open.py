"""Which format a file or folder is in."""

from __future__ import annotations

from pathlib import Path

from rlflow.datasets.flat import FlatSource
from rlflow.datasets.hdf5 import MinariSource, open_hdf5
from rlflow.datasets.lerobot import LeRobotSource
from rlflow.datasets.source import Source
from rlflow.datasets.tables import NpzTable, ParquetTable

READ = "a LeRobot v3 or Minari folder, .hdf5 (Minari, robomimic, D4RL), .npz, .parquet or a folder of them"


def open_source(path: Path) -> Source:
    """The dataset at a path; ValueError says what is read."""
    if not path.exists():
        raise FileNotFoundError(f"no dataset '{path}': give {READ}")
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".npz":
        return FlatSource(NpzTable(path), "npz")
    if path.suffix == ".parquet":
        return FlatSource(ParquetTable(path, [path]), "parquet")
    if path.suffix in (".hdf5", ".h5"):
        return open_hdf5(path)
    raise ValueError(f"{path}: give {READ}")


def _open_folder(path: Path) -> Source:
    if (path / "meta" / "info.json").is_file():
        return LeRobotSource(path)
    for folder in (path / "data", path):
        if (folder / "main_data.hdf5").is_file():
            return MinariSource(path, folder / "main_data.hdf5")
    if (path / "metadata.json").is_file() or (path / "data" / "metadata.json").is_file():
        raise ValueError(f"{path} is a Minari dataset without main_data.hdf5: make it with data_format='hdf5'")
    if files := sorted(path.glob("*.parquet")):
        return FlatSource(ParquetTable(path, files), "parquet")
    raise ValueError(f"{path}: give {READ}")
