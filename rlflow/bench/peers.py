"""What is timed beside peers: every row ours and theirs in turns, in one process or in processes of their own.

A figure is the median of the turns in CPU seconds, a ratio the median of the ratios inside a turn: above 1 ours is
faster, or smaller. The machine may be shared; its load is told. A peer that is not installed is named, not timed.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rlflow.bench.stopwatch import num_threads

MISSING = "not installed: pip install 'rlflow-torch[bench]'"
PACKAGES = ("torch", "mujoco", "gymnasium", "stable-baselines3", "sbx-rl", "envpool", "numpy")


@dataclass(frozen=True)
class Line:
    """One comparison: ours and theirs in `unit`, and how many times better ours is; None where there is no peer."""

    row: str
    what: str
    peer: str
    unit: str
    ours: float | None = None
    theirs: float | None = None
    ratio: float | None = None
    note: str = ""


Contender = Callable[[], float]
"""Does its work once; how many units it did."""


def iterations(run: Callable[[int], None]) -> Contender:
    """One iteration of `run` at a time, by its number."""
    count = itertools.count()

    def once() -> float:
        run(next(count))
        return 1.0

    return once


def in_turns(contenders: dict[str, Contender], repeats: int) -> dict[str, list[float]]:
    """Units per CPU second of each, turn by turn; a first turn warms up."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            begin = time.process_time()
            units = run()
            spent = max(time.process_time() - begin, 1e-9)
            if turn:
                rates[name].append(units / spent)
    return rates


def lines(row: str, what: str, unit: str, rates: dict[str, list[float]]) -> list[Line]:
    """The first against each of the others."""
    (_, mine), *others = rates.items()
    return [
        Line(row, what, name, unit, statistics.median(mine), statistics.median(their), _ratio(mine, their))
        for name, their in others
    ]


def _ratio(mine: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


# -- rows ---------------------------------------------------------------------------------------------------------


def environments(repeats: int, seconds: float = 0.1) -> list[Line]:
    """Steps with random actions: one environment and 64, against Gymnasium's, EnvPool's and the physics alone."""
    import gymnasium

    from rlflow.bench.envs import TASKS, physics, pool_play, random_play, rate, vector_play
    from rlflow.envs.sim import SimEnv
    from rlflow.envs.simulators import mujoco

    found = []
    for name in ("hopper", "halfcheetah", "ant"):
        task = TASKS[name]
        for num, chunk in ((1, 1), (1, 4), (64, 4)):
            makers = [lambda task=task: gymnasium.make(task.name)] * num
            with mujoco.warnings_kept():
                theirs = gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)
            players = {
                "ours": random_play(SimEnv(mujoco.MujocoSim(task, num, 1), chunk)),
                "gymnasium SyncVectorEnv": vector_play(theirs),
                "bare physics": physics(task, num, 1),
            }
            try:
                players["EnvPool"] = pool_play(task.name, num)
            except ModuleNotFoundError:
                found.append(Line("environments", f"{task.name}, {num}", "EnvPool", "steps/s", note=MISSING))
            rates: dict[str, list[float]] = {player: [] for player in players}
            for _ in range(repeats):
                for player, step in players.items():
                    rates[player].append(rate(step, seconds)[1])
            found += lines("environments", f"{task.name}, {num}, chunks of {chunk}", "steps/s", rates)
            theirs.close()
    return found


def sac(repeats: int, num: int = 10) -> list[Line]:
    """Optimiser steps, 256 x 256, batch 256."""
    from rlflow.bench import sac as learners

    peers, found = {}, []
    for library in ("stable_baselines3", "sbx"):
        try:
            peers[library] = learners.theirs(library)
        except ModuleNotFoundError:
            found.append(Line("sac", "SAC, Gaussian actor", library, "updates/s", note=MISSING))
    mine = {name: learners.ours(name) for name in learners.OURS}

    def turn(steps: Callable[[int], Any]) -> Contender:
        def run() -> float:
            steps(num)
            return num

        return run

    rates = in_turns({name: turn(steps) for name, steps in (mine | peers).items()}, repeats)
    for name in mine:
        some = {name: rates[name]} | {library: rates[library] for library in peers}
        found += lines("sac", learners.ABOUT[name], "updates/s", some)
    return found


def reinflow(repeats: int) -> list[Line]:
    """An iteration of the recipe's size beside a plain loop, which scores every decision tenfold as the release."""
    from rlflow.bench.peer import PlainLoop
    from rlflow.bench.robot import ReinFlow
    from rlflow.bench.size import Size

    size = Size(num_chunks=25)
    mine, peer = ReinFlow(size, 1), PlainLoop(size)
    rates = in_turns({"ours": iterations(mine), "plain loop": iterations(peer)}, repeats)
    peer.close()
    return lines(
        "reinflow", f"{size.num_envs} x {size.num_chunks} chunks, {size.width} x {size.depth}", "iter/s", rates
    )


