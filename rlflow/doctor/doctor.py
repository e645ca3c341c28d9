"""doctor: does a recipe do what it says? Its real settings on a few rows, then one iteration of its real size.

Every check has its figure and the bound it was held to; one that only informs says why it has none. On a CPU the
first log-ratio is exactly 0 and a resumed run is bitwise equal; on a GPU both are reported.
"""

from __future__ import annotations

import copy
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlflow.assembly.parts import Parts, make_parts
from rlflow.config.schema import Config
from rlflow.console import finite, terminal
from rlflow.cost.formula import iteration_cost
from rlflow.doctor.check import Check
from rlflow.doctor.examine import at_work, few_updates, of_the_learner
from rlflow.doctor.probe import GradientWatch, Probe, bare_seconds, two_passes
from rlflow.flow.marginal import STD, end_error
from rlflow.flow.steps import Plan
from rlflow.report.metrics_file import read_metrics
from rlflow.train.checkpoint import Checkpoints, pack
from rlflow.train.trainer import Trainer

ROWS_OF_A_GROUP = 4
STEPS_OF_AN_EPISODE = 8
NO_LIMIT = 1e30
GPU_ROUNDING = 1e-2
"""Of an answer's size, that a GPU's kernels may differ by from one pass to the next."""
ONE_STEP = STD
"""Error of a single straight step, which ends in the target's mean: more steps must not be worse."""
TRAINING_AWAY = 0.3 * STD
"""How much farther than deployment's a marginal-preserving sampler may end (without its correction: 0.45 at K = 8)."""


def doctor(config: Config, trust_code: bool = False) -> list[Check]:
    """All checks of a recipe, in order; takes seconds, trains nothing that stays."""
    small = few_rows(config, trust_code)
    parts = make_parts(small, trust_code)
    gradients = GradientWatch(parts.policy)
    probe = Probe(parts, 0)
    gradients.close()
    return [
        *_begun_from(parts),
        _rewards(probe),
        _two_passes(probe),
        *of_the_learner(config, parts, probe, trust_code),
        *_gradients(gradients, probe),
        _resume(small, trust_code),
        *_end_marginal(parts),
        *_real_size(config, trust_code),
    ]


def few_rows(config: Config, trust_code: bool = False) -> Config:
    """The same recipe with two small groups, two iterations and a token evaluation; kappa is judged later.

    It samples a group at a time and scores other numbers of rows, as a run of many rows does.
    """
    size = min(ROWS_OF_A_GROUP, config.env.group_size)
    groups, algorithm = few_updates(config, size, trust_code)
    images = config.env.name == "prompt"
    horizon = None if images else min(config.env.horizon or STEPS_OF_AN_EPISODE, STEPS_OF_AN_EPISODE)
    metrics = {"base_distance": "base_distance"} if images else {}
    return replace(
        config,
        policy=replace(config.policy, max_kappa=NO_LIMIT),
        env=replace(config.env, num_groups=groups, group_size=size, rows_per_call=size, horizon=horizon),
        algorithm=algorithm,
        train=replace(config.train, iterations=2, minutes=None, tensorboard=False, report=False, wandb=None),
        eval=replace(config.eval, num=4, every=0, metrics=metrics, video=0),
    )


def _begun_from(parts: Parts) -> list[Check]:
    """Of weights that are read in more than one way, as an adapter's are: which."""
    told = parts.policy.field.unguided.begun_from
    return [Check("begun from", 1.0, detail=told)] if told else []


# -- rewards and gradients -------------------------------------------------------------------------


def _rewards(probe: Probe) -> Check:
    detail = f"share of {probe.rollout.num_rows} rows without a score; mean reward {probe.reward_mean:.3g}"
    if probe.replaced:
        detail += "; no group of these few rows differs, so random rewards stood in for the update"
    return Check("rewards masked", probe.masked, "< 1", probe.masked < 1, detail)


