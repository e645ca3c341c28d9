"""Films of episodes: H.264 that every browser plays, and a tag that holds one inside a page."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

SECONDS = 8.0  # of an episode that a film shows at most
QUALITY = 28  # constant rate factor of H.264: 18 looks like the original, 28 is a third of the bytes


def write_video(frames: Iterable[Tensor], path: Path, fps: float) -> None:
    """Frames (H, W, 3) uint8 of one size to an mp4 at `path`; odd sizes lose their last row or column.

    Colours are stored at half the resolution (yuv420p, all that browsers play), hence even sizes.
    """
    pictures = (np.ascontiguousarray(frame.cpu().numpy()) for frame in frames)
    first = next(pictures, None)
    if first is None:
        raise ValueError(f"no frames for {path}: an episode has at least one")
    height, width = (n - n % 2 for n in first.shape[:2])
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = ["-crf", str(QUALITY), "-preset", "slow", "-movflags", "+faststart"]  # it starts before it has all
    writer = _ffmpeg().write_frames(
        str(path),
        (width, height),
        fps=fps,
        codec="libx264",
        quality=None,
        pix_fmt_out="yuv420p",
        macro_block_size=2,
        output_params=settings,
    )
    writer.send(None)
    try:
        for picture in itertools.chain([first], pictures):
            if picture.shape != first.shape:
                raise ValueError(f"frames of one size make a film, got {picture.shape} after {first.shape}")
            writer.send(np.ascontiguousarray(picture[:height, :width]))
    finally:
        writer.close()


def gif(path: Path, fps: int = 10) -> bytes:
    """The film at `path` as an animated GIF, for viewers that play nothing else."""
    frames = _ffmpeg().read_frames(str(path), output_params=["-r", str(fps)])
    size = next(frames)["size"]
    # an octree of colours is found in a fifth of the time of a median cut, and the file is half as long
    octree = Image.Quantize.FASTOCTREE
    pictures = [Image.frombytes("RGB", size, frame).quantize(method=octree) for frame in frames]
    file = io.BytesIO()
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=1000 // fps, loop=0)
    return file.getvalue()


def _ffmpeg() -> Any:
    try:
        import imageio_ffmpeg
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}: pip install 'rlflow-torch[robots]'", name=error.name) from None
    return imageio_ffmpeg


def html_video(path: Path) -> str:
    """A <video> tag that holds the mp4 itself, so that a page is one file; it plays by itself, which needs `muted`."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<video autoplay loop muted playsinline controls src="data:video/mp4;base64,{data}"></video>'
