"""The loop: what a run folder holds, what the numbers in it mean, and what ends a run."""

import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlflow.config import recipes
from rlflow.config.algorithms import AlgorithmConfig, FlowQConfig, OffPolicyConfig, OGPOConfig, SACConfig
from rlflow.config.parse import parse
from rlflow.envs.demos.dataset import Episode, write_demos
from rlflow.envs.sim import SimEnv
from rlflow.envs.simulators.toy import ToyReach
from rlflow.evaluation.images import Evaluation
from rlflow.models.io import load_field
from rlflow.report.metrics_file import read_metrics
from rlflow.rl.optim import NonFiniteError
from rlflow.train.callbacks import Callback
from rlflow.train.checkpoint import Checkpoints
from rlflow.train.trainer import Trainer
from rlflow.types import Rollout

Make = Callable[..., Trainer]


def train_rows(run: Path) -> list[dict]:
    return [row for row in read_metrics(run) if row["kind"] == "train"]


def evals(run: Path) -> list[dict]:
    return [row for row in read_metrics(run) if row["kind"] == "eval"]


def test_a_run_folder_holds_everything(tmp_path: Path, trainer: Make) -> None:
    run = tmp_path / "run"
    trainer(run, "eval.every=1", "train.tensorboard=true", "train.report=true", "eval.grid=4").fit()
    for name in ("config.yaml", "run.json", "metrics.jsonl", "report.html", "checkpoints/last", "checkpoints/best"):
        assert (run / name).exists(), name
    assert list((run / "tensorboard").iterdir())
    assert [row["iteration"] for row in evals(run)] == [0, 1, 2]
    for iteration in (0, 1, 2):
        scores = load_file(run / f"samples/eval_{iteration:06d}.safetensors")
        assert {"brightness", "base_distance", "caption_id", "key"} == set(scores)
        assert all(len(v) == 6 for v in scores.values())
        assert (run / f"samples/eval_{iteration:06d}.png").stat().st_size > 0
    head = json.loads((run / "run.json").read_text())
    assert head["recipe"] == "t2i_flow_grpo"
    assert head["weights"] == "ema"


def test_the_saved_config_is_the_run(tmp_path: Path, trainer: Make) -> None:
    """config.yaml is complete, equals what was asked for, and trains the same weights again."""
    first = trainer(tmp_path / "a", "algorithm.optimizer.lr=1e-3")
    first.fit()
    saved = yaml.safe_load((tmp_path / "a/config.yaml").read_text())
    assert parse(saved) == first.config
    assert saved["algorithm"]["optimizer"]["lr"] == 1e-3
    again = Trainer(str(tmp_path / "a/config.yaml"), tmp_path / "b", quiet=True)
    again.fit()
    for name, value in first.policy.state_dict().items():
        assert torch.equal(value, again.policy.state_dict()[name]), name


def test_costs_add_up(tmp_path: Path, trainer: Make) -> None:
    run = tmp_path / "run"
    trainer(run, "train.iterations=3", "eval.every=2", "algorithm.kl.beta=0").fit()
    rows = train_rows(run)
    # 8 rows; rollout 6 calls, update 3 x 5 pairs
    assert [row["perf/network_rows"] for row in rows] == [8 * (6 + 15)] * 3
    assert [row["cost/network_rows_total"] for row in rows] == [168, 336, 504]
    seconds = [row["cost/train_seconds_total"] for row in rows]
    parts = [row["time/rollout"] + row["time/update"] for row in rows]
    assert seconds[-1] == pytest.approx(sum(parts))
    assert [row["cost/network_rows_total"] for row in evals(run)] == [0, 336, 504]
    assert [row["cost/samples_total"] for row in evals(run)] == [0, 16, 24]


def test_minutes_end_a_run(tmp_path: Path, trainer: Make) -> None:
    """The budget counts training only, and is spent when the run ends."""
    made = trainer(tmp_path / "run", "train.iterations=", "train.minutes=0.002")
    made.fit()
    assert made.seconds >= 0.12
    assert (
        train_rows(tmp_path / "run")[-2:-1] == [] or train_rows(tmp_path / "run")[-2]["cost/train_seconds_total"] < 0.12
    )
    assert evals(tmp_path / "run")[-1]["iteration"] == made.iteration
    assert not made.interrupted


