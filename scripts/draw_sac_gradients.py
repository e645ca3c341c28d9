"""How the actor's gradient travels back through the denoising steps: plain, Flow-G and Flow-T; a picture and JSON.

    python scripts/draw_sac_gradients.py --out docs/sac_gradients.png
    python scripts/draw_sac_gradients.py --runs runs/plain runs/flow_g runs/flow_t

Each actor learns the toy of robot_reach_sac with K denoising steps, or is that of a finished run; before and after
training, |dL/dx_k| is measured at every step of the chain, as a mean over rows and relative to that at the chain's end.
A chain that multiplies gradients up shows a line that rises to the left.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlflow.assembly.parts import make_parts
from rlflow.assembly.policy import make_policy
from rlflow.config import recipes
from rlflow.report.metrics_file import read_metrics
from rlflow.rl.algorithm import Algorithm
from rlflow.rl.off_policy.sac import SAC
from rlflow.train.trainer import Trainer

FIELDS = {
    "plain": "{name: mlp, width: 64}",
    "Flow-G": "{name: gated, width: 64}",
    "Flow-T": "{name: decoder, width: 32, heads: 2}",
}


def by_step(learner: Algorithm) -> list[float]:
    """Mean |dL/dx_k| of k = 0 .. K over a batch of the replay, over that of k = K."""
    assert isinstance(learner, SAC)
    policy = learner.policy
    seen: list[Tensor] = []
    real = policy.transition

    def watch(x: Tensor, *args: Any) -> Any:
        x = x.requires_grad_() if not x.requires_grad else x
        x.register_hook(lambda g: seen.append(g.flatten(1).norm(dim=1).mean()))
        return real(x, *args)

    batch = learner.batch()
    cond = policy.encode(batch.obs)
    policy.transition = watch  # type: ignore[method-assign]
    squash = policy.squash.forward

    def end(x: Tensor) -> Tensor:
        x.register_hook(lambda g: seen.append(g.flatten(1).norm(dim=1).mean()))
        return squash(x)

    policy.squash.forward = end  # type: ignore[method-assign]
    try:
        learner.actor_loss(cond, batch, learner.noise(len(batch))[1])[0].backward()
        learner.twin.optimizer.zero_grad()
    finally:
        policy.transition = real  # type: ignore[method-assign]
        policy.squash.forward = squash  # type: ignore[method-assign]
    norms = [float(n) for n in reversed(seen)]
    return [n / norms[-1] for n in norms]


def measure(field: str, num_steps: int, iterations: int, seed: int) -> dict[str, Any]:
    """One actor, before and after training, with the gradient norm of its weights by iteration."""
    more = [f"policy.field={FIELDS[field]}", f"policy.num_steps={num_steps}", f"train.seed={seed}"]
    parts = make_parts(recipes.load("robot_reach_sac", more))
    curve, first = [], []
    for i in range(iterations):
        metrics = parts.algorithm.update(parts.collector.collect(i))
        first = first or by_step(parts.algorithm)
        if "optim/grad_norm" in metrics:
            curve.append(metrics["optim/grad_norm"])
    return _rounded(before=first, after=by_step(parts.algorithm), weights=curve)


def measure_run(folder: Path) -> dict[str, Any]:
    """The actor of a run; "before" is an untrained one, judged by the same critics."""
    trainer = Trainer(str(folder / "config.yaml"), folder, resume="last", quiet=True)
    after = by_step(trainer.algorithm)
    trainer.policy.load_state_dict(make_policy(trainer.config).state_dict())
    curve = [row["optim/grad_norm"] for row in read_metrics(folder) if "optim/grad_norm" in row]
    return _rounded(before=by_step(trainer.algorithm), after=after, weights=curve)


def _rounded(**rows: list[float]) -> dict[str, list[float]]:
    return {name: [round(v, 4) for v in row] for name, row in rows.items()}


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Left: relative gradient by step; right: the gradient norm of the actor's weights while training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for colour, (name, runs) in zip(("#D55E00", "#0072B2", "#009E73"), found.items(), strict=True):
        for i, run in enumerate(runs):
            label = name if i == 0 else None
            left.plot(run["before"], "--", color=colour, alpha=0.4)
            left.plot(run["after"], color=colour, label=label)
            right.plot(run["weights"], color=colour, label=label)
    left.set(xlabel="denoising step k", ylabel="|dL/dx_k| over that of the last", yscale="log")
    left.set_title("gradient along the chain (dashed: untrained)")
    right.set(xlabel="iteration", yscale="log")
    right.set_title("gradient norm of the actor's weights")
    left.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/sac_gradients.png"))
    parser.add_argument("--num-steps", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, nargs=3, metavar="DIR", help="of a plain actor, Flow-G and Flow-T")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.runs:
        found = {name: [measure_run(folder)] for name, folder in zip(FIELDS, args.runs, strict=True)}
    else:
        found = {n: [measure(n, args.num_steps, args.iterations, seed) for seed in args.seeds] for n in FIELDS}
    print(json.dumps(found))
    draw(found, args.out)


if __name__ == "__main__":
    main()
