"""Pictures: pixels unchanged, captions kept, marks visible; curves draw what the rows say."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from rlflow.report.curves import Panel, curves, series, trade_off
from rlflow.report.figures import RIGHT, WRONG, before_after, image_grid, read_captions, tiles


def colors(path) -> set[tuple[int, int, int]]:
    """All colours of a picture."""
    return {color for _, color in Image.open(path).convert("RGB").getcolors(1 << 24)}


def test_enlarging_changes_no_pixel():
    """Every pixel becomes a block of its own colour: reduced again, the image is exact."""
    images = torch.rand(2, 3, 8, 8)
    for image, tile in zip(images, tiles(images), strict=True):
        assert tile.size == (128, 128)
        reduced = torch.from_numpy(np.asarray(tile)[::16, ::16].copy()).permute(2, 0, 1)
        assert torch.equal(reduced, (image * 255).round().to(torch.uint8))


def test_values_out_of_range_do_not_wrap_around():
    """1.1 is white, -1 and nan are black; uint8 passes through."""
    images = torch.tensor([1.1, -1.0, math.nan]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert tiles(images, 1)[0].getpixel((0, 0)) == (255, 0, 0)
    assert tiles(torch.full((1, 3, 2, 2), 7, dtype=torch.uint8), 1)[0].getpixel((1, 1)) == (7, 7, 7)


def test_captions_are_in_the_file_and_as_long_as_needed(tmp_path):
    """Long captions and words wrap and end in an ellipsis instead of growing the picture."""
    captions = ["a red circle", "word " * 60, "x" * 300, ""]
    path = image_grid(torch.rand(4, 3, 32, 32), captions, tmp_path / "new" / "grid.png", columns=2)
    assert read_captions(path) == captions
    width, height = Image.open(path).size
    assert width == 14 + 2 * (136 + 14)
    assert height < 2 * 136 + 2 * (3 * 17 + 5 + 14) + 3 * 14
    Image.new("RGB", (4, 4)).save(tmp_path / "other.png")
    assert read_captions(tmp_path / "other.png") == []


@pytest.mark.parametrize("num", [0, 1, 5])
def test_any_number_of_images(tmp_path, num):
    """None, one, or a last row that is not full."""
    path = image_grid(torch.rand(num, 3, 4, 4), ["a"] * num, tmp_path / "grid.png")
    assert Image.open(path).size[0] > 100


def test_before_and_after_stand_side_by_side_with_their_marks(tmp_path):
    """Left half before, right half after; right and wrong have their colours, an unknown one has neither."""
    red, blue = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    red[:, 0], blue[:, 2] = 1, 1
    path = before_after(red, blue, ["a"], tmp_path / "pair.png", marks=([False], [True]))
    pixels = np.asarray(Image.open(path))
    place = {c: np.argwhere((pixels == c).all(-1))[:, 1].mean() for c in [(255, 0, 0), (0, 0, 255), WRONG, RIGHT]}
    middle = pixels.shape[1] / 2
    assert max(place[255, 0, 0], place[WRONG]) < middle < min(place[0, 0, 255], place[RIGHT])
    unmarked = before_after(red, blue, ["a"], tmp_path / "plain.png", marks=([None], [None]))
    assert not {RIGHT, WRONG} & colors(unmarked)


def test_columns_of_different_length_are_refused(tmp_path):
    """A caption under the wrong image would be a lie."""
    with pytest.raises(ValueError, match="captions has 1 entries where 2"):
        image_grid(torch.rand(2, 3, 4, 4), ["a"], tmp_path / "grid.png")
    with pytest.raises(ValueError, match="marks has 1 entries where 2"):
        before_after(torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), ["a", "b"], tmp_path / "g.png", ([True], [True]))
    with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\)"):
        image_grid(torch.rand(3, 4, 4), ["a"] * 3, tmp_path / "grid.png")


# -- curves ---------------------------------------------------------------------------------------


def run(values, start=0, spent=10.0):
    return [{"iteration": start + i, "kind": "train", "a": v, "cost/x": spent * i} for i, v in enumerate(values)]


def test_series_leaves_out_what_is_missing_and_knows_the_cost():
    """nan and missing values have no point; a row without the cost stands at the last one known."""
    rows = [*run([1.0, math.nan, 3.0]), {"iteration": 2, "kind": "eval", "b": 5.0}]
    xs, ys = series(rows, "a")
    assert (xs.tolist(), ys.tolist()) == ([0, 2], [1, 3])
    assert [v.tolist() for v in series(rows, "b", "cost/x")] == [[20.0], [5.0]]
    assert len(series(rows, "unknown")[0]) == 0


def test_seeds_become_mean_and_band(tmp_path):
    """The thick line is the mean of the seeds, the band goes from the lowest to the highest, where all have data."""
    seeds = [run([0.0, 1.0, 2.0, 9.0]), run([2.0, 3.0, 4.0])]
    (axes,) = curves(seeds, ["a"], tmp_path / "a.png").axes
    mean = axes.lines[-1]
    assert mean.get_xdata().tolist() == [0, 1, 2]
    assert mean.get_ydata().tolist() == [1.0, 2.0, 3.0]
    corners = axes.collections[0].get_paths()[0].vertices
    assert {(x, y) for x, y in corners.tolist()} >= {(0, 0), (0, 2), (2, 2), (2, 4)}
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_a_long_noisy_run_is_smoothed_without_being_moved(tmp_path):
    """The running mean of a constant is that constant, ends included; 5,000 points are drawn as 400."""
    noise = np.random.default_rng(0).normal(0, 1, 5000)
    (axes,) = curves(run((3.0 + noise).tolist()), ["a"]).axes
    thin, thick = (line.get_ydata() for line in axes.lines)
    assert len(thin) == len(thick) == 400
    assert abs(thick - 3.0).max() < 0.25 < abs(thin - 3.0).max()


@pytest.mark.parametrize("rows", [[], run([]), run([math.nan, math.nan]), run([1.0]), [[], []], {"x": [], "y": [[]]}])
def test_curves_of_next_to_nothing(tmp_path, rows):
    """No rows, only nan, one point: a picture all the same."""
    curves(rows, ["a", Panel("both", ("a", "b"))], tmp_path / "a.svg")
    assert (tmp_path / "a.svg").exists()


def test_names_are_no_formulas(tmp_path):
    """A dollar sign or a very long name of a group cannot break a picture."""
    groups = {"a$\\frac$ " + "long " * 100: [run([1.0, 2.0])], "b": [run([2.0, 3.0])] * 2}
    curves(groups, ["a", "$^"], tmp_path / "a.svg")
    assert (tmp_path / "a.svg").exists()


def test_pictures_are_reproducible(tmp_path):
    """The same rows give the same bytes."""
    for name in ("a.svg", "b.svg"):
        curves(run([1.0, 2.0]), ["a"], tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_trade_off_joins_evaluations_in_their_order_and_ends_at_the_mean_of_the_seeds():
    """Of the iterations that both seeds have, 0 and 4, the distance going back: none sorted, none beside another."""
    rows = [[(0, 0.0, 1.0), (4, 4.0, 2.0), (9, 9.0, 9.0)], [(0, 0.0, 3.0), (2, 5.0, 5.0), (4, -2.0, 6.0)]]
    seeds = [[{"iteration": i, "d": d, "y": y} for i, d, y in seed] for seed in rows]
    figure = trade_off({"a": seeds, "none": [[{"iteration": 0, "y": 1.0}]]}, ["y"], "d", io.BytesIO())
    path, end = figure.axes[0].lines[:2]
    assert path.get_xydata().tolist() == [[0.0, 2.0], [1.0, 4.0]]
    assert end.get_xydata().tolist() == [[1.0, 4.0]]
