"""Rules that end a run: when each of them holds, what is remembered, and what says nothing."""

import math
import warnings

import pytest

from rlflow.config.schema import StopRule
from rlflow.config.stopping import StopRules

JUDGE = "eval/heldout/judge"


def first_to_stop(rule: StopRule, values: list[float]) -> int | None:
    """Index of the first value at which it holds."""
    rules = StopRules([rule])
    for i, value in enumerate(values):
        rules.see(i, {rule.metric: value})
        if rules.reason:
            return i
    return None


@pytest.mark.parametrize(
    ("rule", "values", "index"),
    [
        (StopRule(JUDGE, below=0.4), [0.5, 0.4, 0.39, 0.6], 2),
        (StopRule(JUDGE, above=0.4), [0.3, 0.4, 0.41], 2),
        (StopRule(JUDGE, falls=0.1), [0.2, 0.15, 0.5, 0.45, 0.39], 4),
        (StopRule(JUDGE, falls=0.1), [0.2, 0.3, 0.4], None),
        (StopRule(JUDGE, below=0.4), [math.nan, -math.inf, 0.5], None),
        (StopRule(JUDGE, falls=0.1), [math.inf, 0.5, math.nan, 0.41], None),
    ],
)
def test_a_rule_holds_where_it_says(rule: StopRule, values: list[float], index: int | None) -> None:
    assert first_to_stop(rule, values) == index


def test_the_first_reason_stays_and_names_metric_bound_value_and_iteration() -> None:
    rules = StopRules([StopRule("kl/ref", above=1.0), StopRule(JUDGE, falls=0.1)])
    rules.see(3, {JUDGE: 0.5})
    rules.see(4, {"kl/ref": 0.5})
    assert not rules.reason
    rules.see(5, {JUDGE: 0.25})
    rules.see(6, {"kl/ref": 2.0})
    assert rules.reason == "eval/heldout/judge falls by 0.1 from its best of 0.5: 0.25 after iteration 5"


def test_a_resumed_run_remembers_what_its_rules_saw() -> None:
    asked = [StopRule(JUDGE, falls=0.1), StopRule("kl/ref", above=1.0)]
    rules, again, others = StopRules(asked), StopRules(asked), StopRules([StopRule(JUDGE, falls=0.2)])
    rules.see(1, {JUDGE: 0.5})
    again.load_state_dict(rules.state_dict())
    again.see(2, {JUDGE: 0.4})
    assert again.reason
    over = StopRules(asked)
    over.load_state_dict(again.state_dict())
    assert over.reason == again.reason
    others.load_state_dict(again.state_dict())
    assert (others.reason, others.best) == ("", {}), "a rule that is no longer asked for has stopped nothing"
    over.load_state_dict({})  # of a run before there were rules


def test_a_metric_that_nothing_logs_is_said_once() -> None:
    """In its own kind of row: an evaluation has no numbers of training."""
    rules = StopRules([StopRule("policy/clip_fraction", above=0.5), StopRule(JUDGE, below=0.1)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rules.see(0, {JUDGE: 0.3})
    with pytest.warns(
        UserWarning, match="no 'policy/clip_fraction' among what is logged.*did you mean 'policy/clip_frac'"
    ):
        rules.see(1, {"policy/clip_frac": 0.1, "reward/mean": 0.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rules.see(2, {"policy/clip_frac": 0.1})
