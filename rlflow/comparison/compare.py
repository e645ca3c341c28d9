"""compare: several runs side by side; what each gained, and its difference to the first, by paired bootstrap.

Two evaluations are paired where they scored the same prompts from the same noise, or played one simulator from the
same starts (pairing.py). Otherwise the difference of the means has no bounds, and says why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlflow.report.curves import NETWORK_ROWS, SECONDS
from rlflow.report.glossary import HELDOUT, MISSING, describe, duration, share, show, signed
from rlflow.report.pairing import pair, unlike
from rlflow.report.record import RunRecord
from rlflow.report.tables import Table

PAIRED_SETTINGS = ("eval.prompts", "eval.num", "eval.seed", "env.name", "env.settings.env_id", "env.prompts")


def compare(folders: Sequence[str | Path]) -> dict[str, Any]:
    """JSON-able: per run its last evaluation, gain and cost; per run but the first its difference to the first."""
    if not folders:
        raise ValueError("nothing to compare: give at least one run folder")
    runs = [RunRecord.read(folder) for folder in folders]
    metrics = list(dict.fromkeys(name for run in runs for name in run.names if name.startswith(HELDOUT)))
    if not metrics:
        raise ValueError("none of these runs has been evaluated")
    return {
        "metrics": metrics,
        "runs": [_describe(run, metrics) for run in runs],
        "differences": [_difference(runs[0], run, metrics) for run in runs[1:]],
    }


def _describe(run: RunRecord, metrics: Sequence[str]) -> dict[str, Any]:
    last = run.evals[-1] if run.evals else {}
    return {
        "run": str(run.folder),
        "recipe": run.recipe,
        "seed": run.setting("train.seed"),
        "control": bool(run.setting("train.permute_rewards", False)),
        "iteration": last.get("iteration"),
        "weights": run.info.get("weights"),
        "eval": {m: _null(last.get(m, math.nan)) for m in metrics},
        "gain": {m: _gain(run, m) for m in metrics},
        "cost": {"seconds": _null(run.last(SECONDS)), "network_rows": _null(run.last(NETWORK_ROWS))},
    }


def _gain(run: RunRecord, metric: str) -> dict[str, float | None] | None:
    """Last minus first evaluation of the run; None before there are two."""
    ends, change = run.ends(metric), run.change(metric)
    if ends is None or change is None or ends[0] == ends[1]:
        return None
    return _interval(change.difference)


def _difference(first: RunRecord, run: RunRecord, metrics: Sequence[str]) -> dict[str, Any]:
    a, b = (r.scores(r.evals[-1]["iteration"]) if r.evals else {} for r in (first, run))
    other = _other_settings(first, run)
    found = {}
    for metric in metrics:
        paired = pair(a, b, metric.removeprefix(HELDOUT), other)
        plain = (_last(run, metric) - _last(first, metric), math.nan, math.nan)
        found[metric] = _interval(plain if paired.reason else paired.difference)
    reason = unlike(a, b, other)
    return {"run": str(run.folder), "against": str(first.folder), "paired": reason is None, "reason": reason} | {
        "metrics": found
    }


def _last(run: RunRecord, metric: str) -> float:
    return float(run.evals[-1].get(metric, math.nan)) if run.evals else math.nan


def _other_settings(first: RunRecord, run: RunRecord) -> list[str]:
    """Settings of evaluations that decide what is asked, and differ."""
    other = [key for key in PAIRED_SETTINGS if first.setting(key) != run.setting(key)]
    return [key for key in other if key != "env.prompts" or first.setting("eval.prompts") is None]


def _interval(interval: Sequence[float]) -> dict[str, float | None]:
    return dict(zip(("value", "low", "high"), map(_null, interval), strict=True))


def _null(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


# -- output ---------------------------------------------------------------------------------------


def run_tables(result: Mapping[str, Any]) -> list[Table]:
    """The last evaluations, run by run, and the differences."""
    labels = [describe(m).label for m in result["metrics"]]
    first = [
        [run["run"], run["recipe"], str(run["iteration"]), *(_cell(run, m) for m in result["metrics"]), *_cost(run)]
        for run in result["runs"]
    ]
    title = "last evaluation (gain since the start, 95 % paired bootstrap)"
    out = [Table(title, ["run", "recipe", "iteration", *labels, "training time", "network rows"], first)]
    if result["differences"]:
        rows = [
            [d["run"], *(_bounds(d["metrics"][m]) for m in result["metrics"]), d["reason"] or "paired"]
            for d in result["differences"]
        ]
        title = f"difference to {result['differences'][0]['against']} (95 % paired bootstrap)"
        out.append(Table(title, ["run", *labels, ""], rows))
    return out


def _cell(run: Mapping[str, Any], metric: str) -> str:
    value, gain = run["eval"][metric], run["gain"][metric]
    return (MISSING if value is None else share(value)) + (f" ({_bounds(gain)})" if gain else "")


def _bounds(interval: Mapping[str, float | None]) -> str:
    value, low, high = interval["value"], interval["low"], interval["high"]
    if value is None:
        return MISSING
    return signed(value) + (f" [{signed(low)}, {signed(high)}]" if low is not None and high is not None else "")


def _cost(run: Mapping[str, Any]) -> list[str]:
    seconds, rows = run["cost"]["seconds"], run["cost"]["network_rows"]
    return [MISSING if seconds is None else duration(seconds), MISSING if rows is None else show(rows)]
