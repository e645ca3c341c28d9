"""Draw the pictures of the README from the two runs of `make demo`:

python scripts/readme_pictures.py runs/demo/images runs/demo/robots
"""

import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image

from rlflow.train.curves import curves
from rlflow.train.figures import before_after
from rlflow.train.record import RunRecord

DOCS = Path(__file__).parents[1] / "docs"


def images(folder: str, pairs: int = 32) -> None:
    """The first and last evaluation of `folder`, evenly over the fixed prompts that its pictures show; its curve."""
    run = RunRecord.read(folder)
    ends = run.ends("eval/heldout/strict")
    assert ends is not None
    first, last = (run.pictures(iteration) for iteration in ends)
    assert first is not None
    assert last is not None
    rows = [round(i * (len(first.captions) - 1) / (pairs - 1)) for i in range(pairs)]
    before_after(
        first.images[rows] / 255,
        last.images[rows] / 255,
        [first.captions[i] for i in rows],
        DOCS / "before_after.png",
        ([first.marks[i] for i in rows], [last.marks[i] for i in rows]),
        columns=4,
        scale=2,
    )
    curves(run.rows, ["eval/heldout/strict", "eval/heldout/judge", "reward/mean"], DOCS / "curve.png")


def robots(folder: str, every: int = 3, side: int = 180) -> None:
    """The first episode of the first and of the last evaluation, side by side; one that has ended is dark."""
    run = RunRecord.read(folder)
    ends = run.ends("eval/heldout/return")
    assert ends is not None
    before, after = (_frames(run.films(iteration)[0], side)[::every] for iteration in ends)
    before += [before[-1] // 3] * (len(after) - len(before))
    pairs = [Image.fromarray(np.hstack(pair)) for pair in zip(before, after, strict=True)]
    shades = Image.fromarray(np.vstack(pairs[:: len(pairs) // 8])).quantize(32)  # one palette for all
    first, *others = [pair.quantize(palette=shades, dither=Image.Dither.NONE) for pair in pairs]
    first.save(DOCS / "hopper.gif", save_all=True, append_images=others, duration=40 * every, loop=0)


def _frames(path: Path, side: int) -> list[np.ndarray]:
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    pictures = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
    return [np.asarray(Image.fromarray(picture).resize((side, side * height // width))) for picture in pictures]


if __name__ == "__main__":
    images(sys.argv[1])
    robots(sys.argv[2])
