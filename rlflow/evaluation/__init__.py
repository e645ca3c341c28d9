"""Evaluation by the deployment sampler: pictures of held-out prompts, episodes of held-out starts, films of them."""