def _two_passes(probe: Probe) -> Check:
    """Without them equal, a sample is scored by another network than drew it."""
    value, gpu = two_passes(probe), probe.parts.policy.device.type != "cpu"
    detail = "difference of the network's answers to one input given twice, over their size: dropout would show here"
    limit = GPU_ROUNDING if gpu else 0.0
    return Check("two passes", value, f"<= {limit:g}" if gpu else "0", value <= limit, detail)


def _gradients(watch: GradientWatch, probe: Probe) -> list[Check]:
    """Finite everywhere, and not zero."""
    bad = [name for name, ok in watch.finite.items() if not ok]
    none = [name for name, moved in watch.not_zero.items() if not moved]
    total = len(watch.finite)
    norm = probe.metrics["optim/grad_norm"]
    moves = math.isfinite(norm) and norm > 0
    detail = f"{total - len(none)} of {total} tensors receive gradient" + (f"; none: {_some(none)}" if none else "")
    return [
        Check("gradients not finite", len(bad), "0", not bad, f"of {total} tensors {_some(bad)}"),
        Check("gradient norm", norm, "> 0", moves, detail),
    ]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


# -- resume ---------------------------------------------------------------------------------------


def _resume(config: Config, trust_code: bool) -> Check:
    """One iteration, a stop and a resumed one against two in a row."""

    def stop(trainer: Trainer, iteration: int, metrics: dict[str, float]) -> None:
        trainer.stop()

    def train(run: Path, **more: Any) -> Trainer:
        trainer = Trainer(config, run, trust_code=trust_code, quiet=True, **more)
        trainer.fit()
        return trainer

    with tempfile.TemporaryDirectory() as folder:
        straight, resumed = Path(folder) / "straight", Path(folder) / "resumed"
        train(straight)
        train(resumed, callbacks=[stop])
        trainer = train(resumed, resume="last")
        a, b = (_state(run) for run in (straight, resumed))
        norms = [row["optim/grad_norm"] for row in read_metrics(resumed) if row["kind"] == "train"]
    differ = sorted(
        name for name in a.keys() | b.keys() if name not in a or name not in b or not torch.equal(a[name], b[name])
    )
    on_cpu, saved = trainer.policy.device.type == "cpu", trainer.collector.env.exact_resume
    detail = "exact" if saved else "statistical"
    detail += f": tensors that differ of {len(a)} after 1 + 1 iterations and after 2 {_some(differ)}".rstrip()
    detail += "; gradient norms " + ", ".join(f"{norm:.2g}" for norm in norms)
    detail += "" if on_cpu else "; no bound: GPU kernels may round differently each time"
    detail += "" if saved else "; no bound: this simulator cannot be saved, a resumed run begins new episodes"
    return Check(
        "resume", len(differ), "0" if on_cpu and saved else "", not differ if on_cpu and saved else None, detail
    )


def _state(run: Path) -> dict[str, Tensor]:
    """Weights, weight sets and optimiser state of a run's last checkpoint."""
    _, state = Checkpoints(run).load("last")
    return pack({name: state[name] for name in ("policy", "weight_sets", "algorithm")})[0]


# -- the sampler's law ----------------------------------------------------------------------------


def _end_marginal(parts: Parts) -> list[Check]:
    policy, steps = parts.policy, parts.collector.steps
    grid = policy.grid(policy.num_steps)
    kernel = copy.deepcopy(policy.kernel).to("cpu", torch.float64)
    rows = torch.zeros(1, dtype=torch.long)
    shape, features = tuple(policy.event_shape), policy.field.num_features

    def check(name: str, plan: Plan, limit: float | None) -> Check:
        with torch.no_grad():
            error = end_error(kernel, policy.solver, plan, shape, features)
        noisy = int(plan.noisy.reshape(-1, plan.num_steps)[0].sum())
        what = f"W2 distance to N(2, .5^2) with exact velocities, {plan.num_steps} steps, {noisy} of them with noise"
        if limit is None:
            return Check(f"end marginal, {name}", error, detail=f"{what}; no bound: this kernel aims at another law")
        return Check(f"end marginal, {name}", error, f"<= {limit:.3g}", error <= limit, what)

    deployed = check("deployment", policy.plan(), ONE_STEP)
    limit = deployed.value + TRAINING_AWAY if kernel.marginal_preserving else None
    return [check("training", steps(0, grid, rows), limit), deployed]


