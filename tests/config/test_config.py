"""A config is checked completely before anything starts, and every one of its keys does something."""

import dataclasses
import json
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import yaml

from rlflow import ranges
from rlflow.config import algorithms, recipes, schema
from rlflow.config import parse as parsing
from rlflow.config.algorithms import OptimizerConfig
from rlflow.config.parse import MAY_CHANGE_ON_RESUME, difference, parse, saved
from rlflow.config.schema import Config, WandbConfig
from rlflow.config.values import merge, read_yaml, set_value
from rlflow.rl.optim import AdamW

RECIPE = "t2i_flow_grpo"


def load(*overrides: str, **more: typing.Any) -> Config:
    return recipes.load(RECIPE, ["train.iterations=1", *overrides], **more)


# -- what is refused ------------------------------------------------------------------------------

REFUSED = {
    # misspelt, at every depth
    "polcy.field=x": r"^polcy: no such setting; did you mean 'policy'\?$",
    "policy.kernle=cps": r"^policy\.kernle: no such setting; did you mean 'kernel'\?$",
    "policy.kernel=flow_sed": r"^policy\.kernel: unknown kernel 'flow_sed'; did you mean 'flow_sde'\?$",
    "policy.kernel={name: cps, etta: 0.5}": r"^policy\.kernel\.etta: cps has no such setting; did you mean 'eta'\?$",
    "algorithm.optimizer.lrr=1": r"^algorithm\.optimizer\.lrr: no such setting; did you mean 'lr'\?$",
    "algorithm.kl.beat=1": r"^algorithm\.kl\.beat: no such setting; did you mean 'beta'\?$",
    "reward.weights={shapes_sotf: 1}": r"^reward\.weights: unknown reward 'shapes_sotf'; did you mean 'shapes_soft'\?$",
    "eval.metrics={a: cnn_jugde}": r"^eval\.metrics: unknown reward 'cnn_jugde'; did you mean 'cnn_judge'\?$",
    "eval.metrics={calls: cnn_judge}": r"^eval\.metrics: 'calls' is a column that every evaluation has: call this one",
    "eval.metrics={key: cnn_judge}": r"^eval\.metrics: 'key' is a column",
    "env.name=promt": r"^env\.name: unknown env 'promt'; did you mean 'prompt'\?$",
    "eval.solver=heum": r"^eval\.solver: unknown solver 'heum'; did you mean 'heun'\?$",
    "advantage=gea": r"^advantage: unknown advantage 'gea'; did you mean 'gae'\?$",
    # wrong type
    "train.iterations=2.5": r"^train\.iterations: Input should be a valid integer, got 2\.5$",
    "train.iterations=true": r"^train\.iterations: Input should be a valid integer, got True$",
    'policy.num_steps="8"': r"^policy\.num_steps: Input should be a valid integer, got '8'$",
    "algorithm.optimizer.lr=fast": r"^algorithm\.optimizer\.lr: Input should be a valid number, got 'fast'$",
    "policy.guidance=2": r"^policy\.guidance: Input should be a name or \{name: \.\.\., setting: \.\.\.\}, got 2$",
    "algorithm={name: sac, offline: {demos: 3}}": r"^algorithm\.offline\.demos: Input should be a valid string, got 3$",
    "algorithm.objective.low=true": r"^algorithm\.objective\.low: Input should be a valid number, got True$",
    "policy.kernel=5": r"^policy\.kernel: Input should be a name or \{name: .* got 5$",
    "policy.precision=float16": r"^policy\.precision: Input should be 'float32', .* got 'float16'$",
    "advantage.std=epoc": r"^advantage\.std: Input should be 'group', 'epoch' or 'none', got 'epoc'$",
    "train=5": r"^train: .*got 5$",
    "reward.weights={shapes_soft: a lot}": r"^reward\.weights\.shapes_soft: Input should be a valid number",
    # impossible
    "policy.kernel={name: cps, eta: 1.8}": r"^policy\.kernel: CPS needs 0 < eta <= 1, got 1\.8",
    "env.group_size=1": r"^env\.group_size: a group of 1 has no group advantage; set it to 2 or more",
    "steps={name: window, size: 9}": r"^steps: window needs 9 usable steps but 8 steps less skip_last=2 leave 6: raise",
    "steps={name: random_window, size: 4, stop: 3}": r"^steps: random_window of size 4 does not fit",
    "steps={name: window, compress: 2}": r"^steps: compress must be in \(0, 1\], got 2",
    "policy.grid={name: from_sigmas, sigmas: [1, 0.4, 0.5, 0]}": r"^policy\.grid: a time grid must increase",
    "algorithm.num_minibatches=9": r"^algorithm\.num_minibatches: 9 is more than env\.num_groups = 8",
    "algorithm.critic_warmup=1": r"^algorithm\.critic_warmup: group advantages have no critic; set it to 0",
    "algorithm.objective.gamma=1.1": r"^algorithm\.objective\.gamma: must be in \[0, 1\], got 1.1",
    "algorithm.anchor=-1": r"^algorithm\.anchor: must not be negative, got -1",
    "likelihood.published=true": r"^likelihood: the published ratio is a joint mean: set joint=true and reduce=mean",
    "algorithm.objective.low=0": r"^algorithm\.objective\.low: must be positive, got 0",
    "algorithm.kl.beta=-1": r"^algorithm\.kl\.beta: must not be negative, got -1",
    "algorithm.ema_decay=1": r"^algorithm\.ema_decay: must be in \[0, 1\), got 1",
    "train.iterations=0": r"^train\.iterations: must be positive, got 0$",
    "train.minutes=.nan": r"^train\.minutes: must be positive, got nan$",
    "train.minutes=-1": r"^train\.minutes: must be positive, got -1",
    "eval.every=-1": r"^eval\.every: must not be negative, got -1$",
    "reward.weights={}": r"^reward\.weights: name at least one reward with a weight that is not 0$",
    "reward.weights={shapes_soft: 0}": r"^reward\.weights: name at least one reward",
    # numbers that would run and mean nothing
    "algorithm.optimizer.max_bad_steps=0": r"^algorithm\.optimizer\.max_bad_steps: must be positive, got 0$",
    "algorithm.optimizer.max_grad_norm=-1": r"^algorithm\.optimizer\.max_grad_norm: must not be negative, got -1",
    "algorithm.optimizer.final=7": r"^algorithm\.optimizer\.final: must be in \[0, 1\], got 7",
    "algorithm.optimizer.eps=-1": r"^algorithm\.optimizer\.eps: must be positive, got -1",
    "algorithm.optimizer.lr=.inf": r"^algorithm\.optimizer\.lr: must be in \(0, 1\], got inf$",
    "algorithm.optimizer.eps=.inf": r"^algorithm\.optimizer\.eps: must be finite, got inf$",
    "algorithm.optimizer.lr=1e38": r"^algorithm\.optimizer\.lr: must be in \(0, 1\], got 1e\+38",
    "algorithm.critic_lr=2": r"^algorithm\.critic_lr: must be in \(0, 1\], got 2",
    "algorithm.optimizer.weight_decay=1e38": r"^algorithm\.optimizer\.weight_decay: must be at most 1e30, got",
    "algorithm.optimizer.betas=[0.9, -1e40]": r"^algorithm\.optimizer\.betas: must be in \[0, 1\), got -1e\+40",
    "algorithm.objective.high=1e300": r"^algorithm\.objective\.high: must be at most 1e30, got 1",
    "policy.kernel={name: flow_sde, a: 1e200}": r"^policy\.kernel\.a: must be at most 1,000, got",
    "policy.grid={name: from_sigmas, sigmas: [-1e31, 0]}": r"^policy\.grid\.sigmas: must be at most 1e30, got",
    "reward.weights={brightness: -1e38}": r"^reward\.weights\.brightness: must be at most 1e30, got -1",
    "train.seed=1e29": r"^train\.seed: must be in \[0, 2\*\*63\), got 9999",
    "eval.seed=-1": r"^eval\.seed: must be in \[0, 2\*\*63\), got -1$",
    "algorithm.optimizer.betas=[2, 3]": r"^algorithm\.optimizer\.betas: must be in \[0, 1\), got 2",
    "algorithm.critic_lr=-1": r"^algorithm\.critic_lr: must be in \(0, 1\], got -1",
    "algorithm.objective.target_kl=-1": r"^algorithm\.objective\.target_kl: must be positive, got -1",
    "algorithm.objective=cilp": r"^algorithm\.objective: unknown objective 'cilp'; did you mean 'clip'\?$",
    # another place now
    "algorithm.clip_low=0.1": r"^algorithm\.clip_low: is now algorithm\.objective\.low$",
    "algorithm.denoising_gamma=0.9": r"^algorithm\.denoising_gamma: is now algorithm\.objective\.gamma$",
    "algorithm.guard=true": r"^algorithm\.guard: set algorithm\.objective to guard$",
    "algorithm.nft={beta: 1}": r"^algorithm\.nft: set algorithm\.objective to \{name: nft, \.\.\.\}$",
    "advantage={name: gae, gamma: 0.9}": r"^advantage\.gamma: the discount, of a primitive step, is env\.gamma: set it there$",
    "env.gamma=5": r"^env\.gamma: must be in \[0, 1\], got 5",
    "advantage={name: gae, lam: -1}": r"^advantage\.lam: must be in \[0, 1\], got -1",
    "advantage={name: group, clip: -1}": r"^advantage\.clip: must be positive, got -1",
    "advantage={name: group, eps: -1}": r"^advantage\.eps: must not be negative, got -1",
    "policy.guidance={name: cfg_zero, scale: 2.0, zero_until: 3}": r"^policy\.guidance\.zero_until: must be in \[0, 1\]",
    "seed=3": r"^seed: no such setting; did you mean train\.seed or eval\.seed\?$",
    # another learner
    "algorithm.name=sacc": r"^algorithm\.name: unknown algorithm 'sacc'; did you mean 'sac'\?$",
    "algorithm=sacc": r"^algorithm\.name: unknown algorithm 'sacc'; did you mean 'sac'\?$",
    "algorithm=sac": r"^advantage: algorithm=sac does not read it",
    "algorithm={name: sac, tua: 1}": r"^algorithm\.tua: no such setting; did you mean 'tau'\?$",
    "algorithm={name: sac, clip_low: 1}": r"^algorithm\.clip_low: no such setting",
    "algorithm={name: sac, tau: 2.0}": r"^algorithm\.tau: must be in \[0, 1\], got 2",
    "algorithm={name: sac}": r"^advantage: algorithm=sac does not read it",
    "train.stop_when={metric: reward/mean}": r"^train\.stop_when\.0: give one of below, above and falls, got none$",
    "train.stop_when={metric: reward/mean, below: 1, falls: 1}": r"^train\.stop_when\.0: give one of .*got below and falls$",
    "train.stop_when=[{metric: kl/ref, above: 1}, {below: 1}]": r"^train\.stop_when\.1\.metric: Field required",
    "train.stop_when={metrc: kl/ref, above: 1}": r"train\.stop_when\.0\.metrc: no such setting; did you mean 'metric'\?",
    "train.stop_when={metric: judge, below: 0.4}": r"^train\.stop_when\.0\.metric: nothing logs 'judge': .* begins with eval/, ",
    "train.stop_when={metric: eval/heldout/jugde, below: 0.4}": r"^train\.stop_when\.0\.metric: .*did you mean 'eval/heldout/judge'",
    "train.stop_when={metric: kl/ref, falls: 0}": r"^train\.stop_when\.falls: must be positive, got 0",
    "train.stop_when={metric: kl/ref, below: .nan}": r"^train\.stop_when\.below: must be finite, got nan",
    "policy.select=best_of": r"^policy\.select\.scorer: best_of needs one: name a reward \(images\), or a critic \(robots\)$",
    "policy.select={name: best_of, scorer: ocr}": r"^policy\.select\.num: best_of needs this setting$",
    "policy.select={name: best_off, num: 2, scorer: ocr}": r"^policy\.select: unknown select 'best_off'; did you mean",
    "policy.select={name: best_of, num: 0, scorer: ocr}": r"^policy\.select\.num: must be positive, got 0$",
    "policy.select={name: best_of, num: 2, called: x, scorer: ocr}": r"^policy\.select\.called: best_of has no such setting",
    "policy.select={name: best_of, num: 2, scorer: cnn_jugde}": r"^policy\.select\.scorer: unknown reward 'cnn_jugde'; did",
    "policy.select={name: best_of, num: 2, scorer: {name: jpeg, x: 1}}": r"^policy\.select\.scorer: .* of reward\.settings\.jpeg$",
    # not an assignment
    "train": r"^override 'train': write section\.key=value$",
    "=5": r"^override '=5': write section\.key=value$",
    "train.seed.deeper=5": r"^override 'train\.seed\.deeper=5': 'seed' is a value, not a section$",
}


