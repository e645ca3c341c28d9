"""When a run ends before its budget is spent: rules on logged numbers (`train.stop_when`).

{metric: eval/heldout/judge, falls: 0.05}       a judge that no reward sees falls that far from its best
{metric: eval/heldout/base_distance, above: 0.2}
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from rlflow.config.schema import StopRule
from rlflow.registry import nearest

FAMILIES = (
    *("eval", "reward", "rollout", "policy", "kl", "advantage", "critic", "optim", "replay", "env"),
    *("time", "perf", "cost"),
)
"""What metrics begin with."""


def check_rule(path: str, rule: StopRule, judges: Sequence[str] | None) -> None:
    """ValueError for a rule without exactly one bound, or whose metric nothing logs; `judges` are those of images."""
    bounds = [name for name in ("below", "above", "falls") if getattr(rule, name) is not None]
    if len(bounds) != 1:
        raise ValueError(f"{path}: give one of below, above and falls, got {' and '.join(bounds) or 'none'}")
    family, _, rest = rule.metric.partition("/")
    if family not in FAMILIES or not rest:
        raise ValueError(f"{path}.metric: nothing logs {rule.metric!r}: a metric begins with {'/, '.join(FAMILIES)}/")
    known = None if judges is None else [f"eval/heldout/{name}" for name in judges]
    if family == "eval" and known is not None and rule.metric not in known:
        raise ValueError(f"{path}.metric: eval.metrics has no {rule.metric!r}{nearest(rule.metric, known)}")


def words(rule: StopRule) -> str:
    """The rule in words: it is known by them in a checkpoint."""
    if rule.falls is not None:
        return f"{rule.metric} falls by {rule.falls:g} from its best"
    return f"{rule.metric} {'below' if rule.below is not None else 'above'} {_level(rule):g}"


def _level(rule: StopRule) -> float:
    level = rule.above if rule.below is None else rule.below
    assert level is not None
    return level


class StopRules:
    """The rules of a run, which see every row that is logged; `reason` says which was the first to hold."""

    def __init__(self, rules: Sequence[StopRule]):
        self.rules = {words(rule): rule for rule in rules}
        self.best: dict[str, float] = {}
        """The largest value so far, by the rules that ask how far it fell."""
        self.fired, self.reason = "", ""
        self._missed: set[str] = set()

    def see(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Look at a row of training or of an evaluation; what is not finite says nothing."""
        for name, rule in self.rules.items():
            value = metrics.get(rule.metric, math.nan)
            if rule.metric not in metrics:
                self._warn_of_missing(rule.metric, metrics)
            elif math.isfinite(value) and self._holds(name, rule, value) and not self.reason:
                best = f" of {self.best[name]:.4g}" if name in self.best else ""
                self.fired, self.reason = name, f"{name}{best}: {value:.4g} after iteration {iteration}"

    def _holds(self, name: str, rule: StopRule, value: float) -> bool:
        if rule.falls is not None:
            self.best[name] = max(value, self.best.get(name, value))
            return value <= self.best[name] - rule.falls
        return value < _level(rule) if rule.below is not None else value > _level(rule)

    def _warn_of_missing(self, metric: str, metrics: Mapping[str, float]) -> None:
        """Say once that an iteration, or an evaluation, has no such number."""
        same = [name for name in metrics if name.startswith("eval/")]
        if metric in self._missed or metric.startswith("eval/") != bool(same):
            return
        self._missed.add(metric)
        near = nearest(metric, same or list(metrics))
        warnings.warn(f"train.stop_when: no {metric!r} among what is logged, so it stops nothing{near}", stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """What the rules remember."""
        return {"best": dict(self.best), "fired": self.fired, "reason": self.reason}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; what a rule remembered that is no longer asked for is left out."""
        self.best = {name: value for name, value in state.get("best", {}).items() if name in self.rules}
        if state.get("fired") in self.rules:
            self.fired, self.reason = state["fired"], state["reason"]
