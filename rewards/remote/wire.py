"""What goes over the wire between a reward client and its server: safetensors one way, JSON the other.

    request   tensors by column, images as 8-bit; under "json" the UTF-8 of {"id", "rows", "columns": {name: list}}
    answer    {"id": the request's, "scores": [number or null, one per row]}

Neither side ever unpickles. An answer that names another request, has another length, or holds anything but finite
numbers and null is refused as a whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rlflow.rewards.base import to_uint8
from rlflow.rewards.remote.ask import parse_json

TYPE = "application/x-safetensors"
IMAGES = ("images", "base_images")


@dataclass(frozen=True)
class Batch:
    """Columns of N rows under a name of their own."""

    id: str
    rows: int
    columns: dict[str, Any]


def pack(batch: Batch) -> bytes:
    """The bytes of a request; TypeError for a column that is neither a tensor nor JSON."""
    tensors = {name: value for name, value in batch.columns.items() if isinstance(value, Tensor)}
    lists = {name: list(value) for name, value in batch.columns.items() if name not in tensors}
    said = json.dumps({"id": batch.id, "rows": batch.rows, "columns": lists}, allow_nan=False).encode()
    small = {name: _small(name, value).contiguous() for name, value in tensors.items()}
    return save(small | {"json": torch.frombuffer(bytearray(said), dtype=torch.uint8)})


def _small(name: str, value: Tensor) -> Tensor:
    """Pictures as the 8-bit ones that would be saved; other tensors as they are."""
    if name in IMAGES:
        return torch.from_numpy(to_uint8(value)).permute(0, 3, 1, 2)
    return value.detach().cpu()


def unpack(content: bytes) -> Batch:
    """The batch of a request; ValueError for anything else."""
    try:
        tensors = load(content)
        said = parse_json(bytes(tensors.pop("json").numpy()))
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"not a batch of columns: {type(error).__name__}") from None
    if not isinstance(said, dict) or not isinstance(said.get("columns"), dict):
        raise ValueError("not a batch of columns")
    if not isinstance(said.get("id"), str) or not isinstance(said.get("rows"), int) or said["rows"] < 1:
        raise ValueError("a batch has an id and 1 row or more")
    columns = {name: _wide(name, value) for name, value in tensors.items()} | said["columns"]
    for name, value in columns.items():
        if not isinstance(value, Tensor | list) or len(value) != said["rows"]:
            raise ValueError(f"column {name!r} has not {said['rows']} rows")
    return Batch(said["id"], said["rows"], columns)


def _wide(name: str, value: Tensor) -> Tensor:
    if name in IMAGES:
        if value.dtype != torch.uint8 or value.ndim != 4:
            raise ValueError(f"column {name!r} is not (N, 3, H, W) of 8 bits")
        return value.float() / 255
    if value.ndim == 0:
        raise ValueError(f"column {name!r} has no rows")
    return value


def answer(batch: Batch, scores: Tensor) -> dict[str, Any]:
    """What the server says: null for nan."""
    return {"id": batch.id, "scores": [s if math.isfinite(s) else None for s in scores.tolist()]}


def read_answer(batch: Batch, said: Any) -> list[float | None]:
    """Scores by row; ValueError unless they are what `answer` writes, for this very batch."""
    if not isinstance(said, Mapping) or said.get("id") != batch.id:
        raise ValueError("it is not for this request")
    scores = said.get("scores")
    if not isinstance(scores, list) or len(scores) != batch.rows:
        raise ValueError(f"it has not {batch.rows} scores")
    for score in scores:
        number = isinstance(score, int | float) and not isinstance(score, bool) and abs(score) < 1e30
        if score is not None and not number:
            raise ValueError(f"{score!r} is no score")
    return scores
