"""Mutated recipes: each is accepted, or refused in lines that say where; none has a traceback, none is senseless."""

import copy
import math
import random
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlflow.config import plain, recipes
from rlflow.config.schema import Config
from tests.conftest import missing_package

RECIPES = [name for name in recipes.names() if missing_package(name) is None]
ROUND = 50
"""Mutations of a test; three rounds are fast, all twenty are a thousand."""
ROUNDS = [pytest.param(n, marks=[] if n < 3 else pytest.mark.slow) for n in range(20)]

NUMBERS = (0, -1, 1, 10**31, -(10**40), 1e300, -1e31, math.nan, math.inf, -math.inf, 0.5, 1e-300, 2**63, True)
TEXTS = (
    "",
    " ",
    "nan",
    "None",
    "../..",
    "os:system",
    "a" * 10_000,
    "\u2028",
    "{}",
    "none",
    "window",
    "1e3",
    "2026-01-01",
)
OTHERS = (None, [], {}, [[]], [1, "a"], {"name": "cps"}, {"name": 5}, {"a": {"b": {}}}, {"": 1})
RAW = (
    "- ",
    "&a [*a]",
    "*b",
    "!!set {x}",
    "!!binary aGk=",
    "? x",
    "{a: 1, a: 2}",
    "\x00",
    "[" * 600,
    "<<: 5",
    "1: 2",
    "@",
)

WHERE = re.compile(
    r"^((recipe|override) ['\"]|base: |(about|policy|steps|likelihood|advantage|algorithm|env|reward|imitation|train|eval)\b|"
    r"  |(no recipe|unknown recipe)|[^:]+: no such setting)",
)
"""How a line of a refusal begins: with a file and its line, an override, or the path of a setting."""

SENSELESS: dict[str, Callable[[Any], bool]] = {
    "policy.num_steps": lambda v: v < 1,
    "policy.max_kappa": lambda v: not v > 0,
    "algorithm.epochs": lambda v: v < 1,
    "algorithm.micro_batch": lambda v: v < 1,
    "algorithm.optimizer.lr": lambda v: not 0 < v <= 1,
    "algorithm.lr": lambda v: not 0 < v <= 1,
    "algorithm.ema_decay": lambda v: not 0 <= v < 1,
    "algorithm.kl.beta": lambda v: not 0 <= v < math.inf,
    "algorithm.objective.low": lambda v: not v > 0,
    "algorithm.tau": lambda v: not 0 < v <= 1,
    "env.num_groups": lambda v: v < 1,
    "env.group_size": lambda v: v < 1,
    "env.rows_per_call": lambda v: v < 1,
    "env.gamma": lambda v: not 0 < v <= 1,
    "env.prompts": lambda v: not v.strip(),
    "env.settings.chunk": lambda v: v < 1,
    "eval.prompts": lambda v: v is not None and not v.strip(),
    "eval.num": lambda v: v < 1,
    "eval.every": lambda v: v < 0,
    "policy.field": lambda v: v == "" or (isinstance(v, dict) and min(v.get("width", 1), v.get("depth", 1)) < 1),
    "policy.guidance.scale": lambda v: not abs(v) <= 1000,
    "policy.kernel.std_max": lambda v: not v < 1e4,
    "reward.timeout_s": lambda v: not v >= 0.001,
    "train.iterations": lambda v: v is not None and v < 1,
    "train.minutes": lambda v: v is not None and not v > 0,
    "train.seed": lambda v: not 0 <= v < 2**63,
}
"""Never accepted, by path, whatever else a config says."""


@cache
def _resolved(name: str) -> dict[str, Any]:
    return recipes.load(name).to_dict()


def resolved(name: str) -> dict[str, Any]:
    """A recipe with every setting it has; to be changed."""
    return copy.deepcopy(_resolved(name))


