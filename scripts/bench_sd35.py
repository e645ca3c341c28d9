"""What the sd35 recipes cost on a GPU: the architecture of Stable Diffusion 3.5 medium with random weights; JSON.

    python scripts/bench_sd35.py --out sd35.json        512 pixels, LoRA 32, guidance 4.5: four minutes on an H100
    python scripts/bench_sd35.py --tiny                 a small network on any device, to try the script

Nothing is downloaded. The transformer and the VAE have the published shapes; the text encoders are left out, their
results are random numbers of the right shape; the reward is the picture's brightness. Everything else is what
`rlflow train` runs: the recipe's policy, collector and learner. After every part the results so far are written.

- `iterations`: seconds and peak memory of a recipe's iteration, against the same network passes run bare, and against
  `rlflow plan`'s estimate of the memory.
- `first_log_ratio`: largest |log-ratio| per denoising step at unchanged weights, when all pairs of the samples are
  scored again in pieces of the size they were drawn in and of others, by the precision of the base's weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rlflow.assembly.network import PRECISION
from rlflow.assembly.parts import make_parts
from rlflow.bench.passes import Bare, listen
from rlflow.config import recipes
from rlflow.config.schema import Config
from rlflow.cost.estimate import Planner
from rlflow.cost.formula import iteration_cost
from rlflow.flow.noise import Key
from rlflow.flow.steps import AllButLast
from rlflow.models.pretrained.known import KNOWN
from rlflow.models.pretrained.pipeline import PretrainedField
from rlflow.models.pretrained.shapes_of import NoText, shape_of
from rlflow.parallel.dist import device
from rlflow.rl.likelihoods.chain import ChainLikelihood

MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
TINY = {"sample_size": 16, "num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128}
TINY |= {"pos_embed_max_size": 32, "dual_attention_layers": (0,)}
TEXTS = 64
"""Distinct texts there are encodings of."""
RECIPES = {
    "flow_grpo": ("sd35_flow_grpo_ocr", []),
    "flow_grpo_fast": ("sd35_24gb", ["policy.guidance={name: cfg, scale: 4.5}", "policy.grad_checkpointing=false"]),
    "mixgrpo": ("sd35_mixgrpo_pickscore", []),
    "flow_grpo_checkpointed": ("sd35_flow_grpo_ocr", ["policy.grad_checkpointing=true"]),
}


class RandomText(NoText):
    """Random encodings, the same for the same number."""

    def __init__(self, tokens: int, pooled: int):
        super().__init__(tokens, pooled)
        g = torch.Generator(device()).manual_seed(0)
        self.table = {
            "tokens": torch.randn(TEXTS, tokens, 4096, generator=g, device=device()),
            "pooled": torch.randn(TEXTS, pooled, generator=g, device=device()),
        }

    def __call__(self, numbers: Tensor) -> dict[str, Tensor]:
        return {name: value[numbers % TEXTS] for name, value in self.table.items()}

    def numbers(self, texts: list[str]) -> Tensor:
        return torch.tensor([len(text) % TEXTS for text in texts])


def random_medium(
    checkpoint: str,
    resolution: int,
    lora: int,
    weights: str,
    max_sequence_length: int,
    release_encoders: bool = False,
    vae_tiling: bool = False,
) -> PretrainedField:
    """The recipe's network with random weights, made on the device; there are no encoders to release."""
    settings = {"resolution": resolution, "lora": lora, "weights": weights, "max_sequence_length": max_sequence_length}
    settings |= {"vae_tiling": vae_tiling}
    field = shape_of(checkpoint, settings)
    text = field.table
    torch.manual_seed(0)
    for module in (field, field.adapter.pipe.vae):
        module.to_empty(device=device())
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            with torch.no_grad():
                if name.endswith("bias") or "lora_B" in name:
                    value.zero_()
                elif "norm" in name and value.ndim == 1:
                    value.fill_(1.0)
                else:
                    value.normal_(std=0.02)
    assert isinstance(text, NoText)
    field.table = RandomText(text.tokens, text.pooled)  # type: ignore[assignment]
    return field


def config_of(name: str, rows: int, tiny: bool) -> tuple[Config, Config]:
    """(what `plan` estimates, what runs here) of one of RECIPES, with one group of `rows` pictures."""
    recipe, changes = RECIPES[name]
    small = [f"env.num_groups=1 env.group_size={rows} env.rows_per_call={rows} algorithm.num_minibatches=1"]
    changes = [*changes, *" ".join(small).split(), "algorithm.micro_batch=8", "eval.metrics={brightness: brightness}"]
    changes += ["reward.weights={brightness: 1.0}", "policy.field.release_encoders=true"]
    if tiny:
        changes += ["policy.field.resolution=64", "policy.max_kappa=1000"]
    made = "policy.field.name=bench_sd35:random_medium"
    return recipes.load(recipe, changes, False), recipes.load(recipe, [*changes, made], True)


