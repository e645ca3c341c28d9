"""Learners: likelihoods, advantages, losses, rollouts, algorithms."""