def test_callbacks_see_every_iteration(tmp_path: Path, trainer: Make) -> None:
    seen: list[tuple[int, float]] = []
    trainer(tmp_path / "run", callbacks=[lambda t, i, m: seen.append((i, m["reward/mean"]))]).fit()
    assert seen == [(row["iteration"], row["reward/mean"]) for row in train_rows(tmp_path / "run")]


class Diary(Callback):
    """Writes down what it is called for."""

    def __init__(self) -> None:
        self.lines: list[tuple[object, ...]] = []

    def on_start(self, trainer: Trainer) -> None:
        assert (trainer.run / "config.yaml").exists()
        self.lines.append(("start",))

    def on_rollout(self, trainer: Trainer, rollout: Rollout) -> None:
        self.lines.append(("rollout", tuple(rollout.reward.shape)))

    def on_iteration(self, trainer: Trainer, iteration: int, metrics: dict[str, float]) -> None:
        self.lines.append(("iteration", iteration))

    def on_evaluation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        assert list((trainer.run / "samples").glob(f"eval_{trainer.iteration:06d}.png"))
        self.lines.append(("evaluation", trainer.iteration, "eval/heldout/brightness" in metrics))

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        assert (folder / "model.safetensors").exists() or list(folder.iterdir())
        self.lines.append(("checkpoint", folder.name))

    def on_end(self, trainer: Trainer) -> None:
        assert (trainer.run / "model").is_dir()
        self.lines.append(("end", trainer.interrupted))