@pytest.mark.parametrize("override", REFUSED)
def test_refused_with_path_reason_and_nearest_name(override: str) -> None:
    values = recipes.read(RECIPE) | {"train": {"iterations": 1, "seed": 0}}
    with pytest.raises(ValueError, match=REFUSED[override]):
        parse_with(values, override)


def parse_with(values: dict, override: str) -> Config:
    set_value(values, override)
    return parse(values)


def test_every_problem_is_listed_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)env\.group_siz: .*\n.*train\.sede: "):
        load("env.group_siz=1", "train.sede=1")


def test_guard_needs_ratios_of_single_steps() -> None:
    with pytest.raises(ValueError, match=r"^algorithm\.objective: GRPO-Guard .*use likelihood\.joint=false with it$"):
        load("algorithm.objective=guard", "likelihood.joint=true")


def test_one_critic_cannot_normalise_each_rewards_advantage() -> None:
    with pytest.raises(ValueError, match=r"^reward\.normalize: .*set reward\.normalize=reward, or advantage=group$"):
        load("reward.normalize=advantage", "advantage=gae")
    assert load("reward.normalize=advantage").reward.normalize == "advantage"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("reward.scale=true", r"^reward\.scale: the replay of algorithm=sac .* std that still moves"),
        ("algorithm.n_step=3", r"^algorithm\.n_step: no such setting"),
    ],
)
def test_what_a_replay_would_keep_wrongly_is_refused(override: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        recipes.load("robot_reach_sac", [override])


def test_the_largest_number_is_allowed() -> None:
    assert load("policy.max_kappa=1.0e+30").policy.max_kappa == ranges.LARGEST


def test_a_budget_is_needed() -> None:
    with pytest.raises(ValueError, match=r"train: give a budget, train\.iterations=N or train\.minutes=M"):
        load("train.iterations=", "train.minutes=")


def test_foreign_names_need_trust() -> None:
    with pytest.raises(ValueError, match=r"^policy\.kernel: kernel 'os:getcwd' is code outside rlflow"):
        load("policy.kernel=os:getcwd")
    with pytest.raises(ValueError, match=r"^env\.name: env 'os:getcwd' is code outside rlflow"):
        load("env.name=os:getcwd")


def test_unknown_recipes_say_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown recipe 't2i_flow_grop'; did you mean 't2i_flow_grpo'\?"):
        recipes.load("t2i_flow_grop")
    with pytest.raises(ValueError, match=r"no recipe file 'absent\.yaml'"):
        recipes.load("absent.yaml")


# -- what is understood ---------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4", "10e-5", ".1e-3"])
def test_scientific_notation_is_a_number(text: str) -> None:
    """YAML 1.1 reads 1e-4 as text; on the command line, in a file and inside lists it is a number."""
    assert load(f"algorithm.optimizer.lr={text}").algorithm.optimizer.lr == 1e-4
    assert load(f"algorithm.optimizer={{lr: {text}}}").algorithm.optimizer.lr == 1e-4
    assert read_yaml(f"a: [{text}, {{b: {text}}}]") == {"a": [1e-4, {"b": 1e-4}]}


def test_scientific_whole_numbers_count() -> None:
    assert load("train.iterations=1e3").train.iterations == 1000


def test_text_stays_text() -> None:
    """Names that look like numbers or words of YAML keep their meaning where text is quoted."""
    assert read_yaml('a: "12"\nb: inf\nc: nan\nd: e5\ne: 1_000') == {
        "a": "12",
        "b": "inf",
        "c": "nan",
        "d": "e5",
        "e": 1000,
    }
    assert load("about='1.5'").about == "1.5"


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.minutes=2", "train.minutes", 2.0),
        ("algorithm.objective.target_kl=.5", "algorithm.objective", {"name": "clip", "target_kl": 0.5}),
        ("policy.kernel=ancestral", "policy.kernel", "ancestral"),
        ("policy.kernel.a=0.9", "policy.kernel", {"name": "flow_sde", "a": 0.9}),
        ("steps.skip_last=2", "steps", {"name": "all_but_last", "skip_last": 2}),
        ("reward.weights.brightness=0.1", "reward.weights.brightness", 0.1),
        ("algorithm.optimizer.betas=[0.5, 0.6]", "algorithm.optimizer.betas", [0.5, 0.6]),
        ("eval.prompts=a=b.txt", "eval.prompts", str(Path("a=b.txt").absolute())),
    ],
)
def test_an_override_changes_exactly_its_key(override: str, path: str, value: object) -> None:
    """Nothing is ignored, and nothing else moves."""
    base = recipes.read(RECIPE)
    base["train"] = {"iterations": 1}
    base.setdefault("reward", {}).setdefault("weights", {"shapes_soft": 0.5})
    changed = yaml.safe_load(yaml.safe_dump(base))
    set_value(changed, override)
    before, after = parse(base).to_dict(), parse(changed).to_dict()
    found = after
    for part in path.split("."):
        found = found[part]
    assert found == value
    (line,) = _all_differences(before, after)
    assert line.startswith((f"{path}: ", f"{path}."))


