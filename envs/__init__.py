"""Environments: batched tensors in, Step out (joint A of the design)."""

if __name__ != "rlflow.envs":
    raise ImportError("this folder installs as rlflow.envs: `pip install -e .` and import that")
