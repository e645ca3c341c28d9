"""A sweep: the plan is checked and priced first, runs are skipped, resumed and aggregated by hand-checkable rules."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rlflow.comparison.aggregate import Spread, aggregate, eval_at
from rlflow.config import recipes
from rlflow.parallel.workers import Workers
from rlflow.report.curves import NETWORK_ROWS, SECONDS
from rlflow.report.metrics_file import read_metrics
from rlflow.report.record import RunRecord
from rlflow.train.budget import planned
from rlflow.train.checkpoint import Checkpoints
from rlflow.train.logger import RunLogger
from rlflow.train.sweep import describe_plan, plan, run_sweep, state
from rlflow.train.table import parse_table, read_table
from rlflow.train.trainer import Trainer

STRICT = "eval/heldout/strict"


def table(**more) -> dict:
    runs = [
        {"name": "grpo", "recipe": "t2i_flow_grpo", "overrides": ["train.minutes=2"]},
        {"name": "control", "recipe": "t2i_flow_grpo", "overrides": ["train.permute_rewards=true"]},
    ]
    return {"runs": runs, "overrides": ["train.minutes=", "train.iterations=3"], "seeds": [0, 5], "jobs": 2} | more


# -- the plan -------------------------------------------------------------------------------------


def test_the_plan_is_every_run_with_every_seed() -> None:
    jobs = plan(table())
    assert [(j.name, j.seed) for j in jobs] == [("grpo", 0), ("control", 0), ("grpo", 5), ("control", 5)]
    assert {j.config.train.threads for j in jobs} == {1}
    assert [j.config.train.seed for j in jobs] == [0, 0, 5, 5]
    assert [j.config.train.minutes for j in jobs] == [2, None, 2, None], "a run's own overrides come last"
    assert [j.config.train.permute_rewards for j in jobs] == [False, True, False, True]


def test_the_command_runs_or_resumes(tmp_path: Path) -> None:
    job = plan(table())[1]
    command = job.command(tmp_path)
    assert command[1:6] == ["-P", "-m", "rlflow", "train", "t2i_flow_grpo"]
    assert command[command.index("--run") + 1] == str(tmp_path / "control" / "seed-0")
    assert "--resume" not in command
    job.folder(tmp_path).mkdir(parents=True)
    (job.folder(tmp_path) / "config.yaml").write_text(job.config.to_yaml())
    assert job.command(tmp_path)[-2:] == ["--resume", "last"]


@pytest.mark.parametrize("name", sorted(recipes.tables()))
def test_every_table_that_ships_can_be_named(name: str) -> None:
    """By its name alone, with what it is; its recipes and overrides are right where their extras are installed."""
    checked = parse_table(read_table(name))
    assert {run.recipe for run in checked.runs} <= set(recipes.names())
    assert recipes.tables()[name].read_text().startswith("# ")


def test_an_unknown_table_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no table 't2'; did you mean 't2i'"):
        read_table("t2")
    with pytest.raises(ValueError, match="no table"):
        read_table(tmp_path / "t2i.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sedes": [1]}, r"^sedes: no such setting; did you mean 'seeds'\?$"),
        ({"at": {"minute": [1]}}, r"^at\.minute: no such setting; did you mean 'minutes'\?$"),
        ({"runs": [{"name": "a", "recipe": "t2i_cps", "override": []}]}, r"^runs\.0\.override: .*'overrides'\?$"),
        ({"runs": [{"name": "a"}]}, r"^runs\.0\.recipe: Field required"),
        ({"runs": []}, "at least one run"),
        ({"seeds": []}, "one seed"),
        ({"seeds": [1, 1]}, r"^seeds: \[1, 1\] has one twice"),
        ({"seeds": ["a"]}, r"^seeds\.0: Input should be a valid integer"),
        ({"jobs": 0}, r"^jobs: must be positive"),
        ({"runs": [{"name": "a/b", "recipe": "t2i_cps"}]}, r"runs: \['a/b'\] cannot name a folder"),
        ({"runs": [{"name": "a", "recipe": "t2i_cps"}] * 2}, r"runs: the names \['a'\] occur twice"),
        ({"runs": [{"name": "a", "recipe": "t2i_csp"}]}, r"^run 'a': unknown recipe 't2i_csp'; did you mean 't2i_cps'"),
        ({"overrides": ["train.minuts=1"]}, r"^run 'grpo': train\.minuts: no such setting; did you mean 'minutes'"),
    ],
)
def test_a_wrong_table_is_refused_before_anything_runs(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(table(**change))


def test_the_cost_is_told_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Minutes add up and are shared by the processes; a run of iterations has no known time before one ran."""
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table()))
    run_sweep(tmp_path / "table.yaml", tmp_path / "out", dry=True)
    out = capsys.readouterr().out
    assert "4 runs, 4 to do" in out
    assert "grpo: t2i_flow_grpo, 3 iterations or 2 min each (at most 288 images), 2 seeds (2 new)" in out
    assert "about 2 min 00 s with 2 side by side" in out, "2 runs x 2 min / 2"
    assert "2 runs count iterations only" in out
    assert not (tmp_path / "out").exists()
    folder = plan(table())[1].folder(tmp_path / "out")
    with RunLogger(folder, total_iterations=3, minutes=None, tensorboard=False, quiet=True) as log:
        log.log(2, "train", {SECONDS: 40.0})
    told = describe_plan(plan(table()), tmp_path / "out", 2)
    assert "about 2 min 40 s with 2 side by side" in told, "+ 20 s that are left of one, and 60 s of the other, / 2"
    with RunLogger(folder, total_iterations=3, minutes=None, tensorboard=False, quiet=True) as log:
        log.log(3, "train", {SECONDS: 90.0})
        log.log(3, "eval", {STRICT: 0.5})
    told = describe_plan(plan(table()), tmp_path / "out", 2)
    assert "about 2 min 45 s with 2 side by side" in told, "what has been trained counts no more: + 0 s and 90 s, / 2"


