"""Objectives: losses of recorded evidence, a file each; base.py says what one must answer."""
