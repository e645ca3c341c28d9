"""report.html: self-contained, true to the run folder, and written for a run in any state."""

import json
import math
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from rlflow.comparison.report import compare_report, figure
from rlflow.report.curves import Panel, curves
from rlflow.report.figures import image_grid
from rlflow.report.glossary import MISSING
from rlflow.report.metrics_file import METRICS
from rlflow.report.record import RunRecord
from rlflow.report.report import summary, write_report
from rlflow.train.logger import RunLogger

EVIL = '<script>alert("x")</script> & http://evil.example/x.png'
CAPTIONS = ["one red circle", EVIL, "two blue squares", "three squares"]
ROWS = 200  # samples of an evaluation; 50 of each caption
CONFIG = {
    "about": "a test",
    "policy": {"num_steps": 8, "solver": "euler"},
    "reward": {"weights": {"shapes_strict": 1.0}},
    "train": {"iterations": 20, "minutes": None, "seed": 0, "permute_rewards": False},
    "eval": {"metrics": {"strict": "shapes_strict", "judge": "cnn_judge", "diversity": "diversity"}, "num_steps": None},
}


def start(folder: Path, recipe: str = "t2i_test", **train) -> Path:
    """A run folder before its first iteration."""
    folder.mkdir(parents=True)
    config = CONFIG | {"train": CONFIG["train"] | train}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    info = {"recipe": recipe, "command": "rlflow train x", "weights": "ema", "world": 1, "device": "cpu"}
    (folder / "run.json").write_text(json.dumps(info | {"versions": {"torch": "2.13.0"}, "started": "2026-01-01"}))
    return folder


def evaluate(log: RunLogger, iteration: int, strict: float, judge: float, seconds: float) -> None:
    """Log an evaluation with the given accuracies; sample i of a caption is right before it is in others."""
    rank = torch.arange(ROWS) // 4 / (ROWS // 4)
    scores = {"strict": (rank < strict).float(), "judge": (rank < judge).float(), "diversity": torch.full((ROWS,), 0.3)}
    ids = torch.arange(ROWS) % 4
    samples = log.folder / "samples"
    samples.mkdir(exist_ok=True)
    save_file(scores | {"caption_id": ids}, samples / f"eval_{iteration:06d}.safetensors")
    images = torch.rand(4, 3, 8, 8)
    image_grid(images, CAPTIONS, samples / f"eval_{iteration:06d}.png")
    pixels = {"images": (images * 255).to(torch.uint8), "index": torch.tensor([0, 1, 100, 199])}
    save_file(pixels, samples / f"images_{iteration:06d}.safetensors")
    means = {f"eval/heldout/{name}": float(value.mean()) for name, value in scores.items()}
    log.log(iteration, "eval", means | {"cost/train_seconds_total": seconds, "time/eval": 1.0})


def train(log: RunLogger, iteration: int, reward: float, **more: float) -> None:
    metrics = {
        "reward/mean": reward,
        "policy/first_log_ratio_max": 0.0,
        "optim/grad_norm": 1.0,
        "time/rollout": 1.0,
        "time/update": 2.0,
        "perf/samples_per_s": 32.0,
        "cost/network_rows_total": 100.0 * iteration,
        "cost/train_seconds_total": 3.0 * iteration,
    }
    log.log(iteration, "train", metrics | more)


def logger(folder: Path) -> RunLogger:
    return RunLogger(folder, total_iterations=None, minutes=None, tensorboard=False, quiet=True)


def finished(folder: Path, strict=(0.4, 0.6), judge=(0.4, 0.6), reward=(0.3, 0.7), **options) -> Path:
    """A whole run of 20 iterations with an evaluation at both ends."""
    with logger(start(folder, **options)) as log:
        evaluate(log, 0, strict[0], judge[0], 0.0)
        for i in range(1, 21):
            train(log, i, reward[0] + (reward[1] - reward[0]) * i / 20)
        evaluate(log, 20, strict[1], judge[1], 60.0)
    return folder