def leaves(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Path of every key of nested mappings."""
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


def at(values: Any, path: str) -> Any:
    """The value at a dotted path; KeyError where there is none."""
    for part in path.split("."):
        if not isinstance(values, dict):
            raise KeyError(path)
        values = values[part]
    return values


def a_value(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(rng.choice([NUMBERS, TEXTS, OTHERS])))


def put(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        values = values[part]
    values[path[-1]] = value


def mutate(values: dict[str, Any], rng: random.Random) -> str:
    """One change of a resolved recipe, as YAML text."""
    path = rng.choice(list(leaves(values)))
    node = at(values, ".".join(path[:-1])) if path[:-1] else values
    kind = rng.randrange(7)
    if kind == 0:
        del node[path[-1]]
    elif kind == 1:
        node[path[-1][::-1] or "x"] = node.pop(path[-1])
    elif kind == 2:
        node[rng.choice(["", "x", "name", "policy"])] = a_value(rng)
    elif kind in (3, 4):
        put(values, path, a_value(rng))
    text = yaml.safe_dump(values, sort_keys=False)
    if kind == 5:
        lines = text.splitlines()
        line = rng.randrange(len(lines))
        lines[line] = lines[line].partition(":")[0] + ": " + rng.choice(RAW)
        return "\n".join(lines)
    if kind == 6:
        place = rng.randrange(len(text))
        return text[:place] + rng.choice((*RAW, text[place:][:80])) + text[place:]
    return text


def override(values: dict[str, Any], rng: random.Random) -> str:
    """One assignment of a command line."""
    path = ".".join(rng.choice(list(leaves(values))))
    value = a_value(rng)
    text = rng.choice(RAW) if rng.random() < 0.2 else yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return f"{path}{rng.choice(['=', '=', '=', '==', '.x=', ''])}{text.removesuffix('...' + chr(10)).strip()}"


def numbers(value: Any) -> Iterator[float]:
    """Every number below a value."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


def outcome(recipe: str, overrides: list[str]) -> Config | str:
    """What is accepted, or the words of the refusal; any other error is a traceback, and the test's."""
    try:
        return recipes.load(recipe, overrides)
    except ValueError as error:
        return str(error)


def check_sense(config: Config, said: str) -> None:
    values = config.to_dict()
    for path, senseless in SENSELESS.items():
        try:
            value = at(values, path)
        except KeyError:
            continue
        assert not senseless(value), f"{path}={value!r} was accepted: {said}"
    assert not any(number != number or abs(number) > 1e30 for number in numbers(values) if number != math.inf), said
    assert plain.load(config.to_yaml()) == values, said


@pytest.mark.parametrize("number", ROUNDS)
def test_a_mutated_recipe_is_accepted_or_refused_with_its_place(number: int, tmp_path: Path) -> None:
    accepted = 0
    for n in range(number * ROUND, (number + 1) * ROUND):
        rng = random.Random(n)
        name = rng.choice(RECIPES)
        values = resolved(name)
        if rng.random() < 0.5:
            file = tmp_path / f"{n}.yaml"
            said = mutate(values, rng)
            file.write_text(said, encoding="utf-8")
            arguments: tuple[str, list[str]] = (str(file), [])
        else:
            said = override(values, rng)
            arguments = (name, [said])
        found = outcome(*arguments)
        said = f"mutation {n} of {name}: {said[-300:]}"
        if isinstance(found, str):
            assert all(WHERE.search(line) for line in found.splitlines() or [""]), f"{found!r} says no place; {said}"
        else:
            check_sense(found, said)
            accepted += 1
    assert 0 < accepted < ROUND, "both happen, or nothing was mutated"


@pytest.mark.parametrize("path", SENSELESS)
def test_the_senseless_is_refused_by_its_path(path: str) -> None:
    """In a recipe that has the setting, and in nobody's name."""
    bases = {
        "algorithm.tau": "robot_reach_sac",
        "algorithm.lr": "robot_reach_sac",
        "env.settings.chunk": "robot_reinflow",
    }
    components = {
        "policy.field": [{"name": "mlp", "width": 0}, {"name": "mlp", "depth": -1}, ""],
        "policy.guidance.scale": [math.nan, math.inf, 1e9],
        "policy.kernel.std_max": [math.inf, 1e9],
    }
    kinds = {"policy.guidance.scale": {"name": "cfg"}, "policy.kernel.std_max": {"name": "learned_noise"}}
    of_field = {"policy.field": "robot_reach_reinflow"}
    base = (bases | of_field).get(path, "t2i_flow_grpo")
    tried = 0
    for value in components.get(path, (*NUMBERS, *TEXTS)):
        try:
            senseless = SENSELESS[path](value)
        except (TypeError, AttributeError):
            continue  # of another type
        if not senseless or isinstance(value, bool):
            continue
        values = resolved(base)
        *section, key = path.split(".")
        node = values
        for part in section:
            if not isinstance(node[part], dict):
                node[part] = dict(kinds[path])
            node = node[part]
        node[key] = value
        with pytest.raises(ValueError, match=rf"^{re.escape(path)}"):
            recipes.parse(values)
        tried += 1
    assert tried > 0