def seconds(run: Callable[[], Any]) -> float:
    """Wall time, of what it left to the GPU too."""
    begin = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def bench_iteration(name: str, rows: int, repeats: int, tiny: bool) -> dict[str, Any]:
    """One recipe: real and bare iterations in turn."""
    planned, config = config_of(name, rows, tiny)
    estimate = Planner(planned).estimate(planned)
    parts = make_parts(config, trust_code=True)
    field, cuda = parts.policy.field, torch.cuda.is_available()
    first: list[float] = []

    def iterate(iteration: int) -> None:
        metrics = parts.algorithm.update(parts.collector.collect(iteration))
        first.append(metrics["policy/first_log_ratio_max"])

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    passes = listen(field, lambda: iterate(0))
    peak = torch.cuda.max_memory_allocated() if cuda else None
    bare = Bare(field, PRECISION[config.policy.precision], passes, torch.zeros(1, dtype=torch.long))
    real_s, bare_s = [], []
    for i in range(1, 1 + repeats):
        real_s.append(seconds(lambda: iterate(i)))  # noqa: B023 - used at once
        bare_s.append(seconds(lambda: bare(i)))  # noqa: B023
    real, alone = statistics.median(real_s), statistics.median(bare_s)
    return {
        "s_per_iteration": real,
        "pictures_per_s": rows / real,
        "bare_s": alone,
        "overhead": real / alone,
        "all_s": {"iteration": real_s, "bare": bare_s},
        "peak_bytes": peak,
        "plan_peak_bytes": estimate.memory.peak,
        "plan_parts": dict(estimate.memory.parts),
        "plan_over_measured": estimate.memory.peak / peak if peak else None,
        "tflop_per_iteration": estimate.flops / 1e12,
        "tflop_per_s": estimate.flops / 1e12 / real,
        "rows": {"counted": iteration_cost(parts).total, "ran": sum(n * (3 if b else 1) for n, b in passes)},
        "calls_per_row": field.calls,
        "first_log_ratio_max": max(first),
        "pictures": rows,
        "grad_checkpointing": config.policy.grad_checkpointing,
    }


@torch.no_grad()
def first_log_ratio(weights: str, rows: int, tiny: bool) -> dict[str, Any]:
    """Per step, for pieces of as many rows as were drawn together and for others."""
    network = "bfloat16" if weights == "bfloat16" else "float32"
    changes = [f"policy.field.weights={weights}", f"policy.precision={network}"]
    with mock.patch.dict(RECIPES, {"ratio": (RECIPES["flow_grpo"][0], changes)}):
        _, config = config_of("ratio", rows, tiny)
    policy = make_parts(config, trust_code=True).policy
    likelihood, ids = ChainLikelihood("mean"), torch.arange(rows)
    cond = policy.encode(ids.to(policy.device))
    chain = policy.sample(cond, AllButLast(2)(0, policy.grid(policy.num_steps), ids), row_ids=ids)
    evidence = likelihood.record(policy, cond, chain, Key(0, "bench"), ids)
    out = {}
    for size in (rows, rows // 2, 1):
        log_ratio = [
            likelihood.score(policy, cond.index(part), evidence.index(part)).log_prob
            - evidence.index(part).old_log_prob
            for part in ids.split(size)
        ]
        out[f"pieces_of_{size}"] = torch.cat(log_ratio).abs().amax(0).tolist()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rows", type=int, default=16, help="pictures an iteration")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--out", type=Path, help="JSON file, rewritten after every part")
    args = parser.parse_args()
    if args.tiny:
        KNOWN[MEDIUM] = replace(KNOWN[MEDIUM], numbers={**KNOWN[MEDIUM].numbers, **TINY})
    cuda = torch.cuda.is_available()
    setting = {"device": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__}
    out: dict[str, Any] = {"setting": setting, "iterations": {}, "first_log_ratio": {}}

    def part(kind: str, name: str, run: Callable[[], dict[str, Any]]) -> None:
        try:
            out[kind][name] = run()
        except Exception as error:  # one part that fails, for want of memory say, leaves the others
            traceback.print_exc()
            out[kind][name] = {"error": repr(error)}
        if cuda:
            torch.cuda.empty_cache()
        if args.out:
            args.out.write_text(json.dumps(out, indent=1), encoding="utf-8")

    for name in args.only:
        part("iterations", name, lambda: bench_iteration(name, args.rows, args.repeats, args.tiny))  # noqa: B023
    for weights in ("bfloat16", "float32"):
        part("first_log_ratio", weights, lambda: first_log_ratio(weights, max(2, args.rows // 4), args.tiny))  # noqa: B023
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