# -- cost, at the recipe's size -------------------------------------------------------------------


def _real_size(config: Config, trust_code: bool) -> list[Check]:
    """One whole iteration: network rows, seconds, memory."""
    config = replace(config, policy=replace(config.policy, max_kappa=NO_LIMIT), algorithm=at_work(config))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        parts = make_parts(config, trust_code)
        probe = Probe(parts, 0)
    except torch.OutOfMemoryError as error:
        return [Check("peak memory, MiB", math.inf, passed=False, detail=str(error).splitlines()[0])]
    return [_count(parts, probe), _memory(parts), *_times(parts, probe)]


def _count(parts: Parts, probe: Probe) -> Check:
    cost = iteration_cost(parts, 0)
    early = probe.metrics.get("policy/early_stop", 0) > 0
    return Check(
        "network evaluations",
        probe.network_rows,
        f"<= {cost.total}" if early else f"{cost.total}",
        probe.network_rows <= cost.total if early else probe.network_rows == cost.total,
        f"rows counted in one iteration of {probe.rollout.num_rows} samples (backward = 2); closed form: rollout "
        f"{cost.rollout}, reference {cost.reference}, update {cost.update}",
    )


def _times(parts: Parts, probe: Probe) -> list[Check]:
    total = sum(probe.seconds.values())
    reward = sum(v for k, v in probe.metrics.items() if k.startswith("reward/") and k.endswith("/seconds"))
    network = bare_seconds(parts, probe, iteration_cost(parts, 0))
    shares = {
        "rollout": probe.seconds["rollout"],
        "update": probe.seconds["update"],
        "reward": reward,
        "network": network,
    }
    notes = {"reward": "runs beside the sampling", "network": "the same forwards and backwards run bare"}
    why = "; no bound: it depends on the machine and on what else runs (`rlflow bench t2i` holds it to one)"
    seconds = Check("seconds per iteration", total, detail=f"for {probe.rollout.num_rows} samples{why}")
    return [seconds] + [
        Check(f"time share, {n}", v / total, detail=notes.get(n, "part") + why) for n, v in shares.items()
    ]


def _memory(parts: Parts) -> Check:
    """Peak of one iteration of real size, against what the device has."""
    c, device = parts.collector, parts.policy.device
    at = f"one iteration of {parts.groups.num_rows} rows, {c.rows_per_call} sampled and "
    at += f"{parts.algorithm.micro_batch} scored at a time"
    if device.type == "cuda":
        peak, total = float(torch.cuda.max_memory_allocated(device)), float(torch.cuda.mem_get_info(device)[1])
        what = "tensors on the GPU"
    else:
        import resource

        unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
        peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
        total, what = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), "this process with its libraries"
    mib = 2**20
    return Check("peak memory, MiB", peak / mib, f"<= {total / mib:.0f}", peak <= total, f"{what}; {at}")


# -- output ---------------------------------------------------------------------------------------


def checks_as_json(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """JSON-able values; a figure that is not finite is null."""
    return [finite(asdict(check) | {"verdict": check.verdict}) for check in checks]


def print_checks(checks: Sequence[Check]) -> None:
    """A table on the terminal."""
    from rich.table import Table

    colours = {"PASS": "green", "FAIL": "bold red", "INFO": "dim"}
    table = Table("check", "figure", "should be", "", "what it is")
    for check in checks:
        verdict = f"[{colours[check.verdict]}]{check.verdict}[/]"
        table.add_row(check.name, f"{check.value:.4g}", check.limit, verdict, check.detail)
    terminal().print(table)
