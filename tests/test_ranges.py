"""Every number and every name of every component and section has a range, whoever wrote it."""

import dataclasses
import math
import typing
from typing import Annotated, Any

import pytest

from rlflow import ranges, registry
from rlflow.config import recipes
from rlflow.config.algorithms import LEARNERS
from rlflow.config.parse import parse
from rlflow.config.schema import Config
from rlflow.config.values import set_value
from rlflow.rewards.component import column_names

KINDS = [
    (kind, name) for kind, table in registry.TABLE.items() if kind not in ("policy", "algorithm") for name in table
]
"""Algorithms are made from sections of the config."""
SUPPLIED = {
    "model": ("event_shape",),
    "kernel": ("num_features", "event_shape"),
    "env": ("num_envs", "gamma", "prompts", "rewards", "action_shape", "tokenize", "decode", "seed"),
    "grid": ("field",),
    "guidance": ("field",),
    "advantage": ("gamma",),
    "select": ("scorer", "called"),
    "scorer": ("event_shape", "trust_code"),
}
ABSURD: dict[Any, tuple[Any, ...]] = {
    float: (math.nan, -math.inf, 1e31, -1e31),
    int: (10**31, -(10**31)),
    str: ("", "  "),
}


def plain_types(annotation: Any) -> set[type]:
    """float, int, str, where a setting takes them."""
    if annotation in ABSURD:
        return {annotation}
    parts = typing.get_args(annotation)
    return set().union(*(plain_types(part) for part in parts)) if parts else set()


def filled(annotation: Any, value: Any) -> Any:
    """`value` in the place where the annotation has it: alone, or in a list."""
    sequences = ("Sequence", "tuple", "list")
    members = (annotation, *typing.get_args(annotation))
    return [value] if any(name in str(m)[:40] for m in members for name in sequences) else value


def found(kind: str, name: str) -> tuple[Any, tuple[str, ...]]:
    try:
        component = registry.find(kind, name)
    except ValueError as error:
        pytest.skip(str(error))
    columns = column_names(component) if kind == "reward" and not isinstance(component, type) else ()
    return component, (*SUPPLIED.get(kind, ()), *columns)


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_every_number_of_every_component_refuses_nan_and_the_absurd(kind: str, name: str) -> None:
    """At config time, by the path of the setting."""
    component, supplied = found(kind, name)
    for key, parameter in registry.settings(component).items():
        for plain in plain_types(parameter.annotation) if key not in supplied else ():
            may_be_empty = plain is str and ranges.MayBeEmpty() in list(ranges._metadata(parameter.annotation))
            for value in () if may_be_empty else ABSURD[plain]:
                spec = {"name": name, key: filled(parameter.annotation, value)}
                others = [p for p in registry.settings(component) if p != key]
                with pytest.raises(ValueError, match=rf"^here\.{key}: "):
                    registry.validate(kind, "here", spec, [o for o in others if o not in spec])


ALGORITHMS: dict[str, type] = {name: type(default()) for name, default in LEARNERS.items()}


def sections() -> list[tuple[str, type]]:
    """Path and class of every section."""
    return [*((f"algorithm.{name}", cls) for name, cls in ALGORITHMS.items()), ("", Config)]


def numbers(cls: type) -> list[tuple[str, Any]]:
    """Dotted names of the plain settings below a section, with their annotations."""
    listed: list[tuple[str, Any]] = []
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        inner = [m for m in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(m) and isinstance(m, type)]
        if name not in {f.name for f in dataclasses.fields(cls)} or name == "algorithm":
            continue
        listed += [(f"{name}.{below}", annotation) for below, annotation in numbers(inner[0])] if inner else []
        listed += [] if inner else [(name, hint)]
    return listed


BASES = {
    "policy_gradient": "t2i_flow_grpo",
    "sac": "robot_reach_sac",
    "flow_q": "robot_fql",
    "ogpo": "robot_ogpo",
    "reward_gradient": "t2i_draft",
}
NEEDED = {"stop_when": {"metric": "kl/ref"}, "frozen": {"policy": "hopper"}}
"""What a section has no default for."""


@pytest.mark.parametrize(
    ("learner", "path", "annotation"),
    [("policy_gradient", path, a) for path, a in numbers(Config)]
    + [(name, f"algorithm.{path}", a) for name, cls in ALGORITHMS.items() for path, a in numbers(cls)],
)
def test_every_number_of_every_section_refuses_nan_and_the_absurd(learner: str, path: str, annotation: Any) -> None:
    for plain in plain_types(annotation) - ({str} if path == "about" else set()):
        for value in ABSURD[plain]:
            values = recipes.read(BASES[learner])
            put = [value, 0.5] if "betas" in path else {"brightness": value} if path == "reward.weights" else value
            if path == "eval.metrics":
                put = {"strict": value}
            node = values
            for part in path.split(".")[:-1]:
                if not isinstance(node.get(part), dict):
                    node[part] = {"name": node[part]} if part in node else dict(NEEDED.get(part, {}))
                node = node[part]
            node[path.rpartition(".")[2]] = put
            with pytest.raises(ValueError, match=rf"^{path}"):
                parse(values)