def test_pictures_and_steps_are_told_before_anything_runs(tmp_path: Path) -> None:
    """groups x horizon x chunk x iterations; at most where an episode's end leaves some out."""
    reach = ["train.minutes=", "train.iterations=7", "env.num_groups=6", "env.group_size=2", "env.horizon=3"]
    runs = [
        {"name": "pictures", "recipe": "t2i_flow_grpo", "overrides": reach[:4]},
        {"name": "toy", "recipe": "robot_reach_sac", "overrides": reach},  # decisions of two steps, not a setting
        {"name": "hop", "recipe": "robot_sac_flow_g", "overrides": [*reach, "env.rows_per_call=12"]},
        {"name": "chunks", "recipe": "robot_sac_flow_g", "overrides": [*reach, "env.settings={}"]},  # hopper's own: 4
        {"name": "timed", "recipe": "t2i_flow_grpo", "overrides": ["train.iterations="]},
    ]
    jobs = plan(table(runs=runs, overrides=[]))
    told = describe_plan(jobs, tmp_path, 1)
    assert "pictures: t2i_flow_grpo, 7 iterations each (84 images), 2 seeds" in told
    assert "toy: robot_reach_sac, 7 iterations each (at most 504 environment steps)" in told
    assert "hop: robot_sac_flow_g, 7 iterations each (252 environment steps)" in told
    assert "chunks: robot_sac_flow_g, 7 iterations each (at most 1,008 environment steps)" in told
    steps = 2 * (504 + 252 + 1008)
    assert f"in all 168 images, at most {steps:,} environment steps, of 2 runs it is not known beforehand" in told


def test_a_run_takes_the_steps_that_were_told(tmp_path: Path) -> None:
    config = recipes.load(
        "robot_reach_sac", ["train.iterations=2", "train.threads=1", "eval.num=2", "algorithm.start=32"]
    )
    made = Trainer(config, tmp_path / "run", quiet=True)
    made.fit()
    cost = planned(config)
    assert cost is not None
    assert made.samples == cost.num == 32 * 4 * 2 * 2


