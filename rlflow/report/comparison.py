"""compare_report: several runs in one self-contained page; runs that differ only in their seed form one group."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from rlflow.report import page
from rlflow.report.curves import AXES, Panel, curves, series
from rlflow.report.glossary import MISSING, describe, duration, share, show, signed
from rlflow.report.record import HEADLINE, HELDOUT, RunRecord

Groups = dict[str, list[RunRecord]]
SEED = "train.seed"
SAID_ONCE = ("about", SEED)  # settings that do not make another group
OFF = ("false", "null")  # not worth a word in a label
BUDGETS = {"cost/train_seconds_total": "training time", "cost/network_rows_total": "network rows"}
OVERLAID = ("reward/mean", "kl/ref", "policy/clip_frac", f"{HELDOUT}judge", f"{HELDOUT}diversity", "optim/grad_norm")


def compare_report(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Write one page on the runs in `folders` to the file `out`, and return its path."""
    if not folders:
        raise ValueError("nothing to compare: give at least one run folder")
    groups = group_runs([RunRecord.read(folder) for folder in folders])
    name = _headline(groups)
    parts = [
        '<div class="kicker">rlflow comparison</div>'
        f"<h1>{len(folders)} runs in {len(groups)} {'group' if len(groups) == 1 else 'groups'}</h1>"
        '<p class="soft small">Runs that differ only in their seed form one row and one curve with a band.</p>',
        page.section(
            "Result and cost",
            _result_table(groups, name),
            "Mean over seeds [lowest, highest]; changes are last minus first evaluation.",
        ),
        page.section(f"{describe(name).label} against what it cost", _against_cost(groups, name)),
        page.section("At equal budgets", _equal_budgets(groups, name), _BUDGET_NOTE),
        page.section("Curves", _overlaid(groups)),
        page.section("Runs", _runs_table(groups, name)),
    ]
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(page.page("rlflow comparison", parts), encoding="utf-8")
    os.replace(temporary, path)
    return path


_BUDGET_NOTE = "At the largest budget that all runs reached, on a straight line between the two nearest evaluations."


def group_runs(runs: Sequence[RunRecord]) -> Groups:
    """Runs by recipe; runs of a recipe whose settings differ in more than the seed by recipe and those settings."""
    recipes: Groups = {}
    for run in runs:
        recipes.setdefault(run.recipe, []).append(run)
    groups: Groups = {}
    for recipe, members in recipes.items():
        settings = _differing([flatten(run.config) for run in members])
        short = [
            ", ".join([recipe, *(f"{k.split('.')[-1]}={v}" for k, v in s.items() if v not in OFF)]) for s in settings
        ]
        full = [", ".join([recipe, *(f"{k}={v}" for k, v in s.items())]) for s in settings]
        for run, label in zip(members, short if len({*short}) == len({*full}) else full, strict=True):
            groups.setdefault(label, []).append(run)
    return groups


