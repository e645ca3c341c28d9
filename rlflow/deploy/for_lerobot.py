"""A run's policy as a folder that plain LeRobot opens, evaluates and deploys."""

from __future__ import annotations

from pathlib import Path

from rlflow.deploy.runs import is_run, load, read_run_config
from rlflow.models.lerobot.export import save_policy


def export_policy(
    run: str | Path, out: str | Path, checkpoint: str = "last", weights: str | None = None, trust_code: bool = False
) -> Path:
    """Write the policy that the run's evaluations judge; its config says how many actions of a chunk are carried out
    and how many denoising steps make them. ValueError for another kind of policy."""
    if not is_run(run):
        raise ValueError(f"{run} is no run folder: export a run of a recipe whose policy.field is lerobot")
    config = read_run_config(run, trust_code)
    policy = load(run, checkpoint=checkpoint, weights=weights, trust_code=trust_code)
    chunk = int(config.env.settings.get("chunk", 1))
    return save_policy(policy.field.unguided, out, n_action_steps=chunk, num_steps=policy.num_steps)
