"""Likelihoods: evidence recorded while sampling, scored again at update time."""
