"""Families of text-to-image checkpoints, a file each: what their pipelines do around the network."""
