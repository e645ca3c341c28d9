"""Full environment steps per second as JSON, as in `rlflow bench robot` but at any size; and MuJoCo Warp's.

    python scripts/bench_envs.py --task hopper --envs 1 16 64 --seconds 2 --repeats 3
    python scripts/bench_envs.py --backend warp --task hopper halfcheetah --envs 1024 4096 16384

With `--backend warp` three play on one device: `ours`, `with_policy` (a flow policy of 256 x 3 and 4 denoising steps
in the loop) and `physics` (the substeps alone, without resets).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from typing import Any

import torch

from rlflow.bench.envs import TASKS, Player, bench_envs, compare, random_play
from rlflow.bench.robot import acting, flow_policy


def bench_warp(name: str, num_envs: int, chunk: int, seconds: float, repeats: int) -> dict[str, Any]:
    """One task at one number of worlds."""
    from rlflow.envs.sim import SimEnv
    from rlflow.envs.simulators.warp import WarpSim

    task = TASKS[name]
    env, acted, alone = (SimEnv(WarpSim(task, num_envs), chunk) for _ in range(3))

    def physics() -> torch.Tensor:
        alone.sim.advance(torch.zeros(num_envs, *alone.sim.low.shape, device=alone.device))
        return torch.full((), num_envs, device=alone.device)

    policy = flow_policy(acted, width=256, depth=3, num_steps=4)
    players: dict[str, Player] = {"ours": random_play(env), "with_policy": acting(acted, policy), "physics": physics}
    rows = compare(players, seconds, repeats)
    device = torch.cuda.get_device_name() if env.device.type == "cuda" else "cpu"
    overflow = [e.sim.overflow for e in (env, acted, alone)]
    return {"task": task.name, "num_envs": num_envs, "chunk": chunk, "device": device, "overflow": any(overflow)} | rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, nargs="+", default=["hopper"])
    parser.add_argument("--envs", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--chunk", type=int, default=4)
    parser.add_argument("--backend", choices=["mujoco", "warp"], default="mujoco")
    parser.add_argument("--threads", type=int, default=0, help="of mujoco; 0: all CPUs")
    parser.add_argument("--seconds", type=float, default=2.0, help="wall seconds per measurement")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        bench_warp(name, num_envs, args.chunk, args.seconds, args.repeats)
        if args.backend == "warp"
        else bench_envs(name, num_envs, args.chunk, args.threads, args.seconds, args.repeats)
        for name in args.task
        for num_envs in args.envs
    ]
    host = {"cpus": os.cpu_count(), "load_1min": os.getloadavg()[0], "machine": platform.processor()}
    print(json.dumps({"host": host, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
