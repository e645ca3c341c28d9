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
IMAGES = {"images": 4, "base_images": 4, "frames": 5, "base_frames": 5}
"""Columns of 8 bits, with their dimensions: (N, 3, H, W), and of videos (N, F, 3, H, W)."""
LONGEST_ID = 64


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
        flat = value.flatten(0, -4)
        return torch.from_numpy(to_uint8(flat)).permute(0, 3, 1, 2).reshape(value.shape)
    return value.detach().cpu()


def unpack(content: bytes) -> Batch:
    """The batch of a request, ready to score; ValueError for anything else."""
    return widened(read(content))


def read(content: bytes) -> Batch:
    """The batch of a request as it came, pictures of 8 bits; ValueError for anything else."""
    try:
        tensors = load(content)
        said = parse_json(bytes(tensors.pop("json").numpy()))
        json.dumps(said, ensure_ascii=False).encode()  # half a character (a lone surrogate) is in no text
    except (SafetensorError, KeyError, TypeError, AttributeError, RuntimeError, UnicodeError) as error:
        raise ValueError(f"not a batch of columns: {type(error).__name__}") from None
    if not isinstance(said, dict) or not isinstance(lists := said.get("columns"), dict):
        raise ValueError("not a batch of columns")
    name, rows = said.get("id"), said.get("rows")
    if not isinstance(name, str) or len(name) > LONGEST_ID or type(rows) is not int or rows < 1:
        raise ValueError(f"a batch has an id of at most {LONGEST_ID} letters and 1 row or more")
    if twice := sorted(set(tensors) & set(lists)):
        raise ValueError(f"columns {twice} come twice, as tensors and as lists")
    columns = tensors | lists
    for column, value in columns.items():
        _check_column(column, value, rows)
    return Batch(name, rows, columns)


def _check_column(name: str, value: Any, rows: int) -> None:
    if not isinstance(value, Tensor | list) or (isinstance(value, Tensor) and value.ndim == 0) or len(value) != rows:
        raise ValueError(f"column {name!r} has not {rows} rows")
    tensor = value if isinstance(value, Tensor) else None
    if name in IMAGES and not (tensor is not None and _is_pictures(tensor, IMAGES[name])):
        raise ValueError(f"column {name!r} is not (N, {'F, ' * (IMAGES[name] - 4)}3, H, W) of 8 bits")
    if name == "group" and (tensor is None or tensor.ndim != 1 or tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(f"column {name!r} is not (N,) of integers")
    if name == "prompt" and not (tensor is None and all(isinstance(text, str) for text in value)):
        raise ValueError(f"column {name!r} is no list of texts")


def _is_pictures(tensor: Tensor, ndim: int) -> bool:
    return tensor.dtype == torch.uint8 and tensor.ndim == ndim and tensor.shape[-3] == 3 and 0 not in tensor.shape


def widened(batch: Batch) -> Batch:
    """The same with its pictures in [0, 1], four times as large."""
    wide = {name: value.float() / 255 if name in IMAGES else value for name, value in batch.columns.items()}
    return Batch(batch.id, batch.rows, wide)


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