def _all_differences(before: dict, after: dict) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parsing, "MAY_CHANGE_ON_RESUME", ())
        return difference(before, after)


def test_merge_replaces_a_component_and_deepens_a_section() -> None:
    base = {"policy": {"kernel": {"name": "flow_sde", "a": 0.7}, "num_steps": 8}, "steps": "all"}
    merged = merge(base, {"policy": {"kernel": {"name": "cps"}}, "steps": {"name": "window"}})
    assert merged == {"policy": {"kernel": {"name": "cps"}, "num_steps": 8}, "steps": {"name": "window"}}
    assert merge(base, {"policy": {"kernel": {"a": 0.5}}})["policy"]["kernel"] == {"name": "flow_sde", "a": 0.5}
    assert base["policy"]["kernel"] == {"name": "flow_sde", "a": 0.7}, "the base is not changed"


def test_another_simulator_keeps_the_rest_of_the_section() -> None:
    """A recipe that names only another simulator runs with its base's rows, horizon, chunk and discount."""
    base, heir = recipes.load("robot_reinflow"), recipes.load("robot_reinflow_halfcheetah")
    assert heir.env == dataclasses.replace(base.env, name="halfcheetah")


def test_a_table_of_names_is_replaced_and_a_single_weight_is_added() -> None:
    """An inherited reward would be asked for scores it cannot give, and mask every sample (t2i_ocr once did)."""
    base = {"reward": {"weights": {"shapes_soft": 1.0}, "timeout_s": 5.0}, "eval": {"metrics": {"strict": "a"}}}
    merged = merge(base, {"reward": {"weights": {"ocr": 1.0}}, "eval": {"metrics": {"soft": "b"}}})
    assert merged == {"reward": {"weights": {"ocr": 1.0}, "timeout_s": 5.0}, "eval": {"metrics": {"soft": "b"}}}
    assert set(recipes.load("t2i_ocr").reward.weights) == {"ocr"}
    assert set(load("reward.weights.brightness=1").reward.weights) > {"brightness"}


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_parses_and_says_what_it_is(name: str) -> None:
    assert recipes.read(name)["about"]
    config = recipes.load(name)
    assert parse(yaml.safe_load(config.to_yaml())) == config, "the resolved config is the same run"


