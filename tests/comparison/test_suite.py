"""A suite: every method on every task, checked and priced as a sweep, and summed up over tasks."""

import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from rlflow.cli import parse
from rlflow.commands import suite
from rlflow.comparison.stats import improvement, iqm
from rlflow.comparison.suite import Scale, across, scores_of
from rlflow.comparison.suite_page import suite_figure, suite_page
from rlflow.train.logger import RunLogger
from rlflow.train.sweep import describe_plan, parse_table, plan


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
    """Profiles with bands around them, a point for every pair, a link to every run; one seed has no band."""
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
    text = suite_page(values, tables, [tmp_path / "b@x" / "seed-0"], tmp_path / "suite.html").read_text()
    assert 'href="b@x/seed-0/report.html"' in text
    assert "late" in text
    assert "<b above" not in text
    alone, tables = across({"a": {"x": np.array([0.3])}})
    assert alone["methods"]["a"]["band"] is None
    assert len(suite_figure(alone).axes) == 1


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
