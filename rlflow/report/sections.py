"""Sections of a run's report that are tables: reward hacking, metrics, what was left out, cost, how to run it again."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from html import escape

import numpy as np

from rlflow.report import page
from rlflow.report.curves import series
from rlflow.report.glossary import HELDOUT, MISSING, describe, duration, order, share, show, signed
from rlflow.report.record import Change, RunRecord

TASK = "eval/task/"
FALL = 0.02  # of a judge that counts, where no interval is known
NARROWER = 0.8  # of the first diversity; below it the samples have become alike
GROUPS = (
    ("Held-out evaluation", ("eval/",)),
    ("Reward", ("reward/", "rollout/")),
    ("Policy", ("policy/", "kl/", "advantage/", "critic/")),
    ("Optimiser", ("optim/",)),
    ("Time and cost", ("time/", "perf/", "cost/")),
    ("Other", ("",)),
)


# -- reward hacking -------------------------------------------------------------------------------


def hacking(run: RunRecord) -> str:
    """The reward next to judges that no reward sees, and a warning where they part."""
    reward = run.trend("reward/mean")
    changes = {name: change for name in run.heldout if (change := run.change(name)) is not None}
    if reward is None and not changes and not any(kind == "bad" for _, kind in findings(run)):
        return ""
    rows = (
        []
        if reward is None
        else [_change_row("training reward", reward, "What is optimised; the first and the last tenth of training.")]
    )
    rows += [_change_row(run.judge_label(n), c, describe(n).meaning) for n, c in changes.items()]
    verdicts = [page.pill(text, kind) for text, kind in findings(run)]
    table = page.table(("", "before", "after", "change", "95 % interval", "what it is"), rows, numeric=(1, 2, 3, 4))
    note = "Reward next to judges that no reward sees. Reward hacking is a reward that rises while a judge falls."
    return page.section("Is the reward being hacked?", f"<p>{' '.join(verdicts)}</p>{table}", note)


def tasks(run: RunRecord) -> str:
    """Success at every task of a simulator that has several, before and after."""
    changes = {name: run.change(name) for name in run.names if name.startswith(TASK) and not _once(run, name)}
    rows = [
        [escape(name.removeprefix(TASK)), share(change.before), share(change.after), signed(change.difference.value)]
        for name, change in changes.items()
        if change is not None
    ]
    if not rows:
        return ""
    table = page.table(("task", "before", "after", "change"), rows, numeric=(1, 2, 3))
    note = "Share of held-out episodes that reached their goal; there are few of each task."
    return page.section("Success by task", table, note)


_DISTANCES = (f"{HELDOUT}diversity", f"{HELDOUT}base_distance")


def _once(run: RunRecord, name: str) -> bool:
    ends = run.ends(name)
    return ends is None or ends[0] == ends[1]


def _change_row(label: str, change: Change, meaning: str) -> list[str]:
    value, low, high = change.difference
    bounds = f"[{signed(low)}, {signed(high)}]" if math.isfinite(low) else MISSING
    numbers = [share(change.before), share(change.after), signed(value), bounds]
    return [escape(label), *numbers, f'<span class="soft">{escape(meaning)}</span>']


def findings(run: RunRecord) -> Iterator[tuple[str, str]]:
    """(what was found about a judge, the diversity or missing scores, kind of label: bad, watch, good or '')."""
    if lost := int((run.train.column("reward/masked_frac") >= 1).sum()):
        yield f"no score at all in {lost} of {len(run.train)} iterations: nothing was learnt from them", "bad"
    reward = run.trend("reward/mean")
    rises = reward is not None and reward.difference.low > 0  # false where the run is too short to tell
    judged = {n: c for n in run.judges if not _once(run, n) and (c := run.change(n)) is not None}
    for name, change in judged.items():
        label = run.judge_label(name)
        if direction(change) < 0:
            yield f"{'the reward rises while' if rises else ''} {label} falls".strip(), "bad"
        elif direction(change) > 0:
            yield f"{label} rises{' with the reward' if rises else ''}", "good"
        else:
            yield f"{label}: no clear change{' while the reward rises' if rises else ''}", "watch" if rises else ""
    if not judged and run.is_images:
        yield "no judge has been evaluated twice yet: nothing can be said", "watch"
    diversity = run.change(_DISTANCES[0])
    if diversity is not None and diversity.after < NARROWER * diversity.before:
        yield (
            f"diversity fell by {1 - diversity.after / diversity.before:.0%}: samples of a prompt become alike",
            "watch",
        )


def direction(change: Change) -> int:
    """+1 rises, -1 falls, 0 not clear: by the interval, or by more than .02 where there is none to be had."""
    if change.unlike:
        return 0
    value, low, high = change.difference
    if math.isfinite(low):
        return 1 if low > 0 else -1 if high < 0 else 0
    return 1 if value > FALL else -1 if value < -FALL else 0


# -- metrics --------------------------------------------------------------------------------------


def metrics(run: RunRecord) -> str:
    """Every metric with its first, last and best value, its course and its meaning."""
    rows: list[list[str]] = []
    left = [name for name in run.names if not name.startswith(TASK)]  # those have a section of their own
    for title, prefixes in GROUPS:
        names = [name for name in left if name.startswith(prefixes)]
        left = [name for name in left if name not in names]
        if names:
            rows += [[escape(title)], *(_metric_row(run, name) for name in sorted(names, key=order))]
    if not rows:
        return ""
    header = ("metric", "first", "last", "best", "course", "what it means")
    return page.section("Metrics", page.table(header, rows, numeric=(1, 2, 3)))


def _metric_row(run: RunRecord, name: str) -> list[str]:
    metric = describe(name)
    at, ys = series(run.rows, name)
    best = MISSING
    if metric.better:
        place = int((ys * metric.better).argmax())
        best = f"{show(ys[place])} <span class='soft'>at {at[place]:.0f}</span>"
    unit = f' <span class="soft">({escape(metric.unit)})</span>' if metric.unit else ""
    label = f"{escape(metric.label)}{unit}" + (f"<code>{escape(name)}</code>" if metric.label != name else "")
    meaning = f'<span class="soft">{escape(metric.meaning)}</span>'
    return [label, show(ys[0]), show(ys[-1]), best, page.spark(ys), meaning]


# -- what was left out ----------------------------------------------------------------------------


def left_out(run: RunRecord) -> str:
    """Samples without a score, failed reward calls, skipped steps and values that were not finite."""
    rows = [row for name in run.names if (row := _left_out_row(run, name))]
    rows += _not_finite_rows(run)
    if not run.train:
        return ""
    table = page.table(("what", "mean", "most in one iteration"), rows, numeric=(1, 2)) if rows else "<p>Nothing.</p>"
    note = "A sample without a score never counts as zero: it is masked. A step that is not finite is skipped."
    return page.section("Samples and steps left out", table, note)


def _left_out_row(run: RunRecord, name: str) -> list[str] | None:
    if not name.endswith(("/masked_frac", "/errors", "/skipped_steps", "/bad_rows")):
        return None
    _, ys = series(run.train, name)
    if not len(ys) or ys.max() == 0:
        return None
    percent = name.endswith("masked_frac")
    values = [f"{100 * v:.2g} %" if percent else show(v) for v in (float(ys.mean()), float(ys.max()))]
    if name.endswith("skipped_steps"):  # counted since the start
        values = [MISSING, f"{show(float(ys[-1]))} in all"]
    return [f"{escape(describe(name).label)}<code>{escape(name)}</code>", *values]


def _not_finite_rows(run: RunRecord) -> list[list[str]]:
    train, total = run.train, len(run.train)
    counts = {name: int((train.has(name) & ~np.isfinite(train.column(name))).sum()) for name in train.names}
    return [
        [f"no finite value of {escape(name)}", f"{100 * n / total:.1f} %", f"{n} of {total} iterations"]
        for name, n in counts.items()
        if n
    ]


# -- cost -----------------------------------------------------------------------------------------


def cost(run: RunRecord) -> str:
    """Seconds per phase, network rows and speed."""
    phases = [(describe(n).label, _total(run, n)) for n in ("time/rollout", "time/update", "time/eval")]
    bar = page.shares([(label, seconds, duration(seconds)) for label, seconds in phases if seconds > 0])
    if not bar and not run.train:
        return ""
    trained = run.last("cost/train_seconds_total")
    iteration = run.median("time/rollout") + run.median("time/update")
    facts = [
        (duration(trained), "training time"),
        (duration(iteration), "per iteration (median)"),
        speed(run),
        (show(run.last("cost/network_rows_total")), "network rows in all (a backward pass counts two)"),
        (show(run.median("perf/network_rows")), "network rows per iteration (median)"),
        *_reward_seconds(run),
    ]
    return page.section("Cost", bar + page.facts((v, what) for v, what in facts if v != MISSING))


def _reward_seconds(run: RunRecord) -> list[tuple[str, str]]:
    """Time in each reward, of images beside the sampling of the next ones, and so not an addend of the bar."""
    names = sorted(name for name in run.train.names if re.fullmatch(r"reward/\w+/seconds", name))
    spent = [(name.split("/")[1], _total(run, name)) for name in names]
    return [(duration(seconds), f"in the reward {name}") for name, seconds in spent if seconds > 0]


def speed(run: RunRecord) -> tuple[str, str]:
    """Median speed of training, and what is counted."""
    if run.is_images:
        return show(run.median("perf/samples_per_s")), "images per second while training (median)"
    return show(run.median("perf/env_steps_per_s")), "environment steps per second while training (median)"


def _total(run: RunRecord, name: str) -> float:
    return float(series(run.rows, name)[1].sum())


# -- how to run it again --------------------------------------------------------------------------


def again(run: RunRecord) -> str:
    """Command, resolved config and versions."""
    versions = run.info.get("versions", {})
    text = "\n".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else str(versions)
    rest = {k: v for k, v in run.info.items() if k not in ("versions", "command")}
    parts = [
        page.details("Command", str(run.info.get("command", "")), is_open=True),
        page.details("Config, resolved: rlflow train config.yaml runs it again", run.config_text),
        page.details("Versions", text),
        page.details("run.json", json.dumps(rest, indent=1) if rest else ""),
    ]
    return page.section("To run it again", "".join(parts))
