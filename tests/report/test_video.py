"""A film is what was given to it, in the format that browsers play, and small."""

import base64
import re

import pytest
import torch
from PIL import Image

from rlflow.report.video import FILMED, films, frames_of, gif, html_video, strips, write_film, write_video

ffmpeg = pytest.importorskip("imageio_ffmpeg")


def bars(count: int, height: int, width: int) -> list[torch.Tensor]:
    """A white bar that moves to the right over grey noise."""
    noise = torch.randint(90, 130, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    frames = [noise.clone() for _ in range(count)]
    for i, frame in enumerate(frames):
        frame[:, i * width // count : i * width // count + 8] = 255
    return frames


def read_back(path):
    """(meta data, frames (T, H, W, 3)) of a film."""
    reader = ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    frames = [torch.frombuffer(bytearray(f), dtype=torch.uint8).view(height, width, 3) for f in reader]
    return meta, torch.stack(frames)


def test_frames_come_back_in_order_and_upright(tmp_path):
    frames = bars(24, 64, 96)
    for frame in frames:
        frame[:8] = torch.tensor([200, 20, 20], dtype=torch.uint8)  # red above
    write_video(frames, tmp_path / "deep" / "film.mp4", fps=12)
    meta, found = read_back(tmp_path / "deep" / "film.mp4")
    assert meta["codec"] == "h264"
    assert meta["pix_fmt"].startswith("yuv420p")
    assert meta["fps"] == 12
    assert found.shape == (24, 64, 96, 3)
    assert float((found.float() - torch.stack(frames).float()).abs().mean()) < 12


def test_odd_sizes_lose_one_row_and_column(tmp_path):
    write_video(bars(3, 33, 65), tmp_path / "a.mp4", fps=5)
    assert read_back(tmp_path / "a.mp4")[1].shape == (3, 32, 64, 3)


def test_eight_seconds_fit_into_a_page(tmp_path):
    write_video(bars(200, 192, 192), tmp_path / "a.mp4", fps=25)
    tag = html_video(tmp_path / "a.mp4")
    assert len(tag) < 400_000
    data = re.search(r'src="data:video/mp4;base64,([^"]+)"', tag)
    assert data is not None
    assert base64.b64decode(data[1]) == (tmp_path / "a.mp4").read_bytes()
    assert data[1].count("<") == 0


def test_what_is_no_film_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no frames"):
        write_video([], tmp_path / "a.mp4", fps=5)
    with pytest.raises(ValueError, match=r"one size .*\(8, 12, 3\) after \(8, 8, 3\)"):
        write_video([torch.zeros(8, 8, 3).byte(), torch.zeros(8, 12, 3).byte()], tmp_path / "a.mp4", fps=5)


def moving(num: int = 2, frames: int = 9) -> torch.Tensor:
    """Videos (N, F, 3, 8, 12) in [0, 1] that get brighter."""
    return torch.linspace(0, 1, frames).view(1, -1, 1, 1, 1).expand(num, frames, 3, 8, 12)


def test_a_strip_has_the_first_and_the_last_frame():
    shown = strips(moving(), 3)
    assert shown.shape == (2, 3, 8, 36)
    assert shown[0, 0, 0, ::12].tolist() == [0, 0.5, 1]
    assert strips(moving(frames=2)).shape == (2, 3, 8, 24), "no more frames than there are"


@pytest.mark.parametrize("missing", [False, True])
def test_videos_are_filmed_as_gif_where_there_is_no_ffmpeg(missing, tmp_path, monkeypatch):
    monkeypatch.setattr("rlflow.report.video.importlib.util.find_spec", lambda name: None if missing else True)
    paths = films(moving(num=FILMED + 1), tmp_path, 7)
    kind = "gif" if missing else "mp4"
    assert [path.name for path in paths] == [f"film_000007_{row}.{kind}" for row in range(FILMED)]
    assert gif(paths[0])[:4] == b"GIF8"
    assert html_video(paths[0]).startswith("<img" if missing else "<video")
    if not missing:
        meta, found = read_back(paths[0])
        assert (meta["fps"], found.shape) == (16, (9, 8, 12, 3))
        assert (found[8].float().mean() - found[0].float().mean()) > 200


def test_a_gif_holds_every_frame(tmp_path):
    write_film(frames_of(moving()[0]), tmp_path / "a.gif", fps=10)
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.n_frames, image.size, image.info["duration"]) == (9, (12, 8), 100)
    with pytest.raises(ValueError, match=r"x\.webm: a film is an \.mp4 or a \.gif"):
        write_film([], tmp_path / "x.webm", fps=10)
