"""Rewards: plain functions called with the columns their signature names."""

if __name__ != "rlflow.rewards":
    raise ImportError("this folder installs as rlflow.rewards: `pip install -e .` and import that")
