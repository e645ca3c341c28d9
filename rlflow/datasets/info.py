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
FEW = 16
"""Numbers of a step's entry up to which each of them has figures of its own."""
FIGURES = ("mean", "std", "min", "max")


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
    """Of a column: shape, dtype, mean, std, least and largest; of each number where they are few, else over all."""
    first = demos.shards[0][name]
    shape = first.shape[1:]
    each = shape.numel() <= FEW
    own = shape if each else torch.Size()
    found = no_moments([own.numel()])
    low = torch.full(found.shape[1:], torch.inf, dtype=torch.float64)
    high = -low
    for block in _blocks(demos, name):
        rows = block.reshape(-1, own.numel()).double()
        found = merge(found, rows, torch.ones(len(rows), dtype=torch.bool))
        low, high = torch.minimum(low, rows.amin(0)), torch.maximum(high, rows.amax(0))
    count, mean, deviations = found
    figures = {"mean": mean, "std": (deviations.clamp(min=0) / count).sqrt(), "min": low, "max": high}
    return {
        "shape": list(shape),
        "dtype": str(first.dtype).removeprefix("torch."),
        "over": "each number" if each else "all numbers",
        **{key: value.reshape(own).tolist() for key, value in figures.items()},
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


def _written(figure: Any) -> str:
    """One number, or those of a nested list in order."""
    return " ".join(map(_written, figure)) if isinstance(figure, list) else f"{figure:.4g}"


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The same for people."""
    yield f"format: {found['format']}    env: {found['env']}"
    yield "episodes: " + "  ".join(f"{name} {value}" for name, value in found["episodes"].items() if value is not None)
    for name, column in found["columns"].items():
        numbers = [f"{key} {_written(column[key])}" for key in FIGURES if key in column]
        if column.get("shape") and numbers:  # one number needs no word
            numbers.insert(0, f"of {column['over']}:")
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