def images(repeats: int) -> list[Line]:
    """A Flow-GRPO iteration of the shipped image model beside the single file's, and its network passes run bare."""
    from rlflow.bench.iterations import SCRIPT, Real, Setting, SingleFile
    from rlflow.bench.methods import methods

    setting = Setting("shapes", rows=12, group_size=12, num_steps=6, micro_batch=12)
    real = Real(setting, methods(window=2)[0])
    contenders = {"ours": iterations(real), "network passes run bare": iterations(real.bare(0))}
    if SCRIPT.is_file():
        contenders["single-file loop"] = iterations(SingleFile(real, setting))
    return lines("images", "Flow-GRPO, 12 images, K 6, plain", "iter/s", in_turns(contenders, repeats))


def flow_grpo(repeats: int) -> list[Line]:
    """Guidance, KL and a LoRA on a small Stable Diffusion 3 beside the single file's loop, and the passes run bare."""
    from rlflow.bench.images import bench_flow_grpo
    from rlflow.bench.iterations import SCRIPT

    what = "Flow-GRPO, SD3 of peers' size, 4 images, K 5, CFG + KL + LoRA"
    if not SCRIPT.is_file():
        return [Line("flow_grpo", what, "single-file loop", "iter/s", note="needs a checkout")]
    told = bench_flow_grpo(repeats=max(1, repeats // 2), images=4, num_steps=5)
    ours = 1 / told["ours_cpu_s"]
    return [
        Line("flow_grpo", what, peer, "iter/s", ours, 1 / told[f"{name}_cpu_s"], told[ratio])
        for peer, name, ratio in (
            ("single-file loop", "peer", "speed_ratio"),
            ("its passes run bare", "bare", "bare_ratio"),
            ("the loop's passes run bare", "peer_bare", "peer_bare_ratio"),
        )
    ]


def files(repeats: int) -> list[Line]:
    """A prompt file of 10^6 lines and metrics of 10^5 rows, in processes of their own, beside lists of dicts."""
    found = []
    for row, what in (("prompts", "10^6 lines"), ("reports", "10^5 rows of metrics")):
        runs: dict[str, list[dict[str, float]]] = {"columns": [], "dicts": []}
        for _ in range(max(1, repeats // 3)):
            for kind, told in runs.items():
                command = [sys.executable, "-m", "rlflow.bench.sizes", f"{row}_{kind}", what.split()[0]]
                told.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
        for unit in ("cpu_s", "mib"):
            ours, theirs = ([one[unit] for one in runs[kind]] for kind in ("columns", "dicts"))
            medians = statistics.median(ours), statistics.median(theirs)
            found.append(Line(row, what, "list of dicts", unit, *medians, _ratio(theirs, ours)))
    return found


ROWS: dict[str, Callable[[int], list[Line]]] = {
    "environments": environments,
    "sac": sac,
    "reinflow": reinflow,
    "images": images,
    "flow_grpo": flow_grpo,
    "files": files,
}


def setting() -> dict[str, Any]:
    """The machine, how busy it is, and what was installed."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    load = [round(x, 2) for x in os.getloadavg()]
    return {"cpus": os.cpu_count(), "load": load, "machine": platform.machine(), "packages": packages}


def bench_peers(rows: tuple[str, ...] = tuple(ROWS), repeats: int = 5) -> dict[str, Any]:
    """All lines; about six CPU minutes."""
    before = setting()
    with num_threads(1):
        found = [asdict(line) for row in rows for line in ROWS[row](repeats)]
    return {"lines": found, "setting": before, "load_after": [round(x, 2) for x in os.getloadavg()]}


def table(result: dict[str, Any]) -> str:
    """The lines for a terminal."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"

    rows = [("", "what", "peer", "unit", "ours", "theirs", "ratio")]
    for line in result["lines"]:
        numbers = [number(line[name]) for name in ("ours", "theirs", "ratio")]
        rows.append((line["row"], line["what"], line["peer"], line["unit"], *numbers))
        if line["note"]:
            rows[-1] = (*rows[-1][:4], line["note"], "", "")
    widths = [max(len(row[i]) for row in rows if i < 4 or not row[4].startswith("not")) for i in range(7)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    load, packages = result["setting"]["load"], result["setting"]["packages"]
    told = ", ".join(f"{name} {number}" for name, number in packages.items())
    cpus = result["setting"]["cpus"]
    return "\n".join([*text, f"load of {cpus} CPUs before {load}, after {result['load_after']}; {told}"])
