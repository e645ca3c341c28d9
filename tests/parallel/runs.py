"""Runs by one process and by several, at which both files of this folder look: the cases, and how they are started."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from rlflow.envs.captions import scenes
from rlflow.models.dit import DiT
from rlflow.models.io import save_field

ROOT = Path(__file__).parents[2]
HANGS = 580
"""Seconds: what is not done by then hangs. Two processes that start on a machine with other work take over 100."""


def in_parts(root: Path) -> dict[str, Any]:
    """GRPO with a reference, guidance, two minibatches, micro-batches that do not divide them, a frozen part."""
    torch.manual_seed(0)
    field = DiT(scenes.VOCAB, size=8, patch=4, width=16, depth=2, heads=2)
    torch.nn.init.normal_(field.patch_out.weight, std=0.2)
    return {
        "policy": {
            "field": str(save_field(field, root / "field")),
            "frozen": "patch_in",
            "num_steps": 4,
            "precision": "float64",
            "guidance": {"name": "cfg", "scale": 1.5},
        },
        "algorithm": {"micro_batch": 7, "num_minibatches": 2, "kl": {"beta": 0.1}, "optimizer": {"lr": 1e-3}},
        "env": {"num_groups": 8, "group_size": 4, "rows_per_call": 8},
        "reward": {"weights": {"brightness": 1.0}},
        "train": {"iterations": 2, "tensorboard": False, "report": False, "threads": 1, "sharding": "full"},
        "eval": {"num": 5, "metrics": {"brightness": "brightness", "base_distance": "base_distance"}, "grid": 2},
    }


def until(values: dict[str, Any], iterations: int) -> dict[str, Any]:
    return values | {"train": values["train"] | {"iterations": iterations}}


def cases(root: Path, url: str = "") -> dict[str, dict]:
    """GRPO with a KL term and epochs, PPO with a critic, and runs in which one rank never has a score."""
    torch.manual_seed(0)
    field = DiT(scenes.VOCAB, size=8, patch=4, width=16, depth=1, heads=2)
    torch.nn.init.normal_(field.patch_out.weight, std=0.2)
    prompts = root / "prompts.jsonl"
    texts = scenes.split(False, ("pair",))[:2]
    prompts.write_text("".join(f'{{"prompt": "{text}", "hide": {i}}}\n' for i, text in enumerate(texts)))
    base = {
        "policy": {
            "field": str(save_field(field, root / "field")),
            "num_steps": 4,
            "precision": "float64",
            "kernel": {"name": "flow_sde", "a": 0.7},
        },
        "algorithm": {"micro_batch": 7, "epochs": 2, "kl": {"beta": 0.1}, "optimizer": {"lr": 1e-3, "cosine": True}},
        "env": {"num_groups": 4, "group_size": 4, "rows_per_call": 4},
        "reward": {"weights": {"brightness": 1.0}},
        "train": {"iterations": 2, "tensorboard": False, "report": False, "threads": 1},
        "eval": {"num": 5, "metrics": {"brightness": "brightness", "base_distance": "base_distance"}, "grid": 2},
    }
    two = {"num_groups": 4, "num_minibatches": 2}
    # 3 of the 4 steps of an episode in an iteration: both runs have episodes under way when they stop
    simulator = {
        "policy": {
            "field": {"name": "mlp", "width": 16},
            "num_steps": 2,
            "precision": "float64",
            "kernel": {"name": "learned_noise", "std_min": 0.2, "std_max": 0.3},
        },
        "steps": "all",
        "likelihood": {"reduce": "sum", "joint": True},
        "advantage": "gae",
        "algorithm": {"objective": {"low": 0.2}, "micro_batch": 7, "kl": {"beta": 0.1}, "optimizer": {"lr": 1e-3}},
        "env": {"name": "toy_reach", "settings": {"horizon": 4}, "num_groups": 4, "group_size": 1}
        | {"horizon": 3, "mode": "steps"},
        "reward": {"scale": True},
        "train": base["train"],
        "eval": {"num": 5, "video": 0},
    }
    return {
        "grpo": base,
        "two rewards, minibatches": base
        | {
            "reward": {"weights": {"brightness": 1.0, "redness": 0.5}, "normalize": "reward"},
            "algorithm": base["algorithm"]
            | {"num_minibatches": two["num_minibatches"], "objective": {"low": 0.2, "target_kl": 1.0}},
        },
        "ppo": base | {"advantage": {"name": "gae"}},
        "nft": base
        | {
            "steps": "none",
            "likelihood": {"name": "cfm", "draws": 3, "joint": False},
            "algorithm": base["algorithm"] | {"objective": {"name": "nft", "old_rate": 0.5}},
        },
        "reward gradient": base
        | {
            "steps": "none",
            "algorithm": {"name": "reward_gradient", "through": {"name": "refl", "n": 3}, "micro_batch": 3, "kl": 0.1}
            | {"optimizer": {"lr": 1e-3}},
            "reward": {"weights": {"brightness": 1.0, "redness": -0.5}},
        },
        "one rank stopped": base,
        "one rank masked": base
        | {
            "env": {"num_groups": 2, "group_size": 4, "prompts": str(prompts)},
            "reward": {"weights": {"tests.parallel.member:masked": 1.0}},
        },
        "one rank not answered": base
        | {
            "env": {"num_groups": 2, "group_size": 4, "rows_per_call": 4, "prompts": str(prompts)},
            "reward": {
                "weights": {"far": 1.0},
                "settings": {"far": {"name": "remote", "url": url, "request_s": 5.0, "tries": 1}},
            },
        },
        "simulator": simulator,
        "simulator, resumed": simulator,
        "in parts": in_parts(root),
        "in parts, an iteration": until(in_parts(root), 1),
    }


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a command and all its children; a hang is a failure, and leaves nothing behind."""
    try:
        out, _ = process.communicate(timeout=HANGS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError("a process hangs") from None
    assert process.returncode == 0, out.decode()[-3000:]


def launch(root: Path, processes: int, folder: str, *names: str, torchrun: bool = False) -> subprocess.Popen[bytes]:
    """Start the cases of these names, or all, in one group of processes: torchrun's, or forks, which import but once."""
    port, member = str(free_port()), ["-m", "tests.parallel.member"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-addr", "127.0.0.1"]
    launcher = [*launcher, "--master-port", port, *member] if torchrun else member
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    command = [sys.executable, *launcher, str(root), folder, "0" if torchrun else str(processes), *names]
    return subprocess.Popen(command, env=environment, **pipes)
