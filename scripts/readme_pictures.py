"""Draw the pictures of the README from the two runs of `make demo`, or put two films side by side:

python scripts/readme_pictures.py runs/demo/images runs/demo/robots
python scripts/readme_pictures.py before.mp4 after.mp4 docs/cube.gif
"""

import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image

from rlflow.report.curves import curves
from rlflow.report.figures import before_after
from rlflow.report.record import RunRecord

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
        torch.from_numpy(first.images[rows]),
        torch.from_numpy(last.images[rows]),
        [first.captions[i] for i in rows],
        DOCS / "before_after.png",
        ([first.marks[i] for i in rows], [last.marks[i] for i in rows]),
        columns=4,
        scale=2,
    )
    curves(run.rows, ["eval/heldout/strict", "eval/heldout/judge", "reward/mean"], DOCS / "curve.png")


def robots(folder: str) -> None:
    """The first episode of the first and of the last evaluation, side by side; one that has ended is dark."""
    run = RunRecord.read(folder)
    ends = run.ends("eval/heldout/return")
    assert ends is not None
    side_by_side(*(run.films(iteration)[0] for iteration in ends), DOCS / "hopper.gif")


def side_by_side(before: Path, after: Path, out: Path, every: int = 3, side: int = 180) -> None:
    """Two films as one picture that moves; the one that is over first goes dark."""
    left, right = (_frames(path, side)[::every] for path in (before, after))
    for short, long in ((left, right), (right, left)):
        short += [short[-1] // 3] * (len(long) - len(short))
    pairs = [Image.fromarray(np.hstack(pair)) for pair in zip(left, right, strict=True)]
    some = Image.fromarray(np.vstack(pairs[:: len(pairs) // 8]))
    shades = some.quantize(128, Image.Quantize.FASTOCTREE)  # one palette for all
    first, *others = [pair.quantize(palette=shades, dither=Image.Dither.NONE) for pair in pairs]
    first.save(out, save_all=True, append_images=others, duration=40 * every, loop=0)


def _frames(path: Path, side: int) -> list[np.ndarray]:
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    pictures = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
    return [np.asarray(Image.fromarray(picture).resize((side, side * height // width))) for picture in pictures]


if __name__ == "__main__":
    if len(sys.argv) > 3:
        side_by_side(*map(Path, sys.argv[1:4]))
    else:
        images(sys.argv[1])
        robots(sys.argv[2])
