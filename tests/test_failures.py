"""What a user can act on is one line: memory that ran out, components of strangers, signals before the first iteration."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlflow import cli, registry
from rlflow.config import recipes
from rlflow.failures import OutOfMemoryError, one_line, sized_by
from rlflow.rl.off_policy.sac import SAC
from rlflow.rl.optim import AdamW, NonFiniteError, Optimizer
from rlflow.train.trainer import Trainer


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """fails(*words) -> the one line of a command that must end with exit code 2."""

    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line.removeprefix("rlflow: error: ")

    return run


REACH = (
    "robot_reach_reinflow",
    "env.num_groups=2",
    "train.iterations=1",
    "eval.num=2",
    "train.tensorboard=false",
    "train.report=false",
)

# -- memory ---------------------------------------------------------------------------------------


def test_the_cpus_allocator_is_recognised() -> None:
    """A real failure: a petabyte, and a size beyond 64 bits."""
    for size in ((2**50,), (2**40, 2**40)):
        naming = sized_by("the test", SimpleNamespace(a=SimpleNamespace(b=3)), "a.b")
        with pytest.raises(OutOfMemoryError, match=r"^out of memory.* in the test: lower a\.b=3") as error, naming:
            torch.empty(size)
        assert "\n" not in str(error.value)


GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79 GiB\nSee documentation")


@pytest.mark.parametrize("error", [GPU, MemoryError("x"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling")])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("rlflow.rl.collector.Collector.collect", "env.rows_per_call=32, env.num_groups=2, env.group_size="),
        ("rlflow.rl.learners.policy_gradient.PolicyGradient.update", "algorithm.micro_batch="),
        ("rlflow.evaluation.episodes.EpisodeEvaluator.__call__", "eval.rows_per_call="),
    ],
)
def test_memory_that_runs_out_names_the_settings_that_size_it(
    method: str, settings: str, error: Exception, tmp_path: Path, fails: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(method, full)
    said = fails("train", *REACH, "env.rows_per_call=32", "--run", str(tmp_path / "run"), "--quiet")
    assert said.startswith("out of memory")
    assert settings in said
    assert ("(20.00 GiB were asked for)" in said) == (error is GPU)


def test_memory_outside_a_run_is_one_line_too(fails: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise GPU

    monkeypatch.setattr("rlflow.deploy.runs.evaluator_of", full)
    assert "lower env.rows_per_call, " in fails("eval", "shapes")


# -- components of strangers -----------------------------------------------------------------------

OWN = """
from rlflow.flow.kernels import FlowSDE, Kernel
from rlflow.flow.solvers import Euler, Solver
from rlflow.flow.steps import All, Steps
from rlflow.rl.advantages import GAE


class NoCall(Steps):
    def possible(self, num_steps):
        return range(num_steps)


class Raises(All):
    def __call__(self, iteration, grid, row_ids):
        return {}[iteration]


class AtOnce(FlowSDE):
    def __init__(self):
        super().__init__()
        1 / 0


class NoKernel:
    pass


class Late(FlowSDE):
    def g(self, t, t_next):
        if not self.training and len(t) > 0:  # as part of a policy
            raise RuntimeError
        return t


class OnlyX(Euler):
    def __call__(self, velocity, x, t, t_next, cond, memory):
        return x


class Quarter(Euler):
    def __call__(self, velocity, x, t, t_next, cond, memory):
        return x[:1], None


class NoResult(GAE):
    def __call__(self, rollout, values, next_values):
        return None


class Flat(GAE):
    def __call__(self, rollout, values, next_values):
        return super().__call__(rollout, values, next_values).advantage


