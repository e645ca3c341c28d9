"""All that an exact resume needs of a Trainer: given, and taken up again."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlflow.parallel import dist, shards
from rlflow.train.checkpoint import deal, pack, rng_state, set_rng_state, unpack
from rlflow.train.seal import taken_up

if TYPE_CHECKING:
    from rlflow.train.trainer import Trainer


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Complete on rank 0, and every process has to ask for it at once."""
    episodes = dist.gather(pack(trainer.collector.state_dict()))  # packed, it is on the CPU
    return {
        "policy": shards.whole_state(trainer.policy),
        "weight_sets": trainer.policy.weights.state_dict(),
        "algorithm": trainer.algorithm.state_dict(),
        "collector": [unpack(*share) for share in episodes],
        "rng": rng_state(),
        "trainer": {
            "iteration": trainer.iteration,
            "seconds": trainer.seconds,
            "network_rows": trainer.network_rows,
            "samples": trainer.samples,
            "last_eval": {k: v for k, v in trainer.last_eval.items() if math.isfinite(v)},
            "evaluated": trainer.evaluated,
            "headline": trainer.headline,
            "stops": trainer.stops.state_dict(),
        },
        "evaluator": trainer.evaluator.state_dict(),
    }


def take_up(trainer: Trainer, path: Path, state: dict[str, Any]) -> None:
    """Of the checkpoint in `path`, all but its iteration; an error names the part that does not fit."""
    with taken_up(path, "policy"):
        shards.load_whole_state(trainer.policy, state["policy"])
    with taken_up(path, "weight_sets"):
        trainer.policy.weights.load_state_dict(state["weight_sets"])
    with taken_up(path, "algorithm"):
        trainer.algorithm.load_state_dict(state["algorithm"])
    with taken_up(path, "collector"):
        _take_up_episodes(trainer, state["collector"])
    with taken_up(path, "rng"):
        set_rng_state(state["rng"])
    with taken_up(path, "trainer"):
        mine = state["trainer"]
        trainer.seconds = mine["seconds"]
        trainer.network_rows, trainer.samples = mine["network_rows"], mine["samples"]
        trainer.last_eval, trainer.evaluated, trainer.headline = mine["last_eval"], mine["evaluated"], mine["headline"]
        trainer.stops.load_state_dict(mine.get("stops", {}))
    with taken_up(path, "evaluator"):
        trainer.evaluator.load_state_dict(state["evaluator"])


def _take_up_episodes(trainer: Trainer, episodes: list[Any]) -> None:
    """Go on with the episodes under way, of which every process has saved its own."""
    try:
        mine = deal(episodes, trainer.groups)
    except ValueError as error:
        if dist.rank() == 0:
            warnings.warn(f"new episodes are begun: {error}", stacklevel=2)
        return
    trainer.collector.load_state_dict(mine)