def test_a_recipe_file_inherits_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: t2i_mixgrpo\npolicy: {kernel: {name: cps, eta: 0.5}}\ntrain: {minutes: 1e-1}\n")
    config = recipes.load(str(path), ["steps.size=2"])
    assert config.policy.kernel == {"name": "cps", "eta": 0.5}
    assert config.train.minutes == 0.1
    assert config.steps["name"] == "window"
    assert config.steps["size"] == 2


# -- no dead keys ---------------------------------------------------------------------------------


def sections() -> Iterator[type]:
    """Every dataclass of the config, but for what several learners share."""
    return (
        c
        for module in (schema, algorithms)
        for c in vars(module).values()
        if dataclasses.is_dataclass(c) and c.__module__ == module.__name__ and not c.__subclasses__()
    )


def test_the_optimizer_section_is_the_optimizer() -> None:
    """It is passed on whole: the same names, types and (but for the recipe's warm-up) defaults."""
    mine, theirs = typing.get_type_hints(OptimizerConfig), typing.get_type_hints(AdamW)
    assert {k: v for k, v in mine.items() if k != "__pydantic_config__"} == theirs


READ_ELSEWHERE = {
    "about": "`rlflow list recipes` prints it",
    "video": "episodes are filmed, images are not",
    "name": "picks the section, whose type picks the learner",
}


