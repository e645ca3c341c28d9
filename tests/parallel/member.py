"""Trains cases of a file in one group of processes: those of torchrun, or forks of this one, its imports behind them.

python -m tests.parallel.member FOLDER NAME FORKS CASE ... reads FOLDER/cases.json and writes FOLDER/NAME/CASE.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed.fsdp  # loads the compiler: before the processes part, and once
from torch import Tensor

from rlflow.parallel import dist
from rlflow.rewards.colour import brightness
from rlflow.train.trainer import Trainer


def masked(images: Tensor, hide: list[int]) -> Tensor:
    """A reward that has no score for the prompts that say so."""
    return torch.where(torch.tensor(hide) > 0, torch.nan, brightness(images))


def stop_on_the_last_rank(trainer: Trainer, iteration: int, metrics: dict[str, float]) -> None:
    if dist.rank() == dist.world() - 1:
        trainer.stop()


def run(root: Path, folder: str, names: list[str]) -> None:
    """Train the cases of these names, or all; a run that is there already goes on."""
    cases = json.loads((root / "cases.json").read_text())
    for name in names or cases:
        path = root / folder / name
        stops = not path.exists() and name in ("one rank stopped", "simulator, resumed")
        more = {"callbacks": [stop_on_the_last_rank] if stops else [], "resume": "last" if path.exists() else None}
        Trainer(cases[name], path, trust_code=True, quiet=True, **more).fit()
        if stops and name.endswith("resumed"):
            run(root, folder, [name])


def fork(processes: int) -> None:
    """Go on as each of that many processes, named as torchrun names them; the first one waits for them and ends.

    One that fails ends all: the others may wait for it for ever.
    """
    children = set()
    for rank in range(processes):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        if (pid := os.fork()) == 0:
            return
        children.add(pid)
    while children:
        pid, status = os.wait()
        children.remove(pid)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if (processes := int(sys.argv[3])) > 0:
        fork(processes)
    try:
        run(Path(sys.argv[1]), sys.argv[2], sys.argv[4:])
        dist.stop()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
