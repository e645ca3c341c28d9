"""Films of episodes and of videos that a model makes: H.264 that every browser plays, or GIF where there is no ffmpeg,
and a tag that holds one inside a page; a video as a strip of some of its frames."""

from __future__ import annotations

import base64
import importlib.util
import io
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

SECONDS = 8.0  # of an episode that a film shows at most
FPS = 16.0  # of videos that a model makes: those that Wan was trained on
FILMED = 8  # videos of an evaluation that are filmed
STRIP = 5  # frames of a strip
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


def strips(videos: Tensor, num: int = STRIP) -> Tensor:
    """Videos (N, F, 3, H, W) as images (N, 3, H, n W): up to `num` frames side by side, first and last among them."""
    some = np.linspace(0, videos.shape[1] - 1, min(num, videos.shape[1])).round().astype(int).tolist()
    return videos[:, some].permute(0, 2, 3, 1, 4).flatten(3)


def frames_of(video: Tensor) -> list[Tensor]:
    """A video (F, 3, H, W) in [0, 1] as frames (H, W, 3) uint8."""
    pixels = (video.detach().float().nan_to_num().clamp(0, 1) * 255).round().byte()
    return list(pixels.permute(0, 2, 3, 1).cpu())


def write_film(frames: list[Tensor], path: Path, fps: float) -> None:
    """Frames (H, W, 3) uint8 to an .mp4, or a .gif, which needs no ffmpeg; ValueError for another name."""
    if path.suffix == ".mp4":
        write_video(frames, path, fps)
        return
    if path.suffix != ".gif":
        raise ValueError(f"{path}: a film is an .mp4 or a .gif")
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = [Image.fromarray(frame.cpu().numpy()) for frame in frames]
    first.save(path, "GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)


def films(videos: Tensor, folder: Path, iteration: int) -> list[Path]:
    """Write film_ITERATION_ROW of videos (N, F, 3, H, W), at most FILMED, into `folder`: mp4, or gif without ffmpeg."""
    kind = "mp4" if importlib.util.find_spec("imageio_ffmpeg") else "gif"
    paths = [folder / f"film_{iteration:06d}_{row}.{kind}" for row in range(min(len(videos), FILMED))]
    for video, path in zip(videos, paths, strict=False):
        write_film(frames_of(video), path, FPS)
    return paths


def gif(path: Path, fps: int = 10) -> bytes:
    """The film at `path` as an animated GIF, for viewers that play nothing else."""
    if path.suffix == ".gif":
        return path.read_bytes()
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
    """A tag that holds the film itself, so that a page is one file; a <video> plays by itself, which needs `muted`."""
    data = base64.b64encode(path.read_bytes()).decode()
    if path.suffix == ".gif":
        return f'<img src="data:image/gif;base64,{data}">'
    return f'<video autoplay loop muted playsinline controls src="data:video/mp4;base64,{data}"></video>'
