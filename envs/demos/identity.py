"""Which environment demonstrations are of: a name, and the settings that make it another environment."""

from __future__ import annotations

import json
from typing import Any

from rlflow import registry
from rlflow.envs.base import VecEnv
from rlflow.types import Tree

ALIKE = ("chunk", "gamma", "num_envs", "threads", "device", "success", "max_steps", "horizon")
"""Settings under which a primitive step shows, takes and pays the same."""


def check_env(env: Any) -> None:
    """ValueError unless `env` is {"name": ..., "settings": {...}}, the second of which may be missing."""
    if not isinstance(env, dict) or not isinstance(env.get("name"), str) or not set(env) <= {"name", "settings"}:
        raise ValueError(f'env: write {{"name": NAME, "settings": {{...}}}} as in a config\'s env section, got {env!r}')
    if not isinstance(env.get("settings", {}), dict):
        raise ValueError(f"env.settings: write a dict, got {env['settings']!r}")


def differences(demos: dict[str, Any], env: dict[str, Any]) -> list[str]:
    """In words, why `demos` are not of the environment `env`, whose code is trusted; nothing where they are."""
    if demos["name"] != env["name"]:
        return [f"they are of {demos['name']}, not of {env['name']}"]
    mine, theirs = _world(env), _world(demos)
    return [
        f"env.settings.{name}: {theirs.get(name)!r} there, {mine.get(name)!r} here"
        for name in sorted(mine | theirs)
        if mine.get(name) != theirs.get(name)
    ]


def _world(env: dict[str, Any]) -> dict[str, Any]:
    """The settings that matter, defaults filled in; those of pictures do not."""
    asked = registry.settings(registry.find("env", env["name"], trust_code=True))
    usual = {name: p.default for name, p in asked.items() if p.default is not p.empty}
    settings = {k: v for k, v in {**usual, **env.get("settings", {})}.items() if k not in ALIKE}
    options = {k: v for k, v in (settings.get("options") or {}).items() if k != "render_mode"}
    if "options" in settings:
        settings["options"] = options
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain


def check_alike(where: str, obs_spec: Tree, action_shape: tuple[int, ...], env: VecEnv) -> None:
    """ValueError where `env` shows or takes other shapes in a primitive step than demonstrations hold."""
    if action_shape != tuple(env.action_shape[1:]):
        raise ValueError(f"{where}: actions are {action_shape}, the environment takes {tuple(env.action_shape[1:])}")
    seen, shown = _shapes(obs_spec), _shapes(env.obs_spec)
    if seen != shown:
        raise ValueError(f"{where}: what was seen is {seen}, the environment shows {shown}")


def _shapes(spec: Tree) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each entry, by name."""
    entries = spec if isinstance(spec, dict) else {"obs": spec}
    return {name: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for name, v in sorted(entries.items())}
