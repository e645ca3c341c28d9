"""What an iteration costs: against its network passes run bare, against the single-file script, method by method.

Cost is counted in forward-equivalents of one row: a forward is 1, a forward with its backward 3. With K steps, of
which R are scored, a row costs K + 3 R. Everything is timed interleaved in one process, so that a busy machine
slows all alike, by the wall clock and by the CPU time of the process. Sampling, scoring and the script run passes of
the same number of rows: a pass of few rows costs more per row, and no method shall gain by that.
`bench_flow_grpo`: a LoRA on a Stable Diffusion 3 of peers' size beside the script on diffusers' own network.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlflow.assembly.network import PRECISION
from rlflow.assembly.parts import make_parts
from rlflow.bench.stopwatch import Times, num_threads
from rlflow.config.parse import parse
from rlflow.config.schema import Config
from rlflow.envs.captions import scenes
from rlflow.flow.field import VelocityField
from rlflow.flow.steps import Plan
from rlflow.models.dit import DiT
from rlflow.models.io import embedded, save_field
from rlflow.models.pretrained.pipeline import pretrained
from rlflow.models.pretrained.tiny import POOLED, TEXT_WIDTH, make_tiny
from rlflow.models.pretrained.tiny_parts import moved
from rlflow.registry import build
from rlflow.types import Tree, tree_map

SCRIPT = Path(__file__).parents[2] / "scripts" / "single_file_flow_grpo.py"
"""Only in a checkout; an installed package is timed without it."""
SKIP_LAST = 2  # MixGRPO's window slides over the first K - 2 steps


@dataclass(frozen=True)
class Method:
    """A way to choose the noisy steps; `aim` is the largest share of a Flow-GRPO iteration it may take."""

    name: str
    steps: dict[str, Any]
    solver: str = "euler"
    shared_noise: bool = False
    aim: float | None = None
    slides: bool = True


def methods(window: int) -> list[Method]:
    """Flow-GRPO first, then what is measured against it."""
    slide = {"name": "window", "size": window, "every": 1, "stride": 1, "skip_last": SKIP_LAST}
    flash, frozen = slide | {"compress": 0.4}, slide | {"compress": 0.2, "stride": 0}
    return [
        Method("flow_grpo", {"name": "all_but_last"}, slides=False),
        Method("mixgrpo", slide, aim=0.42),
        Method("flash", flash, "dpm2m", aim=0.36),
        Method("flash_star", frozen, "dpm2m", aim=0.25, slides=False),
        Method("mixgrpo_shared_noise", slide, shared_noise=True),
        Method("flash_shared_noise", flash, "dpm2m", shared_noise=True),
    ]


def forward_equivalents(plan: Plan, group_size: int = 1, shared_noise: bool = False) -> float:
    """Network passes per row of one iteration, for solvers of one call a step; a backward counts as two forwards.

    With shared initial noise the steps before the first noisy one run once per group.
    """
    prefix = plan.first_noisy() if shared_noise else 0
    return prefix / group_size + plan.num_steps - prefix + 3 * plan.num_scored


def num_positions(num_steps: int, window: int) -> int:
    """Window starts of one full slide."""
    return num_steps - SKIP_LAST - window + 1


def count(method: Method, num_steps: int, group_size: int, iterations: range | list[int]) -> float:
    """Forward-equivalents per row, averaged over `iterations`."""
    steps, grid = build("steps", "steps", method.steps), torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    costs = [forward_equivalents(steps(i, grid, torch.arange(1)), group_size, method.shared_noise) for i in iterations]
    return statistics.fmean(costs)


# -- what is timed ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """The shapes of the benchmark; `field` is a checkpoint's name or folder."""

    field: str
    rows: int
    group_size: int
    num_steps: int
    micro_batch: int

    def config(self, method: Method) -> Config:
        """The run that `rlflow train` would make of it."""
        env = {"num_groups": self.rows // self.group_size, "group_size": self.group_size, "rows_per_call": self.rows}
        return parse(
            {
                "policy": {"field": self.field, "num_steps": self.num_steps, "solver": method.solver},
                "steps": method.steps,
                "algorithm": {"micro_batch": self.micro_batch},
                "env": env | {"shared_noise": method.shared_noise},
                "train": {"iterations": 1},
            }
        )


@dataclass(frozen=True)
class PeerSetting:
    """Flow-GRPO with a LoRA of rank 32 on the network in `folder`; `guided`: with guidance and the KL to the base."""

    folder: str
    guided: bool = True
    images: int = 8
    group_size: int = 4
    num_steps: int = 10
    micro_batch: int = 8
    guidance: ClassVar[float] = 4.5
    kl: ClassVar[float] = 0.04

    def config(self, method: Method) -> Config:
        """Of the same iteration by `rlflow train`; the unconditional half is a constant, as in the peer's release."""
        field = {"name": "pretrained", "checkpoint": self.folder, "lora": 32, "max_sequence_length": 128}
        policy: dict[str, Any] = {"field": field, "num_steps": self.num_steps, "precision": "float32"}
        if self.guided:
            policy |= {"guidance": {"name": "cfg", "scale": self.guidance, "detach": True}}
        env = {"num_groups": self.images // self.group_size, "group_size": self.group_size}
        return parse(
            {
                "policy": policy,
                "steps": method.steps,
                "algorithm": {"micro_batch": self.micro_batch, "kl": {"beta": self.kl if self.guided else 0.0}},
                "env": env | {"rows_per_call": self.images},
                "reward": {"weights": {"brightness": 1.0}},
                "train": {"iterations": 1},
            }
        )

    def peer(self) -> tuple[Any, VelocityField]:
        """The script's learner on diffusers' own network with its own LoRA, and the field that it calls."""
        from diffusers import SD3Transformer2DModel

        script, field = _load(SCRIPT), pretrained(self.folder, max_sequence_length=128)
        net = SD3Transformer2DModel.from_pretrained(self.folder, subfolder="transformer").eval()
        script.add_lora(net, 32, 64, field.adapter.modules)
        field.adapter.pipe.transformer = field.transformer = net
        backbone = script.Backbone(field, False, self.guidance if self.guided else 1.0, detach=True)
        kl, size = self.kl if self.guided else 0.0, self.group_size
        settings = script.Settings(num_steps=self.num_steps, group_size=size, kl=kl, rows=self.micro_batch)
        return script.FlowGRPO(backbone, lambda images, _: images.mean((1, 2, 3)), settings), field


class Real:
    """Iterations through the collector and the learner, as in training."""

    def __init__(self, setting: Setting | PeerSetting, method: Method) -> None:
        self.parts = make_parts(setting.config(method))
        self.precision = PRECISION[setting.config(method).policy.precision]
        self.first_log_ratio = 0.0

    def __call__(self, iteration: int) -> None:
        """Rollout, reward, update."""
        metrics = self.parts.algorithm.update(self.parts.collector.collect(iteration))
        self.first_log_ratio = max(self.first_log_ratio, metrics.get("policy/first_log_ratio_max", 0.0))

    def bare(self, iteration: int) -> Bare:
        """The network passes of one iteration, which it runs."""
        field = self.parts.policy.field.unguided
        passes = listen(field, lambda: self(iteration))
        return Bare(field, self.precision, passes, field.tokenize(scenes.train_captions()[:1]))


def listen(field: VelocityField, run: Callable[[], None]) -> list[tuple[int, bool]]:
    """(rows, with a backward) of every network pass of `run`."""
    seen: list[tuple[int, bool]] = []

    def note(_module: Any, inputs: tuple[Tensor, ...]) -> None:
        seen.append((len(inputs[0]), torch.is_grad_enabled()))

    hook = field.register_forward_pre_hook(note)
    run()
    hook.remove()
    return seen


class Bare:
    """Network passes at given shapes and precision, all of one observation (1, ...), and nothing else."""

    def __init__(
        self, field: VelocityField, precision: torch.dtype | None, passes: list[tuple[int, bool]], obs: Tree
    ) -> None:
        self.field, self.precision, self.passes = field, precision, passes
        sizes, place = {n for n, _ in passes}, next(field.parameters()).device
        self.obs = tree_map(lambda v: v.to(place), obs)
        self.x = {n: torch.randn(n, *self.field.event_shape, device=place) for n in sizes}
        self.t = {n: torch.full((n,), 0.3, device=place) for n in sizes}
        self.rows = {n: torch.zeros(n, dtype=torch.long, device=place) for n in sizes}

    def __call__(self, iteration: int) -> None:
        for n, backward in self.passes:
            half = torch.autocast(self.t[n].device.type, self.precision, self.precision is not None)
            with torch.set_grad_enabled(backward), half:
                cond = self.field.encode(self.obs).index(self.rows[n])
                v = self.field(self.x[n], self.t[n], torch.zeros_like(self.t[n]), cond)
            if backward:
                torch.autograd.backward(v, self.x[n])
        for p in self.field.parameters():
            p.grad = None


class SingleFile:
    """Iterations of scripts/single_file_flow_grpo.py on the same model, shapes and reward."""

    def __init__(self, real: Real, setting: Setting) -> None:
        script = _load(SCRIPT)
        settings = script.Settings(
            num_steps=setting.num_steps, group_size=setting.group_size, rows=setting.micro_batch, std_of="epoch"
        )
        net = DiT(**real.parts.policy.field.args)
        net.load_state_dict(real.parts.policy.field.state_dict())
        self.learner = script.FlowGRPO(script.Backbone(net, real.precision is not None), script.shapes_reward, settings)
        self.captions = scenes.train_captions()[: setting.rows // setting.group_size]

    def __call__(self, iteration: int) -> None:
        self.learner.iterate(self.captions)


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# -- the benchmark ------------------------------------------------------------------------------------------------


def bench_flow_grpo(
    guided: bool = True, repeats: int = 3, images: int = 8, num_steps: int = 10, micro_batch: int = 8
) -> dict[str, float]:
    """CPU seconds (medians) of an iteration of ours, of the single-file script's, and of the passes of each run bare.

    Interleaved, after a first turn that warms up; needs a checkout, where the script is. `ratio` is the median over
    turns of ours over the peer's; a `..._ratio` how many times as fast as that ours is.
    """
    times, only = Times(), methods(4)[0]
    with tempfile.TemporaryDirectory() as folder:
        setting = PeerSetting(make_peers_size(folder), guided, images, images // 2, num_steps, micro_batch)
        ours, (peer, field) = Real(setting, only), setting.peer()
        captions, obs = scenes.train_captions()[:2], field.tokenize(scenes.train_captions()[:1])
        bare = ours.bare(0)
        peer_bare = Bare(field, None, listen(field, lambda: peer.iterate(captions)), obs)
        runs: dict[str, Callable[[int], None]] = {"ours": ours, "bare": bare, "peer_bare": peer_bare}
        runs["peer"] = lambda _: peer.iterate(captions)
        for turn in range(repeats + 1):
            for name, fn in runs.items():
                (times if turn else Times()).run(name, fn, turn)
    out = {f"{name}_cpu_s": times.median(name, "cpu") for name in runs}
    spent = {name: [seconds.cpu for seconds in times.samples[name]] for name in runs}

    def times_as_fast(name: str) -> float:
        return statistics.median(b / a for a, b in zip(spent["ours"], spent[name], strict=True))

    out |= {f"{name}_ratio": times_as_fast(name) for name in ("bare", "peer_bare")}
    out |= {"speed_ratio": times_as_fast("peer")}
    return out | {"ratio": 1 / out["speed_ratio"], "first_log_ratio_max": ours.first_log_ratio}


def make_peers_size(folder: str) -> str:
    """A random Stable Diffusion 3 of width 128, 6 blocks, 256 tokens of a picture and 205 of its text."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    make_tiny("sd3", folder)
    sizes = {"num_layers": 6, "attention_head_dim": 32, "num_attention_heads": 4, "caption_projection_dim": 128}
    sizes |= {"sample_size": 32, "patch_size": 2, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 32}
    text = {"joint_attention_dim": TEXT_WIDTH, "pooled_projection_dim": 2 * POOLED, "qk_norm": "rms_norm"}
    moved(SD3Transformer2DModel(**sizes, **text), 0.02).save_pretrained(f"{folder}/transformer")
    return folder


def _even(total: int, wanted: int) -> list[int]:
    """`wanted` of 0 .. total - 1, evenly spread and symmetric about the middle."""
    if wanted == 1:
        return [(total - 1) // 2]
    return torch.linspace(0, total - 1, min(wanted, total), dtype=torch.float64).round().long().tolist()


def bench_t2i(
    iterations: int = 10,
    rows: int = 24,
    num_steps: int = 25,
    window: int = 4,
    micro_batch: int | None = None,
    repeats: int = 5,
    threads: int | None = None,
    group_size: int = 12,
) -> dict[str, Any]:
    """Time the methods at `iterations` positions of the sliding window, and Flow-GRPO `repeats` times in between.

    `micro_batch` is `rows` unless given. Under "methods": `relative` is the time of a Flow-GRPO iteration that one
    takes, `count` the same in forward-equivalents. ValueError unless `rows` are whole groups.
    """
    if rows % group_size:
        raise ValueError(f"rows={rows} must be a multiple of group_size={group_size}")
    field = "shapes"
    with tempfile.TemporaryDirectory() as folder, num_threads(threads):
        if field not in embedded():
            field = str(save_field(DiT(scenes.VOCAB), Path(folder) / "random"))
        setting = Setting(field, rows, group_size, num_steps, micro_batch or rows)
        return _bench(setting, methods(window), _even(num_positions(num_steps, window), iterations), repeats)


def _bench(setting: Setting, chosen: list[Method], positions: list[int], repeats: int) -> dict[str, Any]:
    reals = {m.name: Real(setting, m) for m in chosen}
    flow = reals["flow_grpo"]
    fixed: dict[str, Callable[[int], None]] = {"flow_grpo": flow, "bare": flow.bare(0)}
    if SCRIPT.is_file():
        fixed["single_file"] = SingleFile(flow, setting)
    fixed |= {m.name: reals[m.name] for m in chosen if not m.slides}
    sliding = {m.name: reals[m.name] for m in chosen if m.slides}
    for name, fn in (fixed | sliding).items():
        if name != "flow_grpo":  # it has run once, to be listened to
            fn(0)
    times = Times()
    anchors = [positions[i] for i in _even(len(positions), repeats)]
    for position in positions:
        for name, fn in (fixed | sliding if position in anchors else sliding).items():
            times.run(name, fn, position)
    return _result(setting, chosen, positions, times) | {
        "first_log_ratio_max": max(r.first_log_ratio for r in reals.values())
    }


def _result(setting: Setting, chosen: list[Method], positions: list[int], times: Times) -> dict[str, Any]:
    median, fastest = statistics.median, min
    out: dict[str, Any] = {
        "s_per_iteration": times.median("flow_grpo"),
        "bare_s": times.median("bare"),
        "overhead": times.ratio("flow_grpo", "bare", median),
        "overhead_min": times.ratio("flow_grpo", "bare", fastest),
        "overhead_cpu": times.ratio("flow_grpo", "bare", median, "cpu"),
        "network_share": times.ratio("bare", "flow_grpo", median, "cpu"),
        "images_per_s": setting.rows / times.median("flow_grpo"),
    }
    if "single_file" in times.samples:
        out["single_file_s"] = times.median("single_file")
        out["single_file_ratio"] = times.ratio("flow_grpo", "single_file", median)
        out["single_file_ratio_cpu"] = times.ratio("flow_grpo", "single_file", median, "cpu")
    whole = count(chosen[0], setting.num_steps, setting.group_size, positions)
    out["methods"] = {m.name: _method(m, setting, positions, times, whole) for m in chosen}
    shapes = {"rows": setting.rows, "group_size": setting.group_size, "num_steps": setting.num_steps}
    out["setting"] = shapes | {
        "micro_batch": setting.micro_batch,
        "field": "shapes" if setting.field == "shapes" else "random",
        "window_positions": positions,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    return out


def _method(method: Method, setting: Setting, positions: list[int], times: Times, whole: float) -> dict[str, Any]:
    """A method's cost beside Flow-GRPO's, by time and by count, averaged over the positions that were timed.

    Wall seconds: the median per forward-equivalent times the mean count, so that one sample spoilt by other work on
    the machine does not decide. CPU seconds: plain means.
    """
    ran = positions if method.slides else positions[: len(times.samples[method.name])]
    costs = [count(method, setting.num_steps, setting.group_size, [p]) for p in ran]
    mean_cost = statistics.fmean(costs)
    samples = zip(times.samples[method.name], costs, strict=True)
    seconds = mean_cost * statistics.median(sample.wall / cost for sample, cost in samples)
    relative_cpu = times.ratio(method.name, "flow_grpo", statistics.fmean, "cpu")
    return {
        "s_per_iteration": seconds,
        "forward_equivalents": mean_cost,
        "count": mean_cost / whole,
        "relative": seconds / times.median("flow_grpo"),
        "relative_cpu": relative_cpu,
        "over_count_cpu": relative_cpu / (mean_cost / whole),
        "aim": method.aim,
    }
