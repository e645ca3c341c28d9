"""Draw docs/before_after.png and docs/curve.png: python scripts/readme_pictures.py runs/demo/images, a finished run."""

import sys
from pathlib import Path

from rlflow.train.curves import curves
from rlflow.train.figures import before_after
from rlflow.train.record import RunRecord

DOCS = Path(__file__).parents[1] / "docs"


def main(folder: str, pairs: int = 32) -> None:
    """The first and last evaluation of `folder`, evenly over the fixed prompts that its pictures show."""
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


if __name__ == "__main__":
    main(sys.argv[1])
