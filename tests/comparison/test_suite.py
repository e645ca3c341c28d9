"""A suite: every method on every task, checked and priced as a sweep, and summed up over tasks."""

import base64
import itertools
import math
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from rlflow.cli import parse
from rlflow.commands import suite
from rlflow.comparison.stats import improvement, iqm
from rlflow.comparison.suite import Scale, across, scores_of
from rlflow.comparison.suite_page import curves_figure, suite_figure, suite_page
from rlflow.report.curves import COLORS, SAMPLES
from rlflow.report.record import RunRecord
from rlflow.train.logger import RunLogger
from rlflow.train.sweep import describe_plan, plan
from rlflow.train.table import parse_table


def table(**more) -> dict:
    tasks = [
        {"name": "reach", "overrides": ["env.name=toy_reach"], "metric": "return", "low": -6.0, "high": -1.0},
        {"name": "routes", "overrides": ["env.name=toy_routes", "env.settings={}", "train.iterations=7"]},
    ]
    methods = [
        {"name": "short", "recipe": "robot_reach_sac", "overrides": ["train.iterations=5"]},
        {"name": "usual", "recipe": "robot_reach_sac"},
    ]
    return {"tasks": tasks, "methods": methods, "overrides": ["train.iterations=9"], "seeds": [0, 3]} | more


def test_every_method_meets_every_task_with_every_seed() -> None:
    """What a method says comes after what the task says, and both after what all say."""
    jobs = plan(table())
    names = ["short@reach", "usual@reach", "short@routes", "usual@routes"]
    assert [(j.name, j.seed) for j in jobs] == [(name, seed) for seed in (0, 3) for name in names]
    assert [j.config.train.iterations for j in jobs[:4]] == [5, 9, 5, 7]
    assert [j.config.env.name for j in jobs[:4]] == ["toy_reach"] * 2 + ["toy_routes"] * 2
    assert "8 runs, 8 to do" in describe_plan(jobs, Path("nowhere"), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": []}, "^a table has runs, or else tasks and methods$"),
        ({"runs": [{"name": "a", "recipe": "t2i_cps"}]}, "^a table has runs, or else tasks and methods$"),
        ({"tasks": [{"name": "a", "metrik": "x"}]}, r"^tasks\.0\.metrik: .*did you mean 'metric'"),
        ({"tasks": [{"name": "a", "low": 1.0}]}, r"^tasks: \['a'\] count the same number as 0 and as 1"),
        ({"tasks": [{"name": "a"}] * 2}, r"^tasks: the names \['a'\] occur twice"),
        ({"tasks": [{"name": "a@b"}]}, r"^tasks: the names \['a@b'\] occur twice, or hold an @"),
    ],
)
def test_a_wrong_suite_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_table(table(**change))


