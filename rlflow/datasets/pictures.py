"""Pictures of datasets: PNG and JPEG in columns, frames of video files; decoded one by one and scaled."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from rlflow.datasets.source import Array

FORMATS = ("PNG", "JPEG")
"""That are opened at all."""


def decode(data: bytes, shape: tuple[int, ...], size: tuple[int, int] | None, where: str) -> Array:
    """(H, W, 3) bytes of a PNG or JPEG whose own height and width are `shape`'s, scaled to `size`."""
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        if picture.size[::-1] != shape[:2]:  # read from its head, before anything is decoded
            raise ValueError(f"{where}: a picture of {picture.size[::-1]} among those of {shape[:2]}")
        return scaled(np.asarray(picture.convert("RGB")), size)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: {error}") from None


def head(data: bytes, where: str) -> tuple[int, int, int]:
    """(H, W, 3) of a PNG or JPEG, from its first bytes."""
    try:
        width, height = Image.open(io.BytesIO(data), formats=FORMATS).size
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: {error}") from None
    return height, width, 3


def scaled(picture: Array, size: tuple[int, int] | None) -> Array:
    """(H, W, 3) bytes at another height and width, by the mean of the area."""
    if size is None or picture.shape[:2] == size:
        return picture
    return np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BOX))


def all_scaled(pictures: Array, size: tuple[int, int] | None) -> Array:
    """(L, H, W, 3) or (L, 3, H, W) at `size`, in their order of axes; anything where `size` is None."""
    if size is None:
        return pictures
    first = pictures.shape[-1] != 3
    frames = np.moveaxis(pictures, 1, -1) if first else pictures
    made = np.stack([scaled(np.ascontiguousarray(frame), size) for frame in frames])
    return np.moveaxis(made, -1, 1) if first else made


class Video:
    """Frames of the video files of one camera, in the order in which episodes lie in them."""

    def __init__(self, shape: tuple[int, ...], size: tuple[int, int] | None):
        self.shape, self.size = shape, size
        self.path: Path | None = None
        self.at = 0
        self.frames: Iterator[bytes] = iter(())

    def take(self, path: Path, first: int, num: int) -> Array:
        """(num, H, W, 3) from frame `first` of a file."""
        if path != self.path or first < self.at:
            self._open(path)
        height, width = self.size or self.shape[:2]
        made = np.empty((num, height, width, 3), np.uint8)
        while self.at < first:
            self._next(path)
        for i in range(num):
            made[i] = scaled(np.frombuffer(self._next(path), np.uint8).reshape(self.shape), self.size)
        return made

    def _open(self, path: Path) -> None:
        """Begin a file; ValueError where its frames are not of the size that the dataset says."""
        self.close()
        if not path.is_file():
            raise FileNotFoundError(f"no video '{path}'")
        frames = ffmpeg().read_frames(str(path), pix_fmt="rgb24")
        try:
            size = tuple(next(frames)["size"][::-1])
        except OSError as error:
            raise ValueError(f"{path} cannot be played: {str(error).splitlines()[-1]}") from None
        if size != self.shape[:2]:
            raise ValueError(f"{path} has frames of {size}, the dataset says {self.shape[:2]}")
        self.path, self.at, self.frames = path, 0, frames

    def _next(self, path: Path) -> bytes:
        frame = next(self.frames, None)
        if frame is None:
            raise ValueError(f"{path} ends after {self.at} frames, more belong to its episodes")
        self.at += 1
        return frame

    def close(self) -> None:
        """End the decoder."""
        if self.path is not None:
            self.frames.close()  # type: ignore[attr-defined]  # a generator
        self.path = None


def ffmpeg() -> Any:
    """The decoder; ModuleNotFoundError says what installs it."""
    try:
        import imageio_ffmpeg
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}: pip install 'rlflow-torch[data]'", name=error.name) from None
    return imageio_ffmpeg
