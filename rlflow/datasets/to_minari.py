"""Demonstrations as a Minari dataset: an HDF5 group for each episode, and metadata.json.

Minari keeps one observation more than actions. What an episode reached in the end is not part of demonstrations: the
last observation stands there twice, which the dataset's description says.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlflow.datasets.hdf5 import h5py
from rlflow.datasets.out import Leaving, Played, Writer
from rlflow.types import Tree, tree_map

VERSION = "0.5.3"
"""Of Minari, whose layout this is."""
LAST = "The observation behind the last action of an episode was not kept: it repeats the one before."


class ToMinari(Writer):
    """`dataset_id` is NAMESPACE/NAME-vN, by which Minari knows a dataset."""

    def __init__(self, dataset_id: str | None = None):
        self.dataset_id = dataset_id

    def write(self, leaving: Leaving, folder: Path) -> None:
        """data/main_data.hdf5 and data/metadata.json."""
        data = folder / "data"
        data.mkdir()
        with h5py().File(data / "main_data.hdf5", "w") as file:
            for played in leaving.episodes():
                _write_episode(file.create_group(f"episode_{played.number}"), played)
        about = self._about(leaving) | {"dataset_size": round(os.path.getsize(data / "main_data.hdf5") / 1e6, 1)}
        (data / "metadata.json").write_text(json.dumps(about), encoding="utf-8")

    def _about(self, leaving: Leaving) -> dict[str, Any]:
        rows = leaving.demos.episodes
        about = {
            "dataset_id": self.dataset_id or f"rlflow/{leaving.demos.env['name']}-v0",
            "minari_version": VERSION,
            "data_format": "hdf5",
            "jpeg_encoding": False,
            "total_episodes": len(rows),
            "total_steps": sum(row["length"] for row in rows),
            "observation_space": json.dumps(_space(leaving.demos.obs_spec)),
            "action_space": json.dumps(_action_space(leaving)),
            "description": f"{leaving.task}. {LAST}",
        }
        env_id = leaving.demos.env.get("settings", {}).get("env_id")
        return about if env_id is None else about | {"env_spec": _env_spec(env_id)}


def _env_spec(env_id: str) -> str:
    import gymnasium

    return str(gymnasium.spec(env_id).to_json())


def _space(spec: Tree) -> dict[str, Any]:
    """A Box, or a Dict of them, of one row's observation (meta tensors)."""
    if isinstance(spec, dict):
        return {"type": "Dict", "subspaces": {name: _space(part) for name, part in spec.items()}}
    whole = (0, 255) if spec.dtype == torch.uint8 else (-(2**31), 2**31)
    ends = (-np.inf, np.inf) if spec.is_floating_point() else whole
    low, high = (np.full(tuple(spec.shape), end) for end in ends)
    return _box(low, high, str(spec.dtype).removeprefix("torch."))


def _action_space(leaving: Leaving) -> dict[str, Any]:
    if leaving.bounds is None:
        ones = np.ones(leaving.demos.action_shape)
        return _box(-ones, ones, "float32")
    return _box(leaving.bounds.low.cpu().numpy(), leaving.bounds.high.cpu().numpy(), "float32")


def _box(low: Any, high: Any, dtype: str) -> dict[str, Any]:
    return {"type": "Box", "dtype": dtype, "shape": list(low.shape), "low": low.tolist(), "high": high.tolist()}


def _write_episode(group: Any, played: Played) -> None:
    length = len(played.reward)
    group.attrs["id"], group.attrs["total_steps"] = played.number, length
    obs = tree_map(lambda value: torch.cat([value, value[-1:]]), played.obs)
    for name, value in obs.items() if isinstance(obs, dict) else [("", obs)]:
        group[f"observations/{name}" if name else "observations"] = value.numpy()
    group["actions"], group["rewards"] = played.action.numpy(), played.reward.numpy()
    last = np.arange(length) == length - 1
    group["terminations"], group["truncations"] = last & played.told["terminated"], last & played.told["truncated"]
    if played.told["success"] is not None:
        group["infos/success"] = last & played.told["success"]