def test_a_table_of_runs_is_no_suite(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({"runs": [{"name": "a", "recipe": "t2i_cps"}]}))
    args = parse(["suite", str(tmp_path / "t.yaml"), "--run", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="is a table of runs, without tasks and methods: rlflow sweep"):
        suite._run(args)


def folder(root: Path, name: str, **evaluated: float) -> Path:
    with RunLogger(root / name, total_iterations=1, minutes=None, tensorboard=False, quiet=True) as log:
        for i, factor in enumerate((0.0, 1.0)):  # the last one counts
            log.log(i, "eval", {f"eval/heldout/{metric}": factor * value for metric, value in evaluated.items()})
    return root / name


def test_scores_are_of_the_last_evaluation_on_the_scale_of_their_task(tmp_path: Path) -> None:
    runs = {
        ("a", "reach"): [folder(tmp_path, f"a{i}", **{"return": value}) for i, value in enumerate((-6.0, -1.0, -3.5))],
        ("a", "routes"): [folder(tmp_path, "a9", success=0.25)],
        ("b", "reach"): [folder(tmp_path, "b0", **{"return": -2.0})],
        ("b", "routes"): [],
    }
    found = scores_of(runs, {"reach": Scale("return", -6, -1), "routes": Scale()})
    np.testing.assert_allclose(found["a"]["reach"], [0, 1, 0.5])
    np.testing.assert_allclose(found["a"]["routes"], [0.25])
    values, tables = across(found)
    assert values["unfinished"] == ["b"]
    assert list(values["methods"]) == ["a"]
    assert values["methods"]["a"]["profile"][0] == pytest.approx((2 / 3 + 1) / 2), "tasks count alike"
    assert len(tables) == 1


def test_the_page_draws_what_the_tables_say(tmp_path: Path) -> None:
    """Profiles with bands around them and a point for every pair, in the colour of the method; one seed has no band."""
    rng = np.random.default_rng(0)
    scores = {m: {t: rng.random(4) for t in ("x", "y")} for m in ("a<b", "b", "c")}
    values, tables = across(scores | {"late": {"x": rng.random(2)}})
    profiles, better = suite_figure(values).axes
    drawn = {line.get_label(): line.get_ydata() for line in profiles.lines}
    assert list(drawn) == ["a<b", "b", "c"]
    for name, ys in drawn.items():
        (low, high), middle = values["methods"][name]["band"], values["methods"][name]["profile"]
        assert list(ys) == middle
        assert all(a <= b + 1e-12 and b <= c + 1e-12 for a, b, c in zip(low, middle, high, strict=True))
    points = [line.get_xdata()[0] for line in better.lines if line.get_marker() == "o"]
    wanted = [values["methods"][a]["improvement"][b][0] for a, b in (("a<b", "b"), ("a<b", "c"), ("b", "c"))]
    assert points == pytest.approx(wanted)
    colors = [line.get_color() for line in profiles.lines]
    assert colors == list(COLORS[:3])
    assert [line.get_color() for line in better.lines if line.get_marker() == "o"] == [*COLORS[:1] * 2, COLORS[1]]
    text = suite_page(values, tables, {}, {}, tmp_path / "suite.html").read_text()
    assert "late" in text
    assert "<b above" not in text
    alone, tables = across({"a": {"x": np.array([0.3])}})
    assert alone["methods"]["a"]["band"] is None
    assert len(suite_figure(alone).axes) == 1


def learnt(root: Path, seed: int, returns: list[float], films: tuple[int, ...] = (), report: bool = False) -> Path:
    """A run evaluated every ten iterations of 64 steps; at `films` two episodes were filmed."""
    run = root / f"seed-{seed}"
    samples = run / "samples"
    samples.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"env": {"name": "hopper"}}))
    with RunLogger(run, total_iterations=1, minutes=None, tensorboard=False, quiet=True) as log:
        for i, value in zip(range(0, 10 * len(returns), 10), returns, strict=True):
            log.log(i, "eval", {"eval/heldout/return": value, SAMPLES: 64.0 * i})
            scores = {"return": torch.tensor([value + 1, value - 1]), "caption_id": torch.arange(2)}
            save_file(scores, samples / f"eval_{i:06d}.safetensors")
    for i, row in itertools.product(films, (0, 1)):
        (samples / f"film_{i:06d}_{row}.mp4").write_bytes(f"film {run.parent.name} {seed} {i} {row}".encode())
    if report:
        (run / "report.html").write_text("a report")
    return run


def a_page(root: Path) -> tuple[dict, dict[str, Scale], str]:
    """Folders, scales and text of the page of two methods: b met one task alone, and drew no pictures there."""
    runs = {
        ("a", "hop"): [learnt(root / "a@hop", s, [0, 10 + 4 * s, 30 + 6 * s], (0, 20), s == 1) for s in (0, 1)],
        ("a", "x#y"): [learnt(root / "a@x#y", 0, [5.0], report=True)],
        ("b", "hop"): [learnt(root / "b@hop", 0, [0, 7])],
    }
    scales = {"hop": Scale("return", 0, 40), "x#y": Scale("return", 0, 10)}
    values, tables = across(scores_of(runs, scales))
    return runs, scales, suite_page(values, tables, runs, scales, root / "suite.html").read_text()