SENSELESS = {
    "policy.guidance={name: cfg, scale: .nan}": "policy.guidance.scale: must be in [0, 1000], got nan",
    "policy.guidance={name: cfg, scale: .inf}": "policy.guidance.scale: must be in [0, 1000], got inf",
    "policy.guidance={name: cfg, scale: 1e6}": "policy.guidance.scale: must be in [0, 1000], got 1000000.0",
    "policy.kernel={name: learned_noise, std_max: .inf}": "policy.kernel.std_max: must be finite, got inf",
    "policy.kernel={name: learned_noise, std_max: 1e9}": "policy.kernel.std_max: must be at most 1,000, got",
    "policy.kernel={name: flow_sde, a: -1}": "policy.kernel.a: must be positive, got -1",
    "policy.grid={name: sigmoid, scale: 1e4}": "policy.grid.scale: must be at most 60, got",
    "policy.num_steps=1000000": "policy.num_steps: must be at most 65,536, got 1000000",
    "algorithm.epochs=0": "algorithm.epochs: must be positive, got 0",
    "eval.prompts=''": "eval.prompts: must not be empty: leave it out, or name one",
    "eval.prompts=' '": "eval.prompts: must not be empty",
    "env.prompts=''": "env.prompts: must not be empty",
    "policy.field=''": "policy.field: must not be empty",
    "policy.frozen=''": "policy.frozen: must not be empty",
    "eval.metrics={'': shapes_strict}": "eval.metrics: must not be empty",
    "reward.timeout_s=1e-300": "reward.timeout_s: must be at least 0.001, got",
    "reward.timeout_s=.nan": "reward.timeout_s: must be at least 0.001, got nan",
    "reward={weights: {jpeg_compressibility: 1}, settings: {jpeg_compressibility: {quality: 0}}}": "quality: must be in",
}


@pytest.mark.parametrize("override", SENSELESS)
def test_what_once_trained_to_the_end_is_refused_at_the_start(override: str) -> None:
    values = recipes.read("t2i_flow_grpo")
    set_value(values, override)
    with pytest.raises(ValueError, match="must") as error:
        parse(values)
    assert SENSELESS[override] in str(error.value)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("width: 0", r"^policy\.field\.width: must be positive, got 0$"),
        ("depth: -3", r"^policy\.field\.depth: must be"),
    ],
)
def test_a_network_that_cannot_be_is_refused_before_anything_is_made(field: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipes.load("robot_reach_reinflow", [f"policy.field={{name: mlp, {field}}}"])


def test_infinite_means_no_limit_where_it_says_so() -> None:
    config = recipes.load("t2i_flow_grpo", ["policy.max_kappa=.inf", "advantage={name: group, clip: .inf}"])
    assert config.policy.max_kappa == math.inf


def test_a_new_component_says_nothing_and_is_checked(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its own range is obeyed."""
    (tmp_path / "rlflow_tests_ranges.py").write_text(
        "from rlflow.flow.solvers import Euler\nfrom rlflow.ranges import Unit\n\n\nclass Mine(Euler):\n"
        "    def __init__(self, plain: float = 1.0, share: Unit = 0.5, many: list[float] | None = None):\n"
        "        self.plain = plain\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    refused = {
        "plain: .nan": "must be finite",
        "share: 2.0": r"must be in \[0, 1\]",
        "many: [1.0, .inf]": "must be finite",
    }
    for setting, message in refused.items():
        spec = f"policy.solver={{name: 'rlflow_tests_ranges:Mine', {setting}}}"
        with pytest.raises(ValueError, match=rf"^policy\.solver\.{setting.partition(':')[0]}: {message}"):
            recipes.load("t2i_flow_grpo", [spec], trust_code=True)


def test_ends_and_messages_of_a_range() -> None:
    assert [ranges.UNIT.problem(v) for v in (0, 1, 0.5)] == [None] * 3
    assert ranges.UNIT.problem(math.nan) == ranges.UNIT.problem(1.0001) == "must be in [0, 1]"
    assert ranges.POSITIVE.problem(0) == ranges.POSITIVE.problem(-math.inf) == "must be positive"
    assert ranges.POSITIVE.problem(math.inf) == "must be finite"
    assert ranges.POSITIVE.problem(1e31) == ranges.FINITE.problem(-1e31) == "must be at most 1e30"
    assert ranges.WHOLE.problem(10**400) is not None
    with pytest.raises(ValueError, match=r"^a: must be positive, got 0$"):
        ranges.check("a", dict[str, Annotated[int, ranges.POSITIVE]] | None, 0)
    ranges.check("a", Any, math.nan)  # somebody else's