def test_a_callback_is_called_at_every_turning_point(tmp_path: Path, trainer: Make) -> None:
    """In this order; what it does not override does nothing, and a function may stand beside it."""
    diary, functions = Diary(), []
    trainer(tmp_path / "run", callbacks=[diary, Callback(), lambda t, i, m: functions.append(i)]).fit()
    begun = [("start",), ("checkpoint", "000000"), ("evaluation", 0, True)]  # the first is the best so far
    trained = [("rollout", (1, 8)), ("iteration", 1), ("rollout", (1, 8)), ("iteration", 2)]
    assert diary.lines[:7] == begun + trained
    assert diary.lines[-3:] == [("evaluation", 2, True), ("checkpoint", "000002"), ("end", False)]
    assert functions == [1, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_checkpoints_and_returns(tmp_path: Path, trainer: Make, number: int) -> None:
    """The iteration is finished, saved and no evaluation delays the end; handlers are as before afterwards."""

    def send(made: Trainer, iteration: int, metrics: dict[str, float]) -> None:
        if iteration == 2:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    made = trainer(tmp_path / "run", "train.iterations=50", callbacks=[send])
    made.fit()
    assert made.interrupted
    assert made.iteration == 2
    assert Checkpoints(tmp_path / "run").load("last")[0] == 2
    assert [row["iteration"] for row in evals(tmp_path / "run")] == [0]
    assert signal.getsignal(number) is before


def test_a_second_signal_stops_at_once(tmp_path: Path, trainer: Make) -> None:
    def twice(made: Trainer, iteration: int, metrics: dict[str, float]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "run", callbacks=[twice]).fit()


def test_a_folder_in_use_is_refused(tmp_path: Path, trainer: Make) -> None:
    trainer(tmp_path / "run").fit()
    rows = read_metrics(tmp_path / "run")
    with pytest.raises(FileExistsError, match="--resume last, or another --run"):
        trainer(tmp_path / "run")
    assert read_metrics(tmp_path / "run") == rows


def test_nothing_is_written_before_the_config_is_right(tmp_path: Path, trainer: Make) -> None:
    """CPS has no noise in the last step; its path and the fix are named, and no folder is left behind."""
    with pytest.raises(ValueError, match=r"steps: CPS has zero std at step \[5\].*all_but_last"):
        trainer(tmp_path / "run", "policy.kernel=cps", "steps=all")
    with pytest.raises(ValueError, match=r"steps: CPS has kappa.*max_kappa"):
        trainer(tmp_path / "run", "policy.kernel={name: cps, eta: 0.01}")
    with pytest.raises(ValueError, match=r"policy.field: no checkpoint 'shpes'"):
        trainer(tmp_path / "run", "policy.field=shpes")
    with pytest.raises(ValueError, match=r"env.prompts: prompts 'scnes'"):
        trainer(tmp_path / "run", "env.prompts=scnes")
    assert not (tmp_path / "run").exists()


FROM_SIGMAS = "policy.grid={name: from_sigmas, sigmas: [1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0]}"


def test_a_start_that_must_fail_fails_before_a_folder_is_written(
    tmp_path: Path, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the folder would stand in the way of the next try."""
    run, prompts = tmp_path / "run", tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na red zeppelin\n")
    with pytest.raises(ValueError, match=r"eval.num_steps: .*6"):
        trainer(run, FROM_SIGMAS, "eval.num_steps=4")
    for key in ("env.prompts", "eval.prompts"):
        with pytest.raises(ValueError, match=rf"{key}: .*zeppelin"):
            trainer(run, f"{key}={prompts}")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        trainer(run, "train.wandb=true")
    assert not run.exists()


def test_a_folder_in_which_nothing_was_trained_can_be_used_again(
    tmp_path: Path, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that died in its first evaluation holds nothing to lose; the next one may even differ."""
    run = tmp_path / "run"

    def die(self: Trainer, result: Evaluation) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_keep", die)
        with pytest.raises(ZeroDivisionError):
            trainer(run).fit()
    assert (run / "config.yaml").exists()
    trainer(run, "eval.num=7").fit()
    assert [row["iteration"] for row in evals(run)] == [0, 2]
    assert yaml.safe_load((run / "config.yaml").read_text())["eval"]["num"] == 7
    with pytest.raises(FileExistsError):
        trainer(run)


def test_a_callers_dict_is_not_changed(tmp_path: Path, scenes_field: str) -> None:
    values = {"policy": {"field": scenes_field}, "train": {"iterations": 1}}
    Trainer(values, tmp_path / "run", overrides=["policy.num_steps=4", "train.seed=3"])
    assert values == {"policy": {"field": scenes_field}, "train": {"iterations": 1}}


def scripted(made: Trainer, scores: list[float]) -> Trainer:
    """Let evaluations give these scores by their first metric that is no distance, one after the other."""
    real, left = made.evaluator, iter(scores)
    assert real is not None

    def evaluate(weights: str) -> Evaluation:
        result = real(weights)
        name = next(n for n in result.scores if n != "base_distance")
        result.scores[name] = torch.full_like(result.scores[name], next(left))
        return result

    evaluate.state_dict, evaluate.load_state_dict = real.state_dict, real.load_state_dict
    made.evaluator = evaluate
    return made


@pytest.mark.parametrize("scores", [[0.3, 0.1, 0.9, 0.2, 0.5], [0.8, 0.1, 0.8, 0.2, 0.5], [0.1, 0.2, 0.3, 0.4, 0.5]])
@pytest.mark.parametrize("every", [1, 100])
@pytest.mark.parametrize("metric", ["strict", "mine"])
def test_best_is_the_best_evaluation(
    tmp_path: Path, trainer: Make, scores: list[float], every: int, metric: str
) -> None:
    """Wherever checkpoints fall, the start included; without a strict metric by the first of which more is better."""
    run = tmp_path / "run"
    metrics = f"{{base_distance: base_distance, {metric}: brightness, other: brightness}}"
    overrides = [f"train.checkpoint_every={every}", f"eval.metrics={metrics}"]
    scripted(trainer(run, "train.iterations=4", "eval.every=1", "train.keep=1", *overrides), scores).fit()
    best, state = Checkpoints(run).load("best")
    assert best == scores.index(max(scores))
    assert Checkpoints(run).best_score() == pytest.approx(max(scores))
    assert state["trainer"]["iteration"] == state["trainer"]["evaluated"] == best
    assert Checkpoints(run).load("last")[0] == 4


def test_ema_and_live_weights_are_apart(tmp_path: Path, trainer: Make) -> None:
    """Evaluation and the report use the EMA; the checkpoint holds both and neither overwrites the other."""
    made = trainer(tmp_path / "run", "algorithm.optimizer.lr=1e-2", "algorithm.ema_decay=0.5")
    made.fit()
    _, state = Checkpoints(tmp_path / "run").load()
    live, ema = state["policy"]["field.patch_in.weight"], state["weight_sets"]["ema/field.patch_in.weight"]
    assert torch.equal(live, made.policy.state_dict()["field.patch_in.weight"])
    assert not torch.equal(live, ema)
    model = load_file(tmp_path / "run/model/model.safetensors")
    assert torch.equal(model["patch_in.weight"], ema)


# -- rewards that fail ----------------------------------------------------------------------------

OWN = "rlflow_tests_rewards"


@pytest.fixture
def own_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module outside the package with rewards that fail."""
    (tmp_path / f"{OWN}.py").write_text(
        "def nothing(images):\n    return None\n\n\n"
        "def broken(images):\n    raise RuntimeError('no')\n\n\n"
        "def explodes(images):\n    return 1e30 * images.mean((1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return OWN


@pytest.mark.parametrize("name", ["nothing", "broken"])
def test_without_a_single_score_nothing_is_learnt(tmp_path: Path, trainer: Make, own_rewards: str, name: str) -> None:
    """All rewards masked: the run goes on, the weights stay, the mean is absent and not zero."""
    made = trainer(tmp_path / "run", f"reward.weights={{'{own_rewards}:{name}': 1}}", trust_code=True)
    before = {k: v.clone() for k, v in made.policy.state_dict().items()}
    made.fit()
    assert all(torch.equal(v, made.policy.state_dict()[k]) for k, v in before.items())
    for row in train_rows(tmp_path / "run"):
        assert row["rollout/masked_frac"] == row["reward/masked_frac"] == row[f"reward/{name}/masked_frac"] == 1
        assert math.isnan(row["reward/mean"])
        assert row["advantage/used_frac"] == 0


def test_a_reward_that_never_scores_is_said_once_and_reported(
    tmp_path: Path, trainer: Make, own_rewards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends well, since a service may be down for a while; but nobody can overlook it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made = trainer(
        tmp_path / "run", f"reward.weights={{'{own_rewards}:nothing': 1}}", "train.report=true", trust_code=True
    )
    with pytest.warns(UserWarning, match="iteration 1 has a score") as said:
        made.fit()
    assert len([w for w in said if "has a score" in str(w.message)]) == 1
    assert "beware: no score at all in 2 of 2 iterations" in (tmp_path / "run/report.html").read_text()


def test_a_run_that_ends_before_its_learner_begins_says_so(tmp_path: Path) -> None:
    """Decisions that `start` waits for did not come: the policy is the one it was, and nobody thinks it learnt."""
    small = ["env.num_groups=4", "env.horizon=2", "train.iterations=2", "eval.num=2", "eval.video=0"]
    small += ["algorithm.start=100", "train.report=false", "train.tensorboard=false"]
    with pytest.warns(UserWarning, match=r"never took a step in 2 iterations: it waits for algorithm.start"):
        Trainer("robot_reach_sac", tmp_path / "run", overrides=small, quiet=True).fit()


def test_dotted_paths_need_trust(tmp_path: Path, trainer: Make, own_rewards: str) -> None:
    with pytest.raises(ValueError, match=r"reward.weights: .*--trust-code"):
        trainer(tmp_path / "run", f"reward.weights={{'{own_rewards}:nothing': 1}}")


def poison_after(when: int) -> Callable[[Trainer, int, dict[str, float]], None]:
    """A callback after which every gradient is nan."""

    def callback(made: Trainer, iteration: int, metrics: dict[str, float]) -> None:
        if iteration == when:
            for parameter in made.algorithm.optimizer.parameters:
                parameter.register_hook(lambda grad: grad * torch.nan)

    return callback


@pytest.mark.parametrize("keep", [1, 3])
def test_non_finite_steps_end_the_run_and_the_checkpoints_before_them_stay(
    tmp_path: Path, trainer: Make, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    """Bad steps are skipped, counted, never saved and prune nothing; the run stops, says why, and is reported."""
    run, reported = tmp_path / "run", []
    monkeypatch.setattr("rlflow.report.report.write_report", reported.append)
    overrides = ["train.iterations=12", "train.checkpoint_every=1", f"train.keep={keep}", "train.report=true"]
    made = trainer(run, *overrides, "algorithm.optimizer.max_bad_steps=5", callbacks=[poison_after(3)])
    with pytest.raises(NonFiniteError, match=r"5 optimiser steps in a row.*--resume 2\); \[3\] may be spoilt$"):
        made.fit()
    assert [row["optim/skipped_steps"] for row in train_rows(run)] == [0, 0, 0, 2, 4]
    assert reported == [run]
    assert Checkpoints(run).load("last")[0] == 3
    assert Checkpoints(run).load(2)[1]["trainer"]["iteration"] == 2


def test_a_finite_but_absurd_step_spoils_no_earlier_checkpoint(tmp_path: Path, trainer: Make) -> None:
    """Weights of 1e30 are finite: that they do not train shows one step later, and one from before is still there."""
    overrides = ["train.iterations=12", "train.checkpoint_every=1", "train.keep=1", "eval.every=0"]

    def absurd(made: Trainer, iteration: int, metrics: dict[str, float]) -> None:
        if iteration == 3:
            with torch.no_grad():
                for parameter in made.algorithm.optimizer.parameters:
                    parameter.fill_(1e30)

    made = trainer(tmp_path / "run", *overrides, "algorithm.optimizer.max_bad_steps=2", callbacks=[absurd])
    with pytest.raises(NonFiniteError, match=r"--resume 2\); \[3\] may be spoilt"):
        made.fit()
    _, state = Checkpoints(tmp_path / "run").load(2)
    assert all(v.abs().max() < 100 for v in state["policy"].values() if v.is_floating_point())


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, trainer: Make) -> None:
    def overflow(made: Trainer, iteration: int, metrics: dict[str, float]) -> None:
        if iteration == 2:
            with torch.no_grad():
                made.algorithm.optimizer.parameters[0].fill_(torch.inf)

    made = trainer(tmp_path / "run", "train.iterations=4", "train.checkpoint_every=1", callbacks=[overflow])
    with pytest.raises(NonFiniteError, match="weights are not finite after iteration 2"):
        made.fit()
    assert Checkpoints(tmp_path / "run").load("last")[0] == 1


def test_a_run_that_ends_within_bad_steps_is_saved_and_prunes_nothing(tmp_path: Path, trainer: Make) -> None:
    """A skipped step changes no weight: the end of the budget, or a signal, keeps what there is."""
    run = tmp_path / "run"
    overrides = ["train.iterations=4", "train.checkpoint_every=1", "train.keep=1"]
    trainer(run, *overrides, callbacks=[poison_after(2)]).fit()
    names = {p.name for p in Checkpoints(run).all()}
    assert names >= {"000002", "000004"}
    a, b = Checkpoints(run).load(2)[1], Checkpoints(run).load(4)[1]
    assert all(torch.equal(v, b["policy"][k]) for k, v in a["policy"].items())


def test_permuted_rewards_are_the_same_rewards(tmp_path: Path, trainer: Make) -> None:
    """The control shuffles which sample a reward belongs to and nothing else."""
    for name, more in (("a", []), ("b", ["train.permute_rewards=true"])):
        trainer(tmp_path / name, "train.iterations=1", *more).fit()
    (a,), (b,) = train_rows(tmp_path / "a"), train_rows(tmp_path / "b")
    assert a["reward/mean"] == pytest.approx(b["reward/mean"])
    assert a["reward/std"] == pytest.approx(b["reward/std"])
    assert a["advantage/abs_mean"] != b["advantage/abs_mean"]


@pytest.mark.parametrize("through", ["last_n", "refl", "adjoint"])
def test_reward_gradients_resume_and_are_not_the_controls(tmp_path: Path, scenes_field: str, through: str) -> None:
    """1 + 1 iterations are 2 bit for bit; the control trains other weights by the same pictures' rewards."""
    recipe = "t2i_adjoint" if through == "adjoint" else "t2i_draft"
    few = [
        f"policy.field={scenes_field}",
        "train.minutes=",
        "env.num_groups=3",
        "eval.num=3",
        "train.tensorboard=false",
        "train.report=false",
    ]
    few += [f"algorithm.through={{name: {through}}}", "policy.num_steps=4", "algorithm.kl=0.1"]

    def run(name: str, iterations: int, *more: str, **settings: str) -> Trainer:
        overrides = [*few, f"train.iterations={iterations}", *more]
        made = Trainer(recipe, tmp_path / name, overrides=overrides, quiet=True, **settings)
        made.fit()
        return made

    straight = run("straight", 2)
    run("resumed", 1)
    resumed, control = run("resumed", 2, resume="last"), run("control", 2, "train.permute_rewards=true")
    for name, value in straight.policy.state_dict().items():
        assert torch.equal(value, resumed.policy.state_dict()[name]), name
    rows, permuted = train_rows(tmp_path / "straight"), train_rows(tmp_path / "control")
    assert permuted[0]["reward/mean"] == pytest.approx(rows[0]["reward/mean"])
    assert permuted[0]["policy/loss"] != rows[0]["policy/loss"]
    moved = [not torch.equal(v, control.policy.state_dict()[n]) for n, v in straight.policy.state_dict().items()]
    assert any(moved)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("reward.weights={shapes_soft: 1}", r"^reward\.weights: reward 'shapes_soft' gives no gradient"),
        ("reward.normalize=reward", r"^reward\.normalize: algorithm=reward_gradient climbs"),
        ("likelihood=cfm", r"^likelihood: algorithm=reward_gradient does not read it"),
        ("advantage=gae", r"^advantage: algorithm=reward_gradient does not read it"),
        ("steps=all_but_last", r"^algorithm: last_n differentiates the deployment sampler.*steps=none"),
        ("algorithm.through={name: last_n, n: 99}", r"^algorithm: last_n of n=99 steps"),
        ("algorithm.through={name: lastn}", r"^algorithm\.through: unknown through 'lastn'; did you mean 'last_n'"),
        ("algorithm.through={name: adjoint}", r"^algorithm: adjoint needs the same noisy steps"),
        ("env.name=toy_reach", r"^env\.name: algorithm=reward_gradient needs rewards"),
    ],
)
def test_reward_gradients_refuse_what_has_none(tmp_path: Path, scenes_field: str, override: str, reason: str) -> None:
    few = [f"policy.field={scenes_field}", "policy.num_steps=4"]
    with pytest.raises(ValueError, match=reason):
        Trainer("t2i_draft", tmp_path / "run", overrides=[*few, override], quiet=True)


