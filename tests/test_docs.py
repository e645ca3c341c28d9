"""Every snippet of the README and the docs is run: Python executed, commands parsed, recipes checked."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import shlex
import sys
import textwrap
from pathlib import Path

import pytest

import rlflow as rf
from rlflow import registry
from rlflow.cli import main, parse
from rlflow.config import recipes
from rlflow.config.algorithms import FlowQConfig, RewardGradientConfig, SACConfig
from rlflow.config.parse import parse as parse_config
from rlflow.config.schema import Config
from rlflow.config.values import merge, read_yaml
from rlflow.report.glossary import describe
from rlflow.train.sweep import plan

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md"]


SMALL = (
    "train.minutes=",
    "train.iterations=1",
    "train.threads=1",
    "train.tensorboard=false",
    "train.report=false",
    "env.num_groups=2",
)
SMALL += ("env.group_size=2", "eval.num=2", "policy.precision=float32")


def fences(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", page.read_text(), re.M | re.S)
    return [(language, textwrap.dedent(text)) for _, language, text in found]


def blocks(language: str) -> list[pytest.param]:
    """All fenced blocks of a language, as (page, text)."""
    found = []
    for page in PAGES:
        texts = [text for name, text in fences(page) if name == language]
        found += [pytest.param(page.name, text, id=f"{page.name}-{i}") for i, text in enumerate(texts)]
    return found


LESS = {'"train.minutes=0.05", "eval.num=30"': '*SMALL, "eval.num_steps=4"'}
"""What a snippet trains for seconds, a test trains once."""


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_python_snippets_run(page, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for settings, fewer in LESS.items():
        assert settings in PAGES[0].read_text()
        text = text.replace(settings, fewer)
    exec(compile(text, page, "exec"), {"__name__": "__main__", "SMALL": SMALL})


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_recipe_snippets_are_valid(page, text):
    values = read_yaml(text)
    if "policy" in values or "steps" in values or "base" in values:
        base = values.pop("base", "t2i_flow_grpo")
        parse_config(merge(recipes.read(base), values))


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """The files that the docs tell a user to write, where the command stands; returns the folder."""
    for page in PAGES:
        for language, text in fences(page):
            if language == "python" and (found := re.match(r"# (my_\w+\.py)\n", text)):
                (tmp_path / found[1]).write_text(text)
            if language == "yaml" and "my_model" in text:
                (tmp_path / "my.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # what the command adds is forgotten
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith("my_")]:
        del sys.modules[name]


def installed(recipe):
    """False where the recipe's environment needs an extra that is not installed."""
    try:
        registry.find("env", recipes.read(recipe).get("env", {}).get("name", "prompt"))
    except ValueError as error:
        if "pip install" in str(error):
            return False
        raise
    return True


def test_commands_parse_and_name_what_exists(own_code):
    seen = 0
    for page in PAGES:
        for _, text in fences(page):
            for line in text.splitlines():
                if not line.startswith("rlflow "):
                    continue
                args = parse(shlex.split(line, comments=True)[1:])
                seen += 1
                named = getattr(args, "recipe", "")
                if named in recipes.names() and installed(named):
                    recipes.load(args.recipe, args.overrides, args.trust_code)
    assert seen >= 2


def test_the_reward_of_the_readme_trains(tmp_path, monkeypatch):
    """As a newcomer does it: the file beside one, the script that was installed, no path of ours."""
    python, command = (next(t for n, t in fences(PAGES[0]) if n == name and "darkness" in t) for name in ("python", ""))
    (tmp_path / "my_rewards.py").write_text(python)
    script = Path(sys.executable).parent / "rlflow"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), *shlex.split(command)[1:], *SMALL, "--run", "run"])
    monkeypatch.setattr(sys, "path", [str(script.parent), *(p for p in sys.path if p not in ("", str(ROOT)))])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    sys.modules.pop("my_rewards", None)
    assert not end.value.code
    assert '"reward/darkness/mean"' in (tmp_path / "run/metrics.jsonl").read_text()


def trusted(*words):
    """The command refuses without --trust-code, and does it with."""
    with pytest.raises(SystemExit):
        main(words)
    main([*words, "--trust-code"])


def test_an_own_model_and_recipe_work_in_every_command(own_code, capsys):
    """The page's steps: save the network, then train, eval and sample by file and folder."""
    runpy.run_path("my_models.py", run_name="__main__")
    assert json.loads((own_code / "my_model/config.json").read_text())["model"] == "my_models:BagOfWords"
    trusted("train", "my.yaml", *SMALL, "--run", "run", "--quiet")
    said = capsys.readouterr()
    assert "model 'my_models:BagOfWords' is code outside rlflow: pass --trust-code" in said.err
    assert "finished: 1 iterations" in said.out
    for source in ("run", "run/model"):
        capsys.readouterr()
        trusted("eval", source, "--json")
        assert json.loads(capsys.readouterr().out)["samples"] == 2
        trusted("sample", source, "--prompt", "two red circles", "--out", "x.png", "--num", "1")
        with pytest.raises(ValueError, match="--trust-code"):
            rf.load(source)
        assert type(rf.load(source, trust_code=True).field).__name__ == "BagOfWords"


