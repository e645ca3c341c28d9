"""Configs of earlier versions: what is refused in a recipe, with its new spelling, and read from a saved run."""

from __future__ import annotations

from typing import Any

MOVED = {
    "clip_low": "low",
    "clip_high": "high",
    "clip_base": "base",
    "denoising_gamma": "gamma",
    "target_kl": "target_kl",
}
"""Settings of `algorithm` that are now of its objective."""
CHOSEN = {"guard": "guard", "nft": "{name: nft, ...}", "trust_region": "clip, spo or aspo"}
"""Settings of `algorithm` that named what is now the objective."""
USUAL = {"clip_high": None, "target_kl": None, "clip_base": None, "denoising_gamma": 1.0}
"""Values that said nothing."""


def refuse(algorithm: dict[str, Any]) -> None:
    """ValueError for settings of a policy gradient's section that have another place now."""
    moved = [f"algorithm.{old}: is now algorithm.objective.{new}" for old, new in MOVED.items() if old in algorithm]
    moved += [f"algorithm.{old}: set algorithm.objective to {new}" for old, new in CHOSEN.items() if old in algorithm]
    if moved:
        raise ValueError("\n".join(moved))


def translate(values: dict[str, Any]) -> dict[str, Any]:
    """The config of a saved run in today's spelling; one of today comes back as it is.

    A KL that was of each column is now of the ratio that is clipped: of a joint one, the sum of K steps. An n_step
    of 1 is what there is now.
    """
    algorithm = dict(values.get("algorithm") or {})
    if algorithm.get("name") == "sac" and algorithm.get("n_step") == 1:
        del algorithm["n_step"]
        return values | {"algorithm": algorithm}
    if algorithm.get("name", "policy_gradient") != "policy_gradient" or "objective" in algorithm:
        return values
    old = {name: algorithm.pop(name) for name in (*MOVED, *CHOSEN) if name in algorithm}
    if old.get("nft") is not None:
        algorithm["objective"] = {"name": "nft", **old["nft"]}
        return values | {"algorithm": algorithm}
    name = "guard" if old.get("guard") else old.get("trust_region", "clip")
    kept = {MOVED[key]: value for key, value in old.items() if key in MOVED and USUAL.get(key, ...) != value}
    if "target_kl" in kept and _joint_steps(values.get("likelihood")):
        kept["target_kl"] *= values["policy"]["num_steps"]
    algorithm["objective"] = {"name": name, **kept}
    return values | {"algorithm": algorithm}


def _joint_steps(likelihood: Any) -> bool:
    return isinstance(likelihood, dict) and likelihood.get("name") == "chain" and bool(likelihood.get("joint"))
