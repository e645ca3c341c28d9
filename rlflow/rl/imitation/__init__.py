"""Rewards learnt from demonstrations: density ratios, and the environment that pays them."""
