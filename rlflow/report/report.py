"""write_report: one self-contained report.html per run, from its folder alone, killed runs and nan included.

It answers in this order: did it get better, can one see it, how did it go, was the reward hacked, what did it cost.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

from rlflow.report import page, sections
from rlflow.report.beside import before_after
from rlflow.report.curves import Panel, curves, heldout_panels
from rlflow.report.glossary import describe, duration, share, show
from rlflow.report.record import Change, RunRecord

REPORT = "report.html"
TRAINING = (
    *("rollout/episode_return", "reward/mean", "kl/ref", "policy/clip_frac", "policy/first_log_ratio_max"),
    *("optim/grad_norm", "policy/approx_kl", "advantage/used_frac"),
)


def write_report(folder: str | Path) -> Path:
    """Write <folder>/report.html from what the folder holds, and return its path."""
    run = RunRecord.read(folder)
    parts = [
        _header(run),
        _verdict(run),
        page.section("Before and after", *before_after(run)),
        page.section(
            "Learning curves", _curves(run), "Thin: every iteration. Thick: running mean over a tenth of the run."
        ),
        sections.hacking(run) if run.judges or run.is_images else "",
        sections.tasks(run),
        sections.metrics(run),
        sections.left_out(run),
        sections.cost(run),
        sections.again(run),
    ]
    path = run.folder / REPORT
    temporary = path.with_name(f".report.{os.getpid()}.html")
    temporary.write_text(page.page(f"{run.recipe} - rlflow report", parts), encoding="utf-8")
    os.replace(temporary, path)
    return path


def summary(folder: str | Path) -> str:
    """One line for the end of a run: every held-out metric before and after, and where the report is."""
    run = RunRecord.read(folder)
    words = [text for name in run.heldout if (text := _before_after(run, name))]
    return f"{', '.join(words) or 'no held-out metric'}; report: {(run.folder / REPORT).resolve()}"


def _before_after(run: RunRecord, name: str) -> str:
    ends, change = run.ends(name), run.change(name)
    if ends is None or change is None:
        return ""
    before = "" if ends[0] == ends[1] else f"{share(change.before)} -> "
    return f"{describe(name).label} {before}{share(change.after)}"


# -- header and verdict ---------------------------------------------------------------------------


def _header(run: RunRecord) -> str:
    world = run.info.get("world", 1)
    pieces = [
        f"run {run.folder.resolve().name}",
        f"started {str(run.info['started']).replace('T', ' ')}" if "started" in run.info else "",
        f"{world} process{'es' if world != 1 else ''} on {run.info.get('device', 'an unknown device')}",
        f"seed {run.setting('train.seed')}" if run.setting("train.seed") is not None else "",
    ]
    about = run.setting("about", "")
    control = page.pill("control: rewards permuted across the batch", "watch") if _is_control(run) else ""
    return (
        f'<div class="kicker">rlflow run report</div><h1>{escape(run.recipe)}</h1>'
        + (f"<p>{escape(str(about))}</p>" if about else "")
        + f'<p class="soft small">{escape(" · ".join(p for p in pieces if p))}</p>{_state(run)}{control}'
    )


def _is_control(run: RunRecord) -> bool:
    return bool(run.setting("train.permute_rewards", False))


def _state(run: RunRecord) -> str:
    """How much of the budget was spent."""
    iterations, minutes = run.setting("train.iterations"), run.setting("train.minutes")
    seconds = run.last("cost/train_seconds_total")
    done = f"{run.iterations} iterations" + (f", {duration(seconds)} of training" if seconds else "")
    if not run.train:
        return page.pill("no training iteration yet", "watch")
    if "stopped" in run.info:
        return page.pill(f"{done}, then stopped: {run.info['stopped']}")
    finished = bool(iterations and run.iterations >= iterations) or bool(minutes and seconds >= 60 * minutes)
    parts = [f"{iterations} iterations"] if iterations else []
    budget = " or ".join(parts + ([f"{minutes:g} min"] if minutes else []))
    if finished or not budget:
        return page.pill(done, "good" if finished else "")
    return page.pill(f"stopped or still running: {done} of a budget of {budget}", "watch")


def _conclusion(change: Change) -> str:
    low, high = change.difference.low, change.difference.high
    if not math.isfinite(low):
        return page.pill("no interval: the two evaluations did not score the same samples", "watch")
    return (
        page.pill("better", "good")
        if low > 0
        else page.pill("worse", "bad")
        if high < 0
        else page.pill("no clear change")
    )


def _verdict(run: RunRecord) -> str:
    name = run.headline
    ends = run.ends(name) if name else None
    change = run.change(name) if name else None
    if name is None or ends is None or change is None:
        sentence = (
            page.pill("not evaluated", "watch") + "No held-out evaluation has finished yet, so there is no verdict."
        )
    elif ends[0] == ends[1]:
        value = f"{describe(name).label} {share(change.after)} after iteration {ends[1]}"
        sentence = page.pill("one evaluation") + escape(f"{value}{_conditions(run)}; the change needs a second one.")
    else:
        at = "" if ends == (0, run.iterations) else f", after iteration {ends[1]} against iteration {ends[0]}"
        words = change.words(describe(name).label) + _rows_words(run, change) + _conditions(run) + at + "."
        sentence = _conclusion(change) + escape(words)
    warnings = "".join(page.pill(f"beware: {text}", kind) for text, kind in sections.findings(run) if kind == "bad")
    warnings = f"<p>{warnings}</p>" if warnings else ""
    return f'<section><p class="verdict">{sentence}</p>{warnings}{page.facts(_facts(run))}</section>'


def _rows_words(run: RunRecord, change: Change) -> str:
    if not change.num_rows:
        return ""
    if not run.is_images:
        return f" over {change.num_rows:,} seeded episodes"
    rows, prompts = change.num_rows, change.num_prompts
    return f" on {'' if rows == prompts else f'{rows:,} images of '}{prompts:,} held-out prompts"


def _conditions(run: RunRecord) -> str:
    """Which weights were evaluated, with which sampler."""
    steps = run.setting("eval.num_steps") or run.setting("policy.num_steps")
    solver = run.setting("eval.solver") or run.setting("policy.solver")
    solver = solver.get("name") if isinstance(solver, dict) else solver
    words = [f"{run.info['weights']} weights"] if "weights" in run.info else []
    words += [f"{steps} {solver or 'solver'} steps"] if steps else []
    words += [] if run.is_images else [f"{run.setting('eval.noise')} initial noise, no other"]
    return ", evaluated with " + ", ".join(words) if words else ""


def _facts(run: RunRecord) -> Iterator[tuple[str, str]]:
    for name in run.judges:
        change = run.change(name)
        if change is not None and run.headline != name:
            yield f"{share(change.before)} \N{RIGHTWARDS ARROW} {share(change.after)}", run.judge_label(name)
    # a simulator's reward is scaled by its own spread: the return of its episodes says more
    name, label = ("reward/mean", "training reward") if run.is_images else ("rollout/episode_return", "training return")
    if (trend := run.trend(name)) is not None:
        yield f"{share(trend.before)} \N{RIGHTWARDS ARROW} {share(trend.after)}", f"{label}, first and last tenth"
    if run.train:
        yield f"{run.iterations:,}", "iterations"
        yield duration(run.last("cost/train_seconds_total")), "training time"
        yield show(run.last("cost/network_rows_total")), "network rows (a backward pass counts two)"
        yield sections.speed(run)


# -- curves ---------------------------------------------------------------------------------------


def _curves(run: RunRecord) -> str:
    panels = heldout_panels(run.heldout + [n for n in run.names if n == "rollout/success"])
    rewards = [name for name in run.names if re.fullmatch(r"reward/\w+/mean", name)]
    training = [name for name in TRAINING if name in run.names]
    after = training.index("reward/mean") + 1 if "reward/mean" in training else 0
    training[after:after] = rewards if len(rewards) > 1 else []  # a single one is the curve before it
    shown: list[str | Panel] = [*panels, *training]
    return page.figure(curves(run.rows, shown), "learning curves") if shown else ""