# -- every recipe ---------------------------------------------------------------------------------


def on_a_tiny_checkpoint(checkpoint: Path, prompts: Path) -> list[str]:
    """What a recipe of a foreign checkpoint cannot have in a test: its weights, its pixels, its judges' weights."""
    prompts.write_text("".join(f"{i} cats\n" for i in range(12)))
    field = [f"policy.field.checkpoint={checkpoint}", "policy.field.resolution=32"]
    rewards = [
        "reward.weights={brightness: 1, redness: 1}",
        "reward.settings={}",
        "eval.metrics={bright: brightness}",
        "eval.num_steps=4",
    ]
    texts = [] if "sd15" in str(checkpoint) or "sdxl" in str(checkpoint) else ["policy.field.max_sequence_length=16"]
    video = ["policy.field.width=48", "policy.field.frames=5"] if "wan" in checkpoint.name else []
    return [*field, *texts, *video, *rewards, f"env.prompts={prompts}"]


def some_demos(folder: Path, env: str = "hopper") -> Path:
    """Random demonstrations."""
    observed, acted = {"hopper": (11, 3), "cube_single": (28, 5)}[env]
    rows = [(torch.randn(n, observed), torch.rand(n, acted) * 2 - 1, torch.ones(n)) for n in (9, 12, 3)]
    write_demos(folder / "demos", (Episode(*row, True, False) for row in rows), {"name": env}, {})
    return folder / "demos"