def test_a_shipped_suite_tells_its_steps_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_sweep("suite_toys", tmp_path, dry=True)
    out = capsys.readouterr().out
    assert "flow_g@mdp: robot_reach_sac, 60 iterations each (11,520 environment steps), 3 seeds (3 new)" in out
    assert "(at most 15,360 environment steps)" in out, "32 rows x 4 decisions x 2 steps x 60"
    steps = 3 * 2 * 32 * 60 * (4 * 2 + 6 + 12 * 2)
    assert f"in all at most {steps:,} environment steps" in out


def test_no_table_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no table"):
        run_sweep(tmp_path / "absent.yaml", tmp_path)


# -- where a run stands ---------------------------------------------------------------------------


def tiny_table(tiny: list[str], field: str, **more) -> dict:
    overrides = [*tiny, f"policy.field={field}", "train.minutes=", "train.iterations=3"]
    return table(overrides=overrides, runs=[{"name": "grpo", "recipe": "t2i_flow_grpo"}], seeds=[0], jobs=1) | more


def test_states(tmp_path: Path, tiny: list[str], scenes_field: str, trainer: Callable[..., Trainer]) -> None:
    """New, interrupted before and after the first checkpoint, finished, and finished no more with a larger budget."""
    (job,) = plan(tiny_table(tiny, scenes_field))
    run = job.folder(tmp_path)
    overrides = ["train.threads=1", "train.iterations=3"]
    assert state(job, tmp_path) == "new"

    def stop(made: Trainer, iteration: int, metrics: dict[str, float]) -> None:
        made.stop()

    made = trainer(run, *overrides, callbacks=[stop])
    made.folder.begin({}, 0)
    assert state(job, tmp_path) == "interrupted"
    made.fit()
    assert state(job, tmp_path) == "interrupted"
    trainer(run, *overrides, resume="last").fit()
    assert state(job, tmp_path) == "finished"
    (longer,) = plan(tiny_table(tiny, scenes_field, runs=[job_line("train.iterations=4")]))
    assert state(longer, tmp_path) == "interrupted"
    (other,) = plan(tiny_table(tiny, scenes_field, runs=[job_line("algorithm.objective.low=0.5")]))
    with pytest.raises(ValueError, match=r"holds a run of another config(.|\n)*algorithm\.objective\.low: .* -> 0\.5"):
        state(other, tmp_path)


def job_line(*overrides: str) -> dict:
    return {"name": "grpo", "recipe": "t2i_flow_grpo", "overrides": list(overrides)}


# -- processes ------------------------------------------------------------------------------------


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def test_workers_run_side_by_side_and_report_failures(tmp_path: Path) -> None:
    """Never more than `num` at once; exit code and last line of a failed one; work that is not complete fails too."""
    log = tmp_path / "log"
    code = f"import time; f = open({str(log)!r}, 'a'); f.write('+'); f.flush(); time.sleep(.3); f.write('-'); f.flush()"
    commands = {str(i): python(code) for i in range(4)}
    commands |= {"bad": python("print('one'); raise SystemExit('two')"), "lazy": python("")}
    done = {name: (lambda name=name: name != "lazy") for name in commands}
    failed = Workers(commands, done, tmp_path / "logs", 2).run()
    assert len(failed) == 2
    assert failed[0].startswith("bad: two (see")
    assert failed[1].startswith("lazy: no output")
    running = 0
    for sign in log.read_text():
        running += 1 if sign == "+" else -1
        assert 0 <= running <= 2
    assert (tmp_path / "logs/bad.log").read_text().split() == ["one", "two"]


def test_what_still_runs_is_not_started_again(tmp_path: Path) -> None:
    """The sweep was killed, its run lives on: two processes must not write one folder."""
    commands = {"a": python("import time; time.sleep(60)"), "b": python("")}
    killed = Workers(commands, {}, tmp_path, 2)
    killed._start("a")
    (process,) = killed.running
    try:
        failed = Workers(commands, dict.fromkeys(commands, lambda: True), tmp_path, 2).run()
        assert failed == ["a: still runs since an earlier sweep; wait for it, or stop it"]
    finally:
        process.kill()
        process.wait()
    commands["a"] = python("")
    assert Workers(commands, dict.fromkeys(commands, lambda: True), tmp_path, 2).run() == []


