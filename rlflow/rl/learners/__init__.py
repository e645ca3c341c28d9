"""Learners of one rollout: the policy gradient of any objective, and gradients of rewards; parts of theirs."""
