"""Rewards that pretrained networks give: CLIP and what stands on it, preference models, detectors."""