def test_a_signal_reaches_every_worker_once_and_starts_no_other(tmp_path: Path) -> None:
    """They checkpoint on the first signal and would stop at once on a second."""
    code = (
        "import signal, sys, time\n"
        "def handle(n, f):\n    open(sys.argv[1], 'a').write('x')\n    signal.alarm(1)\n"
        "signal.signal(signal.SIGTERM, handle); signal.signal(signal.SIGINT, handle)\n"
        "signal.signal(signal.SIGALRM, lambda n, f: sys.exit(0))\n"
        "open(sys.argv[1], 'a').write('up ')\n"
        "while True: time.sleep(.01)\n"
    )
    files = [tmp_path / name for name in ("a", "b", "c")]
    commands = {f.name: [*python(code), str(f)] for f in files}
    workers = Workers(commands, dict.fromkeys(commands, lambda: False), tmp_path / "logs", 2)
    real = workers._reap

    def reap(waiting: list[str]) -> None:
        if not workers.stopped and all(f.exists() and f.read_text() == "up " for f in files[:2]):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        real(waiting)

    workers._reap = reap  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="run the same command again"):
        workers.run()
    assert [f.read_text() for f in files[:2]] == ["up x", "up x"]
    assert not files[2].exists()
    assert workers.failed == []
    assert signal.getsignal(signal.SIGINT) is before


def test_what_is_left_is_told_whenever_a_command_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the titles that run or wait; not after the last one, nor of what failed."""
    commands = {"a": python(""), "bad": python("raise SystemExit(1)"), "b": python(""), "c": python("")}
    done = dict.fromkeys(commands, lambda: True)
    Workers(commands, done, tmp_path, 1, lambda titles: f"left: {', '.join(titles)}").run()
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line.startswith("left")] == ["left: bad, b, c", "left: c"]


@pytest.mark.slow
def test_a_sweep_of_real_runs(
    tmp_path: Path, tiny: list[str], scenes_field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs, skips what is finished, resumes a run that was killed, and aggregates."""
    values = tiny_table(tiny, scenes_field)
    values["runs"] = [job_line(), {"name": "control"} | {**job_line("train.permute_rewards=true"), "name": "control"}]
    values |= {"seeds": [0, 1], "jobs": 2}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(values))
    root = tmp_path / "out"
    jobs = plan(values)
    killed = jobs[0].folder(root)
    with subprocess.Popen(
        [w if w != "train.iterations=3" else "train.iterations=3000" for w in jobs[0].command(root)]
    ) as process:
        while len(read_metrics(killed)) < 2 and process.poll() is None:
            time.sleep(0.05)
        process.kill()
    result = run_sweep(tmp_path / "table.yaml", root)
    assert json.loads((root / "table.json").read_text()) == result
    assert (root / "table.md").read_text().count("| control") == 3
    assert result["runs"]["grpo"]["seeds"] == result["runs"]["control"]["seeds"] == [0, 1]
    assert result["runs"]["control"]["control"] is True
    assert result["runs"]["grpo"]["metrics"]["eval/heldout/brightness"]["difference"]["num"] == 2
    assert all(Checkpoints(job.folder(root)).load("last")[0] == 3 for job in jobs)
    capsys.readouterr()
    assert run_sweep(tmp_path / "table.yaml", root) == result
    assert "nothing to do" in capsys.readouterr().out


# -- aggregation ----------------------------------------------------------------------------------


