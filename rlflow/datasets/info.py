"""`rlflow demos info`: figures of a folder of demonstrations, or the columns of a dataset that is not imported yet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlflow.datasets.open import open_source
from rlflow.datasets.source import Source
from rlflow.envs.demos.dataset import Demos
from rlflow.parallel.moments import merge, no_moments

BLOCK = 65_536
"""Rows that are read at once."""


def info(path: Path) -> dict[str, Any]:
    """JSON-able; of demonstrations every number is read once."""
    return _of_demos(Demos.open(path)) if (path / "dataset.json").is_file() else _of_source(open_source(path))


def _of_demos(demos: Demos) -> dict[str, Any]:
    lengths = [e["length"] for e in demos.episodes]
    ends = {name: sum(bool(e[name]) for e in demos.episodes) for name in ("terminated", "truncated")}
    return {
        "format": "rlflow",
        "env": demos.env,
        "episodes": _lengths(lengths) | ends | {"return": round(demos.mean_return, 3), "success": demos.success},
        "columns": {name: _statistics(demos, name) for name in demos.shards[0]},
        "made_by": demos.about["made_by"],
    }


def _lengths(lengths: list[int]) -> dict[str, Any]:
    return {
        "number": len(lengths),
        "steps": sum(lengths),
        "shortest": min(lengths),
        "longest": max(lengths),
        "mean_length": round(sum(lengths) / len(lengths), 1),
    }


def _statistics(demos: Demos, name: str) -> dict[str, Any]:
    """Of a column: shape, dtype, and over all its numbers the mean, std, least and largest."""
    first = demos.shards[0][name]
    found, low, high = no_moments(), torch.inf, -torch.inf
    for block in _blocks(demos, name):
        flat = block.flatten().double()
        found = merge(found, flat, torch.ones(len(flat), dtype=torch.bool))
        low, high = min(low, float(flat.min())), max(high, float(flat.max()))
    count, mean, deviations = found.tolist()
    return {
        "shape": list(first.shape[1:]),
        "dtype": str(first.dtype).removeprefix("torch."),
        "mean": mean,
        "std": (max(deviations, 0.0) / count) ** 0.5,
        "min": low,
        "max": high,
    }


def _blocks(demos: Demos, name: str) -> Iterator[Tensor]:
    """Rows, as many as have 65,536 numbers, so that pictures stay small."""
    for shard in demos.shards:
        value = shard[name]
        yield from value.split(max(1, BLOCK // max(1, value[0].numel())))


def _of_source(source: Source) -> dict[str, Any]:
    said = source.said
    bounds = {} if said.low is None or said.high is None else {"low": said.low.tolist(), "high": said.high.tolist()}
    return {
        "format": source.format,
        "env": said.env,
        "episodes": _lengths(source.lengths),
        "columns": {n: {"shape": list(c.shape), "dtype": str(c.dtype)} for n, c in source.columns.items()},
        "observed": source.observed,
        "action": {"column": source.action, "control": said.control, **bounds},
        "reward": source.reward,
        "fps": said.fps,
        "tasks": said.tasks,
        "notes": said.notes,
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The same for people."""
    yield f"format: {found['format']}    env: {found['env']}"
    yield "episodes: " + "  ".join(f"{name} {value}" for name, value in found["episodes"].items() if value is not None)
    for name, column in found["columns"].items():
        numbers = [f"{key} {column[key]:.4g}" for key in ("mean", "std", "min", "max") if key in column]
        role = (
            "action"
            if name == found.get("action", {}).get("column")
            else "reward"
            if name == found.get("reward")
            else ""
        )
        seen = "observed" if name in found.get("observed", ()) else role
        yield f"  {name}: {column['dtype']} {tuple(column['shape'])}  {seen}{'  '.join(numbers)}".rstrip()
    for name in ("fps", "tasks"):
        if found.get(name):
            yield f"{name}: {found[name]}"
    for note in [*found.get("notes", ()), *found.get("made_by", {}).get("notes", ())]:
        yield f"note: {note}"