def _differing(configs: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Of every config the settings, as text, that are not the same in all."""
    texts = [{key: _text(value) for key, value in config.items() if key not in SAID_ONCE} for config in configs]
    keys = sorted({key for text in texts for key in text})
    differ = [key for key in keys if len({text.get(key) for text in texts}) > 1]
    return [{key: text.get(key, "null") for key in differ} for text in texts]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of a nested config by their dotted path."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        leaves |= flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return leaves


def value_at(run: RunRecord, name: str, budget: str, spent: float) -> float:
    """`name` once `spent` of the metric `budget` is used up, interpolated between evaluations; nan outside them."""
    at, ys = series(run.rows, name, budget)
    return float(np.interp(spent, at, ys)) if len(at) and at[0] <= spent <= at[-1] * (1 + 1e-9) else math.nan


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _headline(groups: Groups) -> str:
    names = [run.headline for runs in groups.values() for run in runs if run.headline]
    return names[0] if names else HEADLINE


def _spread(values: Sequence[float], words: Callable[[float], str] = share) -> str:
    """Mean [lowest, highest] of what is finite."""
    kept = [v for v in values if math.isfinite(v)]
    if not kept:
        return MISSING
    mean = words(sum(kept) / len(kept))
    return mean if len(kept) == 1 else f"{mean} <span class='soft'>[{words(min(kept))}, {words(max(kept))}]</span>"


def _result_table(groups: Groups, name: str) -> str:
    judge, diversity = f"{HELDOUT}judge", f"{HELDOUT}diversity"
    header = (
        "runs",
        "seeds",
        describe(name).label,
        "change",
        "judge, change",
        "diversity",
        "KL",
        "time",
        "network rows",
    )
    rows = [
        [
            escape(label),
            str(len(runs)),
            _spread([_after(run, name) for run in runs]),
            _spread([run.gain(name) for run in runs], signed),
            _spread([run.gain(judge) for run in runs], signed),
            _spread([_after(run, diversity) for run in runs]),
            _spread([run.last("kl/ref") for run in runs]),
            duration(_mean([run.last("cost/train_seconds_total") for run in runs])),
            show(_mean([run.last("cost/network_rows_total") for run in runs])),
        ]
        for label, runs in groups.items()
    ]
    return page.table(header, rows, numeric=range(1, len(header)))


def _after(run: RunRecord, name: str) -> float:
    change = run.change(name)
    return math.nan if change is None else change.after


def _mean(values: Sequence[float]) -> float:
    kept = [v for v in values if math.isfinite(v)]
    return sum(kept) / len(kept) if kept else math.nan


def _against_cost(groups: Groups, name: str) -> str:
    rows = {label: [run.rows for run in runs] for label, runs in groups.items()}
    if not any(name in run.names for runs in groups.values() for run in runs):
        return ""
    panels = [Panel(f"{describe(name).label} by {label}", (name,), x) for x, (label, _) in AXES.items()]
    return page.figure(curves(rows, panels), f"{name} against iterations, time and network rows")


def _overlaid(groups: Groups) -> str:
    known = {name for runs in groups.values() for run in runs for name in run.names}
    names = [name for name in OVERLAID if name in known]
    rows = {label: [run.rows for run in runs] for label, runs in groups.items()}
    return page.figure(curves(rows, names), "curves of all runs") if names else ""


def _equal_budgets(groups: Groups, name: str) -> str:
    runs = [run for members in groups.values() for run in members]
    spent = {budget: [s for run in runs if (s := _reach(run, name, budget)) > 0] for budget in BUDGETS}
    usable = {budget: min(every) for budget, every in spent.items() if every}
    if len(runs) < 2 or not usable:
        return ""
    said: dict[str, Callable[[float], str]] = {"cost/train_seconds_total": duration, "cost/network_rows_total": show}
    header = ["runs", *(f"{describe(name).label} at {said[b](s)} {BUDGETS[b]}" for b, s in usable.items())]
    rows = [
        [escape(label), *(_spread([value_at(run, name, b, s) for run in members]) for b, s in usable.items())]
        for label, members in groups.items()
    ]
    return page.table(header, rows, numeric=range(1, len(header)))


def _reach(run: RunRecord, name: str, budget: str) -> float:
    """What the run had spent at its last evaluation."""
    at, _ = series(run.rows, name, budget)
    return float(at[-1]) if len(at) else 0.0


def _runs_table(groups: Groups, name: str) -> str:
    rows = [list(_run_row(label, run, name)) for label, runs in groups.items() for run in runs]
    return page.table(("run", "of", "seed", describe(name).label, "iterations", "device"), rows, numeric=(2, 4))


def _run_row(label: str, run: RunRecord, name: str) -> Iterator[str]:
    change = run.change(name)
    yield f"<code>{escape(str(run.folder))}</code>"
    yield escape(label)
    yield escape(_text(run.setting(SEED, MISSING)))
    yield MISSING if change is None else escape(change.words("").strip())
    yield str(run.iterations)
    yield escape(str(run.info.get("device", MISSING)))
