"""Benchmarks: what iterations, environments and actions cost, beside bare network passes and beside peers."""