def end_early(env: Any) -> None:
    """Episodes of 12 primitive steps where a simulator would play a thousand."""
    while not isinstance(env, SimEnv | ToyReach):
        env = env.env
    if isinstance(env, SimEnv):
        env.sim.horizon = min(env.sim.horizon, 12)


def on_a_tiny_policy(folder: Path, place: str) -> list[str]:
    """Overrides with which a recipe of LeRobot's policies runs a random SmolVLA in PushT, in float32: a CPU's bfloat16
    rounds differently for another number of rows."""
    from rlflow.models.lerobot import tiny

    tiny.smolvla(folder / "policy", state=2, actions=2)
    looks = "{name: lerobot, checkpoint: %s, rename: {observation.image: observation.images.top}}"
    sizes = "{observation_height: 64, observation_width: 64}"
    return [
        f"{place}={looks % (folder / 'policy')}",
        "policy.precision=float32",
        f"env.settings={{type: pusht, chunk: 4, max_steps: 24, options: {sizes}}}",
    ]


SLOW = ("sdxl_nft_24gb", "sd15_nft_12gb", "sd15_draft", "sd15_scenes", "wan_24gb", "klein_24gb", "zimage_24gb")
"""Recipes that are others with another size or network, which run here."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in recipes.names()])
def test_every_recipe_runs_two_iterations(
    name: str, tmp_path: Path, scenes_field: str, words_field: str, tiny_of: Callable[[str], Path]
) -> None:
    """At its own settings, with a tiny network and few rows: first ratio exactly 1, finite numbers, weights move."""
    few = [
        "env.num_groups=2",
        "env.group_size=4",
        "eval.num=4",
        "train.tensorboard=false",
        "train.report=false",
    ]
    recipe = recipes.load(name)
    learner = recipe.algorithm
    ratios = isinstance(learner, AlgorithmConfig)
    few += ["algorithm.num_minibatches=2", f"algorithm.epochs={min(learner.epochs, 2)}"] if ratios else []
    if isinstance(learner, OffPolicyConfig):
        few += ["algorithm.start=0", "algorithm.batch_size=16", "algorithm.critic_width=32"]
    if isinstance(learner, OGPOConfig):
        few += ["algorithm.states=4", "algorithm.copies=3", "algorithm.chain.num_minibatches=2"]
    if name.startswith("t2i_"):
        field = {"shapes": scenes_field, "words": words_field}[recipe.policy.field]
        few += [f"policy.field={field}", "reward.weights.brightness=1"]
    elif recipe.env.name == "prompt":
        few += [*on_a_tiny_checkpoint(tiny_of(name), tmp_path / "prompts.txt"), "env.group_size=2", "eval.num=2"]
        few += ["algorithm.micro_batch=16"] if ratios else []  # as few passes as the rows allow
    else:
        few += [f"env.horizon={3 if isinstance(learner, SACConfig | FlowQConfig) else 6}", "eval.video=0"]
    if recipe.env.name == "lerobot":
        few += on_a_tiny_policy(tmp_path, "env.frozen.policy" if recipe.env.frozen else "policy.field")
        few += ["env.frozen.steering.chosen=[4, 2]"] if recipe.env.frozen else []
    offline, imitation = getattr(learner, "offline", None) is not None, recipe.imitation
    if offline or imitation is not None:
        demos = some_demos(tmp_path, recipe.env.name)
        few += [f"algorithm.offline.{key}" for key in (f"demos={demos}", "clone=2", "updates=2")] if offline else []
        few += [f"imitation.demos={demos}", "imitation.fits=2"] if imitation is not None else []
    if getattr(learner, "critic_warmup", 0):
        few += ["algorithm.critic_warmup=0"]  # else neither iteration moves the policy
    made = Trainer(name, tmp_path / "run", overrides=[*few, "train.minutes=", "train.iterations=2"], quiet=True)
    if name.startswith("robot_"):
        end_early(made.evaluator.env)
    before = {k: v.clone() for k, v in made.policy.state_dict().items()}
    made.fit()
    rows = train_rows(tmp_path / "run")
    if ratios or isinstance(learner, OGPOConfig):
        iterations = (
            2 if made.algorithm.sample_with == "live" else 1
        )  # of which the samples are of the very weights that learn
        largest = 1e-4 if made.policy.field.ragged else 0  # texts of two lengths, the base in bfloat16
        assert all(row["policy/first_log_ratio_max"] <= largest for row in rows[:iterations])
    assert [row["reward/masked_frac"] for row in rows] == [0, 0], "its rewards know its prompts"
    assert all(math.isfinite(row[k]) for row in rows for k in ("policy/loss", "reward/mean", "optim/grad_norm"))
    assert any(not torch.equal(v, made.policy.state_dict()[k]) for k, v in before.items())
    assert set(evals(tmp_path / "run")[-1]) >= {f"eval/heldout/{m}" for m in made.config.eval.metrics}


def test_demonstrations_do_not_fit_stacked_observations(tmp_path: Path) -> None:
    few = [f"algorithm.offline.demos={some_demos(tmp_path)}", "env.frame_stack=2"]
    with pytest.raises(ValueError, match=r"offline: demonstrations hold single .* use env\.frame_stack=1"):
        Trainer("robot_sac_flow_offline_to_online", tmp_path / "run", overrides=few, quiet=True)


@pytest.mark.parametrize("env", ["toy_image", "toy_reach", "toy_bandit", "toy_mdp", "toy_routes"])
def test_a_recipe_drives_the_toy_environments(tmp_path: Path, env: str) -> None:
    """The same trainer; evaluation is exactly `eval.num` episodes from seeds."""
    values = {
        "policy": {"field": "mlp", "num_steps": 4, "precision": "float32"},
        "env": {"name": env, "num_groups": 4, "group_size": 4},
        "train": {"iterations": 2, "tensorboard": False, "report": False},
        "eval": {"num": 5},
    }
    made = Trainer(values, tmp_path / "run", quiet=True)
    made.fit()
    assert len(train_rows(tmp_path / "run")) == 2
    assert [row["iteration"] for row in evals(tmp_path / "run")] == [0, 2]
    scores = load_file(tmp_path / "run/samples/eval_000002.safetensors")
    assert len(scores["return"]) == 5
    assert scores["return"].isfinite().all()


def test_frozen_parameters_stay_and_the_others_move(tmp_path: Path, trainer: Make) -> None:
    """Bit for bit, in the live weights and in the network that is saved."""
    made = trainer(tmp_path / "run", "policy.frozen=patch_out|^blocks.0")
    before = {name: p.detach().clone() for name, p in made.policy.field.named_parameters()}
    made.fit()
    saved = dict(load_field(str(tmp_path / "run/model")).named_parameters())
    for name, p in made.policy.field.named_parameters():
        frozen = name.startswith(("patch_out", "blocks.0"))
        assert p.requires_grad is not frozen
        assert torch.equal(p, before[name]) is frozen, name
        assert not frozen or torch.equal(saved[name], before[name])


@pytest.mark.parametrize(("pattern", "reason"), [("nothing", "in no"), (".", "in all"), ("(", "no regular expression")])
def test_a_frozen_pattern_must_leave_something_to_both_sides(tmp_path, trainer, pattern, reason):
    with pytest.raises(ValueError, match=rf"^policy.frozen: .*{reason}"):
        trainer(tmp_path / "run", f'policy.frozen="{pattern}"')