def test_the_page_draws_the_held_out_curve_of_every_method(tmp_path: Path) -> None:
    """Over environment steps: seeds of 10 and 14 after 640 steps have a mean of 12 there."""
    runs, scales, text = a_page(tmp_path)
    drawn = curves_figure({both: [RunRecord.read(f) for f in folders] for both, folders in runs.items()}, scales)
    hop, other = drawn.axes
    assert [ax.get_title("left") for ax in drawn.axes] == ["hop: return", "x#y: return"]
    assert hop.get_xlabel() == other.get_xlabel() == "environment steps"
    lines = [(line.get_color(), line.get_xdata().tolist(), line.get_ydata().tolist()) for line in hop.lines]
    steps = [0, 640, 1280]
    mine = [(color, ys) for color, xs, ys in lines if xs == steps]
    assert mine == [(COLORS[0], [0, 10, 30]), (COLORS[0], [0, 14, 36]), (COLORS[0], [0, 12, 33])]
    assert lines[-1] == (COLORS[1], steps[:2], [0, 7])
    assert [line.get_ydata().tolist() for line in other.lines] == [[5]], "what b has not finished has no curve"
    assert [entry.get_text() for entry in drawn.legends[0].get_texts()] == ["a", "b"]
    assert "Learning curves" in text
    b = [RunRecord.read(folder) for folder in runs["b", "hop"]]
    alone = curves_figure({("a", "x#y"): [RunRecord.read(runs["a", "x#y"][0])], ("b", "hop"): b}, scales)
    assert [ax.lines[0].get_color() for ax in alone.axes] == [COLORS[1], COLORS[0]], "a method has one colour"
    assert curves_figure({}, scales) is None


def test_the_page_holds_the_newest_films_and_leads_nowhere_that_is_not(tmp_path: Path) -> None:
    """One film: of the first finished seed, newest evaluation, first episode, with what that episode returned."""
    _, _, text = a_page(tmp_path)
    films = [base64.b64decode(data).decode() for data in re.findall(r'src="data:video/mp4;base64,([^"]*)"', text)]
    assert films == ["film a@hop 0 20 0"]
    assert "a, seed 0, after iteration 20: return 31<" in text
    assert text.count("<video") == text.count('<div class="tile">') == 1
    links = re.findall(r'href="([^"]*)"', text)
    assert links == ["a@hop/seed-1/report.html", "a@x%23y/seed-0/report.html"]
    assert all((tmp_path / unquote(link)).exists() for link in links)
    assert "<li>b@hop/seed-0</li>" in text
    assert not re.search(r'src="(?!data:)', text), "the page loads nothing"


def test_a_suite_without_pictures_says_nothing_of_films(tmp_path: Path) -> None:
    runs = {("b", "hop"): [learnt(tmp_path / "b@hop", 0, [0, 7])]}
    scales = {"hop": Scale("return", 0, 40)}
    text = suite_page(*across(scores_of(runs, scales)), runs, scales, tmp_path / "suite.html").read_text()
    assert "Films" not in text
    assert "<video" not in text
    assert "Learning curves" in text


def test_the_tables_say_what_the_statistics_say() -> None:
    rng = np.random.default_rng(0)
    scores = {m: {t: rng.random(4) + shift for t in ("x", "y")} for m, shift in (("a", 0.0), ("b", 0.4))}
    values, (whole, better) = across(scores)
    a, b = (list(scores[m].values()) for m in ("a", "b"))
    assert values["methods"]["a"]["iqm"][0] == pytest.approx(iqm(a))
    assert values["methods"]["b"]["improvement"]["a"][0] == pytest.approx(improvement(b, a))
    assert [row[0] for row in whole.rows] == ["a", "b"]
    assert [row[0] for row in better.rows] == ["a", "b"]
    low, high = values["methods"]["b"]["iqm"][1:]
    assert low < iqm(b) < high
    assert all(math.isfinite(v) for v in values["methods"]["a"]["profile"])