def text(folder: Path) -> str:
    """The report with its markup taken out and its pictures left aside."""
    html = re.sub(r"<style>.*?</style>", "", write_report(folder).read_text(encoding="utf-8"), flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


# -- what it costs --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["report", "compare"])
def test_a_finished_run_is_read_without_pytorch(command, tmp_path):
    """Its import is 250 MiB and a second and a half; scores and pictures are arrays of NumPy."""
    run = finished(tmp_path / "run")
    code = (
        f"import sys; from rlflow.cli import main; main([{command!r}, {str(run)!r}]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert command == "compare" or "paired bootstrap" in (run / "report.html").read_text()


# -- what it says ---------------------------------------------------------------------------------


def test_the_verdict_is_the_paired_difference(tmp_path):
    """Every caption gains .2 exactly, so the interval has no width; weights and sampler are named."""
    said = text(finished(tmp_path / "run"))
    assert "better strict accuracy .40 → .60 (+.20, 95 % paired bootstrap [.20, .20])" in said
    assert "on 200 images of 4 held-out prompts, evaluated with ema weights, 8 euler steps." in said
    assert "20 iterations, 1 min 00 s of training" in said


def test_every_metric_and_every_reward_has_its_curve(tmp_path, monkeypatch):
    """By whatever name; the verdict and the last line of the run name them too."""
    folder = start(tmp_path / "run")
    with logger(folder) as log:
        for i, value in enumerate((20.5, 21.25)):
            log.log(
                i, "eval", {"eval/heldout/base_distance": 0.0, "eval/heldout/pickscore": value, "eval/heldout/ocr": 0.5}
            )
            if i:
                train(log, i, 0.5, **{"reward/pickscore/mean": 20.0, "reward/ocr/mean": 0.5, "reward/ocr/std": 0.1})
    drawn = []
    monkeypatch.setattr(
        "rlflow.report.report.curves", lambda rows, panels: drawn.extend(panels) or curves(rows, panels)
    )
    said = text(folder)
    assert [p.names for p in drawn if isinstance(p, Panel)] == [
        ("eval/heldout/pickscore",),
        ("eval/heldout/ocr",),
        ("eval/heldout/base_distance",),
    ]
    assert [p for p in drawn if isinstance(p, str)][:3] == ["reward/mean", "reward/pickscore/mean", "reward/ocr/mean"]
    assert "held-out pickscore 20.5 → 21.2 (+.75)" in said
    assert summary(folder) == (
        "distance to the base model 0 -> 0, held-out pickscore 20.5 -> 21.2, held-out ocr .50 -> .50; "
        f"report: {folder.resolve() / 'report.html'}"
    )


def test_no_change_is_not_called_better(tmp_path):
    """A control run is marked as one and has no verdict in its favour."""
    folder = finished(tmp_path / "run", strict=(0.4, 0.4), judge=(0.4, 0.4), reward=(0.3, 0.3), permute_rewards=True)
    said = text(folder)
    assert "no clear change strict accuracy .40 → .40 (0, 95 % paired bootstrap [0, 0])" in said
    assert "control: rewards permuted" in said
    assert "held-out judge (cnn_judge): no clear change" in said
    assert "better" not in said.split("Before and after")[0]


def test_reward_hacking_is_flagged(tmp_path):
    """The reward rises while the judge falls: said in the box and next to the verdict; not when both rise."""
    hacked = text(finished(tmp_path / "hacked", judge=(0.6, 0.4)))
    assert "beware: the reward rises while held-out judge (cnn_judge) falls" in hacked.split("Before and after")[0]
    healthy = text(finished(tmp_path / "healthy"))
    assert "held-out judge (cnn_judge) rises with the reward" in healthy
    assert "beware" not in healthy


def test_a_trained_reward_is_no_judge(tmp_path):
    """What carries a weight in the reward cannot vouch for itself."""
    run = RunRecord.read(finished(tmp_path / "run"))
    assert run.judges == ["eval/heldout/judge"]
    run.config["reward"]["weights"] = {"jpeg": 1.0, "shapes_strict": 0.0}
    assert run.judges == ["eval/heldout/strict", "eval/heldout/judge"]
    run.config["reward"]["weights"] = {"shapes_soft": 1.0}
    assert run.judges == ["eval/heldout/judge"], "another mark of the same reader is no second opinion"


def test_pairs_of_images_carry_their_marks(tmp_path):
    """Four captions, each before and after: two right in both, one put right, one wrong in both."""
    html = write_report(finished(tmp_path / "run")).read_text()
    tiles = re.findall(r'<div class="tile (\w*)"><img class="px" alt="(\w+)', html)
    marks = ["right", "right", "right", "right", "wrong", "right", "wrong", "wrong"]
    assert tiles == list(zip(marks, ["before", "after"] * 4, strict=True))
    assert "2 of these 4 before, 3 after" in html


def test_different_samples_are_not_paired(tmp_path):
    """Without the same captions in the same rows there is no interval, and the report says so."""
    folder = finished(tmp_path / "run")
    path = folder / "samples" / "eval_000020.safetensors"
    save_file({"strict": torch.ones(10), "caption_id": torch.arange(10)}, path)
    said = text(folder)
    assert "did not score the same samples" in said
    assert "strict accuracy .40 → .60 (+.20)" in said


def test_evaluations_that_were_cut_are_not_shown(tmp_path):
    """Pictures of a future that a resume discarded stay on disk but are not the 'after'."""
    folder = finished(tmp_path / "run")
    with logger(folder) as log:
        evaluate(log, 30, 1.0, 1.0, 90.0)
        log.cut(20)
    assert "strict accuracy .40 → .60" in text(folder)


def test_metrics_have_first_last_best_and_meaning(tmp_path):
    """The row of the reward: first .32, last .7, best at the end, what it is."""
    html = write_report(finished(tmp_path / "run")).read_text()
    row = next(r for r in re.findall(r"<tr>.*?</tr>", html, flags=re.S) if "<code>reward/mean</code>" in r)
    assert re.findall(r'<td class="num">([\d.]+)', row) == ["0.320", "0.700", "0.700"]
    assert "this is what is optimised" in row
    assert "at 20" in row


def test_what_was_left_out_and_what_it_cost(tmp_path):
    """Masked samples, skipped steps and nan are counted; seconds per phase add up."""
    with logger(start(tmp_path / "run")) as log:
        for i in range(1, 11):
            broken = {"reward/masked_frac": 0.5, "optim/grad_norm": math.nan, "optim/skipped_steps": 1.0}
            more = broken if i == 10 else {"reward/masked_frac": 0.0, "optim/skipped_steps": 0.0}
            train(log, i, 0.5, **more, **{"reward/ocr/seconds": 0.5, "reward/redness/seconds": 0.0})
    said = text(tmp_path / "run")
    assert "samples without a score reward/masked_frac 5 % 50 %" in said
    assert f"optim/skipped_steps {MISSING} 1 in all" in said
    assert "no finite value of optim/grad_norm 10.0 % 1 of 10 iterations" in said
    assert "sampling and scoring 10 s (33 %)" in said
    assert "update 20 s (67 %)" in said
    assert "5.0 s in the reward ocr" in said
    assert "in the reward redness" not in said


# -- safe and self-contained ----------------------------------------------------------------------


def test_nothing_is_loaded_from_outside(tmp_path):
    """No script, no link, no address in an attribute or style; the browser is told to refuse any."""
    html = write_report(finished(tmp_path / "run")).read_text()
    assert not re.search(r"<(script|link|iframe|object|embed|base)\b", html, flags=re.I)
    assert not re.search(r"""(src|href|srcset|action|data)\s*=\s*["']?(?!data:image/)[^"'> ]""", html)
    assert not re.search(r"@import|url\(", html)
    assert "default-src 'none'; img-src data:" in html
    shown = html.replace("http://evil.example/x.png", "")
    assert "http://" not in shown
    assert "https://" not in shown


def test_captions_and_config_are_escaped(tmp_path):
    """Text of others is text: in captions, config, command, recipe, versions, metric names and the title."""
    folder = finished(tmp_path / "run", recipe=EVIL.replace("/", "|"))
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text() + f"# {EVIL}\n")
    info = json.loads((folder / "run.json").read_text())
    info |= {"command": EVIL, "versions": {EVIL: EVIL}, "weights": EVIL, "device": EVIL, "started": EVIL}
    (folder / "run.json").write_text(json.dumps(info))
    with logger(folder) as log:
        train(log, 21, 0.5, **{f"reward/{EVIL}/mean": 1.0, EVIL: 1.0, f"x{EVIL}": math.nan})
    html = write_report(folder).read_text()
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(&quot;x&quot;)") >= 8
    with logger(other := start(tmp_path / "other")) as log:
        log.log(1, "eval", {f"eval/{EVIL}": 1.0, f"eval/heldout/{EVIL}": 1.0})
    assert "<script" not in compare_report([other, folder], tmp_path / "compare.html").read_text()


# -- runs in any state ----------------------------------------------------------------------------


def test_a_run_without_anything_yet(tmp_path):
    """Only the config: the report says what is missing."""
    said = text(start(tmp_path / "run"))
    assert "no training iteration yet" in said
    assert "No held-out evaluation has finished yet" in said


def test_a_run_killed_after_its_first_evaluation(tmp_path):
    """One evaluation and some iterations, a torn line and a torn file: no verdict, but all that is known."""
    with logger(start(tmp_path / "run", iterations=None, minutes=5.0)) as log:
        evaluate(log, 0, 0.4, 0.4, 0.0)
        for i in range(1, 4):
            train(log, i, 0.5)
    folder = tmp_path / "run"
    with (folder / METRICS).open("a") as file:
        file.write('{"iteration": 4, "ki')
    (folder / "samples" / "images_000000.safetensors").write_bytes(b"torn")
    (folder / "run.json").write_text('{"recipe": "t2')
    said = text(folder)
    assert "stopped or still running: 3 iterations, 9.0 s of training of a budget of 5 min" in said
    assert "one evaluation strict accuracy .40 after iteration 0" in said
    assert "no judge has been evaluated twice yet" in said


def test_everything_nan(tmp_path):
    """A run whose every number is nan still has a report."""
    with logger(start(tmp_path / "run")) as log:
        for i in range(1, 4):
            log.log(i, "train", {"reward/mean": math.nan, "optim/grad_norm": math.nan})
            log.log(i, "eval", {"eval/heldout/strict": math.nan})
    said = text(tmp_path / "run")
    assert "No held-out evaluation has finished yet" in said
    assert "no finite value of reward/mean 100.0 % 3 of 3 iterations" in said


def test_a_run_that_evaluates_something_else(tmp_path):
    """Not images: no pictures, another metric for the verdict."""
    with logger(start(tmp_path / "run")) as log:
        for i, value in enumerate((100.0, 250.0)):
            log.log(i, "eval", {"eval/heldout/return": value})
            train(log, i + 1, value)
    assert "return 100 → 250 (+150)" in text(tmp_path / "run")


def test_several_tasks_have_a_table_of_their_own(tmp_path):
    """Once, and not again among the metrics."""
    with logger(start(tmp_path / "run")) as log:
        for i, (reach, push) in enumerate(((0.25, 1.0), (0.75, 0.5))):
            log.log(i, "eval", {"eval/heldout/success": 0.6, "eval/task/reach": reach, "eval/task/push-back": push})
            train(log, i + 1, 1.0)
    said = text(tmp_path / "run")
    assert "Success by task" in said
    assert "reach .25 .75 +.50" in said
    assert "push-back 1 .50 -.50" in said
    assert "success at reach" not in said
    assert "Success by task" not in text(played(tmp_path / "other", (0, 100.0, 40.0)))


def played(folder: Path, *ends: tuple[int, float, float]) -> Path:
    """A robot's run with an evaluation of three episodes, two of them filmed, at each (iteration, return, length)."""
    start(folder, recipe="robot_test")
    config = CONFIG | {"env": {"name": "hopper"}, "eval": {}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    samples = folder / "samples"
    samples.mkdir()
    with logger(folder) as log:
        for iteration, value, length in ends:
            scores = {"return": torch.tensor([value, value + 1, value]), "length": torch.full((3,), length)}
            save_file(scores | {"caption_id": torch.arange(3)}, samples / f"eval_{iteration:06d}.safetensors")
            for row in (0, 1):
                (samples / f"film_{iteration:06d}_{row}.mp4").write_bytes(b"film")
            log.log(iteration, "eval", {"eval/heldout/return": value})
            train(log, iteration + 1, value)
    return folder


def test_films_stand_before_and_after_with_return_and_length(tmp_path):
    said = text(played(tmp_path / "run", (0, 100.0, 40.0), (9, 250.0, 1000.0)))
    assert "before: return 100, 40 steps &rarr; after: return 250, 1,000 steps" in said
    assert "before: return 101, 40 steps &rarr; after: return 251, 1,000 steps" in said
    once = text(played(tmp_path / "once", (0, 100.0, 40.0)))
    assert "after iteration 0: return 100, 40 steps" in once
    assert "before:" not in once


def test_films_are_shown_though_their_scores_are_damaged(tmp_path):
    folder = played(tmp_path / "run", (0, 100.0, 40.0), (9, 250.0, 1000.0))
    (folder / "samples" / "eval_000009.safetensors").write_bytes(b"torn")
    assert "before: return 100, 40 steps &rarr; after: the scores of single samples were not kept" in text(folder)


def test_scores_that_numpy_cannot_read_are_not_kept(tmp_path):
    folder = played(tmp_path / "run", (0, 100.0, 40.0))
    save_file({"return": torch.zeros(3, dtype=torch.bfloat16)}, folder / "samples" / "eval_000000.safetensors")
    assert "after iteration 0: the scores of single samples were not kept" in text(folder)


def test_films_play_by_themselves_and_the_page_lets_them(tmp_path):
    """Browsers start only what is muted, and nothing that the page's own policy forbids to load."""
    html = write_report(played(tmp_path / "run", (0, 100.0, 40.0), (9, 250.0, 1000.0))).read_text()
    films = re.findall(r'<video ([^>]*)src="(\w+):', html)
    assert len(films) == 4
    assert all({"autoplay", "loop", "muted", "playsinline"} <= set(words.split()) for words, _ in films)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    allowed = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert {scheme for _, scheme in films} == {allowed["media-src"].removesuffix(":")}


def test_a_folder_that_is_no_run_is_an_error(tmp_path):
    """Instead of an empty report somewhere."""
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- comparison -----------------------------------------------------------------------------------


def test_seeds_are_one_group_and_settings_are_not(tmp_path):
    """Two seeds: mean and sd; the control of the same recipe is a group of its own, beside it."""
    folders = [finished(tmp_path / f"s{s}", strict=(0.4, 0.6 + 0.1 * s), seed=s) for s in (0, 1)]
    folders.append(finished(tmp_path / "c", strict=(0.4, 0.4), permute_rewards=True))
    folders.append(finished(tmp_path / "m", strict=(0.4, 0.5), recipe="t2i_mix"))
    html = compare_report(folders, tmp_path / "out" / "compare.html").read_text()
    said = " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())
    assert "4 runs in 3 groups" in said
    assert "t2i_test 2 .40 ± 0 → .65 ± .071 (+.25 ± .071)" in said
    assert "t2i_test, permute_rewards=true (control) 1 .40 → .40 (0)" in said
    assert "t2i_mix 1 .40 → .50 (+.10)" in said
    sweep = compare_report([tmp_path], tmp_path / "all.html").read_text()
    assert "4 runs in 3 groups" in sweep, "a folder of runs stands for them"
    assert "https://" not in html


def test_equal_budget_is_what_every_run_reached(tmp_path):
    """A run of 60 s is read at the 30 s at which the shorter one ended, as a sweep's tables do: no line in between."""
    short = start(tmp_path / "short", recipe="t2i_short")
    with logger(short) as log:
        evaluate(log, 0, 0.4, 0.4, 0.0)
        for i in range(1, 11):
            train(log, i, 0.5)
        evaluate(log, 10, 0.48, 0.4, 30.0)
    html = compare_report([finished(tmp_path / "long"), short], tmp_path / "compare.html").read_text()
    said = " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())
    assert "At 30 s of training" in said
    assert "t2i_test 1 .40 .40 .30 0 0.0 s t2i_short 1 .48 .40 .30 10 30 s" in said


@pytest.mark.parametrize(
    ("end", "label", "ticks"),
    [(2.4, "training time (s)", "1.8"), (900.0, "training time (min)", "12"), (2e4, "training time (h)", "4.5")],
)
def test_time_has_the_unit_that_fits_and_no_milli(end, label, ticks):
    """40m meant 40 thousandths of a minute."""
    rows = [{"kind": "eval", "iteration": i, "m": 0.5 * i, "cost/train_seconds_total": end * i} for i in (0, 1)]
    (ax,) = curves(rows, [Panel("m", ("m",), "cost/train_seconds_total")]).axes
    assert ax.get_xlabel() == label
    texts = ax.xaxis.get_major_formatter().format_ticks(ax.get_xticks())
    assert ticks in texts
    assert not any(text.endswith(("m", "µ")) for text in texts)


def test_samples_are_called_what_they_are(tmp_path, monkeypatch):
    """Images, or environment steps; a figure holds every held-out metric and nothing else."""
    drawn = []
    monkeypatch.setattr("rlflow.comparison.report.curves", lambda rows, panels, path: drawn.extend(panels))
    images, robot = finished(tmp_path / "i"), finished(tmp_path / "r")
    (robot / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"env": {"name": "hopper"}}))
    for runs, label in (([images], "images"), ([robot], "environment steps"), ([images, robot], "")):
        drawn.clear()
        figure(runs, tmp_path / "x.png", "samples")
        assert {(p.x, p.x_label) for p in drawn} == {("cost/samples_total", label)}
        assert [p.title for p in drawn] == ["held-out accuracy", "distances of images"]


def test_comparison_of_runs_without_evaluation(tmp_path):
    """Runs that have only begun can be compared too; no runs at all cannot."""
    compare_report([start(tmp_path / "a"), start(tmp_path / "b")], tmp_path / "compare.html")
    with pytest.raises(ValueError, match="at least one"):
        compare_report([], tmp_path / "compare.html")