def function(num_steps):
    return num_steps
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of wrong components; its name."""
    (tmp_path / "rlflow_tests_wrong.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "FOREIGN", {})
    yield "rlflow_tests_wrong"
    sys.modules.pop("rlflow_tests_wrong", None)


@pytest.mark.parametrize(
    ("path", "name", "said"),
    [
        ("steps", "NoCall", r"steps: \w+:NoCall does not define __call__"),
        ("steps", "Raises", r"steps '\w+:Raises' (rlflow_tests_wrong.py, line 15, in __call__) raised KeyError: 0"),
        (
            "policy.kernel",
            "AtOnce",
            r"AtOnce' (rlflow_tests_wrong.py, line 21, in __init__) raised ZeroDivisionError: ",
        ),
        (
            "policy.kernel",
            "NoKernel",
            r"policy.kernel: \w+:NoKernel made a NoKernel, which is no Kernel: derive it from",
        ),
        ("policy.kernel", "Late", r"Late' (rlflow_tests_wrong.py, line 31, in g) raised RuntimeError"),
        (
            "policy.solver",
            "OnlyX",
            r"policy.solver: OnlyX gave a Tensor of shape (2, 1) for x of shape (2, 1): a solver gives (x_next",
        ),
        ("policy.solver", "Quarter", r"policy.solver: Quarter gave a tuple of shape (1, 1) for x"),
        (
            "advantage",
            "NoResult",
            r"'NoneType' object has no attribute 'advantage'; code outside rlflow takes part: advantage '\w+:NoRes",
        ),
        (
            "advantage",
            "Flat",
            r"'Tensor' object has no attribute 'advantage'; code outside rlflow takes part: advantage '\w+:Flat'",
        ),
        ("policy.grid", "function", r"policy.grid.num_steps: \w+:function needs this setting"),
    ],
)
def test_a_wrong_component_is_named_with_its_line(
    path: str, name: str, said: str, own: str, tmp_path: Path, fails: Callable
) -> None:
    words = [*REACH, f"{path}={own}:{name}", "--run", str(tmp_path / "run"), "--quiet", "--trust-code"]
    assert said.replace(r"\w+", own) in fails("train", *words)


def test_a_fault_of_ours_keeps_its_traceback(own: str) -> None:
    """Unless code of others takes part: then that is the first place to look at."""
    assert one_line(RuntimeError("shapes do not match")) is None
    registry.find("steps", f"{own}:Raises", trust_code=True)
    said = one_line(RuntimeError("shapes do not match"))
    assert said is not None
    assert said.startswith(f"RuntimeError: shapes do not match; code outside rlflow takes part: steps '{own}:Raises'")


def test_no_message_is_empty() -> None:
    for error in (ValueError(), KeyError(), NotImplementedError(), OSError()):
        assert type(error).__name__ in (one_line(error) or "")


# -- divergence ------------------------------------------------------------------------------------


def test_divergence_names_a_setting_that_the_learner_has(tmp_path: Path) -> None:
    optimizer = Optimizer([torch.nn.Parameter(torch.ones(1))], AdamW(max_bad_steps=1), "algorithm.lr")
    optimizer.parameters[0].grad = torch.tensor([torch.nan])
    with pytest.raises(NonFiniteError, match=r"lower algorithm\.lr or look"):
        optimizer.step()
    trainer = Trainer("robot_reach_sac", tmp_path / "run", overrides=["train.iterations=1"], quiet=True)
    assert isinstance(trainer.algorithm, SAC)
    with torch.no_grad():
        trainer.algorithm.optimizer.parameters[0].fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=r"lower algorithm\.lr$"):
        trainer._check_weights()
    assert recipes.load("robot_reach_sac").algorithm.lr > 0


# -- signals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_signal_before_the_first_iteration_is_one_line(
    number: int, processes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """While the run is set up: code 0, as after it has begun."""

    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr("rlflow.train.trainer.make_parts", interrupted)
    monkeypatch.setattr("rlflow.parallel.dist.launch", interrupted)
    cli.main(["train", *REACH, "--run", str(tmp_path / "run"), "--quiet", "--processes", processes])
    out, err = capfd.readouterr()
    assert out == "stopped by a signal before the first iteration\n"
    assert err == ""


def test_a_second_signal_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def twice(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_one", twice)
    with pytest.raises(SystemExit) as end:
        cli.main(["train", *REACH, "--run", str(tmp_path / "run"), "--quiet"])
    assert end.value.code == 130
    assert capfd.readouterr().err == (
        "rlflow: stopped at once by a second signal: --resume last goes on from the last checkpoint\n"
    )


def test_ctrl_c_in_any_other_command_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr("rlflow.config.recipes.names", interrupted)
    with pytest.raises(SystemExit) as end:
        cli.main(["list", "recipes"])
    assert (end.value.code, capfd.readouterr().err) == (130, "rlflow: stopped\n")


@pytest.mark.slow
def test_processes_that_are_only_starting_end_quietly(tmp_path: Path) -> None:
    """A terminal sends Ctrl-C to the launcher and to children that have not left its group yet."""
    command = [sys.executable, "-m", "rlflow", "train", *REACH, "--run", str(tmp_path / "run"), "--processes", "2"]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    children, deadline = Path(f"/proc/{process.pid}/task/{process.pid}/children"), time.monotonic() + 120
    while len(children.read_text().split()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=200)
    assert "Traceback" not in err
    assert process.returncode == 0, err
