"""What an iteration costs: against its network passes run bare, against the single-file script, method by method.

Everything is timed interleaved in one process, so that a busy machine slows all alike, by the wall clock and by the CPU
time of the process. Sampling, scoring and the script run passes of the same number of rows: a pass of few rows costs
more per row, and no method shall gain by that.
`bench_flow_grpo`: a LoRA on a Stable Diffusion 3 of peers' size beside the script on diffusers' own network.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlflow.bench.iterations import SCRIPT, PeerSetting, Real, Setting, SingleFile
from rlflow.bench.methods import Method, count, methods, num_positions
from rlflow.bench.passes import Bare, listen
from rlflow.bench.stopwatch import Times, num_threads
from rlflow.envs.captions import scenes
from rlflow.models.dit import DiT
from rlflow.models.io import embedded, save_field
from rlflow.models.pretrained.tiny import POOLED, TEXT_WIDTH, make_tiny
from rlflow.models.pretrained.tiny_parts import moved


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