def test_a_sweep_trusts_as_it_is_told(own_code):
    table = {"runs": [{"name": "a", "recipe": "my.yaml", "overrides": ["reward.weights={'my_rewards:darkness': 1}"]}]}
    with pytest.raises(ValueError, match=r"^run 'a': reward\.weights: .*--trust-code"):
        plan(table)
    (job,) = plan(table, trust_code=True)
    assert "--trust-code" in job.command(own_code)
    assert parse(job.command(own_code)[4:]).trust_code


def test_an_own_environment_trains(own_code, capsys):
    page = (ROOT / "docs" / "extending.md").read_text()
    words = shlex.split(next(line for line in page.splitlines() if "env.name=my_envs" in line))[1:]
    assert words.pop() == "--trust-code"
    trusted(*words, *SMALL, "policy.num_steps=4", "--run", "run", "--quiet")
    assert "finished: 1 iterations" in capsys.readouterr().out


def test_an_own_objective_trains(own_code, capsys):
    """The weights move, what it logs is logged, and its settings are checked like any other's."""
    page = (ROOT / "docs" / "extending.md").read_text()
    words = shlex.split(next(line for line in page.splitlines() if "objective=my_objectives" in line))[1:]
    assert words.pop() == "--trust-code"
    trusted(*words, *SMALL, "--run", "run", "--quiet")
    assert "finished: 1 iterations" in capsys.readouterr().out
    row = json.loads((own_code / "run/metrics.jsonl").read_text().splitlines()[1])
    assert row["policy/weight"] > 0
    assert row["optim/grad_norm"] > 0
    for setting, said in (("betta=1", "did you mean 'beta'"), ("beta=x", "valid number")):
        with pytest.raises(ValueError, match=said):
            recipes.load(
                "t2i_flow_grpo", ["algorithm.objective=my_objectives:Weighted", f"algorithm.objective.{setting}"], True
            )


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


def test_no_page_has_the_marks_of_a_merge():
    for page in (*PAGES, ROOT / "CHANGELOG.md"):
        assert not re.search(r"^(<<<<<<<|>>>>>>>)", page.read_text(), re.M), page


def test_the_metrics_of_the_page_on_failures_exist():
    """Those with a place-holder stand for a pattern of the glossary."""
    names = re.findall(
        r"`((?:eval|reward|policy|kl|critic|optim|advantage|rollout|perf)/[\w/]+)`",
        (ROOT / "docs/not_learning.md").read_text(),
    )
    assert len(set(names)) > 20
    for name in names:
        assert describe(name).meaning, name


def test_the_reference_holds_everything_public():
    """Each page of docs/api lists whole modules; every component of the registry and every rf.NAME is in one of them."""
    text = "".join(path.read_text() for path in (ROOT / "docs/api").glob("*.rst"))
    listed = set(re.findall(r"automodule:: (\S+)", text))
    assert all(importlib.util.find_spec(module) for module in listed)
    parts = {
        path.partition(":")[0] for kind, table in registry.TABLE.items() if kind != "policy" for path in table.values()
    }
    assert not parts - listed, "add these to a page of docs/api"
    for name, home in rf._HOMES.items():
        assert f"rf.{name} <{home}.{name}>" in text
        assert home in listed


def test_every_room_is_listed_for_strangers():
    """docs/concepts.md and CONTRIBUTING.md name every package; what a room of envs or rewards holds stands in its row."""
    for listed in (ROOT / "docs/concepts.md", ROOT / "CONTRIBUTING.md"):
        text = listed.read_text()
        for folder in {path.parent for top in ("rlflow", "envs", "rewards") for path in (ROOT / top).rglob("*.py")}:
            name = folder.relative_to(ROOT).as_posix()
            assert f"{name}/" in text or f"{folder.name}/" in text or name == "rlflow", f"{name} in {listed.name}"


def test_every_finding_is_explained():
    """They download packages, so no test runs them."""
    scripts = {path.name for path in (ROOT / "findings").glob("*.sh")}
    assert scripts == set(re.findall(r"^\| `(\w+\.sh)`", (ROOT / "findings/README.md").read_text(), re.M))


def test_every_setting_is_documented():
    """docs/cli.md names every key of every section."""
    import dataclasses

    text = (ROOT / "docs" / "cli.md").read_text()
    for section in dataclasses.fields(Config):
        value = getattr(Config(), section.name)
        if dataclasses.is_dataclass(value):
            for f in dataclasses.fields(value):
                assert f"`{f.name}" in text, f"{section.name}.{f.name} is not in docs/cli.md"
    for learner in (SACConfig, FlowQConfig, RewardGradientConfig):
        for f in dataclasses.fields(learner):
            assert f"`{f.name}`" in text, f"algorithm.{f.name} of {learner.__name__} is not in docs/cli.md"


def test_every_component_is_listed_by_the_command_line():
    from rlflow.commands.list import KINDS, about

    for kind in KINDS.values():
        assert all(about(kind).values()), f"a {kind} has no docstring"
    assert set(registry.TABLE["steps"]) <= set(re.findall(r"`(\w+)`", (ROOT / "docs" / "cli.md").read_text()))