def fake_run(
    folder: Path,
    strict: list[float],
    *,
    seconds: float,
    rows: float,
    seed: int = 0,
    control: bool = False,
    recipe: str = "t2i_flow_grpo",
) -> Path:
    """A run evaluated after every iteration, each of which costs the same."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": {"seed": seed, "permute_rewards": control}}))
    (folder / "run.json").write_text(json.dumps({"recipe": recipe}))
    with RunLogger(folder, total_iterations=None, minutes=None, tensorboard=False, quiet=True) as log:
        for i, value in enumerate(strict):
            cost = {SECONDS: i * seconds, NETWORK_ROWS: i * rows}
            if i:
                log.log(i, "train", cost | {"policy/approx_kl": 0.1 * i})
            log.log(i, "eval", cost | {STRICT: value})
    return folder


def test_spread_by_hand() -> None:
    spread = Spread.of([1.0, 3.0, math.nan])
    assert (spread.mean, spread.sd, spread.num) == (2, pytest.approx(math.sqrt(2)), 2)
    assert math.isnan(Spread.of([1.0]).sd)
    assert Spread.of([]).as_json() == {"mean": None, "sd": None, "num": 0}


def test_the_evaluation_at_a_budget_is_the_trainers(tmp_path: Path) -> None:
    """A run goes on until the budget is spent: the last evaluation that counts follows the iteration that spent it."""
    run = RunRecord.read(fake_run(tmp_path / "a", [0.0, 0.1, 0.2, 0.3, 0.4], seconds=10, rows=100))
    at = {budget: eval_at(run, SECONDS, budget) for budget in (5, 10, 10.1, 25, 40, 40.1)}
    found = {budget: None if row is None else row["iteration"] for budget, row in at.items()}
    assert found == {5: 1, 10: 1, 10.1: 2, 25: 3, 40: 4, 40.1: None}


def test_the_table_by_hand(tmp_path: Path) -> None:
    """Before, after, difference over seeds; at the common budgets the slower run decides; the control stands beside."""
    folders = {
        "fast": [fake_run(tmp_path / f"f{s}", [0.4, 0.5, 0.6 + s, 0.8], seconds=10, rows=300, seed=s) for s in (0, 1)],
        "other": [fake_run(tmp_path / "o", [0.4, 0.45], seconds=100, rows=10, recipe="t2i_cps")],
        "shuffled": [fake_run(tmp_path / "c", [0.4, 0.4, 0.4, 0.4], seconds=10, rows=300, control=True)],
        "empty": [],
    }
    result = aggregate(folders)
    assert list(result.values["runs"]) == ["fast", "shuffled", "other"]
    fast = result.values["runs"]["fast"]
    assert fast["metrics"][STRICT]["before"] == {"mean": 0.4, "sd": 0.0, "num": 2}
    assert fast["metrics"][STRICT]["difference"]["mean"] == pytest.approx(0.4)
    assert fast["cost"] == {
        "seconds": {"mean": 30, "sd": 0, "num": 2},
        "network_rows": {"mean": 900, "sd": 0, "num": 2},
        "samples": {"mean": None, "sd": None, "num": 0},
    }
    assert fast["training"]["policy/approx_kl"]["mean"] == pytest.approx(0.2)
    at = {(entry["cost"], entry["budget"]): entry["runs"] for entry in result.values["at"]}
    assert set(at) == {(SECONDS, 30.0), (NETWORK_ROWS, 10.0)}, "the least that a run spent"
    by_time = at[SECONDS, 30.0]
    assert by_time["fast"]["metrics"][STRICT]["mean"] == pytest.approx(0.8)
    assert by_time["other"]["metrics"][STRICT]["mean"] == pytest.approx(0.45)
    assert by_time["other"]["spent"]["mean"] == 100, "what it really had spent is told"
    by_rows = at[NETWORK_ROWS, 10.0]
    assert by_rows["fast"]["metrics"][STRICT]["mean"] == pytest.approx(0.5)
    assert "shuffled (control)" in result.markdown
    assert "+.40 ± 0" in result.markdown


def test_asked_budgets_and_runs_that_never_spent_them(tmp_path: Path) -> None:
    folders = {
        "long": [fake_run(tmp_path / "l", [0.4, 0.5, 0.6], seconds=60, rows=10)],
        "short": [fake_run(tmp_path / "s", [0.4, 0.5], seconds=60, rows=10)],
    }
    (entry,) = aggregate(folders, minutes=[1.5], network_rows=[]).values["at"][:1]
    assert entry["budget"] == 90
    assert entry["runs"]["long"]["metrics"][STRICT] == {"mean": 0.6, "sd": None, "num": 1}
    assert entry["runs"]["short"]["metrics"][STRICT]["num"] == 0
    assert "budget not spent" in aggregate(folders, minutes=[1.5]).markdown


def test_parsing_keeps_the_defaults() -> None:
    checked = parse_table({"runs": [{"name": "a", "recipe": "t2i_cps"}]})
    assert (checked.seeds, checked.jobs, checked.at.minutes) == ([0], 1, [])
