"""A network in parts is the network whole: weights, optimiser, metrics, and files that any number of processes reads."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlflow.config.parse import parse
from rlflow.config.processes import share
from rlflow.models.io import load_field
from rlflow.parallel import shards
from rlflow.report.metrics_file import read_metrics
from rlflow.rl.optim import AdamW, Optimizer
from rlflow.train.checkpoint import Checkpoints, pack
from rlflow.train.trainer import Trainer
from tests.parallel.runs import finish, in_parts, launch, until


def saved(run: Path) -> dict[str, torch.Tensor]:
    """Weights, weight sets and optimiser of the last checkpoint."""
    _, state = Checkpoints(run).load("last")
    return pack({name: state[name] for name in ("policy", "weight_sets", "algorithm")})[0]


def agree(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-9) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            other[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def check(straight: Path, sharded: Path, relay: Path) -> None:
    """A run of 2 iterations by several, and one whose second iteration was done by one process, against one process."""
    one = saved(straight)
    moved = [k for k in one if "/ref/" in k and not torch.equal(one[k], one[k.replace("/ref/", "/ema/")])]
    assert moved, "a run that learns nothing proves nothing"
    agree(one, saved(sharded))
    agree(one, saved(relay))
    for a, b in zip(*(read_metrics(run) for run in (straight, sharded)), strict=True):
        for key in (
            "optim/grad_norm",
            "kl/ref",
            "reward/mean",
            "eval/heldout/brightness",
            "policy/first_log_ratio_max",
        ):
            assert b.get(key, 0) == pytest.approx(a.get(key, 0), rel=1e-9, abs=1e-9), key
    fields = [load_field(f"{run}/model").state_dict() for run in (straight, sharded)]
    agree(*fields)


def by_several(root: Path, processes: int, **runs: dict[str, Any]) -> None:
    """Train runs under root/all, or go on with them, in one group of processes of torchrun."""
    (root / "cases.json").write_text(json.dumps(runs))
    finish(launch(root, processes, "all", torchrun=True))


def test_two_processes_with_half_a_network_each(runs: Path, tmp_path: Path) -> None:
    """In float64 to 1e-9; 2 -> 1 processes are one run."""
    relay = shutil.copytree(runs / "two/in parts, an iteration", tmp_path / "relay", symlinks=True)
    values = json.loads((runs / "cases.json").read_text())["in parts"]
    Trainer(values, relay, resume="last", quiet=True).fit()
    check(runs / "one/in parts", runs / "two/in parts", relay)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "sharding"), [(2, "full"), (4, "full"), (4, "replicated"), (2, "replicated")])
def test_more_processes_and_whole_networks(tmp_path: Path, processes: int, sharding: str) -> None:
    """4 -> 1 -> 4, groups shared out in pairs, each with a quarter of the network or all of it; and 2 -> 1 -> 2."""
    values = in_parts(tmp_path)
    values["train"]["sharding"] = sharding
    straight, sharded, relay = tmp_path / "straight", tmp_path / "all/sharded", tmp_path / "all/relay"
    by_several(tmp_path, processes, sharded=values, relay=until(values, 1))
    Trainer(values, straight, quiet=True).fit()
    Trainer(values, relay, resume="last", quiet=True).fit()
    check(straight, sharded, relay)
    by_several(tmp_path, processes, relay=until(values, 3))  # the third iteration by all again
    Trainer(until(values, 3), straight, resume="last", quiet=True).fit()
    agree(saved(straight), saved(relay))


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_the_lora_of_a_pretrained_network_in_parts(
    tmp_path: Path, tiny_pipeline: Callable[..., Any], weights: str
) -> None:
    """A Stable Diffusion 3 of which each process holds half: frozen base and float32 LoRA, as the recipes have them."""
    values = in_parts(tmp_path)
    field = {"name": "pretrained", "checkpoint": str(tiny_pipeline("sd3")), "lora": 4, "weights": weights}
    field |= {"resolution": 32, "max_sequence_length": 12}
    values["policy"] = {"field": field, "kernel": "flow_sde", "grid": "scheduler", "num_steps": 4}
    values["policy"] |= {"precision": weights, "guidance": {"name": "cfg", "scale": 1.5}}
    values["steps"] = {"name": "all_but_last", "skip_last": 2}
    straight, sharded = tmp_path / "straight", tmp_path / "all/sharded"
    by_several(tmp_path, 2, sharded=values)
    Trainer(values, straight, quiet=True).fit()
    one = saved(straight)
    assert any("lora_B" in name and value.abs().max() > 0 for name, value in one.items())
    assert {value.dtype for name, value in one.items() if "lora_" in name} == {torch.float32}
    agree(one, saved(sharded), 1e-4)
    files = [load_file(f"{run}/model/pytorch_lora_weights.safetensors") for run in (straight, sharded)]
    agree(*files, 1e-4)


def test_blocks_are_the_outermost_lists() -> None:
    inner = torch.nn.ModuleList([torch.nn.Linear(1, 1)])
    outer = torch.nn.ModuleList([torch.nn.Sequential(inner), torch.nn.Linear(1, 1)])
    assert list(shards.blocks(torch.nn.Sequential(outer))) == list(outer)


def test_whole_parameters_are_left_as_they_are() -> None:
    """Every verb is the identity where nothing is sharded; `put` exchanges storage."""
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    value = torch.tensor([3.0, 4.0])
    assert shards.local(p) is p
    assert shards.whole(p) is p
    assert shards.part(p, value) is value
    before = shards.put(p, value)
    assert (p.tolist(), before.tolist()) == ([3, 4], [1, 2])
    assert p.data_ptr() == value.data_ptr()
    assert shards.finite([p])
    assert not shards.finite([p, torch.tensor([math.nan])])
    optimizer = Optimizer([p], AdamW())
    assert optimizer.parts[0] is p


def test_what_could_hang_is_refused(tmp_path: Path) -> None:
    values = in_parts(tmp_path)
    with pytest.raises(ValueError, match=r"env\.num_groups to a multiple of 8"):
        share(parse(values | {"env": {"num_groups": 4}}), world=4)
    with pytest.raises(ValueError, match=r"train\.sharding: .* images"):
        parse({"env": {"name": "toy_reach", "mode": "steps"}, "advantage": "gae", "train": values["train"]})
