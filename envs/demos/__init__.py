"""Demonstrations: episodes on disk, and who plays them."""
