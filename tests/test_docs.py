"""Every snippet of the README and the docs is run: Python executed, commands parsed, recipes checked."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rlflow import config, recipes, registry
from rlflow.cli import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]


def fences(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)


def blocks(language: str) -> list[pytest.param]:
    """All fenced blocks of a language, as (page, text)."""
    found = []
    for page in PAGES:
        texts = [text for name, text in fences(page) if name == language]
        found += [pytest.param(page.name, text, id=f"{page.name}-{i}") for i, text in enumerate(texts)]
    return found


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_python_snippets_run(page, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(text, page, "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_recipe_snippets_are_valid(page, text):
    values = config.read_yaml(text)
    if "policy" in values or "steps" in values or "base" in values:
        base = values.pop("base", "t2i_flow_grpo")
        config.parse(config.merge(recipes.read(base), values))


def test_commands_parse_and_name_what_exists(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def darkness(images):\n    return 1 - images.mean(dim=(1, 2, 3))\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen = 0
    for page in PAGES:
        for _, text in fences(page):
            for line in text.splitlines():
                if not line.startswith("rlflow "):
                    continue
                args = parse(shlex.split(line, comments=True)[1:])
                seen += 1
                if hasattr(args, "recipe") and args.recipe in recipes.names():
                    recipes.load(args.recipe, args.overrides, args.trust_code)
    assert seen >= 2


def test_the_reward_of_the_readme_trains(tmp_path):
    """As a newcomer does it: the file beside one, the installed command, no PYTHONPATH."""
    python, command = (next(t for n, t in fences(PAGES[0]) if n == name and "darkness" in t) for name in ("python", ""))
    (tmp_path / "my_rewards.py").write_text(python)
    words = [*shlex.split(command), "train.iterations=1", "train.threads=1", "eval.num=2", "env.num_groups=2"]
    words = [Path(sys.executable).parent / words[0], *words[1:], "env.group_size=2", "--run", "run"]
    said = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    assert '"reward/darkness/mean"' in (tmp_path / "run/metrics.jsonl").read_text()


def test_the_method_table_lists_every_recipe_and_its_section_exists():
    readme, methods = PAGES[0].read_text(), (ROOT / "docs" / "methods.md").read_text()
    for name in recipes.names():
        assert f"`{name}`" in readme, f"{name} is missing in the README's table"
        assert f"`{name}`" in methods, f"{name} has no section in docs/methods.md"


def test_links_and_pictures_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} points to {target}"


def test_every_setting_is_documented():
    """docs/cli.md names every key of every section."""
    import dataclasses

    text = (ROOT / "docs" / "cli.md").read_text()
    for section in dataclasses.fields(config.Config):
        value = getattr(config.Config(), section.name)
        if dataclasses.is_dataclass(value):
            for f in dataclasses.fields(value):
                assert f"`{f.name}" in text, f"{section.name}.{f.name} is not in docs/cli.md"


def test_every_component_is_listed_by_the_command_line():
    from rlflow.cli import KINDS

    for kind in KINDS.values():
        assert all(registry.about(kind).values()), f"a {kind} has no docstring"
    assert set(registry.TABLE["steps"]) <= set(re.findall(r"`(\w+)`", (ROOT / "docs" / "cli.md").read_text()))