def test_every_key_is_read_by_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train one iteration and watch: a key that nobody reads would be a dead one."""
    import torch

    from rlflow.envs.captions import scenes
    from rlflow.models.dit import DiT
    from rlflow.models.io import save_field
    from rlflow.models.mlp import MLPField
    from rlflow.train.trainer import Trainer

    field = save_field(DiT(scenes.VOCAB, size=8, width=16, depth=1, heads=2), tmp_path / "field")
    config = load(
        f"policy.field={field}",
        "env.num_groups=2",
        "eval.num=4",
        "eval.metrics={brightness: brightness}",
        "train.stop_when={metric: kl/ref, above: 9}",
        "train.passes=auto",
    )
    seen: set[tuple[str, str]] = set()
    watching = True

    def watch(cls: type) -> None:
        def read(self: object, name: str) -> object:
            if watching:
                seen.add((cls.__name__, name))
            return object.__getattribute__(self, name)

        monkeypatch.setattr(cls, "__getattribute__", read)

    real = Config.to_dict

    def unseen(self: Config) -> dict:
        nonlocal watching
        watching = False
        try:
            return real(self)
        finally:
            watching = True

    monkeypatch.setattr(Config, "to_dict", unseen)
    real_load = recipes.load

    def load_unseen(*arguments: typing.Any) -> Config:
        """So does a copy of the config."""
        nonlocal watching
        watching = False
        try:
            return real_load(*arguments)
        finally:
            watching = True

    monkeypatch.setattr(recipes, "load", load_unseen)
    monkeypatch.setitem(sys.modules, "wandb", MagicMock())

    def parse_unseen(values: dict, trust: bool) -> Config:
        """The checks read everything: what counts is the run."""
        nonlocal watching
        watching = False
        try:
            return parse(values, trust)
        finally:
            watching = True

    for cls in sections():
        watch(cls)
    torch.set_num_threads(1)
    Trainer(config, tmp_path / "run", quiet=True).fit()
    from rlflow.envs.demos.dataset import Episode, write_demos

    obs, action = {"state": torch.zeros(5, 2), "goal": torch.ones(5, 2)}, torch.zeros(5, 2)
    episode = Episode(obs, action, torch.zeros(5), terminated=True, truncated=False)
    write_demos(tmp_path / "demos", [episode], {"name": "toy_reach"}, {})
    few = ["train.iterations=1", "eval.num=2", "env.num_groups=4", "algorithm.start=8", "algorithm.batch_size=4"]
    few += ["train.wandb=true"]
    few += [f"algorithm.offline={{demos: {tmp_path / 'demos'}, clone: 1, updates: 1}}"]
    few += [f"imitation={{demos: {tmp_path / 'demos'}, fits: 1, batch_size: 4}}"]
    Trainer(recipes.load("robot_reach_sac", few), tmp_path / "off_policy", quiet=True).fit()
    clone = [*few[:5], "train.minutes=", "env.name=toy_reach", "env.settings={}", "env.horizon=1", "reward.scale=false"]
    clone += [f"algorithm.offline={{demos: {tmp_path / 'demos'}, clone: 1, updates: 1}}"]
    Trainer(recipes.load("robot_fql", clone), tmp_path / "extracted", quiet=True).fit()
    torch.manual_seed(0)
    base = save_field(MLPField(4, (2, 2), 8), tmp_path / "base")
    few = ["train.iterations=1", "train.minutes=", "eval.num=2", "algorithm.start=0", "algorithm.batch_size=4"]
    few += ["env.name=toy_reach", "env.settings={}", "env.horizon=1"]
    frozen = [f"env.frozen={{policy: {base}, num_steps: 2}}", "algorithm.updates_per_step=0.25"]
    Trainer(recipes.load("robot_dsrl", [*few, *frozen]), tmp_path / "frozen", quiet=True).fit()
    paid = [f"policy.field={base}", "algorithm.states=4", "algorithm.copies=2"]
    Trainer(recipes.load("robot_ogpo", [*few, *paid]), tmp_path / "paid", quiet=True).fit()
    few = ["train.iterations=1", "train.minutes=", "eval.num=2", "env.num_groups=2", "reward.weights={brightness: 1}"]
    Trainer(recipes.load("t2i_draft", few), tmp_path / "gradient", quiet=True).fit()
    keys = {(cls.__name__, f.name) for cls in sections() for f in dataclasses.fields(cls)}
    dead = sorted(key for key in keys - seen if key[1] not in READ_ELSEWHERE)
    assert not dead


SAVED = json.loads((Path(__file__).parent / "saved_configs.json").read_text())
"""config.yaml of each recipe as the version before objectives wrote it."""


CHANGED = {
    "t2i_fpo": [
        "likelihood={name: cfm, draws: 4, supervise: eps}",
        "algorithm.kl.beta=0",
        "algorithm.optimizer.lr=1e-4",
    ],
    "robot_reinflow_shortcut_k1": [
        "env.horizon=250",
        "algorithm.optimizer.lr=3e-4",
        "algorithm.ema_decay=0.99",
        "train.minutes=5",
        "train.iterations=",
        "eval.every=30",
    ],
}
"""What a recipe said then, where it says something else now."""


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_run_is_the_run_of_todays_recipe(name: str) -> None:
    """It resumes, and evaluates as it did."""
    today = recipes.load(name, CHANGED.get(name, ())).to_dict()
    assert not difference(SAVED[name], today)
    assert not difference(parse(saved(SAVED[name])).to_dict(), today)


def test_a_saved_run_of_another_objective_is_not() -> None:
    """Translation loses nothing: what differed before differs still."""
    old = SAVED["robot_dppo"]
    for key, value in (("clip_low", 0.1), ("target_kl", 0.1), ("clip_base", None), ("trust_region", "spo")):
        changed = old | {"algorithm": old["algorithm"] | {key: value}}
        (line,) = difference(changed, recipes.load("robot_dppo").to_dict())
        assert line.startswith("algorithm.objective")


def test_what_may_change_on_resume_exists() -> None:
    values = load().to_dict()
    for path in MAY_CHANGE_ON_RESUME:
        node: typing.Any = values
        for part in re.sub(r"settings\..*", "settings", path).split("."):  # the rest is a component's own
            assert part in node, path
            node = node[part]


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (["train.wandb=false"], None),
        (["train.wandb=true"], WandbConfig()),
        (["train.wandb.project=mine", "train.wandb.tags=[a, b]"], WandbConfig(project="mine", tags=["a", "b"])),
        (["train.wandb=true", "train.wandb.group=g"], WandbConfig(group="g")),
    ],
)
def test_wandb_is_on_or_off_or_says_where(values, found):
    """And reads back from config.yaml as it was."""
    config = load(*values)
    assert config.train.wandb == found
    assert parse(yaml.safe_load(config.to_yaml())).train.wandb == found


def test_a_wrong_setting_of_wandb_is_named():
    with pytest.raises(ValueError, match=r"train\.wandb\.projct: no such setting; did you mean 'project'"):
        load("train.wandb.projct=x")
